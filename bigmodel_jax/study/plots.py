"""Plots of a study: every seed, gains over the baseline, learning curves, tuned leaves, heat maps.

Each function draws on one axis; `drawn` turns them into SVG (page), PNG (Markdown) or PDF (LaTeX). Variants differ by
colour, and also by marker and line style or by their place with a name beside it, so that a print or a colour-blind
reader loses nothing. A diverged run is a cross at the edge where the worst values are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bigmodel_jax.measures.look import INK, PAPER
from bigmodel_jax.measures.plots import figure

# Each at least 3 to 1 against both the light and the dark paper.
COLOURS = ("#2b7bba", "#d2601a", "#1f9068", "#b8569a", "#8f7a1e", "#7b68c8", "#c0474f", "#5d7f8c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3, 1, 3)))
CURVES = 8  # curves in one plot; of more variants, the best and the baseline
GRID = "#8894a0"
Draw = Callable[[Any], None]


def drawn(draw: Draw, size: tuple[float, float], forms: Sequence[str] = ("svg", "png", "pdf")) -> dict[str, bytes]:
    """The same drawing in several forms."""
    return {form: figure(draw, size, form) for form in forms}


def style(place: int) -> dict[str, Any]:
    """Colour, marker and line of the variant at a place in the study's order."""
    return {
        "color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[(place + place // len(COLOURS)) % len(LINES)],
    }  # fmt: skip


def _named_rows(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), [short(name) for name in names], fontsize=9 if len(names) < 12 else 8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", color=GRID, alpha=0.3, linewidth=0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _columns(names: Sequence[str]) -> int:
    return 2 if max(map(len, names), default=0) <= 20 else 1


def _legend(axis: Any) -> None:
    names = axis.get_legend_handles_labels()[1]
    axis.legend(frameon=False, fontsize=8, ncols=_columns(names), loc="upper center", bbox_to_anchor=(0.45, -0.17),
                handlelength=3.6, labelcolor=INK)  # fmt: skip


def _whisker(axis: Any, interval: Mapping[str, Any], y: float) -> None:
    if interval["low"] is not None:
        axis.errorbar(
            interval["estimate"], y, fmt="none", ecolor=INK, elinewidth=1.4, capsize=3.5, zorder=4,
            xerr=[[interval["estimate"] - interval["low"]], [interval["high"] - interval["estimate"]]],
        )  # fmt: skip


def _lines(metric: str) -> str:
    """A difference of two metrics on two lines, where one would not fit beside an axis."""
    return metric.replace(" - ", "\n− ")


def _apart(values: np.ndarray) -> np.ndarray:
    """Offsets that set equal values one above the other, around 0."""
    same = values[:, None] == values[None, :]
    rank = np.tril(same, -1).sum(1)
    return 0.15 * (rank - (same.sum(1) - 1) / 2)


def seeds(variants: Sequence[Mapping[str, Any]], metric: str, mode: str, axis: Any) -> None:
    """Every run as a point, with the mean and its 95% t interval; a thin line joins runs of one seed."""
    _named_rows(axis, [v["name"] for v in variants])
    fine = [x for v in variants for x in v["values"].values() if math.isfinite(x)]
    if fine:
        low, high = min(fine), max(fine)
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        edge = high + 1.5 * pad if mode == "min" else low - 1.5 * pad
        shared = sorted({seed for v in variants for seed in v["values"]}) if len(variants) <= 12 else []
        for seed in shared:
            points = [(v["values"].get(seed, math.nan), y) for y, v in enumerate(variants)]
            axis.plot(*zip(*points, strict=True), color=GRID, alpha=0.35, linewidth=0.7, zorder=1)
        for y, v in enumerate(variants):
            look = style(y)
            runs = np.array([x for x in v["values"].values() if math.isfinite(x)])
            axis.scatter(runs, y + _apart(runs), s=26, alpha=0.75, color=look["color"], marker=look["marker"],
                         linewidths=0, zorder=3)  # fmt: skip
            if v["diverged"]:
                axis.scatter([edge], [y], marker="x", s=40, color=INK, zorder=3)
                axis.annotate(f"{v['diverged']} diverged", (edge, y), xytext=(0, 7), textcoords="offset points",
                              ha="right" if mode == "min" else "left", fontsize=7)  # fmt: skip
            if v["mean"] is not None:
                axis.plot([v["mean"]] * 2, [y - 0.28, y + 0.28], color=INK, linewidth=2, zorder=5)
                _whisker(axis, v["student"], y)
    better = "less" if mode == "min" else "more"
    axis.set_xlabel(f"{_lines(metric)} ({better} is better)", loc="right")


