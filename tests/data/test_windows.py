"""Windows of documents: every token is a target exactly once, with the context that was promised."""

from __future__ import annotations

import numpy as np
import pytest

from bigmodel_jax.data.prepare import prepare
from bigmodel_jax.data.token_rows import TokenShards
from bigmodel_jax.data.windows import DocumentWindows
from bigmodel_jax.errors import InputError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    texts = [f"document {i}: " + "abcdefghij " * (i % 7) + str(i * i) for i in range(30)]
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)
    prepare(str(folder), str(folder / "out"), tokenizer="bytes", validation_fraction=0.3)
    return TokenShards(str(folder / "out"), "train", 8)


def whole(shards):
    """(targets of each document, eos before it) read straight from the shard."""
    ends = shards.document_ends()[0]
    starts = np.concatenate([[1], ends[:-1]])
    return [shards.take(0, np.arange(a - 1, b)) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (16, 1), (7, 3), (500, 250)])
def test_every_token_is_scored_once_with_its_context(shards, context, stride):
    source = DocumentWindows(shards, context, stride)
    index = np.arange(len(source))
    rows, groups = source.gather(index), source.groups(index)
    for number, document in enumerate(whole(shards)):
        mine = np.flatnonzero(groups == number)
        scored = np.concatenate([rows["targets"][r][rows["weights"][r] > 0] for r in mine])
        np.testing.assert_array_equal(scored, document[1:])
        first = np.flatnonzero(rows["weights"][mine[0]])[0]
        assert first == 0 and rows["tokens"][mine[0], 0] == document[0] == shards.meta["eos"]
        for r in mine[1:]:
            assert np.flatnonzero(rows["weights"][r])[0] == context - stride
        np.testing.assert_array_equal(source.text_tokens(number, 9), document[1:10][: len(document) - 2])
    # Control: counting whole windows would score tokens twice wherever windows overlap.
    twice = (rows["targets"] != shards.meta["pad"]).sum() - rows["weights"].sum()
    assert (twice > 0) == (stride < context and len(source) > source.documents)
    shuffled = np.random.default_rng(0).permutation(len(source))
    np.testing.assert_array_equal(source.gather(shuffled)["tokens"], rows["tokens"][shuffled])


def test_impossible_windows_are_refused(shards):
    for context, stride in ((8, 0), (8, 9)):
        with pytest.raises(InputError, match="stride"):
            DocumentWindows(shards, context, stride)
