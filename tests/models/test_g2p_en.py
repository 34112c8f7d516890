"""Real GRU weights: 50 words of the 1,000 that benchmarks/g2p_en.py compares (results/g2p_en.json)."""

import json
import warnings

import pytest

from benchmarks import g2p_en
from bigmodel_jax.errors import InputError


def test_the_same_phonemes_as_the_numpy_forward_pass():
    try:
        w = g2p_en.weights()
        chosen = g2p_en.words(50)
    except InputError as error:
        warnings.warn(f"the real weights of g2p-en are not tested: {error}", stacklevel=2)
        pytest.skip(str(error))
    expected = [g2p_en.reference(w, word) for word in chosen]
    v = g2p_en.variables(w)
    assert g2p_en.ours(v, chosen) == expected
    assert sum(map(len, expected)) > 250
    # Control: with gates in each other's place the words come out otherwise.
    kernel = v["params"]["decoder"]["layer0"]["forward"]["kernel"]
    v["params"]["decoder"]["layer0"]["forward"]["kernel"] = kernel[::-1]
    assert sum(a != b for a, b in zip(g2p_en.ours(v, chosen), expected, strict=True)) > 25


def test_the_recorded_result_is_of_a_thousand_words():
    row = json.loads(g2p_en.RESULT.read_text())
    assert row["words"] == row["equal"] == 1000
