"""Leaves chosen per variant before its seeds run, on seeds of their own: a grid (`tune`) or a search (`search`).

A method is a generator that yields points to try and is sent their scores; search.py has them. The runs are cells
of the store like all others, so going through the generator again after a kill costs nothing: finished points
answer at once, and the same scores lead to the same next points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bigmodel_jax.study import search
from bigmodel_jax.study.search import Method, Point
from bigmodel_jax.study.spec import Row, Study
from bigmodel_jax.study.store import Cell, Store


@dataclass(frozen=True)
class Tried:
    """One point: its overrides, the metric on each tuning seed (NaN where it diverged), and their mean."""

    overrides: Point
    values: list[float]
    mean: float


@dataclass(frozen=True)
class Choice:
    """What a variant runs with. edge: leaves whose best value is the outermost that was tried."""

    overrides: Point
    tried: list[Tried]
    edge: list[str]


def grid(axes: Mapping[str, Sequence[Any]]) -> Method:
    """Every combination, at once."""
    yield [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def method(study: Study) -> Method:
    """How leaves are looked for."""
    return search.make(study.search) if study.search else grid(study.tune)


def tune(store: Store, variants: Sequence[str], run: Callable[[Sequence[Cell]], Sequence[Row]]) -> dict[str, Choice]:
    """The choice of every variant that could be made; all variants go forward together.

    Args:
      run: carries out cells and returns the rows it has; a point lacking one is not scored.
    """
    study = store.study
    methods = {variant: method(study) for variant in variants}
    asked = {variant: next(each) for variant, each in methods.items()}
    tried: dict[str, list[Tried]] = {variant: [] for variant in variants}
    while asked:
        cells = {
            (variant, n): [store.cell(variant, seed, point, "tune") for seed in study.tune_seeds]
            for variant, points in asked.items() for n, point in enumerate(points)
        }  # fmt: skip
        rows = {row.cell: row for row in run(_by_seed(cells))}
        following = {}
        for variant, points in asked.items():
            found = [_tried(study, point, cells[variant, n], rows) for n, point in enumerate(points)]
            if None in found:
                tried.pop(variant)
                continue
            tried[variant] += found
            try:
                following[variant] = methods[variant].send([_score(study, each) for each in found])
            except StopIteration:
                continue
        asked = following
    return {variant: choose(study, each) for variant, each in tried.items()}


def _by_seed(cells: Mapping[Any, Sequence[Cell]]) -> list[Cell]:
    return [cell for group in zip(*cells.values(), strict=True) for cell in group]


def _tried(study: Study, point: Point, cells: Sequence[Cell], rows: Mapping[str, Row]) -> Tried | None:
    found = [rows.get(cell.id) for cell in cells]
    if any(row is None or row.status == "failed" for row in found):
        return None
    values = [row.values[study.metric] if row.status == "done" else math.nan for row in found]
    return Tried(point, values, sum(values) / len(values))


def _score(study: Study, tried: Tried) -> float:
    if math.isnan(tried.mean):
        return math.inf
    return tried.mean if study.mode == "min" else -tried.mean


def choose(study: Study, tried: Sequence[Tried]) -> Choice:
    """The best point at full length, and whether it lies at an edge of what was tried.

    Of points that are equally good the middle one by value is taken, the lower of two: good on both of its sides, it
    is the least likely to be good by luck. One that diverged on any seed is never best, unless all did: then the first
    is taken, and its runs will tell.
    """
    longest = max((each.overrides.get("steps", 0) for each in tried), default=0)
    full = [each for each in tried if each.overrides.get("steps", 0) == longest]
    least = min(_score(study, each) for each in full)
    tied = [each for each in full if math.isclose(_score(study, each), least, rel_tol=1e-9)]
    if math.isfinite(least):
        tied.sort(key=lambda each: [value for value in each.overrides.values() if _is_number(value)])
    best = tied[(len(tied) - 1) // 2 if math.isfinite(least) else 0]
    overrides = {leaf: value for leaf, value in best.overrides.items() if leaf != "steps"}
    axes = study.search["leaves"] if study.search else study.tune
    edge = [leaf for leaf, value in overrides.items() if _is_number(value) and at_edge(axes[leaf], value)]
    return Choice(overrides, list(tried), edge)


def at_edge(axis: Any, value: float, margin: float = 0.05) -> bool:
    """Whether a value lies at the end of its axis: the least or largest choice, or within `margin` of a range's end."""
    if not isinstance(axis, Mapping):
        return len(axis) > 1 and value in (min(axis), max(axis))
    ends = axis["low"], axis["high"]
    low, high, at = (math.log(x) for x in (*ends, value)) if axis.get("log") else (*ends, value)
    return not margin < (at - low) / (high - low) < 1 - margin


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """For tuned.json."""
    return {variant: asdict(choice) for variant, choice in choices.items()}


def lines(choices: Mapping[str, Choice], metric: str) -> list[str]:
    """What a person is told of each choice."""
    out = []
    for variant, choice in choices.items():
        shown = ", ".join(f"{leaf}={value:.6g}" if isinstance(value, float) else f"{leaf}={value}"
                          for leaf, value in choice.overrides.items())  # fmt: skip
        best = [each.mean for each in choice.tried if choice.overrides.items() <= each.overrides.items()]
        edge = f"; at the edge of what was tried: {', '.join(choice.edge)}" if choice.edge else ""
        out.append(f"{variant}: {shown} ({metric} {best[-1]:.5g} over {len(choice.tried)} points{edge})")
    return out
