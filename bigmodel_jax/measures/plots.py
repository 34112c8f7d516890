"""Plots of an evaluation as PNG bytes: ROC, confusion matrix, reliability, spread over examples."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigmodel_jax.measures.look import INK

_INK, _LINE, _SOFT = "#1f3a5f", "#c8502f", "#9db4cc"
_CURVES = 6  # curves with a label of their own; of more classes, the rest are drawn thin


def figure(draw: Callable[[Any], None], size: tuple[float, float] = (4.6, 4.4), form: str = "png") -> bytes:
    """What `draw` puts on an axis, as "png", "svg" (without a ground) or "pdf", always the same bytes. size: inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context(colours | {"svg.hashsalt": "bigmodel", "pdf.fonttype": 42}):
        canvas = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(canvas)
        axis = canvas.add_subplot()
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis)
        out = io.BytesIO()
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
        ground = {"facecolor": "none"} if form == "svg" else {}
        canvas.savefig(out, format=form, dpi=130, metadata=metadata, **ground)
    return out.getvalue()


def roc(curves: Sequence[dict[str, Any]]) -> bytes:
    """ROC curves: dicts with name, auc, fpr, tpr. The worst ones are named where there are many."""

    def draw(axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":", label="chance")
        ordered = sorted(curves, key=lambda curve: curve["auc"])
        named = {id(curve) for curve in ordered[:_CURVES]}
        for curve in ordered:
            style = {"label": f"{_short(curve['name'])}: {curve['auc']:.3f}"} if id(curve) in named else {}
            thin = {} if style else {"color": _SOFT, "zorder": 1}
            axis.plot(curve["fpr"], curve["tpr"], linewidth=1.6 if style else 0.7, **style, **thin)
        axis.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axis.set_aspect("equal")
        title = "AUC" if len(curves) <= _CURVES else f"AUC, worst of {len(curves)}"
        axis.legend(frameon=False, fontsize=8, loc="lower right", title=title, title_fontsize=8)

    return figure(draw)


def confusion(matrix: Any, names: Sequence[str]) -> bytes:
    """Rows are labels, columns predictions; colour is the share of the row, numbers are counts."""
    counts = np.asarray(matrix)
    many = len(names)

    def draw(axis: Any) -> None:
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.figure.colorbar(image, ax=axis, shrink=0.7, label="share of the label's examples")
        if many <= 20:
            for a in range(many):
                for b in range(many):
                    if counts[a, b]:
                        colour = "white" if share[a, b] > 0.55 else "#222222"
                        axis.text(b, a, f"{counts[a, b]}", ha="center", va="center", color=colour, fontsize=8)
        ticks = range(many) if many <= 40 else []
        labels = [_short(names[i]) for i in ticks]
        long = max(map(len, labels), default=0) > 2
        axis.set_xticks(ticks, labels, rotation=60 if long else 0, ha="right" if long else "center", fontsize=8)
        axis.set_yticks(ticks, labels, fontsize=8)
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.tick_params(length=0)
        axis.set(xlabel="predicted", ylabel="label")

    side = min(3.4 + 0.12 * many, 9.0)
    return figure(draw, (side + 0.8, side))


def reliability(bins: Sequence[dict[str, Any]], ece: float) -> bytes:
    """Accuracy against confidence per bin, with the number of examples of each bin below."""
    used = [b for b in bins if b["count"]]

    def draw(axis: Any) -> None:
        width = bins[0]["high"] - bins[0]["low"]
        places = [b["low"] + width / 2 for b in used]
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":", label="calibrated")
        axis.bar(places, [b["accuracy"] for b in used], width * 0.92, color=_SOFT, label="accuracy")
        total = sum(b["count"] for b in used)
        shares = [b["count"] / total for b in used]
        axis.bar(places, shares, width * 0.4, color=_INK, label="share of examples")
        axis.plot([b["confidence"] for b in used], [b["accuracy"] for b in used], color=_LINE, marker="o",
                  markersize=4, linewidth=1)  # fmt: skip
        axis.set(xlabel="confidence (probability of the predicted class)", xlim=(0, 1), ylim=(0, 1.02))
        axis.set_title(f"expected calibration error {ece:.3f}", fontsize=9)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)

    return figure(draw)


def spread(values: Sequence[float], what: str, average: float) -> bytes:
    """Histogram of a value over examples, with the reported average; the outer 1% is drawn at its edge."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]

    def draw(axis: Any) -> None:
        low, high = np.quantile(values, [0.005, 0.995])
        axis.hist(np.clip(values, low, high), bins=min(40, max(8, len(values) // 8)), color=_SOFT)
        axis.axvline(average, color=_LINE, linewidth=1.5, label=f"average {average:.3f}")
        axis.set(xlabel=what, ylabel="number")
        axis.legend(frameon=False, fontsize=8)

    return figure(draw, (5.2, 3.4))


def picture(image: np.ndarray) -> bytes:
    """An image [H, W, C] of any range as PNG, C 1 or 3; small ones enlarged without smoothing."""
    from PIL import Image

    pixels = np.asarray(image, np.float64)
    if np.asarray(image).dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = 255 * (pixels - low) / max(high - low, 1e-9)
    pixels = pixels.round().astype(np.uint8)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]
    shown = Image.fromarray(pixels)
    times = max(1, 112 // max(shown.size))
    shown = shown.resize((shown.width * times, shown.height * times), Image.Resampling.NEAREST)
    shown.thumbnail((256, 256))
    out = io.BytesIO()
    shown.save(out, format="png")
    return out.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
