"""Measures of a classifier, from the probabilities it gave and the labels that were right.

Values come from scikit-learn. `Scores.statistics` computes the same from weighted examples, for all
resamples of a bootstrap at once; tests hold the two equal. What is undefined (precision of a class
that was never predicted, ROC with one class only) is None, with the reason under `notes`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse, special

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures.intervals import bootstrap

BINS = 15
SHOWN_CLASSES = 100  # a larger confusion matrix is not listed, only its largest entries
AUC_CLASSES = 20  # with more classes, the interval of AUC is left out for its cost
_POINTS = 200  # of a listed ROC curve


def measure(
    probabilities: Any, labels: Any, *, names: Sequence[str] = (), groups: Any = None, **options: Any
) -> dict[str, Any]:
    """`Scores.report` with "intervals": {measure: interval} (see intervals.py) beside its "values".

    Args:
      probabilities, labels: [n, C], [n] in 0..C-1. names: of the classes. groups: [n], examples that are
        not independent of each other. options: of `bootstrap`: resamples, level, seed, method.
    """
    scores = Scores(probabilities, labels, names=names)
    out = scores.report() | {"intervals": {}}
    if not scores.broken:
        found = bootstrap(scores.statistics, len(scores.y), groups=groups, **options)
        out["intervals"] = {name: found[name].json() for name in out["values"] if name in found}
        if "auc" not in found:
            out["notes"].setdefault("auc", f"no interval with more than {AUC_CLASSES} classes")
    return out


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [..., C] float64 of logits."""
    return special.softmax(np.asarray(logits, np.float64), axis=-1)


