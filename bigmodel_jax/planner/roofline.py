"""Seconds of a step from what it costs and what a device can do.

A roofline (Williams et al. 2009, doi:10.1145/1498765.1498785) over every launched piece of the compiled program.

What is assumed, and printed with every prediction:
- a launched piece takes as long as the slowest of its matrix products, its element operations and its memory traffic;
  pieces follow one another;
- gathers and reductions along batch axes (weights, gradients) run beside the arithmetic and cost only what exceeds it;
  all other collectives (of activations) are waited for;
- a collective uses the links of as many torus dimensions as its axes span, a permute one of each pair; on a switch all;
- collectives that cross slices or nodes are done in two stages: the slow network carries the share of one group only.

Of published rates the result is a bound that no program beats; with rates measured here it is an estimate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from bigmodel_jax.chips import Chip
from bigmodel_jax.parallel.mesh import BATCH_AXES
from bigmodel_jax.planner.collectives import Collective, wire
from bigmodel_jax.planner.costs import Costs, Op

_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s8": "int8"}
FIGURES = ("peaks", "sustained", "memory", "cache", "elements", "launch", "fresh", "links", "slow")
HIDDEN = ("all-gather", "reduce-scatter", "all-reduce")


@dataclass(frozen=True)
class Links:
    """How a job's mesh lies on the networks.

    torus: devices per dimension of a slice's torus, () for a switch. slow: {mesh axis: groups along it that the slow
    network joins}: {"data": 2} for two slices, {"data": 8} for eight nodes.
    """

    torus: tuple[int, ...] = ()
    slow: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """Communication over some mesh axes: seconds on either network, and whether arithmetic hides it."""

    axes: tuple[str, ...]
    payload_bytes: float
    fast_bytes: float
    slow_bytes: float
    fast_s: float
    slow_s: float
    hidden: bool


@dataclass(frozen=True)
class Prediction:
    """Seconds per step of one device.

    compute_s, element_s, memory_s, launch_s: each resource alone. device_s: pieces one after the other. exposed_s,
    hidden_s: communication that is waited for, and that runs beside arithmetic. bound: what takes longest. sources:
    {figure: where it is from}. notes: what had to be assumed beside the module's assumptions.
    """

    compute_s: float
    element_s: float
    memory_s: float
    launch_s: float
    device_s: float
    exposed_s: float
    hidden_s: float
    step_s: float
    bound: str
    networks: tuple[Network, ...]
    sources: Mapping[str, str]
    notes: tuple[str, ...]

    def mfu(self, model_flops: float, devices: int, peak: float | None) -> float | None:
        """Share of the peak that model FLOPs of a whole step would reach, None where the peak is not known."""
        return None if not peak or not self.step_s else model_flops / self.step_s / devices / peak

    def per_second(self, amount: float) -> float | None:
        """Tokens or examples a second, from those of a step."""
        return amount / self.step_s if self.step_s else None


def predict(costs: Costs, chip: Chip, links: Links | None = None, temporary_bytes: float = 0.0) -> Prediction:
    """Time of one step. A figure the chip does not have makes its part 0 and is named in `notes`.

    Args:
      temporary_bytes: of the program (`memory_analysis`); where memory is handed out anew in every step, as a CPU's
        operating system does, the first touch of it is paid for.
    """
    links = links or Links()
    notes = list(costs.notes)
    notes += [f"{name}: its arithmetic is not in the text, {runs:g} runs count as memory traffic alone"
              for name, runs in costs.unknown.items()]  # fmt: skip
    totals: dict[str, float] = defaultdict(float)
    for op in costs.ops:
        parts = _parts(op, chip, notes)
        for name, seconds in parts.items():
            totals[name] += seconds * op.count
        totals["device"] += (max(parts["compute"], parts["element"], parts["memory"]) + parts["launch"]) * op.count
    totals["memory"] += chip.fresh_s * temporary_bytes
    totals["device"] += chip.fresh_s * temporary_bytes
    networks = tuple(_networks(costs.collectives, chip, links, notes))
    hidden = max(sum(n.fast_s for n in networks if n.hidden), sum(n.slow_s for n in networks if n.hidden))
    exposed = sum(n.fast_s + n.slow_s for n in networks if not n.hidden)
    step = max(totals["device"], hidden) + exposed
    if not chip.memory_rate:
        notes.append(f"{chip.name}: memory rate not known")
    bounds = {name: totals[name] for name in ("compute", "element", "memory", "launch")}
    bounds["communication"] = exposed + max(0.0, hidden - totals["device"])
    return Prediction(
        compute_s=totals["compute"], element_s=totals["element"], memory_s=totals["memory"], launch_s=totals["launch"],
        device_s=totals["device"], exposed_s=exposed, hidden_s=hidden, step_s=step,
        bound=max(bounds, key=bounds.get), networks=networks,
        sources={
            "FLOPs, bytes, collectives": "compiled program",
            **{figure: chip.source(figure) for figure in FIGURES if chip.source(figure) != "n/a"},
        },
        notes=tuple(dict.fromkeys(notes)),
    )  # fmt: skip


def _parts(op: Op, chip: Chip, notes: list[str]) -> dict[str, float]:
    """Seconds of one run of a piece on each resource."""
    rate = _peak(op.dtype, chip, notes) if op.flops else None
    elements = sum(getattr(op, kind) / speed for kind, speed in chip.element_rates.items())
    near = op.bytes <= chip.cache_bytes and chip.cache_rate
    memory = (op.bytes / (chip.cache_rate if near else chip.memory_rate)) if chip.memory_rate else 0.0
    return {
        "compute": op.flops / rate if rate else 0.0, "element": elements, "memory": memory, "launch": chip.launch_s,
    }  # fmt: skip


def _peak(dtype: str, chip: Chip, notes: list[str]) -> float | None:
    """Rate of matrix products of an HLO element type under jax's default precision."""
    name = "float8" if dtype.startswith("f8") else _DTYPES.get(dtype, dtype)
    if name == "float32" and "tensorfloat32" in chip.peaks:
        name = "tensorfloat32"  # jax's default precision allows it
    elif name == "float32" and name not in chip.peaks and "bfloat16" in chip.peaks:
        name = "bfloat16"  # on TPU, default precision is one bfloat16 pass
        notes.append(f"{chip.name}: float32 products at the bfloat16 rate (default precision, one pass)")
    if name not in chip.peaks:
        notes.append(f"{chip.name}: no rate for products of {name}, counted as free")
    return chip.sustained.get(name) or chip.peaks.get(name)


