"""Real weights: the similarities that the authors of all-MiniLM-L6-v2 print."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from benchmarks import minilm
from bigmodel_jax.data import packages

# The user's cache, asked before the tests get one of their own: 84 MB are not downloaded for every run.
FOLDER = packages.folder(minilm.PACKAGE) / minilm.MODEL


@pytest.fixture(scope="module")
def folder():
    if not all((FOLDER / name).is_file() for name in minilm.FILES):
        warnings.warn("MiniLM is not tested; `python benchmarks/minilm.py` downloads it", stacklevel=2)
        pytest.skip(f"{minilm.PACKAGE} is not in the cache")
    return FOLDER


def test_published_similarities(folder):
    found = minilm.similarities(folder)
    for pair, value in minilm.PUBLISHED.items():
        assert abs(found[pair] - value) < 1e-3, (pair, found[pair])
    # The control: padding that was not masked, or another pooling, moves them by far more.
    vectors = minilm.embed(folder, minilm.SENTENCES, length=24)
    np.testing.assert_allclose(vectors[0] @ vectors[1], found[0, 1], atol=1e-5)
    assert abs(found[0, 1] - found[0, 2]) > 0.1
