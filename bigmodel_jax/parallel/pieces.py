"""Activations as one piece per shard of their rows and length, for loops that must stay on each device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigmodel_jax.parallel.mesh import BATCH_AXES
from bigmodel_jax.parallel.rules import active


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How arrays [B, L, ...] are cut: into `rows` pieces of B and each into `lengths` pieces of L, on `axes`."""

    rows: int = 1
    lengths: int = 1
    axes: tuple[str, ...] = ()
    mesh: Mesh | None = None

    @property
    def count(self) -> int:
        return self.rows * self.lengths

    def split(self, x: jax.Array) -> jax.Array:
        """[B, L, ...] -> [count, B / rows, L / lengths, ...]; every device keeps what it has."""
        rows, length, *rest = x.shape
        x = x.reshape(self.rows, rows // self.rows, self.lengths, length // self.lengths, *rest)
        return self.pin(jnp.swapaxes(x, 1, 2).reshape(self.count, rows // self.rows, -1, *rest))

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        _, rows, length, *rest = x.shape
        x = jnp.swapaxes(self.pin(x).reshape(self.rows, self.lengths, rows, length, *rest), 1, 2)
        return x.reshape(self.rows * rows, self.lengths * length, *rest)

    def pin(self, tree: Any) -> Any:
        """Place leaves [count, ...], one on each shard; other dimensions stay free.

        A weight broadcast to [count, ...] and pinned so is gathered once, and its gradient stays
        local to the shard until it is summed over the first dimension, also inside a loop.
        """
        if self.mesh is None:
            return tree

        def pinned(x: jax.Array) -> jax.Array:
            free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
            place = PartitionSpec(self.axes or None, *free)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, place))

        return jax.tree.map(pinned, tree)


def pieces(rows: int, length: int = 1, over: tuple[str, ...] = BATCH_AXES) -> Pieces:
    """The pieces that the active layout cuts [rows, length] into; a size that it does not divide stays whole.

    over: mesh axes of the rows; outside a layer stack rules.ROW_AXES.
    """
    layout = active()
    if layout is None or layout.mesh.size == 1:
        return Pieces()
    counts, axes = [], []
    over = tuple(axis for axis in over if axis not in layout.apart)
    for size, names in ((rows, over), (length, ("context",))):
        names = [name for name in names if name not in layout.apart]
        count = math.prod(layout.size(name) for name in names)
        counts.append(count if size % count == 0 else 1)
        axes += [name for name in names if layout.size(name) > 1 and counts[-1] > 1]
    return Pieces(*counts, tuple(axes), layout.mesh)
