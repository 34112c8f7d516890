"""Host rows to global arrays.

The data pipeline answers for any rows of a step's global batch. Which rows this process must ask
for is read off the batch sharding, never computed from a process index: two hosts of one tensor
group ask for the same rows and get them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Batch = Mapping[str, np.ndarray]


def _held(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[jax.Device, slice]:
    """{device of this process: rows it holds} for a [M] or [A, M] grid; A is never cut."""
    where = sharding.addressable_devices_indices_map(shape)
    return {device: index[-1] for device, index in where.items()}


def local_columns(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Columns m of the [A, M] (or [M]) row grid that this process's devices hold, each once."""
    held = np.zeros(shape[-1], dtype=bool)
    for columns in _held(sharding, shape).values():
        held[columns] = True
    return np.flatnonzero(held)


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of the global batch that this process feeds, in the order `global_batch` asks for them."""
    *steps, microbatch = shape
    offsets = np.arange(steps[0] if steps else 1)[:, None] * microbatch
    return (offsets + local_columns(sharding, shape)[None, :]).ravel()


def global_batch(
    fetch: Callable[[np.ndarray], Batch], sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> dict[str, jax.Array]:
    """Leaves [*shape, ...] placed as `sharding` says (a sharding of the leading dimensions).

    Args:
      fetch: rows [n] -> {name: [n, ...]}, pure; called once with the rows this process feeds.
      shape: (A, M), A microbatches of M global rows with row r = a * M + m; or (M,).
    """
    *steps, microbatch = shape
    columns = local_columns(sharding, shape)
    local = fetch(local_rows(sharding, shape))
    place = np.full(microbatch, -1)
    place[columns] = np.arange(len(columns))
    held = _held(sharding, shape)

    def assemble(leaf: np.ndarray) -> jax.Array:
        grid = leaf.reshape(*steps, len(columns), *leaf.shape[1:])
        shards = [
            jax.device_put(grid[..., place[m], *(slice(None),) * (leaf.ndim - 1)], device) for device, m in held.items()
        ]
        whole = (*shape, *leaf.shape[1:])
        return jax.make_array_from_single_device_arrays(whole, sharding, shards)

    return {name: assemble(np.asarray(leaf)) for name, leaf in local.items()}


def abstract_batch(
    spec: Mapping[str, tuple[tuple[int, ...], Any]],
    sharding: jax.sharding.Sharding,
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """Shapes of the arrays `global_batch` makes, from {name: (shape of one row, dtype)}."""
    return {name: jax.ShapeDtypeStruct((*shape, *row), dtype, sharding=sharding) for name, (row, dtype) in spec.items()}
