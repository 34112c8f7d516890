"""Early stopping and the best checkpoint, as a function of the evaluations in metrics.jsonl.

There is no counter to save: what was best and how long ago follows from the rows up to the step, so a run that was
killed and continued stops where the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel_jax.errors import InputError, nearest

LOWER = ("loss", "nll", "perplexity", "bits_per_byte", "error", "wer", "per")
"""Metrics of which less is better, unless `mode` says otherwise."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, and how many came after it."""

    step: int
    value: float
    since: int


@dataclass(frozen=True)
class Stopping:
    """Judges evaluations of one metric.

    Args: set, metric: which number of which evaluation set. lower: less is better. patience: evaluations without
    an improvement after which to stop, 0 never. min_delta: what counts as an improvement.
    """

    set: str
    metric: str
    lower: bool
    patience: int
    min_delta: float

    @classmethod
    def of(cls, settings: Any, sets: Iterable[str]) -> Stopping | None:
        """From the config section `eval`; None where it names no metric.

        Raises:
          InputError: a metric that is not SET/METRIC, a set or mode that is not there, patience without metric.
        """
        if not settings.metric:
            if settings.patience:
                raise InputError("eval.patience needs eval.metric, for example 'validation/accuracy'")
            return None
        name, slash, metric = settings.metric.partition("/")
        if not slash or name not in list(sets):
            legal = ", ".join(f"{s}/..." for s in sets)
            raise InputError(f"eval.metric '{settings.metric}' should be one of {legal}{nearest(name, sets)}")
        if settings.mode not in ("auto", "min", "max"):
            raise InputError(f"eval.mode '{settings.mode}' should be auto, min or max")
        if settings.patience < 0 or settings.min_delta < 0:
            raise InputError("eval.patience and eval.min_delta must not be negative")
        lower = settings.mode == "min" or (settings.mode == "auto" and metric in LOWER)
        return cls(name, metric, lower, settings.patience, settings.min_delta)

    def best(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Best | None:
        """The best of (step, metrics) in order of steps; None without any. NaN is never best.

        Raises:
          InputError: the evaluation has no such metric.
        """
        found: Best | None = None
        for step, values in rows:
            if self.metric not in values:
                raise InputError(
                    f"eval.metric: '{self.set}' has no metric '{self.metric}'{nearest(self.metric, values)}; "
                    f"it has {', '.join(sorted(values))}"
                )
            value = float(values[self.metric])
            if math.isnan(value):
                better = False
            elif found is None or math.isnan(found.value):
                better = True
            else:
                gain = found.value - value if self.lower else value - found.value
                better = gain > self.min_delta
            if better or found is None:
                found = Best(step, value, 0)
            else:
                found = Best(found.step, found.value, found.since + 1)
        return found

    def over(self, best: Best) -> bool:
        """Whether patience is at its end."""
        return self.patience > 0 and best.since >= self.patience
