"""Intervals against closed forms: width, coverage by simulation, scipy's own bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures.intervals import bootstrap, difference, draw, ratio


def mean(x):
    statistic = ratio(x)
    return lambda w: {"mean": statistic(w)}


def test_resamples_are_counts_of_draws():
    counts = draw(np.random.default_rng(0), 2000, 10)
    assert (counts.sum(1) == 10).all()
    # Binomial(10, 1/10): mean 1, variance 0.9.
    assert counts.mean() == pytest.approx(1.0) and counts.var() == pytest.approx(0.9, rel=0.03)


def test_width_is_that_of_the_closed_form_and_of_scipy():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    half = 1.959964 * x.std() / 20
    for method in ("percentile", "bca"):
        found = bootstrap(mean(x), 400, resamples=4000, method=method, seed=1)["mean"]
        assert found.estimate == pytest.approx(x.mean())
        assert found.low == pytest.approx(x.mean() - half, abs=0.08 * half)
        assert found.high == pytest.approx(x.mean() + half, abs=0.08 * half)
    skewed = np.exp(np.random.default_rng(2).normal(size=60))
    ours = bootstrap(mean(skewed), 60, resamples=8000, seed=3)["mean"]
    theirs = scipy.stats.bootstrap(
        (skewed,), np.mean, n_resamples=8000, rng=np.random.default_rng(4)
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)
    plain = bootstrap(mean(skewed), 60, resamples=8000, seed=3, method="percentile")["mean"]
    assert ours.high - plain.high > 0.05 * width  # control: the correction does something


def test_coverage_of_a_mean_and_of_groups():
    """300 simulated samples of 20 groups of 5 whose members share most of their value."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 5)
    covered = {"groups": 0, "examples": 0, "t": 0}
    for trial in range(300):
        x = rng.normal(size=20)[groups] + 0.5 * rng.normal(size=100)
        for name, given in (("groups", groups), ("examples", None)):
            found = bootstrap(mean(x), 100, groups=given, resamples=400, seed=trial, method="percentile")["mean"]
            covered[name] += not found.excludes(0.0)
        means = x.reshape(20, 5).mean(1)
        covered["t"] += abs(means.mean()) < scipy.stats.t.ppf(0.975, 19) * means.std(ddof=1) / np.sqrt(20)
    # The t interval is exact. The percentile interval of 20 units is a little short (n - 1, normal tails): 92-93%.
    assert 0.92 < covered["t"] / 300 < 0.98
    assert 0.89 < covered["groups"] / 300 < 0.97
    # Control: examples of one group taken for independent ones.
    assert covered["examples"] / 300 < 0.75


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=500)
    first, second = hard + 0.1 + 0.1 * rng.normal(size=500), hard + 0.1 * rng.normal(size=500)
    paired = difference(mean(first), mean(second), 500, resamples=2000)["mean"]
    half = 1.96 * (first - second).std() / np.sqrt(500)
    assert paired.high - paired.low == pytest.approx(2 * half, rel=0.08) and paired.excludes(0.0)
    alone = [bootstrap(mean(x), 500)["mean"] for x in (first, second)]
    assert alone[1].high > alone[0].low  # control: side by side they overlap


def test_same_seed_same_interval_and_chunks_do_not_matter(monkeypatch):
    x = np.random.default_rng(0).normal(size=50)
    one = bootstrap(mean(x), 50, seed=5)["mean"]
    assert one == bootstrap(mean(x), 50, seed=5)["mean"]
    assert one != bootstrap(mean(x), 50, seed=6)["mean"]
    monkeypatch.setattr("bigmodel_jax.measures.intervals._CHUNK", 50 * 7)
    small = bootstrap(mean(x), 50, seed=5)["mean"]
    assert (small.low, small.high) == pytest.approx((one.low, one.high))


def test_no_interval_where_there_is_none_to_have():
    same = bootstrap(mean(np.ones(30)), 30)["mean"]
    assert same.estimate == 1.0 and same.low is None and "same value" in same.note
    single = bootstrap(mean(np.arange(6.0)), 6, groups=["a"] * 6)["mean"]
    assert single.low is None and single.units == 1
    few = bootstrap(mean(np.arange(6.0)), 6)["mean"]
    assert few.low is not None and "too narrow" in few.note

    def fragile(weights):
        return {"x": np.where(weights[:, 0] > 0, 1.0 + weights[:, 1], np.nan)}

    found = bootstrap(fragile, 30)["x"]
    assert found.low is None and "undefined in" in found.note
    for bad in ({"method": "magic"}, {"level": 1.5}, {"groups": [1, 2]}):
        with pytest.raises(InputError):
            bootstrap(mean(np.ones(3)), 3, **bad)
