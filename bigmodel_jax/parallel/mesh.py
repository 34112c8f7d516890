"""The device mesh: six named axes, and the batch sizes it can take. Outermost first:

    data      replicas of the model; gradients are summed over it
    stage     pieces of a layer stack, a pipeline (Huang et al. 2019)
    fsdp      shards of the state; also splits the batch (ZeRO-3, Rajbhandari et al. 2020)
    expert    splits experts; for everything else it is a second fsdp axis
    context   splits the length of activations; for weights it is a further fsdp axis
    tensor    splits heads, feed-forward and vocabulary (Megatron, Shoeybi et al. 2019)

This is the one place that builds a mesh. Axes are `AxisType.Auto`: the compiler places the
collectives, and `rules.constrain` tells it where activations live. (`jax.make_mesh` defaults to
Explicit axes, under which plain sharded matmuls raise ShardingTypeError.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigmodel_jax.errors import InputError, nearest

AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make_mesh(
    sizes: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    slices: int = 1,
) -> Mesh:
    """Mesh over `AXES`.

    Args:
      sizes: axis -> number of devices; a missing axis is 1, one axis may be -1 ("the rest").
        None means {"data": -1}.
      devices: devices to use, all of them; default every device of the job.
      slices: groups of devices with a slow network between them (TPU slices, nodes). The data axis
        alone crosses it.

    Raises:
      InputError: unknown axis, sizes whose product is not the number of devices, or slices that the
        devices do not form or that the data axis does not divide into.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": -1} if sizes is None else dict(sizes)
    for axis in sizes:
        if axis not in AXES:
            raise InputError(f"unknown mesh axis '{axis}' (there are {AXES}){nearest(axis, AXES)}")
    shape = _fill({axis: int(sizes.get(axis, 1)) for axis in AXES}, len(devices))
    groups = _groups(devices, slices)
    if shape["data"] % slices:
        raise InputError(
            f"mesh.data {shape['data']} does not divide over mesh.slices {slices}: only the data axis crosses "
            f"the slow network; make it a multiple of {slices}"
        )
    within = tuple((shape | {"data": shape["data"] // slices}).values())
    grids = [mesh_utils.create_device_mesh(within, devices=group, allow_split_physical_axes=True) for group in groups]
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _groups(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
    """The devices of each slice: as the hardware says, or equal runs of the list where it says nothing."""
    found = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(found) > 1 and slices != len(found):
        raise InputError(f"the devices form {len(found)} slices; set mesh.slices={len(found)}, not {slices}")
    if slices < 1 or len(devices) % slices:
        raise InputError(f"mesh.slices {slices} does not divide {len(devices)} devices: {divisors(len(devices))}")
    if len(found) > 1:
        return [[device for device in devices if device.slice_index == index] for index in found]
    size = len(devices) // slices
    return [devices[i : i + size] for i in range(0, len(devices), size)]


def _fill(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """Replace -1 and check that the product is the device count."""
    shown = ("data", "fsdp", "tensor")
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1 or axis in shown)
    rest = [axis for axis, size in sizes.items() if size == -1]
    wrong = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(rest) > 1:
        raise InputError(f"mesh {text}: sizes are positive, and one axis at most may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if rest and devices % fixed == 0:
        return sizes | {rest[0]: devices // fixed}
    if not rest and fixed == devices:
        return sizes
    legal = []
    for axis, size in sizes.items():
        if size == 1 and axis not in shown:
            continue
        others = fixed // size if size != -1 else 0
        if others and devices % others == 0:
            fits = divisors(devices // others) if rest else [devices // others]
            legal.append(f"{axis} in {fits}" if rest else f"{axis}={fits[0]}")
    fix = " or ".join(legal) if legal else f"sizes that divide {devices}: {divisors(devices)}"
    raise InputError(f"mesh {text} does not fit {devices} devices; would fit: {fix}")


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces the batch dimension is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def fill(rows: int, mesh: Mesh, parts: int = 1) -> int:
    """The nearest number of rows, not smaller, that gives every batch shard the same, in each of `parts` parts."""
    share = batch_shards(mesh) * parts
    return -(-rows // share) * share


def check_batch(batch_size: int, microbatch: int, mesh: Mesh) -> int:
    """Number of accumulation steps: batch_size / microbatch.

    Args:
      batch_size: global rows per optimizer step.
      microbatch: global rows per forward pass; 0 means the whole batch.

    Raises:
      InputError: a size that the mesh or the accumulation cannot cut evenly; lists legal sizes.
    """
    shards = batch_shards(mesh)
    cut = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES if mesh.shape[axis] > 1)
    if batch_size < 1 or batch_size % shards:
        low = max(batch_size // shards, 1) * shards
        legal = sorted({low, low + shards})
        raise InputError(
            f"batch_size {batch_size} does not divide over {shards} batch shards ({cut}); "
            f"legal sizes are multiples of {shards}, the nearest {legal}"
        )
    microbatch = batch_size if microbatch == 0 else microbatch
    if microbatch < 1 or batch_size % microbatch or microbatch % shards:
        legal = [shards * d for d in divisors(batch_size // shards)]
        raise InputError(
            f"microbatch {microbatch} must divide batch_size {batch_size} and be a multiple of "
            f"{shards} batch shards ({cut}); legal sizes: {legal}"
        )
    return batch_size // microbatch


def batch_sharding(mesh: Mesh, accumulated: bool = True) -> NamedSharding:
    """Sharding of batch leaves [A, M, ...] (M rows cut), or [M, ...] when not `accumulated`."""
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    rows = axes if axes else None
    return NamedSharding(mesh, PartitionSpec(None, rows) if accumulated else PartitionSpec(rows))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a scalar or of a leaf that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
