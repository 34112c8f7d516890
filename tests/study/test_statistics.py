"""Statistics of seeds: simulation, scipy, statsmodels, closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures.intervals import bootstrap
from bigmodel_jax.study import statistics
from bigmodel_jax.study.statistics import gains, hedges_g, holm, judge, paired, power, rank_sum, seeds_needed, student

INF = math.inf


def pair(values, margin=0.0):
    return paired(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0), "max", margin)


@pytest.fixture
def quick(monkeypatch):
    """Leave out of `paired` and `judge` what a simulation does not look at."""
    monkeypatch.setattr(statistics, "resampled", lambda values, level=0.95: student(values, level))
    monkeypatch.setattr(statistics, "sign_flips", lambda scores: 1.0)
    monkeypatch.setattr(statistics, "seeds_needed", lambda *a, **k: None)
    monkeypatch.setattr(statistics, "detectable", lambda *a, **k: None)


def within(count, trials, share, sigmas=3.5):
    """Whether a binomial count is as expected, within the error of the simulation."""
    return abs(count - share * trials) < sigmas * math.sqrt(trials * share * (1 - share))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_t_intervals_cover_as_often_as_they_say(n):
    x = np.random.default_rng(n).normal(2.0, 0.3, size=(6000, n))
    for level in (0.8, 0.95):
        covered = sum(not student(row, level).excludes(2.0) for row in x)
        assert within(covered, len(x), level)
    # Control: the normal quantile in place of Student's.
    half = 1.959964 * x.std(1, ddof=1) / math.sqrt(n)
    assert not within(np.sum(abs(x.mean(1) - 2.0) <= half), len(x), 0.95)


@pytest.mark.parametrize("n", [5, 10, 20])
def test_bootstrap_intervals_of_few_seeds_cover(n, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)
    x = np.random.default_rng(n).normal(size=(1200, n))
    covered = sum(not statistics.resampled(row).excludes(0.0) for row in x)
    # Resamples of 5 values stay within the values, whose range holds the mean in 1 - 2 / 2^5 = 93.75% of samples.
    assert within(covered, len(x), 0.932 if n == 5 else 0.95)
    if n == 5:  # control: the plain percentile interval is far too narrow
        plain = 0
        for row in x:
            narrow = bootstrap(lambda w, row=row: {"m": w @ row / n}, n, resamples=500, method="percentile")["m"]
            plain += not narrow.excludes(0.0)
        assert 0.75 < plain / len(x) < 0.88


def test_p_values_are_scipys():
    rng = np.random.default_rng(1)
    for n in (2, 5, 8, 12):
        x = rng.normal(0.4, 1.0, size=n)
        found = pair(x, margin=0.1)
        assert found.p == pytest.approx(scipy.stats.ttest_1samp(x, 0.1).pvalue, rel=1e-9)
        assert found.p_ranks == pytest.approx(scipy.stats.wilcoxon(x - 0.1, method="exact").pvalue, rel=1e-9)
        flips = scipy.stats.permutation_test(
            (x - 0.1,), np.mean, permutation_type="samples", vectorized=False, n_resamples=INF
        ).pvalue
        assert found.p_flips == pytest.approx(flips, rel=1e-9)
        low, high = scipy.stats.ttest_1samp(x, 0).confidence_interval(0.95)
        assert (found.student.low, found.student.high) == pytest.approx((low, high))
    many = rng.normal(0.5, 1.0, size=30)  # beyond exact enumeration
    exact = scipy.stats.wilcoxon(many, method="exact").pvalue
    assert pair(many).p_ranks == pytest.approx(exact, abs=4 * math.sqrt(exact / 65536))
    ties = np.array([1.0, -1.0, 2.0, 2.0, 3.0, 0.0])
    assert pair(ties).p_ranks == pytest.approx(
        scipy.stats.wilcoxon(ties, zero_method="pratt", method=scipy.stats.PermutationMethod()).pvalue
    )
    for n in (3, 6, 12):  # the last one is beyond exact enumeration
        a, b = rng.normal(0.8, 1.0, size=n), rng.normal(size=n)
        exact = scipy.stats.mannwhitneyu(a, b, method="exact").pvalue
        assert rank_sum(a, b) == pytest.approx(exact, rel=1e-9 if n < 12 else 0.15)
    a, b = np.array([1.0, 2.0, 2.0, 3.0]), np.array([2.0, 0.0, 0.0, 1.0])
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y: scipy.stats.rankdata(np.concatenate([x, y]))[: len(x)].sum(), vectorized=False,
        n_resamples=INF,
    )  # fmt: skip
    assert rank_sum(a, b) == pytest.approx(theirs.pvalue)


def test_holm_is_that_of_statsmodels():
    rng = np.random.default_rng(2)
    for count in (1, 2, 5, 12):
        p = rng.uniform(size=count) ** 3
        np.testing.assert_allclose(holm(p.tolist()), multipletests(p, method="holm")[1], rtol=1e-12)
    ties = [0.01, 0.01, 0.04, 0.03]
    np.testing.assert_allclose(holm(ties), multipletests(ties, method="holm")[1])
    # A test that could not be made still counts: 0.02 is one of three.
    assert holm([0.02, None, 0.5]) == [pytest.approx(0.06), None, pytest.approx(1.0)]
    assert holm([0.02, 0.5])[0] == pytest.approx(0.04)


def test_the_interval_of_a_verdict_excludes_the_margin_exactly_where_it_is_settled():
    rng = np.random.default_rng(3)
    kinds = set()
    for _ in range(100):
        family = [pair(rng.normal(shift, 1.0, size=6), margin=0.2) for shift in rng.normal(0.2, 1.2, size=4)]
        for one, verdict in zip(family, judge(family), strict=True):
            kinds.add(verdict.kind)
            assert verdict.interval.excludes(0.2) == (verdict.kind != "undecided") == (verdict.p <= 0.05)
            if verdict.kind != "undecided":
                assert (verdict.kind == "supported") == (one.mean > 0.2)
    assert kinds == {"supported", "contradicted", "undecided"}


def test_a_study_of_equals_rarely_supports_anything(quick):
    """2,000 studies of four variants that differ from the baseline in nothing, all compared with its runs."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2000, 5, 5))
    supported = anything = uncorrected = 0
    for study in x:
        family = [pair(study[0] - study[k]) for k in range(1, 5)]
        kinds = {verdict.kind for verdict in judge(family)}
        supported += "supported" in kinds
        anything += kinds != {"undecided"}
        uncorrected += any(one.p < 0.05 for one in family)
    error = 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert supported / 2000 < 0.025 + error and anything / 2000 < 0.05 + error
    assert anything / 2000 > 0.015  # not by never saying anything
    assert uncorrected / 2000 > 0.1  # control: without Holm


