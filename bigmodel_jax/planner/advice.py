"""What to change so that a step fits: tried by arithmetic, cheapest change first, and then compiled to be sure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bigmodel_jax import experiment
from bigmodel_jax.errors import InputError
from bigmodel_jax.parallel.mesh import BATCH_AXES
from bigmodel_jax.planner import memory
from bigmodel_jax.planner.targets import Target


@dataclasses.dataclass(frozen=True)
class Change:
    """words: overrides of the config. target: other hardware. price: how much it hurts, least first."""

    text: str
    words: tuple[str, ...] = ()
    target: Target | None = None
    price: int = 0


@dataclasses.dataclass(frozen=True)
class Advice:
    """Changes that fit together: by arithmetic `bytes` per device; `checked` once compiled."""

    text: str
    words: tuple[str, ...]
    target: str
    bytes: float
    checked: bool = False


def changes(config: Mapping[str, Any], target: Target) -> Iterator[Change]:
    """Single changes that need less memory per device."""
    model, mesh = config["model"], memory.sizes(config, target.devices)
    if model.get("remat", "full") != "full":
        yield Change("recompute more (remat full)", ("--config.model.remat=full",), price=1)
    size = config["batch_size"]
    rows = max(each for _, each in size) if not isinstance(size, int) else size
    shards = math.prod(mesh[axis] for axis in BATCH_AXES)
    micro = config["microbatch"] or rows
    for part in (2, 4, 8, 16, 32, 64):
        if micro % part == 0 and micro // part >= shards and (micro // part) % shards == 0:
            words = (f"--config.microbatch={micro // part}",)
            yield Change(f"{rows // (micro // part)} microbatches", words, price=1 + (part > 8))
    if "chunk" in config["objective"] and not config["objective"]["chunk"]:
        yield Change("the loss in chunks of 1024 tokens", ("--config.objective.chunk=1024",), price=1)
    slices = config["mesh"]["slices"]
    if mesh["data"] > slices:
        size = mesh["fsdp"] * mesh["data"] // slices
        words = (f"--config.mesh.data={slices}", f"--config.mesh.fsdp={size}")
        yield Change("shard over all replicas (more fsdp)", words, price=1)
    if config["mesh"]["zero"] != 3:
        yield Change("shard parameters too (zero 3)", ("--config.mesh.zero=3",), price=1)
    if "mu_dtype" in config["optimizer"] and not config["optimizer"]["mu_dtype"]:
        yield Change("first moments in bfloat16", ("--config.optimizer.mu_dtype=bfloat16",), price=3)
    for tensor in (2, 4, 8):
        if "num_heads" in model and mesh["tensor"] == 1 and mesh["fsdp"] % tensor == 0:
            words = (f"--config.mesh.tensor={tensor}", f"--config.mesh.fsdp={mesh['fsdp'] // tensor}")
            words += ("--config.mesh.data=" + str(mesh["data"]),)
            yield Change(f"tensor parallelism over {tensor}", words, price=2)
    for factor in (2, 4, 8, 16, 32, 64):
        grown = larger(target, factor)
        if grown is not None:
            words = (f"--config.mesh.data={slices}", f"--config.mesh.fsdp={grown.devices // slices // _inner(mesh)}")
            yield Change(f"{grown.devices} devices ({grown})", words, grown, price=4 + factor)


def _inner(mesh: Mapping[str, int]) -> int:
    return math.prod(size for axis, size in mesh.items() if axis not in ("data", "fsdp"))


def larger(target: Target, factor: int) -> Target | None:
    """The same hardware with `factor` times the devices, or None where it has no such size."""
    shape = list(target.shape)
    if target.platform == "gpu":
        full = 8 // shape[1] if 8 % shape[1] == 0 else 1
        shape = [shape[0] * factor // min(full, factor), shape[1] * min(full, factor)]
    elif target.platform == "tpu":
        while factor > 1:
            shape[shape.index(min(shape))] *= 2
            factor //= 2
        limit = {"v5e": 256, "v6e": 256, "v4": 4096, "v5p": 8960}[target.chip]
        if math.prod(shape) > limit:
            return None
        shape.sort()
    else:
        return None
    prefix = f"{target.slices}x" if target.slices > 1 else ""
    name = f"{prefix}{target.chip}:{'x'.join(map(str, shape))}"
    return dataclasses.replace(target, name=name, shape=tuple(shape))


def _fitting(
    config: Mapping[str, Any], target: Target, room: float, factor: float, most: int
) -> Iterator[tuple[Advice, dict[str, Any], Target]]:
    """Sets of up to `most` changes that fit by arithmetic, cheapest first."""
    single = list(changes(config, target))
    sets = [s for n in range(1, most + 1) for s in itertools.combinations(single, n) if _compatible(s)]
    for chosen in sorted(sets, key=lambda s: (sum(c.price for c in s), len(s))):
        words = tuple(word for change in chosen for word in change.words)
        where = next((change.target for change in chosen if change.target), target)
        try:
            changed = experiment.resolve(config, words)
            needs = factor * memory.estimate(changed, where.devices, where.platform).total
        except InputError:
            continue
        if needs <= room:
            yield Advice(", ".join(change.text for change in chosen), words, str(where), needs), changed, where


def _compatible(chosen: tuple[Change, ...]) -> bool:
    leaves = [word.partition("=")[0] for change in chosen for word in change.words]
    return len(set(leaves)) == len(leaves) and sum(change.target is not None for change in chosen) < 2


def advise(
    config: Mapping[str, Any],
    target: Target,
    *,
    room: float,
    factor: float = 1.0,
    check: Callable[[dict[str, Any], Target], bool | None],
    tries: int = 3,
    most: int = 3,
) -> Advice | None:
    """The first set of changes that fits when compiled, or None if none of `tries` does.

    Args:
      room: bytes per device. factor: what the compiler needed over what arithmetic said of the config as it is.
      check: compiles a config for a target: whether it fits.
    """
    last = 0.0
    for advice, changed, where in _fitting(config, target, room, max(factor, 1.0), most):
        if last and advice.bytes > 0.8 * last:
            continue  # much like one that did not fit
        if check(changed, where):
            return dataclasses.replace(advice, checked=True)
        last, tries = advice.bytes, tries - 1
        if not tries:
            break
    return None
