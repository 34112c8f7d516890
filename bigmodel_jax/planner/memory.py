"""Bytes per device of a training step by arithmetic, before anything is compiled.

What is kept between steps is exact: every leaf of the state, cut as the rules say. What the backward pass finds
stored is read off the traced step (the residuals of its derivative), so it follows the model and its remat policy,
whatever they are. What is alive for a moment (the weights of one layer gathered, one layer being differentiated, the
head) is an estimate. Compilers have the last word.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from bigmodel_jax import experiment, tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import state as states
from bigmodel_jax.parallel.mesh import AXES, BATCH_AXES, check_batch
from bigmodel_jax.parallel.rules import STATE_AXES, Layout
from bigmodel_jax.planner.compilers import tracing
from bigmodel_jax.programs import Programs


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device. activations: stored for the backward pass. working: alive for a moment."""

    parameters: float
    optimizer: float
    other: float
    gradients: float
    activations: float
    working: float
    batch: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Traced:
    """Bytes a model stores for the backward pass: per row those `stream`ing between layers, which tensor parallelism
    does not cut, and the `rest`; and those of no row, `fixed`. layer: what one layer stores per row if it keeps
    everything. gathered: weights of two layers, whole. head: the largest other weight, whole with a wide gradient;
    logits: of a row, or of a chunk of it."""

    exp: experiment.Experiment
    programs: Programs
    stream: float
    rest: float
    fixed: float
    layer: float
    gathered: float
    head: float
    logits: float