class Scores:
    """Probabilities [n, C] and labels [n], checked.

    Args:
      names: of the classes; default their numbers.
      bins: equal bins of confidence for the calibration error (Guo et al. 2017).

    Errors: InputError for shapes, labels or rows that are not probabilities. Rows that are not finite
    (a diverged model) are no error: every measure is then None.
    """

    def __init__(self, probabilities: Any, labels: Any, *, names: Sequence[str] = (), bins: int = BINS):
        self.p, self.y = np.asarray(probabilities, np.float64), np.asarray(labels)
        if self.p.ndim != 2 or self.p.shape[1] < 2 or self.y.shape != self.p.shape[:1] or not len(self.y):
            raise InputError(
                f"classification: probabilities [n, 2 or more] and labels [n], not {self.p.shape}, {self.y.shape}"
            )
        self.y = self.y.astype(np.int64)
        self.classes = self.p.shape[1]
        if not 0 <= self.y.min() <= self.y.max() < self.classes:
            raise InputError(f"classification: labels {self.y.min()} to {self.y.max()} of {self.classes} classes")
        self.names = [str(name) for name in names] or [str(c) for c in range(self.classes)]
        if len(self.names) != self.classes:
            raise InputError(f"classification: {len(self.names)} names for {self.classes} classes")
        self.broken = int((~np.isfinite(self.p).all(axis=1)).sum())
        if not self.broken and not np.allclose(self.p.sum(axis=1), 1.0, atol=1e-3):
            raise InputError("classification: rows of probabilities must add up to 1; give softmax(logits)")
        self.bins = bins

    @cached_property
    def predicted(self) -> np.ndarray:
        """Most likely class [n]; the lower number among equals."""
        return self.p.argmax(axis=1)

    @cached_property
    def rank(self) -> np.ndarray:
        """Classes ranked before the right one [n]; among equals the lower number comes first."""
        own = self.p[np.arange(len(self.y)), self.y][:, None]
        ahead = (self.p > own) | ((self.p == own) & (np.arange(self.classes) < self.y[:, None]))
        return ahead.sum(axis=1)

    @cached_property
    def nats(self) -> np.ndarray:
        """-log p of the right class [n], with p at least 1e-300."""
        return -np.log(np.maximum(self.p[np.arange(len(self.y)), self.y], 1e-300))

    @property
    def ks(self) -> tuple[int, ...]:
        return tuple(k for k in (3, 5) if k < self.classes)

    @cached_property
    def _bin(self) -> np.ndarray:
        confidence = self.p.max(axis=1)
        return np.minimum((confidence * self.bins).astype(np.int64), self.bins - 1)

    def _columns(self, index: np.ndarray, width: int, value: Any = None) -> sparse.csr_array:
        """[n, width] with `value` (1) at column index[i] of row i."""
        value = np.ones(len(index)) if value is None else np.asarray(value, np.float64)
        return sparse.csr_array((value, (np.arange(len(index)), index)), (len(index), width))

    def statistics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """{measure: [R]} for weights [R, n]; NaN where undefined."""
        right = self.predicted == self.y
        total = weights.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing are NaN
            out = {"accuracy": weights @ right / total, "nll": weights @ self.nats / total}
            out |= {f"top{k}": weights @ (self.rank < k) / total for k in self.ks}
            true = weights @ self._columns(self.y, self.classes)
            called = weights @ self._columns(self.predicted, self.classes)
            hits = weights @ self._columns(self.y, self.classes, right)
            out |= _from_counts(true, called, hits, self.classes)
            if self.classes <= AUC_CLASSES:
                each = [weighted_auc(self.p[:, c], self.y == c, weights) for c in self._roc_classes]
                out["auc"] = np.nanmean(each, axis=0)
            gap = weights @ self._columns(self._bin, self.bins, right - self.p.max(axis=1))
            out["ece"] = np.abs(gap).sum(axis=1) / total
        return out

    @property
    def _roc_classes(self) -> range:
        """One curve for two classes, of class 1; else one per class against the rest."""
        return range(1, 2) if self.classes == 2 else range(self.classes)

    def report(self) -> dict[str, Any]:
        """Everything, as JSON values: values, notes, per_class, confusion, confused, roc, calibration."""
        out: dict[str, Any] = {"examples": len(self.y), "classes": self.names, "values": {}, "notes": {}}
        if self.broken:
            out["notes"]["all"] = f"{self.broken} of {len(self.y)} rows of probabilities are not finite"
            names = self._shape_names()
            return out | {"values": dict.fromkeys(names), "per_class": [], "confused": [], "roc": []} | {
                "confusion": None, "calibration": []
            }  # fmt: skip
        self._ranked(out)
        self._counted(out)
        self._curves(out)
        self._calibrated(out)
        return out

    def _shape_names(self) -> list[str]:
        averaged = [f"{m}_{a}" for m in ("precision", "recall", "f1") for a in ("micro", "macro")]
        positive = ["precision", "recall", "f1"] if self.classes == 2 else []
        tops = [f"top{k}" for k in self.ks]
        return ["accuracy", *tops, "nll", *positive, *averaged, "mcc", "auc", "ece"]

    def _ranked(self, out: dict[str, Any]) -> None:
        from sklearn import metrics

        values = out["values"]
        values["accuracy"] = float(metrics.accuracy_score(self.y, self.predicted))
        for k in self.ks:
            values[f"top{k}"] = float(np.mean(self.rank < k))
        values["nll"] = float(self.nats.mean())

    def _counted(self, out: dict[str, Any]) -> None:
        from sklearn import metrics

        values, notes, labels = out["values"], out["notes"], np.arange(self.classes)
        *each, support = metrics.precision_recall_fscore_support(
            self.y, self.predicted, labels=labels, zero_division=np.nan
        )
        called = np.bincount(self.predicted, minlength=self.classes)
        each = dict(zip(("precision", "recall", "f1"), each, strict=True))
        out["per_class"] = [
            {"name": self.names[c], "support": int(support[c]), "predicted": int(called[c])}
            | {name: _number(value[c]) for name, value in each.items()}
            for c in labels
        ]
        why = {"precision": "never predicted", "recall": "without examples", "f1": "neither there nor predicted"}
        for name, value in each.items():
            defined = value[np.isfinite(value)]
            values[f"{name}_micro"] = values["accuracy"]
            values[f"{name}_macro"] = float(defined.mean()) if len(defined) else None
            lacking = [self.names[c] for c in np.flatnonzero(np.isnan(value))]
            if lacking:
                notes[f"{name}_macro"] = f"averaged without {_few(lacking)}: {why[name]}"
            if self.classes == 2:
                values[name] = _number(value[1])
                if values[name] is None:
                    notes[name] = f"class {self.names[1]} is {why[name]}"
        values["mcc"] = None
        if (support > 0).sum() < 2:
            notes["mcc"] = "all labels are of one class"
        elif (called > 0).sum() < 2:
            notes["mcc"] = "one class was predicted for every example"
        else:
            values["mcc"] = float(metrics.matthews_corrcoef(self.y, self.predicted))
        matrix = metrics.confusion_matrix(self.y, self.predicted, labels=labels)
        out["confused"] = self._confused(matrix)
        out["confusion"] = matrix.tolist() if self.classes <= SHOWN_CLASSES else None
        if out["confusion"] is None:
            notes["confusion"] = f"{self.classes} classes: only the largest confusions are listed"

    def _confused(self, matrix: np.ndarray) -> list[dict[str, Any]]:
        wrong = matrix - np.diag(np.diag(matrix))
        order = np.argsort(-wrong, axis=None, kind="stable")[:20]
        pairs = [divmod(int(i), self.classes) for i in order]
        return [
            {"label": self.names[a], "predicted": self.names[b], "count": int(wrong[a, b])}
            for a, b in pairs if wrong[a, b]
        ]  # fmt: skip

    def _curves(self, out: dict[str, Any]) -> None:
        from sklearn import metrics

        out["roc"], missing = [], []
        for c in self._roc_classes:
            positive = self.y == c
            if positive.all() or not positive.any():
                missing.append(self.names[c])
                continue
            fpr, tpr, _ = metrics.roc_curve(positive, self.p[:, c])
            area = float(metrics.auc(fpr, tpr))
            at = np.unique(np.linspace(0, len(fpr) - 1, min(len(fpr), _POINTS)).astype(int))
            curve = {"fpr": fpr[at].round(6).tolist(), "tpr": tpr[at].round(6).tolist()}
            out["roc"].append({"name": self.names[c], "auc": area} | curve)
        areas = [curve["auc"] for curve in out["roc"]]
        if self.classes > SHOWN_CLASSES:
            out["roc"] = sorted(out["roc"], key=lambda curve: curve["auc"])[:20]
            out["notes"]["roc"] = f"{self.classes} classes: only the 20 worst curves are listed"
        out["values"]["auc"] = float(np.mean(areas)) if areas else None
        if not areas:
            out["notes"]["auc"] = "all labels are of one class"
        elif missing:
            out["notes"]["auc"] = f"averaged without {_few(missing)}: without examples"

    def _calibrated(self, out: dict[str, Any]) -> None:
        confidence, right = self.p.max(axis=1), self.predicted == self.y
        count = np.bincount(self._bin, minlength=self.bins)
        pair = {"confidence": confidence, "accuracy": right}
        sums = {name: np.bincount(self._bin, x, minlength=self.bins) for name, x in pair.items()}
        out["calibration"] = [
            {"low": b / self.bins, "high": (b + 1) / self.bins, "count": int(count[b])}
            | {k: float(s[b] / count[b]) if count[b] else None for k, s in sums.items()}
            for b in range(self.bins)
        ]
        out["values"]["ece"] = float(np.abs(sums["confidence"] - sums["accuracy"]).sum() / len(self.y))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _from_counts(true: np.ndarray, called: np.ndarray, hits: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Averages and MCC (Gorodkin 2004, multi-class) from counts per class, each [R, C]."""
    each = {"precision": hits / called, "recall": hits / true, "f1": 2 * hits / (true + called)}
    total = true.sum(axis=1)
    out = {}
    for name, value in each.items():
        if classes == 2:
            out[name] = value[:, 1]
        out[f"{name}_micro"] = hits.sum(axis=1) / total
        out[f"{name}_macro"] = np.nanmean(value, axis=1)
    top = hits.sum(axis=1) * total - (true * called).sum(axis=1)
    spread = (total**2 - (true**2).sum(axis=1)) * (total**2 - (called**2).sum(axis=1))
    out["mcc"] = np.where(spread > 0, top / np.sqrt(np.maximum(spread, 0)), np.nan)
    return out


def weighted_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve [R] for weights [R, n]: the share of (positive, negative) pairs in order,
    ties half. NaN where one side has no weight."""
    values, at = np.unique(scores, return_inverse=True)
    order = np.argsort(at, kind="stable")
    starts = np.searchsorted(at[order], np.arange(len(values)))
    plus = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    minus = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(minus, axis=1) - minus
    pairs = plus.sum(axis=1) * minus.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (plus * (below + 0.5 * minus)).sum(axis=1) / pairs
