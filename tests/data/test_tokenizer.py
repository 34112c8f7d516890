"""Tokenizers lose nothing, agree with their own tables, and come out the same every time."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import sentencepiece

from bigmodel_jax.data.corpus import list_entries, read_documents
from bigmodel_jax.data.tokenizer import Bytes, SentencePiece, load_tokenizer, train_tokenizer
from bigmodel_jax.errors import InputError

ADVERSARIAL = [
    "",
    " ",
    "  leading and trailing  ",
    "\n",
    "\r\n\r\n\t\t\t\t\t\tx\t",
    "a\x00b\x00\x00",
    "\u2581",
    "a\u2581 \u2581\u2581b \u2581",
    "</s><pad><unk><mask><0x41>",
    "\u2585\ufffd\ufeff\u200b\u202e\u0301e",
    "e\u0301 \u00e9 \u212b \uff21",
    "\U0001f600\U0001f469\u200d\U0001f680\U0010ffff",
    "\u6df1\u5ea6\u5b66\u4e60 \u30ab\u30bf\u30ab\u30ca \u0627\u0644",
    "\x7f\x80\x85\xa0\u2028\u2029\u3000",
]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """About 1.3 MB of the standard library, shuffled; the last twenty are held out."""
    texts = [text for _, text in read_documents(list_entries(["stdlib"]))]
    random.Random(0).shuffle(texts)
    return texts[:80]


@pytest.fixture(scope="module", params=["bpe-word", "bpe-phrase", "bpe-script", "unigram-word", "bytes-word"])
def tokenizer(request, documents):
    kind, pieces = request.param.split("-")
    texts = documents[:60] if kind == "bpe" else [text[:4000] for text in documents[:20]]
    return train_tokenizer(texts, kind=kind, vocab_size=1024 if kind == "bpe" else 512, pieces=pieces)


@pytest.fixture(scope="module")
def bpe(documents):
    return train_tokenizer(documents[:60], vocab_size=1024)


def test_held_out_files_round_trip_and_their_bytes_add_up(tokenizer, documents):
    held_out = documents[60:]
    lengths = tokenizer.byte_lengths()
    for text, ids in zip(held_out, tokenizer.encode_batch(held_out), strict=True):
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())
        assert not tokenizer.special()[ids].any()
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("text", ADVERSARIAL, ids=range(len(ADVERSARIAL)))
def test_adversarial_strings_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert not tokenizer.special()[ids].any()


def random_text(source: random.Random) -> str:
    """Up to sixty characters from all of Unicode and from those that tokenizers treat specially."""
    special = " \n\t\r\u2581\u2585\x00<>_a\ufffd\ufeff\u0301"
    draw = [lambda: chr(source.randrange(0xD800)), lambda: chr(source.randrange(0xE000, 0x110000))]
    draw += [lambda: source.choice(special), lambda: source.choice("    \n\n\tdefself.()")] * 2
    return "".join(source.choice(draw)() for _ in range(source.randrange(60)))


def test_any_text_round_trips(tokenizer):
    source = random.Random(0)
    texts = [random_text(source) for _ in range(1000)]
    assert len({c for text in texts for c in text}) > 5000
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text, ascii(text)


def test_default_sentencepiece_settings_fail_the_same_round_trip(documents, tmp_path):
    """The control: what the library does unless told otherwise loses text, and such a model is refused."""
    (tmp_path / "text").write_text("\n".join(documents[:20]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=400,
        model_type="bpe",
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert theirs.decode(theirs.encode("if  x:\n    y")) != "if  x:\n    y"
    with pytest.raises(InputError, match="byte"):
        load_tokenizer(str(tmp_path / "m.model"))


def test_decoding_agrees_with_the_library(bpe, documents):
    """Our table of bytes against SentencePiece's own decoder, on text without its reserved space sign."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=bpe.model)
    for text in documents[60:70]:
        ids = bpe.encode(text)
        assert ids.tolist() == theirs.encode(text)
        assert bpe.decode(ids) == theirs.decode(ids.tolist())


def test_indentation_is_one_token_and_newlines_join(bpe, documents):
    for width in (4, 8, 12, 16):
        pieces = [bpe.decode([i]) for i in bpe.encode("x\n" + " " * width + "return")]
        assert " " * width in pieces or " " * width + "return" in pieces, pieces
    assert len(bpe.encode("\t\t\t\t")) == 1
    size = sum(len(text.encode()) for text in documents[60:])
    tokens = sum(map(len, bpe.encode_batch(documents[60:])))
    assert size / tokens > 2.3, "bytes per token at 1,024 pieces"


def test_pieces_across_words_need_fewer_tokens(documents):
    held_out = documents[60:]
    counts = [
        sum(map(len, train_tokenizer(documents[:60], vocab_size=1024, pieces=pieces).encode_batch(held_out)))
        for pieces in ("phrase", "word", "script")
    ]
    assert counts[0] < counts[1] < counts[2]


