"""Muon: momentum whose matrices are replaced by their nearest orthogonal ones (Jordan 2024).

The update of a matrix [R, C] is U V^T of its momentum, found by five Newton-Schulz iterations.
Which parameters are matrices follows from their logical axes: neighbours of one family (heads and
head_dim; kernel taps and input channels) are one side, a stack of layers or an unnamed leading
axis is a batch of matrices. Embeddings, heads of a classifier, norms and biases are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic whose iterates push every singular value in (0, 1] into about [0.7, 1.2]."""

_FAMILY = {
    "heads": "heads", "kv_heads": "heads", "head_dim": "heads",
    "spatial": "inputs", "conv_in": "inputs",
}  # fmt: skip
_NEVER = {"vocab", "positions", "classes", "norm"}


def matrix_shape(axes: Sequence[str | None], shape: Sequence[int]) -> tuple[int, int, int] | None:
    """(stack, rows, columns) in which the leaf is a stack of matrices, or None if it is none.

    >>> matrix_shape(("layers", "embed", "heads", "head_dim"), (4, 8, 2, 3))
    (4, 8, 6)
    """
    if _NEVER.intersection(axes):
        return None
    start = 0
    while start < len(axes) and axes[start] in (None, "layers"):
        start += 1
    sides: list[tuple[str, int]] = []
    for name, size in zip(axes[start:], shape[start:], strict=True):
        family = _FAMILY.get(name, name) if name else "unnamed"
        if sides and sides[-1][0] == family and name in _FAMILY:
            sides[-1] = (family, sides[-1][1] * size)
        else:
            sides.append((family, size))
    if len(sides) != 2:
        return None
    return math.prod(shape[:start]), sides[0][1], sides[1][1]


def orthogonalize(x: jax.Array, steps: int = 5) -> jax.Array:
    """Approximate U V^T of each matrix [..., R, C]; singular values end up near 1.

    Computed in the dtype of `x`: bfloat16 is enough (Jordan 2024), float32 is what CPUs are fast at.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-7)

    def iterate(_: int, x: jax.Array) -> jax.Array:
        gram = jnp.einsum("...rc,...sc->...rs", x, x)
        poly = b * gram + c * jnp.einsum("...rs,...st->...rt", gram, gram)
        return a * x + jnp.einsum("...rs,...sc->...rc", poly, x)

    x = jax.lax.fori_loop(0, steps, iterate, x)
    return jnp.swapaxes(x, -1, -2) if tall else x