def gains(variants: Sequence[Mapping[str, Any]], baseline: str, axis: Any) -> None:
    """Bars from 0: the mean gain over the baseline, its 95% t interval, and the gain of every seed."""
    others = [(place, v) for place, v in enumerate(variants) if v["name"] != baseline]
    _named_rows(axis, [v["name"] for _, v in others])
    axis.axvline(0, color=INK, linewidth=1, zorder=2)
    for y, (place, v) in enumerate(others):
        against, look = v["against"], style(place)
        fine = [gain for gain in against["gains"].values() if math.isfinite(gain)]
        if against["mean"] is not None:
            axis.barh(y, against["mean"], height=0.62, color=look["color"], alpha=0.55, zorder=1)
            _whisker(axis, against["student"], y)
        axis.scatter(fine, np.full(len(fine), y), s=16, color=look["color"], marker=look["marker"], zorder=3,
                     edgecolors=PAPER, linewidths=0.4)  # fmt: skip
        if len(fine) < len(against["gains"]):
            axis.text(0.99, y - 0.3, "runs diverged: no mean gain", transform=axis.get_yaxis_transform(), fontsize=7,
                      ha="right")  # fmt: skip
    axis.set_xlabel("gain over the baseline (right is better)", loc="right")


def band(curves: Mapping[Any, Sequence[Sequence[float]]], overlap: float | None = None) -> tuple[np.ndarray, ...]:
    """(steps, mean, low, high): the mean over seeds (or folds) and its 95% t interval, where all have one."""
    from scipy.special import stdtrit

    from bigmodel_jax.study.statistics import widened

    tables = [dict(map(tuple, curve)) for curve in curves.values() if len(curve)]
    steps = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    values = np.array([[t[step] for step in steps] for t in tables], np.float64).reshape(len(tables), len(steps))
    mean = values.mean(axis=0) if len(tables) else np.zeros(0)
    n = len(tables)
    half = stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(len(steps))
    half = half * widened(n, overlap)
    return np.array(steps), mean, mean - half, mean + half


def shown_curves(variants: Sequence[Mapping[str, Any]], baseline: str, mode: str) -> list[int]:
    """Places of the variants whose curves are drawn: all, or the baseline and the best where there are many."""
    places = [i for i, v in enumerate(variants) if any(v["curves"].values())]
    if len(places) <= CURVES:
        return places

    def rank(i: int) -> tuple[bool, float]:
        mean = variants[i]["mean"]
        worst = mean is None or variants[i]["diverged"] > 0
        return variants[i]["name"] != baseline, math.inf if worst else (mean if mode == "min" else -mean)

    return sorted(sorted(places, key=rank)[:CURVES])


