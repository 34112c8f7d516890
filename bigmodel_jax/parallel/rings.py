"""Gradients of weights scattered along one ring of a torus after the other.

XLA for TPU (libtpu 0.0.52) turns a reduce-scatter among all devices of a torus into an all-reduce over all its
dimensions and a slice: that uses every link, but puts twice the bytes on them, and holds the whole sum on each device.
A reduce-scatter along a single ring stays one. So here a product with a weight runs on each device for its own rows
(`own_rows`): the weight's shards are gathered in one go, and the gradient's partial sums go back ring by ring, whole
along the first. A token table is not gathered where reading it for all takes less (`own_tokens`).

Whether less is also faster depends on the hardware: `bigmodel plan` predicts both (mesh.weights_by).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from bigmodel_jax.parallel.mesh import BATCH_AXES
from bigmodel_jax.parallel.pieces import Pieces
from bigmodel_jax.parallel.rules import Layout, active, spec, use

AXIS = "fsdp"
LANES = 128
"""Features that a TPU lays out together in memory."""


def dimensions(mesh: Mesh) -> tuple[int, ...]:
    """Sizes of the rings that the fsdp axis runs along, outermost first, read off the devices' coordinates; their
    product is the axis. One ring where devices have no coordinates, or none that form a grid."""
    along = mesh.devices[tuple(slice(None) if name == AXIS else 0 for name in mesh.axis_names)].ravel()
    places = [getattr(device, "coords", None) for device in along]
    if any(place is None for place in places):
        return (len(along),)
    sizes, at = [], np.array(places)
    while len(at) > 1:
        moved = np.flatnonzero((at[1] != at[0]).reshape(-1))
        rest = np.delete(np.arange(at.shape[1]), moved[:1])
        size = next((n for n in range(1, len(at)) if (at[n][rest] != at[0][rest]).any()), len(at))
        if len(moved) != 1 or len(at) % size:
            return (len(along),)
        sizes.insert(0, size)
        at = at[::size]
    return tuple(sizes) or (1,)


def own_rows(
    fn: Callable[[Any, jax.Array], jax.Array], x: jax.Array, w: jax.Array, axes: Sequence[str | None]
) -> jax.Array:
    """fn(x, w) with x [B, ...] cut into rows and a weight of logical `axes` whole; its result has the rows of x.

    Without rings in the active layout, or where the weight is not cut over fsdp alone, `fn` is left to the compiler.
    """
    layout = active()
    place = _placed(layout, x, w, axes)
    if place is None:
        return fn(x, w)
    dim = place.index(AXIS)

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        with use(None):
            return fn(x, whole(w, dim, layout.rings))

    return _on_rows(local, layout, place)(x, w)


def _on_rows(local: Callable[[jax.Array, jax.Array], jax.Array], layout: Layout, place: list[Any]) -> Callable:
    """`local` on each device, of its rows and its shard of a weight, to its rows."""
    rows = PartitionSpec(tuple(axis for axis in BATCH_AXES if layout.size(axis) > 1))
    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=(rows, PartitionSpec(*place)), out_specs=rows, check_vma=False
    )


def _placed(layout: Layout | None, x: jax.Array, w: jax.Array, axes: Sequence[str | None]) -> list[Any] | None:
    """How the weight is cut, or None where it should be left to the compiler."""
    if layout is None or not layout.rings or not axes or layout.size(AXIS) == 1:
        return None
    if math.prod(layout.size(axis) for axis in BATCH_AXES) != layout.mesh.size:
        return None
    if x.shape[0] % layout.mesh.size:
        return None
    place = list(spec(axes, w.shape, layout.mesh, layout.weights))
    return place if [cut for cut in place if cut is not None] == [AXIS] else None


def own_tokens(fn: Callable[[Any, jax.Array], jax.Array], ids: jax.Array, table: jax.Array) -> jax.Array:
    """fn(ids, table), rows [B, L, D] of a table [V, D], where it is cut over fsdp by features: each device reads its
    features for the tokens of all, and they change rows for features. The table and its gradient stay where they are.
    It is gathered where it is smaller than what would be read, see `exchanged`.
    """
    layout, axes = active(), ("vocab", "embed")
    place = _placed(layout, ids, table, axes)
    if place is None or place.index(AXIS) == 0:
        return own_rows(fn, ids, table, axes)
    together = ids.size // math.prod(layout.size(axis) for axis in BATCH_AXES if axis != AXIS)
    if not exchanged(together, table.shape, layout.size(AXIS)):
        return own_rows(fn, ids, table, axes)

    def local(ids: jax.Array, table: jax.Array) -> jax.Array:
        with use(None):
            x = fn(jax.lax.all_gather(ids, AXIS, tiled=True), table)
        return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=x.ndim - 1, tiled=True)

    return _on_rows(local, layout, place)(ids, table)


def exchanged(tokens: int, table: tuple[int, ...], shards: int) -> bool:
    """Whether a device that reads its features of a table [V, D] for so many tokens holds less than the table. Memory
    of a TPU is laid out in `LANES` of features, however few there are: with thousands of devices it does not."""
    rows, width = table
    return tokens * max(width // shards, LANES) < rows * width


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def whole(w: jax.Array, dim: int, rings: tuple[int, ...]) -> jax.Array:
    """A shard cut over fsdp along `dim` to the whole array. Inside `shard_map`; the gradient is summed over fsdp."""
    return jax.lax.all_gather(w, AXIS, axis=dim, tiled=True)


def _whole_forward(w: jax.Array, dim: int, rings: tuple[int, ...]) -> tuple[jax.Array, None]:
    return whole(w, dim, rings), None


def _whole_backward(dim: int, rings: tuple[int, ...], _: None, g: jax.Array) -> tuple[jax.Array]:
    return (summed(g, dim, rings),)


whole.defvjp(_whole_forward, _whole_backward)


def summed(g: jax.Array, dim: int, rings: tuple[int, ...]) -> jax.Array:
    """Each device's array to its shard, along `dim`, of the sum over fsdp. Inside `shard_map`."""
    g = jnp.moveaxis(g, dim, 0)  # TPU scatters along major dimensions alone
    for groups in _groups(rings):
        g = jax.lax.psum_scatter(g, AXIS, scatter_dimension=0, tiled=True, axis_index_groups=groups)
    return jnp.moveaxis(g, 0, dim)


