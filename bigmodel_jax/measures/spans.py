"""Answers cut out of a text: exact match and word overlap (SQuAD 1.1, Rajpurkar et al. 2016), and the
best span of a row from its logits."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures.intervals import bootstrap, ratio

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces: as SQuAD compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals a reference after `normalise`. No references: nothing is the answer."""
    return float(any(normalise(prediction) == normalise(text) for text in references or [""]))


def overlap(prediction: str, references: Sequence[str]) -> float:
    """Largest F1 of the words of prediction and a reference; 1.0 where both are empty, as in SQuAD 2.0."""
    return max(_overlap(normalise(prediction).split(), normalise(text).split()) for text in references or [""])


def _overlap(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    same = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    return 2 * same / (len(predicted) + len(wanted))


def check_pairs(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Errors: InputError unless there is one list of references per prediction, and at least one of each."""
    if not len(predictions) or len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions for {len(references)} lists of references")
    if any(isinstance(texts, str) for texts in references):
        raise InputError("references are a list of accepted texts per prediction, not one text")


def measure(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, groups: Any = None, **options: Any
) -> dict[str, Any]:
    """{"values", "intervals", "notes", "per_example"} with exact_match and f1, both in 0..1.

    references: accepted answers of each prediction; [] where the right answer is none.
    groups, options: as in intervals.bootstrap.
    """
    check_pairs(predictions, references)
    pairs = list(zip(predictions, references, strict=True))
    each = {"exact_match": [exact(*pair) for pair in pairs], "f1": [overlap(*pair) for pair in pairs]}
    statistics = {name: ratio(np.array(values)) for name, values in each.items()}
    found = bootstrap(lambda w: {name: fn(w) for name, fn in statistics.items()}, len(pairs), groups=groups, **options)
    return {
        "examples": len(pairs),
        "values": {name: float(np.mean(values)) for name, values in each.items()},
        "intervals": {name: interval.json() for name, interval in found.items()},
        "notes": {},
        "per_example": each,
    }


def best_span(start: np.ndarray, end: np.ndarray, longest: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, last, score), each [n]: the span of at most `longest` tokens with the largest sum of logits.

    Args:
      start, end: logits [n, L]; very low where a token is no candidate.

    Among equals the earliest start, then the shortest span.
    """
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
    if start.ndim != 2 or start.shape != end.shape or longest < 1:
        raise InputError(f"spans: logits [n, L] of start and end, not {start.shape}, {end.shape}; longest {longest}")
    count, length = start.shape
    width = min(longest, length)
    scores = np.full((count, length, width), -np.inf)
    for w in range(width):
        scores[:, : length - w, w] = start[:, : length - w] + end[:, w:]
    best = scores.reshape(count, -1).argmax(axis=1)
    first, extra = np.divmod(best, width)
    return first, first + extra, scores.reshape(count, -1)[np.arange(count), best]
