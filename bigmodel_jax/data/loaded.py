"""What a data set gives a run: pipelines, sizes and a report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from bigmodel_jax.data.order import BatchRamp
from bigmodel_jax.data.pipeline import Pipeline

Spec = dict[str, tuple[tuple[int, ...], str]]
Progress = Callable[[str, float, float], None] | None


class Loaded(NamedTuple):
    """Pipelines of one data set. Sizes that do not apply are 0.

    report: what a person should know of the data (class counts, duplicates, what was cut), JSON values.
    """

    train: Pipeline
    evals: dict[str, Pipeline]
    tokenizer: Any = None
    vocab_size: int = 0
    num_classes: int = 0
    in_channels: int = 0
    prefers_tfdata: bool = False
    report: dict[str, Any] = {}

    @property
    def fingerprint(self) -> str:
        """Of the training order and content, and of every evaluation set."""
        parts = [self.train.fingerprint, *(f"{n}:{p.fingerprint}" for n, p in sorted(self.evals.items()))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def ramp(batch_size: int | tuple) -> int | BatchRamp:
    """A batch size, or a ramp from ((first step, rows), ...)."""
    return batch_size if isinstance(batch_size, int) else BatchRamp(tuple(map(tuple, batch_size)))