def test_power_and_the_seeds_that_settle():
    for effect, n, alpha in ((0.5, 5, 0.05), (1.0, 8, 0.0125), (2.0, 4, 0.05), (0.2, 300, 0.01)):
        assert power(effect, n, alpha) == pytest.approx(TTestPower().power(effect, n, alpha), abs=1e-5)
    for effect in (0.3, 0.8, 1.5):
        needed = math.ceil(TTestPower().solve_power(effect, power=0.8, alpha=0.05))
        assert seeds_needed(effect, 1.0, 0.05) == seeds_needed(-3 * effect, 3.0, 0.05) == needed
        assert statistics.detectable(2.0, needed, 0.05) <= 2 * effect < statistics.detectable(2.0, needed - 1, 0.05)
    n = seeds_needed(0.8, 1.0, 0.05)
    x = np.random.default_rng(5).normal(0.8, 1.0, size=(20_000, n))
    found = np.mean(scipy.stats.ttest_1samp(x, 0, axis=1).pvalue < 0.05)
    assert found == pytest.approx(power(0.8, n, 0.05), abs=0.01)
    assert np.mean(scipy.stats.ttest_1samp(x[:, :-3], 0, axis=1).pvalue < 0.05) < 0.8  # control: three fewer
    assert seeds_needed(0.0, 1.0, 0.05) is None and seeds_needed(0.001, 1.0, 0.05) is None


def test_effect_size_is_not_biased_by_few_seeds():
    x = np.random.default_rng(6).normal(0.7, 1.0, size=(20_000, 5))
    corrected = np.mean([hedges_g(row) for row in x])
    assert corrected == pytest.approx(0.7, abs=0.02)
    assert np.mean(x.mean(1) / x.std(1, ddof=1)) > 0.8  # control: Cohen's d of five


def test_gains_point_the_same_way_for_losses_and_scores():
    assert gains({0: 1.0, 1: 2.0, 7: 0.0}, {0: 1.5, 1: 1.0, 8: 0.0}, "min") == {0: 0.5, 1: -1.0}
    assert gains({0: 0.9}, {0: 0.8}, "max") == {0: pytest.approx(0.1)}
    with pytest.raises(InputError, match="min or max"):
        gains({}, {}, "low")


def test_a_diverged_run_is_the_worst_run_and_never_lost():
    fine, bad = {s: 1.0 + s / 100 for s in range(6)}, {s: 1.5 for s in range(6)} | {2: math.nan, 3: INF}
    for mode in ("min", "max"):
        found = gains(fine, bad, mode)
        assert found[2] == found[3] == INF and gains(bad, fine, mode)[2] == -INF
    one = paired(fine, bad, "min")
    assert one.test == "ranks" and one.mean is None and one.n == 6 and one.diverged == (0, 2)
    [verdict] = judge([one])
    assert verdict.kind == "supported" and verdict.p == 2 / math.comb(12, 6)
    assert judge([paired(bad, fine, "min")])[0].kind == "contradicted"
    # Three that train against three that do not cannot be enough at 0.05, and four are said to be needed.
    three, none = {s: 0.9 for s in range(3)}, {s: math.nan for s in range(3)}
    [verdict] = judge([paired(three, none, "max")])
    assert verdict.kind == "undecided" and verdict.p == 2 / math.comb(6, 3) and verdict.seeds_needed == 4
    # A margin moves the runs that finished, and no run is by a margin better than itself.
    assert paired(fine, bad, "min", margin=1.0).ahead == 2 / 6
    assert paired(none, none, "max").p == 1.0
    assert gains({0: math.nan}, {0: math.nan}, "min") == {0: 0.0}
    summary = statistics.summarise(list(bad.values()), "min", failed=1)
    assert (summary.n, summary.diverged, summary.failed, summary.mean, summary.median) == (4, 2, 1, 1.5, 1.5)
    assert statistics.summarise([1.0, math.nan, math.nan], "min").median is None


def test_what_cannot_be_judged_is_undecided_and_says_why():
    for values, says in (([], "no seed in common"), ([0.3], "one run"), ([0.25] * 5, "the same")):
        one = pair(values)
        [verdict] = judge([one])
        assert verdict.kind == "undecided" and verdict.p is None and says in one.note
    # Control: the least spread is enough to go on.
    assert judge([pair([0.25, 0.25, 0.25, 0.25, 0.2501])])[0].kind == "supported"
