"""An evaluation set exactly once, as sums or as one record per example.

The last batch is filled with rows of weight zero, sums add up over batches, and only the final
division makes a mean of them: the result does not depend on batch size or device count. Where a
measure is no sum (AUC, an interval), records are gathered by example id, and padding is dropped by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.parallel.feed import global_batch

Sums = dict[str, tuple[float, float]]


def means(sums: Sums, coefficients: Mapping[str, float]) -> dict[str, float]:
    """{metric: sum / weight}, with "loss" the weighted sum of the objective's terms, and
    "perplexity" = exp(nll) where there is an nll in nats."""
    out = {name: total / weight if weight else math.nan for name, (total, weight) in sums.items()}
    out["loss"] = sum(factor * out[term] for term, factor in coefficients.items() if term in out)
    if "nll" in out:
        out["perplexity"] = math.exp(min(out["nll"], 700.0))
    return out


def spec(pipeline: Pipeline) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{field: (shape of one row, dtype)} of an evaluation batch; reads one row."""
    return {name: (leaf.shape[1:], leaf.dtype) for name, leaf in pipeline.batch(0, [0]).items()}


def evaluate(
    step: Callable[[Any, Any], Any],
    state: Any,
    pipeline: Pipeline,
    sharding: jax.sharding.Sharding,
    batch_size: int,
    *,
    coefficients: Mapping[str, float],
    batches: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Metrics of one evaluation set, or None when `stop()` interrupted it.

    Args:
      step: compiled; (state, batch with leaves [M, ...]) -> {metric: (sum, weight)}.
      sharding: of the leading dimension M of a batch.
      batches: the first so many batches; 0 is the whole set, each example once.
    """
    number = pipeline.num_eval_batches
    number = min(batches, number) if batches else number
    total = totals(
        lambda batch: step(state, batch),
        lambda index: global_batch(lambda rows: pipeline.batch(index, rows), sharding, (batch_size,)),
        number,
        stop,
    )
    if total is None:
        return None
    out = means({name: (float(pair[0]), float(pair[1])) for name, pair in total.items()}, coefficients)
    return {**out, "examples": float(min(len(pipeline.source), number * batch_size))}


def totals(
    step: Callable[[Any], Any], batch: Callable[[int], Any], number: int, stop: Callable[[], bool]
) -> dict[str, np.ndarray] | None:
    """{metric: float64 [2, ...], sums and weights added up} over batches 0 to number - 1; None when stopped."""
    total: dict[str, np.ndarray] = {}
    pending = None

    def add(sums: Any) -> None:
        for name, pair in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + np.asarray(pair, np.float64)

    for index in range(number):
        if stop():
            return None
        sums = step(batch(index))
        if pending is not None:
            add(pending)
        pending = sums
    if pending is not None:
        add(pending)
    return total


def collect(
    step: Callable[[Any, Any], Any],
    state: Any,
    pipeline: Pipeline,
    sharding: jax.sharding.Sharding,
    batch_size: int,
    *,
    batches: int = 0,
) -> dict[str, np.ndarray]:
    """The records of an evaluation set, each example once, ordered by "id" [n] (its number in the source).

    Args:
      step: compiled; (state, batch with leaves [M, ...]) -> {name: [M, ...]}, whole on every process.
      sharding, batches: as in `evaluate`.

    All records are held in memory: an objective keeps them small (sums of a row's tokens, not logits).
    """
    number = pipeline.num_eval_batches
    number = min(batches, number) if batches else number
    parts: list[dict[str, np.ndarray]] = []
    pending: tuple[np.ndarray, Any] | None = None

    def settle() -> None:
        if pending is not None:
            ids, out = pending
            kept = ids >= 0
            parts.append({"id": ids[kept]} | {k: np.asarray(v)[kept] for k, v in jax.device_get(out).items()})

    for index in range(number):
        batch = global_batch(lambda rows, i=index: pipeline.batch(i, rows), sharding, (batch_size,))
        out = step(state, batch)
        settle()
        pending = pipeline.ids(index), out
    settle()
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["id"], kind="stable")
    if len(np.unique(joined["id"])) != len(order):
        raise ValueError("an evaluation set gave an example twice")
    return {name: value[order] for name, value in joined.items()}
