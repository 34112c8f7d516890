"""The device mesh: three named axes, and the batch sizes it can take.

    data     replicas of the model; gradients are summed over it
    fsdp     shards of the state; also splits the batch (ZeRO-3, Rajbhandari et al. 2020)
    tensor   splits heads, feed-forward and vocabulary (Megatron, Shoeybi et al. 2019)

This is the one place that builds a mesh. Axes are `AxisType.Auto`: the compiler places the
collectives, and `rules.constrain` tells it where activations live. (`jax.make_mesh` defaults to
Explicit axes, under which plain sharded matmuls raise ShardingTypeError.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigmodel_jax.errors import InputError, nearest

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh over ("data", "fsdp", "tensor").

    Args:
      sizes: axis -> number of devices; a missing axis is 1, one axis may be -1 ("the rest").
        None means {"data": -1}.
      devices: devices to use, all of them; default every device of the job.

    Raises:
      InputError: unknown axis, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": -1} if sizes is None else dict(sizes)
    for axis in sizes:
        if axis not in AXES:
            raise InputError(f"unknown mesh axis '{axis}' (there are {AXES}){nearest(axis, AXES)}")
    shape = _fill({axis: int(sizes.get(axis, 1)) for axis in AXES}, len(devices))
    return jax.make_mesh(
        tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def _fill(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """Replace -1 and check that the product is the device count."""
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
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
        others = fixed // size if size != -1 else 0
        if others and devices % others == 0:
            fits = _divisors(devices // others) if rest else [devices // others]
            legal.append(f"{axis} in {fits}" if rest else f"{axis}={fits[0]}")
    fix = " or ".join(legal) if legal else f"sizes that divide {devices}: {_divisors(devices)}"
    raise InputError(f"mesh {text} does not fit {devices} devices; would fit: {fix}")


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces the batch dimension is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def fill(rows: int, mesh: Mesh) -> int:
    """The nearest number of rows, not smaller, that gives every batch shard the same."""
    shards = batch_shards(mesh)
    return -(-rows // shards) * shards


def check_batch(batch_size: int, microbatch: int, mesh: Mesh) -> int:
    """Number of accumulation steps: batch_size / microbatch.

    Args:
      batch_size: global rows per optimizer step.
      microbatch: global rows per forward pass; 0 means the whole batch.

    Raises:
      InputError: a size that the mesh or the accumulation cannot cut evenly; lists legal sizes.
    """
    shards = batch_shards(mesh)
    cut = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % shards:
        low = max(batch_size // shards, 1) * shards
        legal = sorted({low, low + shards})
        raise InputError(
            f"batch_size {batch_size} does not divide over {shards} batch shards ({cut}); "
            f"legal sizes are multiples of {shards}, the nearest {legal}"
        )
    microbatch = batch_size if microbatch == 0 else microbatch
    if microbatch < 1 or batch_size % microbatch or microbatch % shards:
        legal = [shards * d for d in _divisors(batch_size // shards)]
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
