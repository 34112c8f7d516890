"""Positions as numbers added to embeddings, rotations of queries and keys, or biases of scores."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def sinusoidal(positions: jax.Array, dim: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Sines, then cosines, of geometric frequencies (Vaswani et al. 2017, section 3.5).

    Args:
      positions: [...] integers.
      dim: D; an odd last column is zero.

    Returns:
      [..., D] in `dtype`.
    """
    half = dim // 2
    exponent = jnp.arange(half, dtype=dtype) / max(half - 1, 1)
    angles = positions[..., None].astype(dtype) * jnp.exp(-math.log(10_000.0) * exponent)
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(table, [(0, 0)] * positions.ndim + [(0, dim - 2 * half)])


def rope_frequencies(
    rotary_dim: int,
    theta: float,
    dtype: jnp.dtype = jnp.float32,
    *,
    scaling: str = "none",
    factor: float = 1.0,
    original: int = 0,
    bounds: tuple[float, ...] = (),
) -> tuple[jax.Array, float]:
    """Radians per position [rotary_dim / 2], and the length of a rotated unit vector.

    none    theta^(-2i / R) (Su et al. 2021)
    linear  all divided by `factor`: position interpolation (Chen et al. 2023)
    llama3  a frequency that turns fewer than `bounds[0]` times in `original` positions is divided by
            `factor`, one that turns more than `bounds[1]` times is kept, between them linear in the
            number of turns (Grattafiori et al. 2024, as released); default bounds 1 and 4
    yarn    the same with default bounds 1 and 32, between them linear in the index i, rounded
            outwards; vectors grow by 0.1 ln(factor) + 1 (Peng et al. 2023, sections 3.2 and 3.4)
    """
    exponent = jnp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim
    plain = theta**-exponent
    if scaling == "none":
        return plain, 1.0
    if scaling == "linear":
        return plain / factor, 1.0
    low, high = bounds or {"llama3": (1.0, 4.0), "yarn": (1.0, 32.0)}[scaling]
    if scaling == "llama3":
        turns = plain * (original / (2 * math.pi))
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return plain * (kept + (1.0 - kept) / factor), 1.0

    def index(turns: float) -> float:
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(index(high)), 0)
    last = min(math.ceil(index(low)), rotary_dim - 1)
    kept = 1.0 - jnp.clip((jnp.arange(rotary_dim // 2, dtype=dtype) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return plain * (kept + (1.0 - kept) / factor), 0.1 * math.log(factor) + 1.0


def rotary_table(
    positions: jax.Array, rotary_dim: int, theta: float, dtype: jnp.dtype = jnp.float32, **scaling: Any
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., rotary_dim / 2] of RoPE (Su et al. 2021, eq. 15).

    Args:
      scaling: keywords of `rope_frequencies`.
    """
    frequencies, length = rope_frequencies(rotary_dim, theta, dtype, **scaling)
    angles = positions[..., None].astype(dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if length == 1.0 else (cos * length, sin * length)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate the first 2 * cos.shape[-1] features of each head; the rest pass through.

    Args:
      x: [B, L, H, K].
      cos, sin: [B or 1, L, R / 2].
      interleaved: pairs are (0, 1), (2, 3), ... as in the paper; otherwise (0, R/2), (1, R/2 + 1),
        ... as in the Llama and NeoX weights.

    Returns:
      same shape and dtype; computed in at least float32.
    """
    half = cos.shape[-1]
    c, s = cos[:, :, None, :], sin[:, :, None, :]
    wide = x[..., : 2 * half].astype(jnp.promote_types(x.dtype, jnp.float32))
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
    else:
        a, b = wide[..., :half], wide[..., half:]
    first, second = a * c - b * s, a * s + b * c
    if interleaved:
        turned = jnp.stack([first, second], axis=-1).reshape(wide.shape)
    else:
        turned = jnp.concatenate([first, second], axis=-1)
    turned = turned.astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes [H] of attention with linear biases (Press et al. 2022), float64.

    A power of two gets 2^(-8/H), 2^(-16/H), ...; for other counts the paper's code takes the
    slopes of the power below and fills up with every other slope of the power above.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8.0 / below * np.arange(1, below + 1))
    extra = 2.0 ** (-8.0 / (2 * below) * np.arange(1, 2 * below + 1))[0::2]
    return np.concatenate([slopes, extra[: heads - below]])


def relative_buckets(gap: jax.Array, both_sides: bool, buckets: int, far: int) -> jax.Array:
    """Number of the bucket that each distance belongs to (Raffel et al. 2020, section 2.1), int32.

    Half of the buckets hold one distance each, the others grow geometrically up to `far`; all larger
    distances share the last. With `both_sides` keys behind the query have the second half of the buckets;
    else they count as distance 0 (they are masked).

    Args:
      gap: query index - key index, any shape.
    """
    own = buckets // 2 if both_sides else buckets
    exact = own // 2
    distance = np.arange(max(far, exact) + 1)
    growth = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(far / exact))
    large = np.minimum(exact + (growth * (own - exact)).astype(np.int32), own - 1)
    table = jnp.asarray(np.where(distance < exact, distance, large), jnp.int32)
    at = jnp.abs(gap) if both_sides else jnp.maximum(gap, 0)
    return table[jnp.minimum(at, len(table) - 1)] + (own * (gap < 0).astype(jnp.int32) if both_sides else 0)
