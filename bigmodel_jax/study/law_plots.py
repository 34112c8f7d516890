"""Plots of a scaling law: loss over tokens for each size, and loss over size for each budget.

As those in plots.py: each function draws on one axis, and what it tells apart differs by more than colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmodel_jax.measures.look import INK
from bigmodel_jax.study import ladder, law
from bigmodel_jax.study.ladder import Point
from bigmodel_jax.study.plots import GRID, style


def lengths(fitted: law.Fitted, made: Sequence[Point], held: Sequence[Point], seen: Mapping[str, Point], metric: str,
            axis: Any) -> None:  # fmt: skip
    """Runs as points over their tokens, one line of the law per size; runs held out with the interval predicted.

    held: points without a loss. seen: {variant: the same point as measured}, of those that were run.
    """
    sizes = sorted({point.parameters for point in [*made, *held]})
    low, high = (f(point.tokens for point in [*made, *held]) for f in (min, max))
    tokens = np.geomspace(low / 1.15, high * 1.15, 100)
    for place, size in enumerate(sizes):
        look = style(place)
        runs = [point for point in made if point.parameters == size]
        line = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.2}
        dots = {"color": look["color"], "marker": look["marker"] if runs else "", "markersize": 5}
        axis.plot(tokens, fitted.law(size, tokens), **line)
        axis.plot([p.tokens for p in runs], [p.loss for p in runs], **dots | {"linestyle": "none"})
        axis.plot([], [], **line | dots, label=f"{ladder.short(size)} parameters")
    for point in held:
        loss, bottom, top = fitted.predict(point.parameters, point.tokens)
        axis.errorbar(point.tokens, loss, yerr=[[loss - bottom], [top - loss]], fmt="_", color=INK, capsize=4,
                      elinewidth=1.4, label=f"predicted: {loss:.4g}")  # fmt: skip
        if point.variant in seen:
            found = seen[point.variant].loss
            axis.plot(point.tokens, found, marker="*", color=INK, markersize=11, linestyle="none", zorder=5,
                      label=f"measured: {found:.4g}")  # fmt: skip
    _finished(axis, "tokens", metric)


def budgets(valleys: Sequence[law.Valley], made: Sequence[Point], metric: str, axis: Any) -> None:
    """Runs as points over their parameters, one parabola per budget, its bottom a ring, and a line through them."""
    for place, valley in enumerate(valleys):
        look = style(place)
        runs = [p for p in made if abs(np.log(p.flops / valley.flops)) < law.SAME_BUDGET]
        sizes = np.geomspace(min(p.parameters for p in runs), max(p.parameters for p in runs), 100)
        axis.plot(sizes, valley(sizes), color=look["color"], linestyle=look["linestyle"], linewidth=1.2)
        axis.plot([p.parameters for p in runs], [p.loss for p in runs], color=look["color"], marker=look["marker"],
                  linestyle="none", markersize=5, label=f"{valley.flops:.2g} FLOPs")  # fmt: skip
    axis.plot([v.parameters for v in valleys], [v.loss for v in valleys], color=INK, linewidth=1, marker="o",
              markersize=9, markerfacecolor="none", label="best sizes")  # fmt: skip
    _finished(axis, "parameters", metric)


def _finished(axis: Any, across: str, metric: str) -> None:
    axis.set_xscale("log")
    axis.set(xlabel=across, ylabel=metric)
    axis.grid(color=GRID, alpha=0.3, linewidth=0.6)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, handlelength=3.6)
