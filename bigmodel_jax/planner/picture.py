"""A picture of a layout: the devices of the mesh, and which mesh axes cut which dimension of the largest parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "data": "#4c78a8", "stage": "#b279a2", "fsdp": "#54a24b", "expert": "#eeca3b", "context": "#f58518",
    "tensor": "#e45756",
}  # fmt: skip
WHOLE = "#e8e8e8"
SHOWN = 12


def draw(file: Path, *, title: str, mesh: Mapping[str, int], hosts: Sequence[int], leaves: Sequence[Any]) -> None:
    """Write a PNG.

    Args:
      mesh: {axis: size}. hosts: process of each device of the mesh, in C order.
      leaves: parameters, largest first: {"path", "shape", "axes": mesh axes of each dimension, "bytes"}.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = leaves[:SHOWN]
    sides = (1.6, 2.4)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 1.6 + 0.42 * max(len(rows), 8)), width_ratios=sides, layout="constrained"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
    _devices(left, mesh, hosts)
    _parameters(right, rows, len(leaves), mesh)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _devices(ax: Any, mesh: Mapping[str, int], hosts: Sequence[int]) -> None:
    """Devices as a grid: the innermost axis of more than one device across, all others down; shades are hosts."""
    from matplotlib.patches import Rectangle

    cut = {axis: size for axis, size in mesh.items() if size > 1}
    total = math.prod(cut.values())
    inner = list(cut)[-1] if len(cut) > 1 else None
    across = cut[inner] if inner else 2 ** math.ceil(math.log2(max(total, 1)) / 2)
    down = math.ceil(total / across)
    several = len(set(hosts)) > 1
    for device in range(total):
        row, column = divmod(device, across)
        shade = "#9ecae9" if hosts[device] % 2 else "#c6dcee"
        ax.add_patch(Rectangle((column, row), 0.94, 0.94, facecolor=shade if several else "#c6dcee"))
    ax.set(xlim=(-0.3, across), ylim=(down, -0.3), xticks=[], yticks=[])
    ax.set_aspect("auto" if max(across, down) > 8 * min(across, down) else "equal")
    for spine in ax.spines.values():
        spine.set_visible(False)
    outer = [axis for axis in cut if axis != inner]
    ax.set_ylabel(" x ".join(f"{axis} {cut[axis]}" for axis in outer) if inner else "", fontsize=10)
    ax.set_xlabel(f"{inner} {cut[inner]}" if inner else " x ".join(f"{a} {n}" for a, n in cut.items()), fontsize=10)
    text = f"{total} device{'s' * (total > 1)}" + (f" on {len(set(hosts))} hosts (shades)" if several else "")
    ax.set_title(text, fontsize=11, loc="left")


def _parameters(ax: Any, rows: Sequence[Any], number: int, mesh: Mapping[str, int]) -> None:
    """One bar per parameter, a box per dimension in the colours of the axes that cut it."""
    from matplotlib.patches import Patch, Rectangle

    used: list[str] = []
    for y, leaf in enumerate(rows):
        width = 6.0 / max(len(leaf["shape"]), 1)
        for d, (size, axes) in enumerate(zip(leaf["shape"], leaf["axes"], strict=True)):
            x, pieces = d * width, max(len(axes), 1)
            for n in range(pieces):
                colour = COLOURS[axes[n]] if axes else WHOLE
                box = (x + n * (width - 0.06) / pieces, y + 0.08)
                ax.add_patch(Rectangle(box, (width - 0.06) / pieces, 0.8, facecolor=colour))
            used += axes
            share = f" / {math.prod(mesh[axis] for axis in axes)}" if axes else ""
            ax.text(x + (width - 0.06) / 2, y + 0.5, f"{size}{share}", ha="center", va="center", fontsize=9)
        ax.text(-0.1, y + 0.5, leaf["path"], ha="right", va="center", fontsize=9, family="monospace")
        ax.text(6.05, y + 0.5, f"{leaf['bytes'] / 2**20:,.1f} MiB", ha="left", va="center", fontsize=9)
    ax.set(xlim=(-2.6, 7.0), ylim=(max(len(rows), 1), -0.2), xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    shown = f"the {len(rows)} largest of {number} parameters" if number > len(rows) else "parameters"
    ax.set_title(f"{shown}: size of each dimension / pieces; per device", fontsize=11, loc="left")
    handles = [Patch(color=COLOURS[axis], label=f"cut over {axis}") for axis in COLOURS if axis in used]
    handles.append(Patch(color=WHOLE, label="whole"))
    ax.legend(handles=handles, ncols=len(handles), loc="upper left", bbox_to_anchor=(0.0, 0.0), frameon=False)
