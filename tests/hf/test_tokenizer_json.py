"""Our tokenizers as tokenizer.json: the library gives the same ids and the same text back."""

from __future__ import annotations

import pathlib

import pytest
from tokenizers import Tokenizer as Engine

from bigmodel_jax.data.tokenizer import Bytes, load_tokenizer, train_tokenizer
from bigmodel_jax.hf import tokenizer_json as form


@pytest.fixture(scope="module")
def text() -> str:
    return pathlib.Path(form.__file__).read_text() + pathlib.Path(__file__).read_text()


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_the_library_gives_the_same_ids(kind, text, tmp_path):
    ours = Bytes() if kind == "bytes" else train_tokenizer([text[:4000]], kind=kind, vocab_size=420)
    files = form.tokenizer_json(ours)
    engine = Engine.from_str(files["tokenizer.json"])
    engine.encode_special_tokens = True  # this file spells some of them
    for sample in [*form.SAMPLES, *text.splitlines(keepends=True), text]:
        ids = ours.encode(sample).tolist()
        assert engine.encode(sample).ids == ids, sample
        assert engine.decode(ids, skip_special_tokens=True) == sample
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    back = load_tokenizer(str(tmp_path))
    assert (back.eos, back.pad, back.mask, back.vocab_size) == (ours.eos, ours.pad, ours.mask, ours.vocab_size)
    assert (back.byte_lengths() == ours.byte_lengths()).all()


def test_unigram_keeps_to_its_own_file(text):
    """Five tabs are two symbols that were given to the training; the library cuts them the other way round."""
    assert form.tokenizer_json(train_tokenizer([text[:4000]], kind="unigram", vocab_size=420)) == {}


def test_a_form_that_differs_is_not_written(monkeypatch):
    """The control: merges in the wrong order give other ids, and that is seen."""
    words = "the cat sat on the mat, then that cat sat there, where a hat and a bat sat\n"
    ours = train_tokenizer([words * 9], vocab_size=327)
    assert form.tokenizer_json(ours)
    right = form._merges
    monkeypatch.setattr(form, "_merges", lambda scores: right(scores)[::-1])
    monkeypatch.setattr(form, "SAMPLES", ("the cat sat there",))
    assert form.tokenizer_json(ours) == {}