def sizes(config: Mapping[str, Any], devices: int) -> dict[str, int]:
    """{axis: size} of a config's mesh on so many devices.

    Raises:
      InputError: a mesh that does not fit them.
    """
    found = {axis: config["mesh"][axis] for axis in AXES}
    fixed = math.prod(size for size in found.values() if size != -1)
    found = {axis: devices // fixed if size == -1 else size for axis, size in found.items()}
    if math.prod(found.values()) != devices:
        text = ", ".join(f"{axis}={size}" for axis, size in found.items() if size != 1)
        raise InputError(f"mesh {text or 'of one device'} does not fit {devices} devices")
    return found


def estimate(config: Mapping[str, Any], devices: int, platform: str = "cpu") -> Memory:
    """Bytes per device of the step of a resolved config on `devices` devices.

    Raises:
      InputError: a mesh or batch that does not fit the devices, or a config that does not build.
    """
    mesh = AbstractMesh(tuple(sizes(config, devices).values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    section = dict(config["mesh"])
    leaves = {leaf: section[leaf] for leaf in ("microbatches", "repeats", "zero", "dispatch", "room")}
    layout = Layout(mesh, context=section["context_by"], **leaves)
    found = traced(config, platform)
    size = rows_of(config)
    steps = check_batch(size, min(config["microbatch"], size), mesh)
    experiment.check_layout(layout, config, found.exp.spec, size // steps)
    held, gradients = _kept(found.programs, layout)
    rows = size / steps / math.prod(mesh.shape[axis] for axis in BATCH_AXES) / mesh.shape["context"]
    shards = math.prod(mesh.shape[axis] for axis in STATE_AXES)
    tensor, stage = mesh.shape["tensor"], mesh.shape["stage"]
    whole = 1.0 / tensor if shards > 1 else 0.0
    moments = (found.layer * rows / tensor + found.gathered * whole, found.logits * rows / tensor + found.head * whole)
    spec = found.exp.spec.values()
    return Memory(
        parameters=held["params"],
        optimizer=held["opt"] * (section["offload"] != "optimizer"),
        other=sum(size for name, size in held.items() if name not in ("params", "opt")),
        gradients=gradients * (2 if steps > 1 else 1),
        activations=rows * (found.stream + found.rest / tensor) / stage + found.fixed / shards / tensor / stage,
        working=max(moments),
        batch=sum(math.prod(shape) * jnp.dtype(kind).itemsize for shape, kind in spec) * steps * rows,
    )


@functools.lru_cache(maxsize=4096)
def _kept(programs: Programs, layout: Layout) -> tuple[dict[str, int], int]:
    """(bytes of each part of the state, bytes of the gradients) on one device."""
    state, axes = programs.state, programs.axes
    places = states.shardings(state, axes, layout)
    held = {name: _held(state[name], places[name]) for name in state}
    return held, _held(state["params"], states.gradients(state, axes, layout))


def _held(leaves: Any, shardings: Any) -> int:
    flat = zip(jax.tree.leaves(leaves), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in flat)


def rows_of(config: Mapping[str, Any]) -> int:
    """Rows of the largest step."""
    size = config["batch_size"]
    return size if isinstance(size, int) else max(rows for _, rows in size)


def _group(model: Mapping[str, Any]) -> int:
    """Rows that a model cannot do with less of."""
    return max(model.get("expert_group", 0), model.get("bn_group", 0), 1)


def traced(config: Mapping[str, Any], platform: str) -> Traced:
    """The step of a config traced on one device; the same for all its meshes, batches and microbatches."""
    mesh = {axis: 1 for axis in AXES} | {"slices": 1, "microbatches": 0, "repeats": 1, "zero": 3, "offload": ""}
    plain = {**config, "mesh": {**config["mesh"], **mesh}, "microbatch": 0, "batch_size": _group(config["model"])}
    return _traced(json.dumps(plain, sort_keys=True), platform)


@functools.lru_cache(maxsize=64)
def _traced(text: str, platform: str) -> Traced:
    config = json.loads(text)
    with tracing(platform):
        exp = experiment.build(config, devices=jax.devices("cpu")[:1], load=False)
        programs = Programs(exp)
        stream, rest, fixed = _residuals(exp, programs)
    layer, model = 0.0, config["model"]
    layers = model.get("num_layers", 0)
    if layers and model.get("remat", "none") != "none":
        all_kept = traced({**config, "model": {**model, "remat": "none"}}, platform)
        layer = (all_kept.stream + all_kept.rest) / layers
    narrow = jnp.dtype(model.get("dtype", "float32")).itemsize
    params = tree.flatten(programs.state["params"])
    stacked = sum(leaf.size for path, leaf in params.items() if "layers/" in f"{path}/")
    largest = max(leaf.size for path, leaf in params.items() if "layers/" not in f"{path}/" or not layers)
    length = exp.spec["tokens"][0][0] if "tokens" in exp.spec else 1
    chunk = min(config["objective"].get("chunk", 0) or length, length)
    return Traced(
        exp, programs, stream, rest, fixed, layer,
        gathered=2.0 * narrow * stacked / max(layers, 1),  # the next is fetched while one works
        head=largest * (narrow + 4.0),
        logits=8.0 * chunk * model.get("vocab_size", 0),
    )  # fmt: skip


def _residuals(exp: experiment.Experiment, programs: Programs) -> tuple[float, float, float]:
    """(stream, rest, fixed) of `Traced`, from the residuals of one group of rows and of two."""
    model = exp.config["model"]
    group = _group(model)
    few, many = (_stored(exp, programs, rows) for rows in (group, 2 * group))
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(programs.state["params"])}
    width, sums = model.get("embed_dim", 0), [0.0, 0.0, 0.0]
    for one, two in zip(few, many, strict=True):
        if one.shape != two.shape:
            sums[one.shape[-1] != width] += (two.size - one.size) * one.dtype.itemsize / group
        elif (one.shape, one.dtype) not in weights:
            sums[2] += one.size * one.dtype.itemsize
    return tuple(sums)


def _stored(exp: experiment.Experiment, programs: Programs, rows: int) -> list[Any]:
    """What the derivative of the loss keeps, as shapes."""
    variables = states.variables(programs.state)
    batch = {name: jax.ShapeDtypeStruct((rows, *shape), kind) for name, (shape, kind) in exp.spec.items()}

    def backward(variables: Any, batch: Any, key: jax.Array) -> Any:
        keys = {"dropout": jax.random.split(key, rows)}

        def loss(params: Any) -> jax.Array:
            return sum(exp.objective(exp.model.apply, {**variables, "params": params}, batch, keys, True)[0].values())

        return jax.vjp(loss, variables["params"])[1]

    return jax.tree.leaves(jax.eval_shape(backward, variables, batch, jax.random.key(0)))