def spread(w: jax.Array, cut: Pieces, width: int) -> jax.Array:
    """[pieces, *w.shape]: a copy of a weight for each piece, gathered here along its dimension of size `width` where
    the active layout has rings."""
    dim = _dimension(w.shape, cut, width)
    if dim is None:
        return cut.pin(jnp.broadcast_to(w, (cut.count, *w.shape)))
    layout = active()
    shard = PartitionSpec(*[AXIS if d == dim else None for d in range(w.ndim)])
    return jax.shard_map(
        lambda w: whole(w, dim, layout.rings)[None],
        mesh=layout.mesh, in_specs=shard, out_specs=PartitionSpec(cut.axes), check_vma=False,
    )(w)  # fmt: skip


def total(g: jax.Array, cut: Pieces, width: int, dtype: Any) -> jax.Array:
    """The sum of [pieces, ...] over its pieces; by rings, and as every other weight's in its `dtype`, where `spread`
    gathers."""
    dim = _dimension(g.shape[1:], cut, width)
    if dim is None:
        return jnp.sum(g, axis=0)
    layout = active()
    others = tuple(axis for axis in cut.axes if axis != AXIS)

    def local(g: jax.Array) -> jax.Array:
        g = summed(g[0].astype(dtype), dim, layout.rings)
        return jax.lax.psum(g, others) if others else g

    shard = PartitionSpec(*[AXIS if d == dim else None for d in range(g.ndim - 1)])
    return jax.shard_map(local, mesh=layout.mesh, in_specs=PartitionSpec(cut.axes), out_specs=shard, check_vma=False)(g)


def _dimension(shape: tuple[int, ...], cut: Pieces, width: int) -> int | None:
    """The dimension of a weight that is gathered here, or None."""
    layout = active()
    if layout is None or not layout.rings or cut.count != layout.mesh.size or AXIS not in cut.axes:
        return None
    return shape.index(width) if width in shape[:2] and len(shape) == 2 and width % layout.size(AXIS) == 0 else None


def _groups(rings: tuple[int, ...]) -> list[list[list[int]] | None]:
    """For each ring, outermost first, the places on the axis that share one."""
    if len(rings) == 1:
        return [None]
    ids = np.arange(math.prod(rings)).reshape(rings)
    return [np.moveaxis(ids, k, -1).reshape(-1, rings[k]).tolist() for k in range(len(rings))]
