"""Measures that are ratios of sums over examples: likelihood of tokens, and errors of predicted numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures.intervals import bootstrap, group_index, ratio

Statistic = Callable[[np.ndarray], np.ndarray]


def by_group(values: dict[str, np.ndarray], groups: Any) -> dict[str, np.ndarray]:
    """Sums [G] of each array [n] over groups, in the order of the groups' names."""
    count = len(next(iter(values.values())))
    index, units = group_index(groups, count)
    return {name: np.bincount(index, np.asarray(x, np.float64), minlength=units) for name, x in values.items()}


def tokens(
    loss: Any, weight: Any, *, correct: Any = None, sizes: Any = None, groups: Any = None, **options: Any
) -> dict[str, Any]:
    """{"values", "intervals", "notes"} of predicted tokens: nll (nats), perplexity, bits_per_byte, accuracy.

    Args:
      loss, weight, correct: per example, summed nats, number of tokens, and how many were right [n].
      sizes: UTF-8 bytes of the tokens [n]. groups: [n], for example the document; these are resampled.
      options: as in intervals.bootstrap.
    """
    columns = {"loss": loss, "weight": weight, "correct": correct, "sizes": sizes}
    sums = by_group({name: np.asarray(x) for name, x in columns.items() if x is not None}, groups)
    if not sums["weight"].sum() > 0:
        raise InputError("evaluation: the examples hold no token to predict")
    nll = ratio(sums["loss"], sums["weight"])
    statistics: dict[str, Statistic] = {"nll": nll, "perplexity": lambda w: np.exp(np.minimum(nll(w), 700.0))}
    if "sizes" in sums and sums["sizes"].sum() > 0:
        statistics["bits_per_byte"] = ratio(sums["loss"] / math.log(2), sums["sizes"])
    if "correct" in sums:
        statistics["accuracy"] = ratio(sums["correct"], sums["weight"])
    return _measured(statistics, len(sums["loss"]), None, options) | {"tokens": int(sums["weight"].sum())}


def numbers(prediction: Any, target: Any, *, groups: Any = None, **options: Any) -> dict[str, Any]:
    """{"values", "intervals", "notes"} of predicted numbers [n, T]: mse and mae (means over T), and r2, the
    share of the targets' variance that is explained, averaged over T (None where a target never varies)."""
    p, t = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (prediction, target))
    error = p - t

    def explained(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(axis=1, keepdims=True)
        mean = weights @ t / total
        variance = weights @ t**2 / total - mean**2
        with np.errstate(invalid="ignore", divide="ignore"):
            left = weights @ error**2 / total / variance
        return np.mean(np.where(variance > 1e-12 * (1 + mean**2), 1 - left, np.nan), axis=1)

    statistics = {
        "mse": ratio(np.mean(error**2, axis=1)), "mae": ratio(np.mean(np.abs(error), axis=1)), "r2": explained,
    }  # fmt: skip
    out = _measured(statistics, len(p), groups, options)
    if out["values"]["r2"] is None:
        out["notes"]["r2"] = "a target has the same value in every example"
    return out


def _measured(statistics: dict[str, Statistic], count: int, groups: Any, options: dict[str, Any]) -> dict[str, Any]:
    found = bootstrap(lambda w: {k: fn(w) for k, fn in statistics.items()}, count, groups=groups, **options)
    return {
        "values": {name: interval.estimate for name, interval in found.items()},
        "intervals": {name: interval.json() for name, interval in found.items()},
        "notes": {name: "not finite" for name, interval in found.items() if interval.estimate is None},
    }
