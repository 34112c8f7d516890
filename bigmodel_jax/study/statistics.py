"""What the seeds of a study support: intervals, paired tests, correction for many of them, power, verdicts.

Runs with the same seed share their data order and, where shapes allow, their initial values, so two variants are
compared by their differences on common seeds. A difference is a *gain*: positive where the first is better,
whichever way the metric points.

A diverged run has no number but is no missing value either: it is worse than any run that finished. Such a gain is
infinite (0 where both diverged) and no mean exists; the test is then the exact rank-sum test, which gives up the
pairing: with 5 seeds its smallest p is 0.008, that of any paired test on ranks 0.06. Shared seeds make runs more alike,
which makes an unpaired test less ready to reject, not more. A failed run (a crash of the machine) says
nothing of the variant; it is left out, and counted.

Folds of one data set share training rows, so that their results are not independent, and the spread between them says
too little of how their mean would differ on other rows: s^2 / n is too small a variance of the mean. The corrected
resampled t test takes s^2 (1/n + n_test / n_train) (Nadeau and Bengio 2003), here `overlap` = n_test / n_train. It
can fall with more folds, but not below overlap.

Sources: Student's t and its power (noncentral t) as in Cohen (1988); exact sign flips, Fisher (1935); signed ranks,
Wilcoxon (1945), with zeros as in Pratt (1959); rank sums, Mann and Whitney (1947); Holm (1979) and the intervals that
go with it, Strassburger and Bretz (2008); effect size, Hedges (1981); folds, Nadeau and Bengio (2003),
"Inference for the Generalization Error", Machine Learning 52.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.special import gammaincinv, gammaln, ndtr, stdtr, stdtrit
from scipy.stats import rankdata

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures.intervals import Interval, bootstrap, ratio

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 10_000
MOST_SEEDS = 1000  # beyond this a difference is not settled by seeds
_EXACT = 16  # pairs of which every sign pattern is counted; of more, a sample
_PATTERNS = 1 << 16
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(300)  # on (-1, 1)
_NODES, _WEIGHTS = (1 + _NODES) / 2, _WEIGHTS / 2


@dataclass(frozen=True)
class Summary:
    """One variant: n finished runs with their mean, sample standard deviation and intervals of the mean.

    diverged, failed: runs counted but not in the mean. median: over finished and diverged runs, the diverged
    as worst; None where it falls on one of them.
    """

    n: int
    diverged: int
    failed: int
    mean: float | None
    sd: float | None
    median: float | None
    student: Interval
    bootstrap: Interval


@dataclass(frozen=True)
class Paired:
    """First against second over common seeds; positive is better for the first.

    seeds: those in common, or the folds. gains: of each, infinite where one of the two diverged. mean, sd, g: of the
    gains, None where not all are finite.
    p: two-sided, of "the mean gain is `margin`", by the test named: "t", or "ranks" (rank sums) where a run diverged.
    p_flips, p_ranks: the same hypothesis by exact sign flips (None with infinite gains) and signed ranks; not of folds.
    ahead: share of all pairs, of whatever seeds, in which the first is better by more than the margin.
    diverged: runs of each, of the n. overlap: of folds, n_test / n_train; None where runs are independent.
    """

    seeds: tuple[Any, ...]
    gains: tuple[float, ...]
    margin: float
    mean: float | None
    sd: float | None
    g: float | None
    student: Interval
    bootstrap: Interval
    test: str
    p: float | None
    p_flips: float | None
    p_ranks: float | None
    ahead: float
    diverged: tuple[int, int]
    note: str = ""
    overlap: float | None = None

    @property
    def n(self) -> int:
        return len(self.gains)


@dataclass(frozen=True)
class Verdict:
    """kind: "supported", "contradicted" or "undecided". p: Holm-corrected. level: of `interval`, the one of this
    claim's step in Holm's procedure, which excludes the margin exactly where p is at most alpha.

    seeds_needed: pairs in all after which a mean and spread as observed would be settled at that level with a
    probability of 80%; None where it cannot be said, as of folds, or not with MOST_SEEDS. detectable: the mean gain
    beyond the margin that the present pairs would settle with the same probability.
    """

    kind: str
    p: float | None
    level: float
    interval: Interval
    seeds_needed: int | None
    detectable: float | None


def widened(n: int, overlap: float | None) -> float:
    """How much larger the standard error of a mean of n folds is than that of n independent runs."""
    return math.sqrt(1 + n * (overlap or 0.0))


def student(values: np.ndarray, level: float = LEVEL, overlap: float | None = None) -> Interval:
    """Student's t interval of a mean, of folds the corrected one."""
    n = len(values)
    mean = float(np.mean(values)) if n else None
    if n < 2:
        return Interval(mean, None, None, level, "t", n, 0, "no runs" if n == 0 else "one run says nothing of others")
    half = float(stdtrit(n - 1, (1 + level) / 2) * np.std(values, ddof=1) / math.sqrt(n)) * widened(n, overlap)
    if half <= 1e-12 * max(1.0, abs(mean)):
        note = "all values are the same, which tells nothing of their spread"
        return Interval(mean, None, None, level, "t", n, 0, note)
    return Interval(mean, mean - half, mean + half, level, "t", n, 0)


