"""The best layout of a config on a target: meshes x remat policies x microbatches, by arithmetic, then compiled.

What does not fit by arithmetic (memory.py) is dropped. The rest is ranked by the roofline of a closed form of the step:
matrix products with what is recomputed, weights gathered and gradients summed over fsdp axes and replicas, activations
summed over tensor, keys and values passed over context, tokens exchanged over expert. The closed form leaves out what
all layouts share, so it ranks and does not predict; the first few are compiled, and ranked by what was compiled.
Pipelines are not searched: their stages pay where one slice is not enough, which is for a person to say.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bigmodel_jax import experiment, tree
from bigmodel_jax.chips import Chip
from bigmodel_jax.errors import InputError
from bigmodel_jax.models.spec import REMAT
from bigmodel_jax.parallel import rings
from bigmodel_jax.parallel.mesh import BATCH_AXES, divisors
from bigmodel_jax.planner import memory
from bigmodel_jax.planner.collectives import Collective, wire
from bigmodel_jax.planner.costs import Costs, Op
from bigmodel_jax.planner.roofline import Links, predict
from bigmodel_jax.planner.targets import Target

SEARCHED = ("data", "fsdp", "expert", "context", "tensor")
NARROW = {"context": 16, "tensor": 16}
"""The widest that axes of activations are tried."""
RECOMPUTED = {"none": 0.0, "dots": 0.0, "minimal": 0.0, "attention": 0.9, "full": 1.0, "offload": 1.0}
"""Share of the forward pass that a remat policy does twice."""
MARGIN = 0.9
"""Share of the memory that arithmetic may fill: the compiler has the last word."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout: overrides of the config, mesh, bytes per device and seconds of a step by arithmetic."""

    words: tuple[str, ...]
    mesh: dict[str, int]
    remat: str
    microbatch: int
    bytes: float
    step_s: float

    @property
    def text(self) -> str:
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        return ", ".join(filter(None, [axes, self.remat, f"microbatch {self.microbatch}" * bool(self.microbatch)]))


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found. ranked: all that fit by arithmetic, best first. compiled: (candidate, what compiling it
    said), best first."""

    tried: int
    ranked: tuple[Candidate, ...]
    compiled: tuple[tuple[Candidate, Any], ...]


def meshes(config: Mapping[str, Any], devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of `SEARCHED` axes, with the slices and the stages of the config."""
    model, slices, stage = config["model"], config["mesh"]["slices"], config["mesh"]["stage"]
    if devices % (slices * stage):
        return
    most = {"tensor": model.get("num_heads", 1), "expert": model.get("num_experts", 0) or 1,
            "context": NARROW["context"] if "num_heads" in model else 1}  # fmt: skip
    most["tensor"] = min(most["tensor"], NARROW["tensor"])
    options = [[d for d in divisors(devices // slices // stage) if d <= most.get(axis, devices)] for axis in SEARCHED]
    for sizes in itertools.product(*options[1:]):
        inner = math.prod(sizes) * stage
        if devices % (inner * slices) == 0:
            yield {"data": devices // inner, "stage": stage, **dict(zip(SEARCHED[1:], sizes, strict=True))}


def candidates(config: Mapping[str, Any], devices: int) -> Iterator[tuple[dict[str, int], str, int]]:
    """(mesh, remat policy, microbatch) worth a look: microbatches of a power of two of rows per shard."""
    policies = tuple(name for name in REMAT if name != "offload") if "remat" in config["model"] else ("",)
    rows = memory.rows_of(config)
    for mesh in meshes(config, devices):
        shards = math.prod(mesh[axis] for axis in BATCH_AXES)
        if rows % shards:
            continue
        each, micros = rows // shards, []
        while each >= 1:
            micros.append(0 if each * shards == rows else each * shards)
            each = each // 2 if each % 2 == 0 else 0
        yield from ((mesh, policy, micro) for policy in policies for micro in micros)


def closed_form(config: Mapping[str, Any], traced: memory.Traced, mesh: Mapping[str, int]) -> Costs:
    """Products and traffic of one device and step, from sizes alone."""
    model, exp = config["model"], traced.exp
    dtype, size = model.get("dtype", "float32"), memory.rows_of(config)
    steps = max(1, size // config["microbatch"]) if config["microbatch"] else 1
    devices, work = math.prod(mesh.values()), exp.work()
    share = 1.0 + RECOMPUTED.get(model.get("remat", "none"), 0.0) / 3.0
    narrow = 2 if dtype in ("bfloat16", "float16") else 4
    op = Op("products", "dot", 1.0, flops=work["flops_per_example"] * size * share / devices, dtype=dtype)
    params = tree.flatten(traced.programs.state["params"])
    experts = sum(leaf.size for path, leaf in params.items() if "/moe/" in path and not path.endswith("router"))
    weights = sum(leaf.size for leaf in params.values()) - experts
    layers, length = model.get("num_layers", 0), work["tokens_per_example"]
    tokens = size / steps * length / devices * mesh["tensor"] * mesh["stage"]
    activation = tokens * model.get("embed_dim", 0) * narrow
    cut = mesh["tensor"] * mesh["stage"]
    out = []

    def add(kind: str, axes: tuple[str, ...], payload: float, times: float) -> None:
        axes = tuple(axis for axis in axes if mesh[axis] > 1)
        many = math.prod(mesh[axis] for axis in axes)
        if many > 1 and payload > 0:
            total = payload * times
            sent = wire(kind, payload, many) * times
            out.append(Collective(kind, total, sent, axes, many, times, kind, "closed form"))

    shards = ("fsdp", "expert", "context")
    recomputed = model.get("remat", "none") != "none"
    tables = [leaf for path, leaf in params.items() if path.endswith("embed/tokens")]
    table, read = sum(leaf.size for leaf in tables), round(size / steps * length / mesh["data"])
    exchanged = config["mesh"]["weights_by"] == "rings" and bool(tables)
    exchanged &= all(rings.exchanged(read, leaf.shape, mesh["fsdp"]) for leaf in tables)
    whole = float(not exchanged or model.get("tied_embeddings", False))
    for size_, over, gathers, sums in (
        (weights - table, shards, 1.0 + recomputed, 1.0),
        (table, shards, whole if exchanged else 1.0 + recomputed, whole),
        (experts / mesh["expert"], ("fsdp", "context"), 1.0 + recomputed, 1.0),
    ):
        add("all-gather", over, size_ * narrow / cut, steps * gathers)
        add("reduce-scatter", over, size_ * narrow / cut, steps * sums)
        pieces = math.prod(mesh[axis] for axis in over)
        add("all-reduce", ("data",), size_ * 4 / cut / pieces, 1.0)
    add("all-to-all", ("fsdp",), activation * exchanged, 2.0 * steps)
    passes = 2.0 + recomputed
    add("all-reduce", ("tensor",), activation, 2.0 * layers * passes / mesh["stage"] * steps)
    heads = model.get("num_kv_heads", 0) or model.get("num_heads", 1)
    kv = activation * 2 * heads / max(model.get("num_heads", 1), 1) / mesh["tensor"]
    add("collective-permute", ("context",), kv * (mesh["context"] - 1), layers * (passes + 1) / mesh["stage"] * steps)
    k = model.get("experts_per_token", 0)
    add("all-to-all", ("expert",), activation * k, 2.0 * layers * passes / mesh["stage"] * steps)
    return Costs((op,), tuple(out))


def search(
    config: Mapping[str, Any],
    target: Target,
    chip: Chip,
    links: Callable[[Mapping[str, int]], Links],
    *,
    room: float,
    compile: Callable[[dict[str, Any], Candidate], tuple[float, Any] | None],
    best: int = 3,
) -> Found:
    """Rank layouts of a resolved config.

    Args:
      links: of a mesh. room: bytes per device.
      compile: (config, candidate) -> (seconds of a step, what to show), or None where it does not fit after all.
      best: how many to compile.
    """
    fitting, tried = [], 0
    for mesh, policy, micro in candidates(config, target.devices):
        tried += 1
        words = [f"--config.mesh.{axis}={mesh[axis]}" for axis in SEARCHED] + [f"--config.microbatch={micro}"]
        words += [f"--config.model.remat={policy}"] if policy else []
        changed = changed_by(config, mesh, policy, micro)
        try:
            needs = memory.estimate(changed, target.devices, target.platform or "cpu").total
        except InputError:
            continue
        if needs > MARGIN * room:
            continue
        traced = memory.traced(changed, target.platform or "cpu")
        step = predict(closed_form(changed, traced, mesh), chip, links(mesh)).step_s
        fitting.append(Candidate(tuple(words), mesh, policy, micro, needs, step))
    ranked = sorted(fitting, key=_order)
    done = []
    for candidate in ranked:
        if len(done) == best:
            break
        try:
            said = compile(experiment.resolve(config, candidate.words), candidate)
        except InputError:
            continue
        if said is not None:
            done.append((said[0], candidate, said[1]))
    done.sort(key=lambda row: row[0])
    return Found(tried, tuple(ranked), tuple((candidate, shown) for _, candidate, shown in done))


def _order(candidate: Candidate) -> tuple:
    """Faster first; where times agree to three digits, fewer mesh axes, then fewer microbatches, then less memory."""
    axes = sum(size > 1 for size in candidate.mesh.values())
    return float(f"{candidate.step_s:.3g}"), axes, -(candidate.microbatch or math.inf), candidate.bytes


def changed_by(config: Mapping[str, Any], mesh: Mapping[str, int], policy: str, micro: int) -> dict[str, Any]:
    """A resolved config with another layout."""
    model = {**config["model"], "remat": policy} if policy else config["model"]
    return {**config, "mesh": {**config["mesh"], **mesh}, "model": model, "microbatch": micro}
