"""Ratios of sums against closed forms and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures import likelihood


def test_tokens_of_windows_are_measured_by_document():
    loss, weight = np.array([8.0, 2.0, 6.0, 1.0]), np.array([4.0, 1.0, 2.0, 1.0])
    options = {"correct": [1, 1, 0, 1], "sizes": [8, 2, 6, 0], "groups": ["b", "b", "a", "c"], "resamples": 200}
    out = likelihood.tokens(loss, weight, **options)
    assert out["tokens"] == 8 and out["intervals"]["nll"]["units"] == 3
    wanted = {"nll": 17 / 8, "perplexity": np.exp(17 / 8), "bits_per_byte": 17 / np.log(2) / 16, "accuracy": 3 / 8}
    assert out["values"] == pytest.approx(wanted)
    # Control: a mean of documents' own perplexities is another number.
    assert np.mean(np.exp([10 / 5, 6 / 2, 1 / 1])) != pytest.approx(wanted["perplexity"], rel=0.05)
    # Exponential of the interval of the mean, up to the correction, which depends only on ranks.
    low = np.exp(out["intervals"]["nll"]["low"])
    assert out["intervals"]["perplexity"]["low"] == pytest.approx(low, rel=0.02)
    with pytest.raises(InputError, match="no token"):
        likelihood.tokens(loss * 0, weight * 0)


def test_numbers_against_scikit_learn():
    rng = np.random.default_rng(0)
    target = rng.normal(size=(50, 2))
    found = target + 0.3 * rng.normal(size=(50, 2))
    out = likelihood.numbers(found, target, resamples=100)
    assert out["values"]["mse"] == pytest.approx(metrics.mean_squared_error(target, found))
    assert out["values"]["mae"] == pytest.approx(metrics.mean_absolute_error(target, found))
    assert out["values"]["r2"] == pytest.approx(metrics.r2_score(target, found))
    same = likelihood.numbers(found, target * 0 + 3.0, resamples=50)
    assert same["values"]["r2"] is None and same["notes"]["r2"]