def _networks(collectives: tuple[Collective, ...], chip: Chip, links: Links, notes: list[str]) -> list[Network]:
    """One row per mesh axes and hidden or not."""
    sums: dict[tuple[tuple[str, ...], bool], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for c in collectives:
        hidden = c.kind in HIDDEN and set(c.axes) <= set(BATCH_AXES)
        fast, slow = split(c, links)
        row = sums[c.axes, hidden]
        for at, value in enumerate((c.payload_bytes, fast, slow, fast / share(c.kind, c.size, links))):
            row[at] += value
    rows = []
    for (axes, hidden), (payload, fast, slow, on_links) in sums.items():
        if fast and not chip.link_rate:
            notes.append(f"{chip.name}: rate of the fast network not known, {'+'.join(axes)} counted as free")
        if slow and not chip.slow_rate:
            notes.append(f"{chip.name}: rate of the slow network not known, {'+'.join(axes)} counted as free")
        fast_s = on_links / chip.link_rate if chip.link_rate else 0.0
        slow_s = slow / chip.slow_rate if chip.slow_rate else 0.0
        rows.append(Network(axes, payload, fast, slow, fast_s, slow_s, hidden))
    return rows


def split(collective: Collective, links: Links) -> tuple[float, float]:
    """(bytes on the fast network, bytes on the slow one) that one device sends."""
    groups = math.prod(links.slow.get(axis, 1) for axis in collective.axes)
    if groups == 1:
        return collective.wire_bytes, 0.0
    inside = max(1, collective.size // groups)
    if collective.kind in ("collective-permute", "all-to-all", "ragged-all-to-all"):
        far = 1.0 if inside == 1 else (groups - 1) / groups
        return collective.wire_bytes * (1 - far), collective.wire_bytes * far
    payload = collective.payload_bytes
    return wire(collective.kind, payload, inside), wire(collective.kind, payload / inside, groups)


def share(kind: str, size: int, links: Links) -> float:
    """Share of a device's links that a collective among `size` devices can use: whole dimensions of the torus."""
    if not links.torus:
        return 1.0
    spans, reached = 0, 1
    for length in sorted(links.torus, reverse=True):
        if reached >= size:
            break
        reached *= length
        spans += 1
    return max(1, spans) / len(links.torus) / (2 if kind == "collective-permute" else 1)
