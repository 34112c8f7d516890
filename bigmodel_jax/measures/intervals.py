"""Bootstrap confidence intervals: what a measure would have been on other examples of the same kind.

A resample is a vector of weights, how often each example was drawn, and a statistic is a function of
weights [R, n] to values [R]: all resamples of a chunk are one matrix product. Examples that come in
groups (sentences of a document, reviews of a film) are drawn group by group, since examples of a group
say less than as many independent ones. Efron and Tibshirani (1993); BCa: Efron (1987).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from bigmodel_jax.errors import InputError

Statistics = Callable[[np.ndarray], Mapping[str, np.ndarray]]
METHODS = ("bca", "percentile", "expanded")
_CHUNK = 1 << 22  # numbers of one chunk of weights: 32 MB
_BLOCKS = 200  # most values of the jackknife; of more groups, blocks are left out


@dataclass(frozen=True)
class Interval:
    """low and high are None where `note` says why. units: what was resampled, groups or examples."""

    estimate: float | None
    low: float | None
    high: float | None
    level: float
    method: str
    units: int
    resamples: int
    note: str = ""

    def json(self) -> dict[str, Any]:
        """As a dict, without an empty note."""
        return {key: value for key, value in asdict(self).items() if key != "note" or value}

    def excludes(self, value: float) -> bool:
        """Whether the interval exists and lies wholly on one side of `value`."""
        return self.low is not None and not self.low <= value <= self.high


def ratio(top: np.ndarray, bottom: np.ndarray | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The statistic sum(top) / sum(bottom) of arrays [n]; a mean where `bottom` is None."""
    top = np.asarray(top, np.float64)
    bottom = np.ones_like(top) if bottom is None else np.asarray(bottom, np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ top) / (weights @ bottom)

    return statistic


def group_index(groups: Any, count: int) -> tuple[np.ndarray, int]:
    """(group number of each of `count` examples, number of groups); None makes each example a group."""
    if groups is None:
        return np.arange(count), count
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(index) != count:
        raise InputError(f"{len(index)} groups were given for {count} examples")
    return index.reshape(-1), len(names)


def draw(rng: np.random.Generator, rows: int, units: int) -> np.ndarray:
    """How often each of `units` is drawn in `rows` resamples with replacement, [rows, units] float64."""
    picks = rng.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
    return np.bincount(picks.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)


def _evaluate(statistics: Statistics, index: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    whole = len(index) == counts.shape[1] and (index == np.arange(len(index))).all()
    values = statistics(counts if whole else counts[:, index])
    return {name: np.asarray(value, np.float64).reshape(-1) for name, value in values.items()}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def bootstrap(
    statistics: Statistics,
    count: int,
    *,
    groups: Any = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    method: str = "bca",
) -> dict[str, Interval]:
    """An interval for each statistic, all from the same resamples.

    Args:
      statistics: weights [R, count] -> {name: [R]}; NaN where a resample leaves it undefined.
      groups: [count] of anything comparable; examples of one group are drawn together.
      method: "percentile", or "bca" (bias-corrected and accelerated): better where the statistic is
        skewed or biased. The acceleration comes from leaving out groups, or 200 blocks of them. "expanded" is the
        percentile interval with the tails of Student's t and the factor n / (n - 1) of the variance, for the few
        units where the others are too narrow (Hesterberg 2015, section 5.3).

    Errors: InputError for an unknown method, no examples, or a level outside (0, 1).
    """
    if method not in METHODS or count < 1 or not 0 < level < 1 or resamples < 20:
        raise InputError(f"bootstrap: method {method} of {METHODS}, {count} examples, level {level}, {resamples} draws")
    index, units = group_index(groups, count)
    rng = np.random.default_rng(seed)
    whole = _evaluate(statistics, index, np.ones((1, units)))
    if units < 2:
        note = "one example (or group) says nothing about others"
        return {k: Interval(_number(v[0]), None, None, level, method, units, 0, note) for k, v in whole.items()}
    rows = max(_CHUNK // max(count, units), 1)
    parts = [
        _evaluate(statistics, index, draw(rng, min(rows, resamples - start), units))
        for start in range(0, resamples, rows)
    ]
    drawn = _joined(parts)
    left_out = _jackknife(statistics, index, units, rng) if method == "bca" else {}
    return {
        name: _interval(float(whole[name][0]), values, left_out.get(name), level, method, units)
        for name, values in drawn.items()
    }


def _jackknife(
    statistics: Statistics, index: np.ndarray, units: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Each statistic with one unit, or one block of units, left out."""
    blocks = np.array_split(rng.permutation(units), min(units, _BLOCKS))
    rows = max(_CHUNK // max(len(index), units), 1)
    parts = []
    for start in range(0, len(blocks), rows):
        counts = np.ones((len(blocks[start : start + rows]), units))
        for row, block in enumerate(blocks[start : start + rows]):
            counts[row, block] = 0.0
        parts.append(_evaluate(statistics, index, counts))
    return _joined(parts)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(
    estimate: float, values: np.ndarray, left_out: np.ndarray | None, level: float, method: str, units: int
) -> Interval:
    good = values[np.isfinite(values)]
    missing = len(values) - len(good)

    def none(note: str) -> Interval:
        return Interval(_number(estimate), None, None, level, method, units, len(good), note)

    if not np.isfinite(estimate):
        return none("undefined on these examples")
    if missing > 0.05 * len(values):
        return none(f"undefined in {missing} of {len(values)} resamples")
    if np.ptp(good) <= 1e-12 * max(1.0, abs(estimate)):
        return none("every resample gives the same value, which tells nothing of its spread")
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    notes = [f"undefined in {missing} of {len(values)} resamples"] if missing else []
    if method == "expanded":
        tails = ndtr(np.sqrt(units / (units - 1)) * stdtrit(units - 1, tails))
    elif units < 10:
        notes.append(f"only {units} units: too narrow")
    if method == "bca":
        corrected = _bca(estimate, good, left_out, tails)
        if corrected is None:
            method = "percentile"
        else:
            tails = corrected
    low, high = np.quantile(good, tails)
    return Interval(float(estimate), float(low), float(high), level, method, units, len(good), "; ".join(notes))


def _bca(estimate: float, values: np.ndarray, left_out: np.ndarray, tails: np.ndarray) -> np.ndarray | None:
    """Corrected tail probabilities (Efron 1987, equation 6.8); None where they cannot be had."""
    below = np.mean(values < estimate) + 0.5 * np.mean(values == estimate)
    left_out = left_out[np.isfinite(left_out)]
    if not 0 < below < 1 or len(left_out) < 2:
        return None
    away = left_out.mean() - left_out
    spread = np.sum(away**2)
    skew = np.sum(away**3) / (6 * spread**1.5) if spread > 0 else 0.0
    bias = ndtri(below)
    z = bias + ndtri(tails)
    return ndtr(bias + z / (1 - skew * z))


def difference(first: Statistics, second: Statistics, count: int, **options: Any) -> dict[str, Interval]:
    """Intervals of first - second on the same examples: the same draws serve both (a paired comparison).

    Statistics that only one of them has are left out. Options as in `bootstrap`.
    """

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        a, b = first(weights), second(weights)
        return {name: np.asarray(a[name]) - np.asarray(b[name]) for name in a if name in b}

    return bootstrap(statistics, count, **options)