def curves(variants: Sequence[Mapping[str, Any]], metric: str, baseline: str, mode: str, axis: Any, *,
           overlap: float | None = None) -> None:  # fmt: skip
    """Mean over seeds (or folds) at each evaluation, with its interval as a band."""
    early, late = [], []
    for i in shown_curves(variants, baseline, mode):
        steps, mean, low, high = band(variants[i]["curves"], overlap)
        if not len(steps):
            continue
        look = style(i)
        axis.plot(steps, mean, label=short(variants[i]["name"]), linewidth=1.5, markersize=4,
                  markevery=max(1, len(steps) // 8), **look)  # fmt: skip
        axis.fill_between(steps, low, high, color=look["color"], alpha=0.18, linewidth=0)
        finite = mean[np.isfinite(mean)]
        if len(finite):
            early.append(finite[min(len(finite) - 1, max(1, len(finite) // 6))])
            late.append(finite[-1])
    axis.set(xlabel="step", ylabel=_lines(metric))
    axis.grid(color=GRID, alpha=0.3, linewidth=0.6)
    if late:
        # The first evaluations are far away from where variants differ.
        pad = 0.08 * (max(early + late) - min(early + late)) or 0.05 * abs(late[0]) or 1.0
        axis.set_ylim(min(early + late) - pad, max(early + late) + pad)
        _legend(axis)


def tuned(points: Mapping[str, Sequence[Mapping[str, Any]]], leaf: str, metric: str, order: Sequence[str], mode: str,
          axis: Any) -> None:  # fmt: skip
    """The metric at each value tried of a leaf: all runs as points, a line through the best of each value.

    points: {variant: dicts with value, metric, chosen, edge}. The chosen value is ringed, with "edge" above it where
    it is the outermost one tried.
    """
    values = [p["value"] for tried in points.values() for p in tried]
    if min(values) > 0 and max(values) >= 8 * min(values):
        axis.set_xscale("log")
        axis.set_xticks(sorted(set(values)), [f"{x:g}" for x in sorted(set(values))], fontsize=7)
        axis.minorticks_off()
    fine = [p["metric"] for tried in points.values() for p in tried if math.isfinite(p["metric"])]
    for name, tried in points.items():
        look = style(list(order).index(name))
        runs = [p for p in tried if math.isfinite(p["metric"])]
        axis.scatter([p["value"] for p in runs], [p["metric"] for p in runs], s=18, color=look["color"],
                     marker=look["marker"], alpha=0.7, linewidths=0)  # fmt: skip
        best: dict[float, float] = {}
        for p in runs:
            best[p["value"]] = (min if mode == "min" else max)(p["metric"], best.get(p["value"], p["metric"]))
        line = sorted(best.items())
        axis.plot([x for x, _ in line], [y for _, y in line], linewidth=1.3, label=short(name), markersize=4, **look)
        for p in (p for p in runs if p["chosen"]):
            axis.scatter([p["value"]], [p["metric"]], s=95, facecolors="none", edgecolors=INK, linewidths=1.2)
            if p["edge"]:
                axis.annotate("edge", (p["value"], p["metric"]), xytext=(0, 9), textcoords="offset points",
                              ha="center", fontsize=7, fontweight="bold")  # fmt: skip
    if fine:
        # Values far off the chosen ones would press the rest together.
        chosen = [p["metric"] for tried in points.values() for p in tried if p["chosen"] and math.isfinite(p["metric"])]
        inner = np.quantile(fine, (0, 0.75) if mode == "min" else (0.25, 1))
        low, high = min([inner[0], *chosen]), max([inner[1], *chosen])
        pad = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
        axis.set_ylim(low - pad, high + pad)
    axis.set(xlabel=leaf, ylabel=_lines(metric))
    axis.grid(color=GRID, alpha=0.3, linewidth=0.6)
    _legend(axis)


def heat(grid: Mapping[str, Any], mode: str, axis: Any) -> None:
    """A heat map of two leaves: numbers in the cells, the best one framed; a cross is a run that diverged, a dash none.

    grid: x, y (names), xs, ys (values), z (rows of y, columns of x; None is missing, NaN diverged).
    """
    z = np.array([[math.nan if v is None else v for v in row] for row in grid["z"]], np.float64)
    fine = z[np.isfinite(z)]
    if not len(fine):
        return
    best = fine.min() if mode == "min" else fine.max()
    far = np.quantile(fine, 0.8 if mode == "min" else 0.2)
    image = axis.imshow(z, cmap="viridis_r" if mode == "min" else "viridis", aspect="auto",
                        vmin=min(best, far), vmax=max(best, far) or None)  # fmt: skip
    for i, row in enumerate(grid["z"]):
        for j, value in enumerate(row):
            if value is None or not math.isfinite(value):
                axis.text(j, i, "–" if value is None else "×", ha="center", va="center", fontsize=8)
                continue
            r, g, b, _ = image.cmap(image.norm(value))
            dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.5
            colour = "#fefefe" if dark else "#101010"
            axis.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=8, color=colour)
            if value == best:
                sides = [j - 0.47, j + 0.47, j + 0.47, j - 0.47, j - 0.47], [i - 0.47] * 2 + [i + 0.47] * 2 + [i - 0.47]
                axis.plot(*sides, color=COLOURS[1], linewidth=2.5)
    axis.set_xticks(range(len(grid["xs"])), [f"{x:g}" for x in grid["xs"]], fontsize=8)
    axis.set_yticks(range(len(grid["ys"])), [f"{y:g}" for y in grid["ys"]], fontsize=8)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)
    axis.set(xlabel=grid["x"], ylabel=grid["y"], title="")
    axis.figure.colorbar(image, ax=axis, shrink=0.8)


def all_plots(report: Mapping[str, Any], forms: Sequence[str]) -> dict[str, tuple[str, str, dict[str, bytes]]]:
    """{file name: (caption, description for those who cannot see it, {form: bytes})} of a report (see findings.py)."""
    variants, metric, mode, baseline = (report[k] for k in ("variants", "metric", "mode", "baseline"))
    done = [v for v in variants if v["values"]]
    each, same, units = ("run", "seed and fold", "fold") if report["folds"] else ("seed", "seed", "seed")
    order = [v["name"] for v in variants]
    height = 1.3 + 0.36 * len(done)
    out = {}
    if done:
        caption = f"Every {each} (thin lines join the same {same}), with the mean and its 95% t interval"
        alt = "; ".join(f"{v['name']}: {words(v)}" for v in done)
        out["seeds"] = caption, alt, drawn(partial(seeds, done, metric, mode), (4.2, height), forms)
    compared = [v for v in done if v["name"] == baseline or v["against"]]
    if len(compared) > 1:
        caption = f"Mean gain over {baseline} in {metric}, its 95% t interval, and the gain on each common {units}"
        alt = "; ".join(f"{v['name']}: {against_words(v)}" for v in compared if v["name"] != baseline)
        out["gains"] = caption, alt, drawn(partial(gains, compared, baseline), (4.2, height), forms)
    if any(len(curve) > 1 for v in done for curve in v["curves"].values()):
        few = len(shown_curves(variants, baseline, mode)) < sum(any(v["curves"].values()) for v in variants)
        caption = f"Mean over {units}s at each evaluation, with its 95% t interval as a band" + (
            f"; the baseline and the best {CURVES - 1} only" if few else ""
        )
        names = [variants[i]["name"] for i in shown_curves(variants, baseline, mode)]
        rows = math.ceil(len(names) / _columns(names))
        size = (4.2, 3.2 + 0.2 * rows)
        draw = partial(curves, variants, metric, baseline, mode, overlap=report["overlap"])
        out["curves"] = caption, caption, drawn(draw, size, forms)
    for leaf, points in report["tuned"].items():
        caption = f"{leaf} as tried on the tuning seeds; rings are the values chosen"
        alt = "; ".join(f"{name}: {next((p['value'] for p in tried if p['chosen']), 'none')} chosen"
                        for name, tried in points.items())  # fmt: skip
        rows = math.ceil(len(points) / _columns(list(points)))
        size = (4.2, 3.2 + 0.2 * rows)
        draw = partial(tuned, points, leaf, metric, order, mode)
        out[f"tuned-{leaf.replace('.', '-')}"] = caption, alt, drawn(draw, size, forms)
    for number, grid in enumerate(report["grids"]):
        caption = f"{grid['title']}: {metric} over {grid['x']} and {grid['y']}; the best is framed, × diverged"
        size = (1.9 + 0.62 * max(4, len(grid["xs"])), 1.2 + 0.42 * max(3, len(grid["ys"])))
        out[f"grid-{number}"] = caption, caption, drawn(partial(heat, grid, mode), size, forms)
    return out


def words(v: Mapping[str, Any]) -> str:
    """A variant's result as words."""
    if v["mean"] is None:
        return f"no run finished, {v['diverged']} diverged"
    spread = "" if v["sd"] is None else f", standard deviation {v['sd']:.2g}"
    return f"mean {v['mean']:.4g}{spread} of {v['n']} runs" + (f", {v['diverged']} diverged" if v["diverged"] else "")


def against_words(v: Mapping[str, Any]) -> str:
    """A variant's gain over the baseline as words."""
    against = v["against"]
    return "no mean gain, runs diverged" if against["mean"] is None else f"mean gain {against['mean']:.3g}"
