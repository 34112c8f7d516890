"""Rows of a study from what a run left, and as plain values that are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bigmodel_jax import metrics
from bigmodel_jax.study.spec import Row


def difference(values: Sequence[float]) -> float:
    """A metric by its one term, or its two."""
    return values[0] if len(values) == 1 else values[0] - values[1]


def curve(terms: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, metric) of every evaluation that has all of it."""
    seen: list[dict[int, float]] = []
    for term in terms:
        name, _, metric = term.removeprefix("best/").partition("/")
        evals = (row for row in rows if row.get("event") == "eval" and row["name"] == name and metric in row)
        seen.append({row["step"]: float(row[metric]) for row in evals})
    return [(step, difference([part[step] for part in seen])) for step in seen[0] if all(step in p for p in seen)]


def numbers(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`Row.values` of result.json and the rows of metrics.jsonl, but for the study's metric."""
    out: dict[str, float] = {}
    best = result.get("best", {})
    for prefix, sets in (("", result.get("eval", {})), ("best/", best.get("eval", {}))):
        for name, found in sets.items():
            out |= {f"{prefix}{name}/{key}": float(metrics.decode(x)) for key, x in (found or {}).items()}
    trained = [row for row in rows if "event" not in row]
    if trained:
        found = {key: x for key, x in trained[-1].items() if key not in metrics.RESERVED}
        out |= {f"train/{key}": float(x) for key, x in found.items() if isinstance(x, (int, float))}
    out |= {f"rows/{name}": float(count) for name, count in result.get("rows", {}).items()}
    for key in ("parameters", "step"):
        if key in result:
            out[key] = float(result[key])
    if "step" in best:
        out["best/step"] = float(best["step"])
    return out


def plain(row: Row) -> dict[str, Any]:
    """For JSON."""
    return metrics.encode(dataclasses.asdict(row))


def from_plain(values: Mapping[str, Any]) -> Row:
    """The row that `plain` gave, whatever else was kept beside it."""
    names = {f.name for f in dataclasses.fields(Row)}
    found = metrics.decode({key: value for key, value in values.items() if key in names})
    return Row(**{**found, "curve": [(int(step), float(value)) for step, value in found["curve"]]})
