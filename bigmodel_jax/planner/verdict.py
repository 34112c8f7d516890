"""What a compiled step means on hardware: does it fit, how long does it take, what does a run cost.

Every number says where it is from:

    exact        follows from shapes and layout
    compiler     the target's own, or "estimate (CPU compiler)" where it is not on this machine
    arithmetic   planner/memory.py
    roofline     the compiled program over data-sheet rates: a bound that no run beats; over rates measured here, an
                 estimate
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigmodel_jax import chips, schema
from bigmodel_jax.chips import Chip
from bigmodel_jax.errors import InputError
from bigmodel_jax.parallel.mesh import AXES
from bigmodel_jax.planner import memory
from bigmodel_jax.planner.compile import Compiled
from bigmodel_jax.planner.costs import Costs, costs
from bigmodel_jax.planner.hlo import read
from bigmodel_jax.planner.roofline import Links, Prediction, predict
from bigmodel_jax.planner.targets import Target

GPU_SHARE = 0.92
"""Of a GPU's memory, what jax takes (XLA_PYTHON_CLIENT_MEM_FRACTION as `bigmodel launch` sets it)."""


@dataclass(frozen=True)
class Figure:
    """A number, its unit and where it is from. value None: not known, and `source` says why."""

    value: float | None
    unit: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """fits: None where the memory of a device is not known. memory, time, run: figures by name.

    traffic: [{"kind", "axes", "payload", "wire"}] bytes per device and step. assumptions: of the time.
    """

    target: str
    mesh: dict[str, int]
    label: str
    fits: bool | None
    reason: str
    memory: dict[str, Figure]
    time: dict[str, Figure]
    run: dict[str, Figure]
    traffic: list[dict[str, Any]]
    assumptions: tuple[str, ...]
    compiled: Compiled

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def judge(
    config: Mapping[str, Any],
    target: Target,
    compiled: Compiled,
    *,
    limit: float = 0.0,
    price: float = 0.0,
) -> Verdict:
    """The verdict on one compiled step.

    Args:
      config: resolved.
      limit: bytes of a device's memory, default the chip's.
      price: dollars per device-hour; 0 leaves dollars out.
    """
    chip = Chip(**compiled.chip) if compiled.chip else chips.chip(target.kind or compiled.device_kind)
    fits, reason, sizes = _memory(config, target, compiled, chip, limit)
    label = "compiler" if compiled.label == "compiler" else "estimate (CPU compiler)"
    time, run, traffic, notes = {}, {}, [], ()
    if not compiled.refused:
        spent = costs(read(compiled.text), compiled.mesh)
        traffic = [
            {"kind": kind, "axes": list(axes), "payload": payload, "wire": wire}
            for (kind, axes), (payload, wire) in sorted(spent.traffic().items(), key=lambda row: -row[1][1])
        ]
        predicted = predict(spent, chip, links(target, compiled.mesh), compiled.memory["temporary"])
        time, notes = _time(config, compiled, spent, predicted, chip, label), predicted.notes
        run = _run(config, compiled, time, price)
    return Verdict(str(target), compiled.mesh, compiled.label, fits, reason, sizes, time, run, traffic, notes, compiled)


def links(target: Target, mesh: Mapping[str, int]) -> Links:
    """How a mesh lies on the target's networks: outer axes cross nodes or slices first."""
    if target.platform == "tpu":
        return Links(torus=target.shape, slow={"data": target.slices} if target.slices > 1 else {})
    slow, nodes = {}, target.shape[0] if target.platform == "gpu" else 1
    for axis in AXES:
        slow[axis] = math.gcd(mesh[axis], nodes)
        nodes //= slow[axis]
    return Links(slow={axis: groups for axis, groups in slow.items() if groups > 1})


def capacity(target: Target, chip: Chip, limit: float = 0.0) -> Figure:
    """Bytes of a device's memory that a program may use."""
    if limit:
        return Figure(limit, "B", "as given")
    if not chip.memory_bytes:
        return Figure(None, "B", f"the memory of '{chip.name}' is not in the table of chips")
    if target.platform == "gpu":
        return Figure(chip.memory_bytes * GPU_SHARE, "B", f"{chip.source('memory')}; {GPU_SHARE:.0%} of it")
    return Figure(chip.memory_bytes, "B", chip.source("memory"))