def resampled(values: np.ndarray, level: float = LEVEL) -> Interval:
    """Bootstrap interval of a mean, made for few values (`method` "expanded" of measures.intervals)."""
    n = len(values)
    if n < 2:
        return _none(values, level, "too few runs")
    statistic = ratio(values)
    return bootstrap(lambda w: {"mean": statistic(w)}, n, resamples=RESAMPLES, level=level, method="expanded")["mean"]


def _none(values: np.ndarray, level: float, note: str = "folds are not independent") -> Interval:
    mean = float(np.mean(values)) if len(values) else None
    return Interval(mean, None, None, level, "expanded", len(values), 0, note)


def summarise(
    values: Sequence[float], mode: str, failed: int = 0, level: float = LEVEL, overlap: float | None = None
) -> Summary:
    """Summary of one variant. values: the metric of each finished run, not finite where it diverged."""
    array = np.asarray(values, np.float64)
    fine = array[np.isfinite(array)]
    worst = np.where(np.isfinite(array), array, np.inf if mode == "min" else -np.inf)
    with np.errstate(invalid="ignore"):
        median = float(np.median(worst)) if len(array) else math.nan
    return Summary(
        n=len(fine), diverged=len(array) - len(fine), failed=failed,
        mean=float(fine.mean()) if len(fine) else None, sd=float(fine.std(ddof=1)) if len(fine) > 1 else None,
        median=median if math.isfinite(median) else None,
        student=student(fine, level, overlap),
        bootstrap=resampled(fine, level) if overlap is None else _none(fine, level),
    )  # fmt: skip


def gains(first: Mapping[Any, float], second: Mapping[Any, float], mode: str) -> dict[Any, float]:
    """{seed or fold: gain} over those that both have; values that are not finite are diverged runs."""
    if mode not in ("min", "max"):
        raise InputError(f"mode {mode!r} should be min or max")

    def worth(value: float) -> float:
        return (value if mode == "max" else -value) if math.isfinite(value) else -math.inf

    out = {}
    for seed in sorted(set(first) & set(second)):
        a, b = worth(float(first[seed])), worth(float(second[seed]))
        out[seed] = 0.0 if a == b else a - b
    return out


