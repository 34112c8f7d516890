"""Experts cut over the expert axis: a function runs on every device, on its own tokens and its own experts.

What is sent between devices, and how much, is decided by the caller (models/dispatch.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bigmodel_jax.parallel.rules import active, spec

AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives between the devices that share out the experts; used inside `on_each_device`.

    size: S, of those devices. cut: the hidden features of an expert are cut over the tensor axis. kind, factor: the
      layout's `dispatch` and `room`.
    """

    size: int
    cut: bool
    kind: str = "bounded"
    factor: float = 0.0

    def index(self) -> jax.Array:
        """Number of this device among the S."""
        return jax.lax.axis_index(AXIS)

    def swap(self, x: jax.Array) -> jax.Array:
        """[S, ...] -> [S, ...]: row i goes to device i, row j of the result came from device j."""
        return jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True)

    def all(self, x: jax.Array) -> jax.Array:
        """[...] -> [S, ...], the same on every device."""
        return jax.lax.all_gather(x, AXIS)

    def ragged(self, x: jax.Array, into: jax.Array, taken, sizes, placed, received) -> jax.Array:
        """Rows taken[i] to taken[i] + sizes[i] of x go to device i, from row placed[i] of its `into` on; all [S].

        received: rows that come from each device. XLA has it for TPU, not for CPU.
        """
        return jax.lax.ragged_all_to_all(x, into, taken, sizes, placed, received, axis_name=AXIS)

    def room(self, choices: int) -> int:
        """R, room on another device for what `choices` of this one fall to it."""
        return choices if self.factor == 0 else min(choices, math.ceil(self.factor * choices / self.size))

    def join(self, y: jax.Array) -> jax.Array:
        """The sum of what the devices made from their part of each expert's hidden features."""
        return jax.lax.psum(y, "tensor") if self.cut else y


def shards() -> int:
    """Devices that share out the experts; 1 without a layout."""
    layout = active()
    return 1 if layout is None else layout.size(AXIS)


def on_each_device(
    fn: Callable[..., Any], rows: Sequence[jax.Array], weights: Sequence[jax.Array],
    axes: Sequence[Sequence[Any]], like: Sequence[int],
) -> tuple[jax.Array, ...]:  # fmt: skip
    """fn(exchange, rows, weights) on every device.

    Args:
      rows: arrays [B, L, ...], cut over the batch axes and the context axis.
      weights: arrays [E, ...] of logical `axes`: each device gets its experts, whole over the fsdp axes.
      like: for each result of fn, which of `rows` it has the rank and the layout of.
    """
    layout = active()
    mesh = layout.mesh
    whole = tuple(rule for rule in layout.rules if rule[1] in ((AXIS,), ("tensor",)) and rule[0] in ("experts", "mlp"))
    row_specs = [spec(("batch", "length", *[None] * (x.ndim - 2)), x.shape, mesh, layout.rules) for x in rows]
    weight_specs = [spec(each, w.shape, mesh, whole) for each, w in zip(axes, weights, strict=True)]
    exchange = Exchange(
        layout.size(AXIS), any("tensor" in where for where in weight_specs), layout.dispatch, layout.room
    )
    return jax.shard_map(
        lambda rows, weights: fn(exchange, rows, weights),
        mesh=mesh, in_specs=(row_specs, weight_specs), out_specs=tuple(row_specs[i] for i in like), check_vma=False,
    )(list(rows), list(weights))  # fmt: skip