def _memory(
    config: Mapping[str, Any], target: Target, compiled: Compiled, chip: Chip, limit: float
) -> tuple[bool | None, str, dict[str, Figure]]:
    """(fits, why, bytes per device by name)."""
    exact, arithmetic = "exact", "arithmetic"
    label = "compiler" if compiled.label == "compiler" else "estimate (CPU compiler)"
    room = capacity(target, chip, limit)
    sizes = {name: Figure(compiled.state[key], "B", exact)
             for name, key in (("parameters", "params"), ("optimizer", "opt"), ("other state", "other"),
                               ("batch", "batch"))}  # fmt: skip
    if compiled.state["stats"]:
        sizes["statistics"] = Figure(compiled.state["stats"], "B", exact)
    try:
        guess = memory.estimate(config, math.prod(compiled.mesh.values()), target.platform or "cpu")
        parts = {"gradients": guess.gradients, "activations": guess.activations, "working": guess.working}
    except InputError:
        parts = {}
    found = compiled.memory
    if compiled.refused:
        needs, room = Figure(found["needs"], "B", label), Figure(found["limit"], "B", label)
    else:
        sizes["temporaries"] = Figure(found["temporary"], "B", label)
        whole = found["argument"] + found["output"] - found["alias"] + found["temporary"] + found["code"]
        needs = Figure(whole, "B", label)
    sizes |= {f"  {name}, about": Figure(size, "B", arithmetic) for name, size in parts.items()}
    sizes |= {"needs": needs, "memory": room}
    if room.value is None:
        return None, room.source, sizes
    fits = not compiled.refused and needs.value <= room.value
    text = f"needs {_gib(needs.value)} of {_gib(room.value)} GiB per device"
    return fits, f"{'fits' if fits else 'does not fit'}: {text} ({label})", sizes


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _time(
    config: Mapping[str, Any], compiled: Compiled, spent: Costs, found: Prediction, chip: Chip, label: str
) -> dict[str, Figure]:
    """Seconds of a step and what follows from them; all None on devices whose rates are not known."""
    measured = "measured" in chip.source("peaks")
    roofline = f"roofline of {chip.name}: {'rates measured here' if measured else 'data-sheet rates, a lower bound'}"
    program = f"{label}, loops multiplied in"
    work, devices = compiled.work, math.prod(compiled.mesh.values())
    out = {
        "FLOPs per device": Figure(spent.flops, "FLOP", program),
        "memory traffic per device": Figure(spent.bytes, "B", program),
        "communication per device": Figure(sum(c.wire_bytes for c in spent.collectives), "B", f"{program}; ring model"),
    }
    if not chip.peaks or not chip.memory_rate:
        why = f"the rates of '{chip.name}' are not known"
        return out | {"step": Figure(None, "s", why), "MFU": Figure(None, "", why), "tokens/s": Figure(None, "/s", why)}
    parts = {
        "arithmetic": found.compute_s, "memory": found.memory_s, "communication, hidden": found.hidden_s,
        "communication, waited for": found.exposed_s,
    }  # fmt: skip
    out |= {name: Figure(seconds, "s", roofline) for name, seconds in parts.items()}
    out["step"] = Figure(found.step_s, "s", f"{roofline}; bound by {found.bound}")
    flops = work["flops_per_example"] * work["examples"]
    peak = chip.peaks.get(config["model"].get("dtype", "float32"))
    out["model FLOPs"] = Figure(flops, "FLOP", "closed form (flops.py)")
    out["MFU"] = Figure(found.mfu(flops, devices, peak), "", f"closed form over {roofline}")
    unit = "tokens/s" if work["tokens_per_example"] else "examples/s"
    amount = work["examples"] * (work["tokens_per_example"] or 1)
    out[unit] = Figure(found.per_second(amount), "/s", roofline)
    return out


def _run(config: Mapping[str, Any], compiled: Compiled, time: Mapping[str, Figure], price: float) -> dict[str, Figure]:
    """From a step to the whole run."""
    work, steps, size = compiled.work, config["steps"], config["batch_size"]
    ends = [] if isinstance(size, int) else [*(first for first, _ in size[1:]), steps]
    rows = size * steps if isinstance(size, int) else sum(
        each * (max(0, min(end, steps) - first)) for (first, each), end in zip(size, ends, strict=True)
    )  # fmt: skip
    tokens = rows * work["tokens_per_example"]
    out = {"tokens" if tokens else "examples": Figure(tokens or rows, "", "config: steps x batch_size")}
    second = time["step"].value
    if second is None:
        return out
    seconds = second * rows / work["examples"]
    devices = math.prod(compiled.mesh.values())
    source = f"{time['step'].source}; without evaluation, saving and failures"
    out["days"] = Figure(seconds / 86400, "d", source)
    out["device-hours"] = Figure(seconds * devices / 3600, "h", source)
    if price:
        spent = price * seconds * devices / 3600
        out["dollars"] = Figure(spent, "$", f"{price:g} $ per device-hour, as given; {source}")
    return out


def overrides(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Command-line words that turn one resolved config into another."""
    changed = schema.difference(before, after)
    return [f"--config.{leaf}={value}" for leaf, (_, value) in changed.items()]