def sign_flips(scores: np.ndarray) -> float:
    """Two-sided p of "scores are symmetric about 0": exact up to 16 scores, else from 65,536 sampled sign patterns."""
    scores = np.asarray(scores, np.float64)
    n = len(scores)
    if n <= _EXACT:
        signs = 1.0 - 2.0 * ((np.arange(1 << n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(_PATTERNS, n))
        signs[0] = 1.0  # the pattern seen is one of them, so p is never 0
    sums = np.abs(signs @ scores)
    return float(np.mean(sums >= abs(scores.sum()) - 1e-9 * np.abs(scores).sum()))


def signed_ranks(values: np.ndarray) -> float:
    """Wilcoxon's signed-rank test, exact also with ties; infinite values take the highest ranks."""
    values = np.asarray(values, np.float64)
    return sign_flips(np.sign(values) * rankdata(np.abs(values)))


def hedges_g(values: np.ndarray) -> float | None:
    """Mean over standard deviation of paired differences, without the bias of few; None below 3 or for spread 0."""
    df = len(values) - 1
    if df < 2:
        return None
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    if sd <= 1e-12 * max(1.0, abs(mean)):
        return None
    return mean / sd * math.exp(gammaln(df / 2) - gammaln((df - 1) / 2)) / math.sqrt(df / 2)


def paired(
    first: Mapping[Any, float], second: Mapping[Any, float], mode: str, margin: float = 0.0, level: float = LEVEL,
    overlap: float | None = None,
) -> Paired:  # fmt: skip
    """First against second, each {seed: metric}, not finite where a run diverged; over their common seeds.

    overlap: of folds in place of seeds, n_test / n_train.
    """
    found = gains(first, second, mode)
    values = np.array(list(found.values()), np.float64)
    n, lost = len(values), [sum(not math.isfinite(side[seed]) for seed in found) for side in (first, second)]
    fine = values if sum(lost) == 0 else np.zeros(0)
    interval = student(fine, level, overlap)
    p, test, note = None, "t", interval.note
    if n == 0:
        note = f"no {'seed' if overlap is None else 'fold'} in common"
    elif sum(lost):
        test, note = "ranks", "tested by ranks, since runs diverged"
        p = rank_sum(*_worths(first, second, found, mode, margin))
    elif interval.low is not None:
        t = (values.mean() - margin) / (values.std(ddof=1) / math.sqrt(n) * widened(n, overlap))
        p = float(2 * stdtr(n - 1, -abs(t)))
    return Paired(
        seeds=tuple(found), gains=tuple(values.tolist()), margin=margin,
        mean=float(fine.mean()) if len(fine) else None, sd=float(fine.std(ddof=1)) if len(fine) > 1 else None,
        g=hedges_g(fine), student=interval, test=test, p=p,
        bootstrap=resampled(fine, level) if overlap is None else _none(fine, level),
        p_flips=sign_flips(fine - margin) if len(fine) and overlap is None else None,
        p_ranks=signed_ranks(values - margin) if n and overlap is None else None,
        ahead=_ahead(*_worths(first, second, found, mode, margin)) if n else 0.5, diverged=tuple(lost),
        note=note, overlap=overlap,
    )  # fmt: skip


def _worths(
    first: Mapping[Any, float], second: Mapping[Any, float], seeds: Iterable[Any], mode: str, margin: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values of both, higher is better, a diverged run -inf; the margin is taken off the first."""
    sign = 1.0 if mode == "max" else -1.0
    out = [np.array([sign * side[seed] for seed in seeds], np.float64) for side in (first, second)]
    one, other = (np.where(np.isfinite(x), x, -np.inf) for x in out)
    return one - margin, other


def _ahead(first: np.ndarray, second: np.ndarray) -> float:
    """Share of all pairs, of whatever seeds, in which the first is better; ties count half."""
    return float(np.mean(np.where(first[:, None] == second, 0.5, first[:, None] > second)))


def rank_sum(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of the rank-sum test of Wilcoxon (1945) and Mann and Whitney, exact also with ties.

    All ways to share out the ranks, or 65,536 sampled ones where there are more.
    """
    n, ranks = len(first), rankdata(np.concatenate([first, second]))
    away = abs(ranks[:n].sum() - n * ranks.mean())
    if math.comb(len(ranks), n) <= _PATTERNS:
        sums = np.array([sum(chosen) for chosen in itertools.combinations(ranks.tolist(), n)])
    else:
        rng = np.random.default_rng(0)
        sums = rng.permuted(np.tile(ranks, (_PATTERNS, 1)), axis=1)[:, :n].sum(axis=1)
        sums[0] = ranks[:n].sum()
    return float(np.mean(np.abs(sums - n * ranks.mean()) >= away - 1e-9))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values. A test that could not be made (None) stays None, and counts among the tests."""
    return [None if value is None else adjusted for value, (adjusted, _) in zip(p, _steps(p, 0.05), strict=True)]


def _steps(p: Sequence[float | None], alpha: float) -> list[tuple[float, float]]:
    """(adjusted p, level of significance of its step) of each test.

    Tests after the first that is not rejected share its level, so that `p <= level` and `adjusted <= alpha` agree.
    """
    order = sorted(range(len(p)), key=lambda i: 1.0 if p[i] is None else p[i])
    out: list[tuple[float, float]] = [(1.0, alpha)] * len(p)
    adjusted, level, rejecting = 0.0, alpha, True
    for rank, i in enumerate(order):
        value = 1.0 if p[i] is None else p[i]
        adjusted = max(adjusted, min(1.0, value * (len(p) - rank)))
        if rejecting:
            level = alpha / (len(p) - rank)
            rejecting = adjusted <= alpha
        out[i] = (adjusted, level)
    return out


@cache
def _spreads(df: int) -> np.ndarray:
    """Quantiles of a sample's standard deviation at the nodes, for a true one of 1."""
    return np.sqrt(2 * gammaincinv(df / 2, _NODES) / df)


def power(effect: float, n: int, alpha: float) -> float:
    """Probability that a two-sided paired t test of n pairs finds a mean of `effect` standard deviations.

    The mean of the normal tail over the distribution of the sample's standard deviation, which, unlike the library's
    noncentral t, stands for every n and alpha.
    """
    spread, critical, shift = _spreads(n - 1), stdtrit(n - 1, 1 - alpha / 2), abs(effect) * math.sqrt(n)
    return float(_WEIGHTS @ (ndtr(shift - critical * spread) + ndtr(-shift - critical * spread)))


def seeds_needed(mean: float, sd: float, alpha: float, wanted: float = POWER) -> int | None:
    """Fewest pairs that find a mean gain (beyond the margin) with probability `wanted`; None beyond MOST_SEEDS."""
    if sd <= 0 or mean == 0 or power(mean / sd, MOST_SEEDS, alpha) < wanted:
        return None
    return bisect_left(range(MOST_SEEDS + 1), wanted, lo=2, key=lambda n: power(mean / sd, n, alpha))


def seeds_apart(alpha: float) -> int:
    """Fewest seeds whose rank-sum test finds two variants with every run of one better than every run of the other."""
    return next(n for n in range(2, MOST_SEEDS) if 2 / math.comb(2 * n, n) <= alpha)


def detectable(sd: float, n: int, alpha: float, wanted: float = POWER) -> float | None:
    """Smallest mean gain (beyond the margin) that n pairs find with probability `wanted`."""
    if n < 2 or sd <= 0:
        return None
    low, high = 0.0, 1.0
    while power(high, n, alpha) < wanted:
        high *= 2
        if high > 1e6:
            return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, n, alpha) < wanted else (low, middle)
    return high * sd


def judge(pairs: Sequence[Paired], alpha: float = 1 - LEVEL) -> list[Verdict]:
    """A verdict on each claim "the gain is more than the margin", all of one family.

    The rule: supported where the two-sided test of "the mean gain is the margin", Holm-corrected over the claims,
    has p at most alpha and the gains lie above the margin; contradicted where they lie below; else undecided. Under
    a family of true null hypotheses some claim is supported with a probability of at most alpha / 2.
    """
    out = []
    for pair, (adjusted, level) in zip(pairs, _steps([pair.p for pair in pairs], alpha), strict=True):
        if pair.p is None:
            out.append(Verdict("undecided", None, 1 - level, pair.student, None, None))
            continue
        if pair.test == "t":
            interval = student(np.array(pair.gains), 1 - level, pair.overlap)
            up, needed = pair.mean > pair.margin, seeds_needed(pair.mean - pair.margin, pair.sd, level)
            least = detectable(pair.sd * widened(pair.n, pair.overlap), pair.n, level)
        else:
            interval, least, up = pair.student, None, pair.ahead > 0.5
            needed = seeds_apart(level) if pair.ahead in (0.0, 1.0) else None
        needed = needed if pair.overlap is None else None  # more folds of the same rows share more of them
        kind = "undecided" if adjusted > alpha else "supported" if up else "contradicted"
        out.append(Verdict(kind, adjusted, 1 - level, interval, needed, least))
    return out
