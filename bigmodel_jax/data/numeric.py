"""Rows of numbers with a class or target numbers: scikit-learn's bundled sets, or columns of a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel_jax.data import images, splits, tables
from bigmodel_jax.data.loaded import Loaded, Progress, Spec, ramp
from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.errors import InputError, nearest

# Those that come with scikit-learn: (features, classes; 0 for a regression).
BUNDLED = {"diabetes": (10, 0), "breast_cancer": (30, 2), "wine": (13, 3), "digits": (64, 10)}


@dataclass(frozen=True)
class Weigh:
    """Adds weights [n] f32 of 1; the pipeline sets them to 0 on padding rows."""

    def __call__(self, batch: dict[str, np.ndarray], rng: Any) -> dict[str, np.ndarray]:
        return batch | {"weights": np.ones(len(batch["features"]), np.float32)}


@dataclass(frozen=True)
class NumericTable:
    """Features [F] per row, with a label or a target.

    source: "diabetes" (a regression), "breast_cancer", "wine" or "digits" of scikit-learn, or files as
    `tables.read` takes them. Of files: features: the columns read as numbers; label: the column of
    classes, or target: the columns to predict. held_out: share of the rows to validate on, by class
    where there are classes; fixed by split_seed. standardise: features, and scale_target the targets,
    get mean 0 and deviation 1 over the training rows.
    """

    source: str = "diabetes"
    features: tuple = ()
    label: str = ""
    target: tuple = ()
    held_out: float = 0.2
    split_seed: int = images.SPLIT_SEED
    standardise: bool = True
    scale_target: bool = False

    def __post_init__(self) -> None:
        bundled = self.source in BUNDLED
        if bundled and (self.features or self.label or self.target):
            raise InputError(f"data.source '{self.source}' brings its own features and target")
        if not bundled and (not self.features or bool(self.label) == bool(self.target)):
            raise InputError(
                f"data.source '{self.source}' is none of {', '.join(BUNDLED)}{nearest(self.source, BUNDLED)}; of a "
                "file give features (columns) and either label (a column) or target (columns)"
            )

    def sizes(self) -> tuple[int, int]:
        """(features, numbers to predict; 0 for classes)."""
        if self.source in BUNDLED:
            features, classes = BUNDLED[self.source]
            return features, 0 if classes else 1
        return len(self.features), len(self.target)

    def spec(self) -> Spec:
        features, targets = self.sizes()
        fields: Spec = {"features": ((features,), "float32")}
        fields |= {"target": ((targets,), "float32")} if targets else {"label": ((), "int32")}
        return fields | {"weights": ((), "float32")}

    def arrays(self) -> tuple[np.ndarray, np.ndarray, int]:
        """(features [n, F] float64, label [n] int32 or target [n, T] float64, classes or 0)."""
        if self.source in BUNDLED:
            from sklearn import datasets

            data = getattr(datasets, f"load_{self.source}")()
            classes = BUNDLED[self.source][1]
            answer = data.target.astype(np.int32) if classes else data.target.astype(np.float64)[:, None]
            return data.data.astype(np.float64), answer, classes
        table = tables.read(self.source)
        x = numbers(table, self.features)
        if self.target:
            return x, numbers(table, self.target), 0
        classes = tables.vocabulary(table.column(self.label))
        return x, tables.label_ids(table, self.label, classes), len(classes)

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        x, answer, classes = self.arrays()
        labels = answer if classes else None
        train, held = splits.held_out(len(x), self.held_out, seed=self.split_seed, labels=labels)
        if self.standardise:
            x = standardised(x, train)
        if self.scale_target and not classes:
            answer = standardised(answer, train)
        name, dtype = ("label", np.int32) if classes else ("target", np.float32)
        parts = [
            Arrays({"features": x[rows].astype(np.float32), name: answer[rows].astype(dtype)}) for rows in (train, held)
        ]
        return Loaded(
            Pipeline(parts[0], ramp(batch_size), seed, (Weigh(),)),
            {"validation": Pipeline(parts[1], eval_batch_size, seed, (Weigh(),), shuffle=False)},
            num_classes=classes or answer.shape[1], num_features=x.shape[1],
        )  # fmt: skip


def numbers(table: tables.Table, columns: tuple[str, ...]) -> np.ndarray:
    """Columns as finite float64 [n, columns]. Errors: InputError with file and line of what is no number."""
    out = np.empty((len(table), len(columns)))
    for place, name in enumerate(columns):
        for row, value in enumerate(table.column(name)):
            try:
                out[row, place] = float(value)
            except (TypeError, ValueError):
                raise InputError(f"{table.where(row)}: '{name}' is {value!r}, not a number") from None
            if not np.isfinite(out[row, place]):
                raise InputError(f"{table.where(row)}: '{name}' is {value!r}; leave such rows out or fill them first")
    return out


def standardised(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Columns of x [n, F] with mean 0 and deviation 1 over the rows `train`; constant ones become 0 there."""
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    return (x - mean) / np.where(deviation > 0, deviation, 1.0)
