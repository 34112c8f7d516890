"""Splits of a table as pure functions of (seed, fold), and what would make them dishonest: duplicates.

A row's fold depends on the seed, the labels and the groups, never on hash order, platform or earlier calls.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmodel_jax.data.order import RowRng
from bigmodel_jax.errors import InputError

log = logging.getLogger(__name__)
DROP = ("none", "exact", "normalised")
_NOT_WORD = re.compile(r"[\W_]+")


def shuffled(n: int, seed: int, salt: str) -> np.ndarray:
    """A permutation of n rows."""
    return np.argsort(RowRng(seed, np.arange(n)).bits(salt=salt), kind="stable")


def folds(
    n: int, count: int, *, seed: int, labels: Sequence[int] | None = None, groups: Sequence[Any] | None = None
) -> np.ndarray:
    """[n] int64: the fold, 0 to count - 1, that each row is held out in.

    Args:
      labels: every fold gets its share of each class (to one row).
      groups: rows of one group stay in one fold; with labels, groups are placed, the largest first, where
        the shares of the classes stay closest to even.

    Errors: InputError when there are fewer rows or groups than folds.
    """
    if count < 2:
        raise InputError(f"{count} folds: at least 2")
    found = n if groups is None else len(set(groups))
    if found < count:
        raise InputError(f"{count} folds need as many {'rows' if groups is None else 'groups'}; there are {found}")
    classes = np.zeros(n, np.int64) if labels is None else np.asarray(labels, np.int64)
    order = shuffled(n, seed, "folds")
    out = np.empty(n, np.int64)
    if groups is None:
        # One deal over all classes in turn: each class, and the whole, is even to one row.
        dealt = order[np.argsort(classes[order], kind="stable")]
        out[dealt] = np.arange(n) % count
        return out
    names, which = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    table = np.zeros((len(names), int(classes.max()) + 1))
    np.add.at(table, (which, classes), 1)
    shares = table / np.maximum(table.sum(0), 1)
    turn = shuffled(len(names), seed, "groups")
    turn = turn[np.argsort(-table.sum(1)[turn], kind="stable")]
    held, place = np.zeros((count, table.shape[1])), np.empty(len(names), np.int64)
    for group in turn:
        # Growth of the sum of squares: least where these classes are rarest so far.
        cost = ((held + shares[group]) ** 2).sum(1) - (held**2).sum(1)
        place[group] = int(np.argmin(cost))
        held[place[group]] += shares[group]
    out[:] = place[which]
    return out


def held_out(
    n: int, share: float, *, seed: int, labels: Sequence[int] | None = None, groups: Sequence[Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(rows kept, rows held out), ascending: one fold of the nearest whole number of folds to 1 / share."""
    if not 0 < share < 1:
        raise InputError(f"a held-out share of {share} must lie between 0 and 1")
    # Where more than half is held out, the fold is what is kept.
    small = min(share, 1 - share)
    fold = folds(n, max(2, round(1 / small)), seed=seed, labels=labels, groups=groups) == 0
    fold = fold if share <= 0.5 else ~fold
    return np.flatnonzero(~fold), np.flatnonzero(fold)


def normalised(text: str) -> str:
    """`text` as duplicates are compared: NFKC, no case, punctuation or spacing; as it is when nothing is left."""
    words = _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return words or text.strip()


def duplicates(
    splits: Mapping[str, Sequence[str]], labels: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, Any]:
    """What is there twice.

    Args:
      splits: texts by split. labels: of the same rows, to count texts with more than one label.

    Returns:
      {"exact" and "normalised": {split: rows that repeat an earlier one of it},
       "between": {"a/b": {"exact", "normalised": rows of b that are in a}}, "conflicting": texts with several
       labels}. Normalised counts include the exact ones.
    """
    forms = {"exact": lambda text: text, "normalised": normalised}
    keys = {form: {name: [fn(t) for t in texts] for name, texts in splits.items()} for form, fn in forms.items()}
    out: dict[str, Any] = {
        form: {name: len(k) - len(set(k)) for name, k in found.items()} for form, found in keys.items()
    }
    names, between = list(splits), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            between[f"{first}/{second}"] = {
                form: sum(key in seen for key in found[second])
                for form, found in keys.items()
                for seen in [set(found[first])]
            }
    out["between"] = between
    if labels is not None:
        seen: dict[str, set[Any]] = {}
        for name, found in keys["normalised"].items():
            for key, label in zip(found, labels[name], strict=True):
                seen.setdefault(key, set()).add(label)
        out["conflicting"] = sum(len(each) > 1 for each in seen.values())
    return out


def say_duplicates(report: Mapping[str, Any], done: str) -> None:
    """One line on the screen for a report of `duplicates` that found some. done: what became of them."""
    rows = sum(report["normalised"].values())
    across = sum(pair["normalised"] for pair in report["between"].values())
    if rows or across:
        log.info(
            "duplicates: %d rows repeat another of their file (%d exactly), %d are in two files, %d texts have "
            "several labels; %s", rows, sum(report["exact"].values()), across, report.get("conflicting", 0), done,
        )  # fmt: skip


def without_duplicates(texts: Sequence[str], how: str, keep_out_of: Sequence[str] = ()) -> np.ndarray:
    """Rows to keep, ascending: the first of each text, and none that is in `keep_out_of` (a test set).

    how: "none" keeps all, "exact" and "normalised" say when two texts are one.
    """
    if how not in DROP:
        raise InputError(f"drop_duplicates '{how}' should be one of {', '.join(DROP)}")
    if how == "none":
        return np.arange(len(texts))
    form = normalised if how == "normalised" else str
    seen, rows = {form(text) for text in keep_out_of}, []
    for row, text in enumerate(texts):
        key = form(text)
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return np.array(rows, np.int64)