def test_training_is_deterministic(bpe, documents):
    assert train_tokenizer(documents[:60], vocab_size=1024).fingerprint == bpe.fingerprint
    assert train_tokenizer(documents[:59], vocab_size=1024).fingerprint != bpe.fingerprint
    short = [text[:3000] for text in documents[:12]]
    small = [train_tokenizer(short, kind="unigram", vocab_size=400).fingerprint for _ in range(2)]
    assert small[0] == small[1]


def test_special_ids(tokenizer):
    special = tokenizer.special()
    ids = {tokenizer.eos, tokenizer.pad, tokenizer.mask}
    assert len(ids) == 3 and all(special[list(ids)])
    assert special.sum() == (3 if tokenizer.kind == "bytes" else 4)
    assert (tokenizer.byte_lengths()[special] == 0).all() and (tokenizer.byte_lengths()[~special] > 0).all()
    assert tokenizer.decode([tokenizer.eos, *tokenizer.encode("ab"), tokenizer.pad]) == "ab"


def words_of(tokenizer, text: str) -> list[str]:
    starts, words = tokenizer.starts_word(), []
    for token in tokenizer.encode(text).tolist():
        if starts[token] or not words:
            words.append(b"")
        words[-1] += tokenizer.table[token]
    return [word.decode() for word in words]


def test_word_starts(bpe):
    text = "the extraordinarily_wonderful _x1 caf\u00e9"
    for tokenizer in (bpe, Bytes()):
        assert words_of(tokenizer, text) == ["the", " extraordinarily_wonderful", " _x1", " caf\u00e9"]
        assert tokenizer.starts_word()[tokenizer.special()].all()
    assert len(bpe.encode(text)) > 4, "the words above are made of several tokens"
    assert words_of(bpe, "x=f(yy)")[-1].startswith(")")
    byte = Bytes()
    assert byte.starts_word()[[ord(" "), ord("("), ord("\n")]].all()
    assert not byte.starts_word()[[ord("a"), ord("_"), ord("7"), 0xE2, 0x96]].any()


def test_special_text_is_not_a_special_id(bpe):
    assert bpe.eos not in bpe.encode("</s>") and bpe.mask not in bpe.encode("<mask>")


def test_long_texts_are_cut_without_loss(bpe, monkeypatch):
    monkeypatch.setattr("bigmodel_jax.data.tokenizer._SEGMENT", 50)
    text = "no newline here " * 20 + "\n" + "x = 1\n" * 30 + "\u2581" * 3
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    whole = SentencePiece(bpe.model)
    monkeypatch.undo()
    assert len(ids) >= len(whole.encode(text)) > len(ids) * 0.8


def test_broken_ids_and_broken_text(bpe):
    assert bpe.decode(bpe.encode("\u00e9")[:1]) == "\ufffd"
    for bad in (-1, bpe.vocab_size):
        with pytest.raises(InputError, match="outside the vocabulary"):
            bpe.decode([bad])
    for tokenizer in (bpe, Bytes()):
        with pytest.raises(InputError, match="lone surrogate at character 1"):
            tokenizer.encode("a\ud800")


def test_settings_that_cannot_be_met():
    with pytest.raises(InputError, match="did you mean 'unigram'"):
        train_tokenizer(["x"], kind="unigramm")
    with pytest.raises(InputError, match="did you mean 'phrase'"):
        train_tokenizer(["x"], pieces="phrases")
    with pytest.raises(InputError, match="too small"):
        train_tokenizer(["x"], vocab_size=100)
    with pytest.raises(InputError, match="more than this text can fill .at most"):
        train_tokenizer(["some short text"], vocab_size=4096)
    with pytest.raises(InputError, match="more than this text can fill"):
        train_tokenizer([], vocab_size=1024)


def test_many_characters_do_not_crowd_out_pieces():
    """Where a corpus has more distinct characters than the vocabulary has room for, rare ones are bytes."""
    random_han = random.Random(0)
    texts = ["".join(chr(0x4E00 + random_han.randrange(3000)) for _ in range(200)) for _ in range(100)]
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    assert tokenizer.vocab_size == 1024 and tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert tokenizer.starts_word()[[i for i, p in enumerate(tokenizer.table) if p == texts[0][0].encode()]].all()


def test_save_and_load(tmp_path, bpe):
    for tokenizer in (bpe, Bytes()):
        name = tokenizer.save(str(tmp_path))
        meta = {"tokenizer": name, "tokenizer_fingerprint": tokenizer.fingerprint}
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        loaded = load_tokenizer(str(tmp_path))
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.vocab_size == tokenizer.vocab_size
        np.testing.assert_array_equal(loaded.encode("def f(x):\n"), tokenizer.encode("def f(x):\n"))
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "tokenizer.model", "tokenizer_fingerprint": "0"}))
    with pytest.raises(InputError, match="fingerprint"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="cannot read"):
        load_tokenizer(str(tmp_path / "absent"))
