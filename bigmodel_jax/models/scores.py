"""The arithmetic of attention on one tile of queries and keys, shared by the pure-JAX backends.

Shapes: B batch, L queries, M keys, G key-value groups, R heads per group, H = G R, K head dim.
A tile is (i0, rows, j0, cols): queries i0 .. i0 + rows against keys j0 .. j0 + cols.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from bigmodel_jax.models.masks import Index, Mask
from bigmodel_jax.models.positions import alibi_slopes

Tile = tuple[Index, int, int, int]


@dataclass(frozen=True)
class Rule:
    """Static side of attention: scores are softcap(scale q k^T) - slope |i - j|."""

    scale: float
    softcap: float = 0.0
    alibi: bool = False
    dropout: float = 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """Which part of attention the arrays at hand are, where devices share it out.

    heads, memory: how many heads and keys the whole has. head, query, key: numbers in the whole of the first
    ones here.
    """

    heads: int = field(metadata={"static": True})
    memory: int = field(metadata={"static": True})
    head: Index = 0
    query: Index = 0
    key: Index = 0


def biases(mask: Mask, heads: int, tile: Tile, dtype: jnp.dtype, part: Part | None = None) -> jax.Array:
    """ALiBi biases [B or 1, H, rows, cols]."""
    slopes = jnp.asarray(alibi_slopes(heads if part is None else part.heads), dtype)
    if part is not None:
        slopes = jax.lax.dynamic_slice_in_dim(slopes, part.head, heads)
    return -slopes[:, None, None] * jnp.abs(mask.distance(*tile))[:, None].astype(dtype)


def kept(keys: jax.Array, rule: Rule, tile: Tile, part: Part, heads: int) -> jax.Array:
    """Which probabilities dropout leaves, bool [B, H, rows, cols].

    One key per row and query: a tile's mask is a cut of the whole mask, whatever the tiling.
    """
    i0, rows, j0, cols = tile
    share = jnp.float32(1.0 - rule.dropout)  # a Python number would draw other bits under float64

    def row(key: jax.Array, i: jax.Array) -> jax.Array:
        drawn = jax.random.bernoulli(jax.random.fold_in(key, i), share, (part.heads, part.memory))
        own = jax.lax.dynamic_slice_in_dim(drawn, part.head, heads)
        return jax.lax.dynamic_slice_in_dim(own, part.key + j0, cols, axis=1)

    over_queries = jax.vmap(row, (None, 0), 1)
    return jax.vmap(over_queries, (0, None))(keys, part.query + i0 + jnp.arange(rows))


def split(q: jax.Array, groups: int) -> jax.Array:
    """[B, L, H, K] -> [B, L, G, R, K]."""
    b, length, heads, k = q.shape
    return q.reshape(b, length, groups, heads // groups, k)


def finish(
    raw: jax.Array,
    mask: Mask,
    rule: Rule,
    tile: Tile,
    bias: jax.Array | None = None,
    part: Part | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scores from raw products q k^T [B, G, R, rows, cols]; hidden keys score -inf.

    Args:
      bias: [B or 1, H or 1, rows, cols].

    Returns:
      (scores, capped scores before biases), shaped and typed as `raw`.
    """
    groups, per = raw.shape[1:3]
    s = raw * rule.scale
    capped = s = rule.softcap * jnp.tanh(s / rule.softcap) if rule.softcap else s
    if rule.alibi:
        line = biases(mask, groups * per, tile, raw.dtype, part)
        s = s + line.reshape(line.shape[0], groups, per, *line.shape[2:])
    if bias is not None:
        full = jnp.broadcast_to(bias, (bias.shape[0], groups * per, *bias.shape[2:]))
        s = s + full.reshape(bias.shape[0], groups, per, *bias.shape[2:]).astype(raw.dtype)
    visible = mask.visible(*tile)
    if visible is not None:
        s = jnp.where(visible[:, None, None], s, -jnp.inf)
    return s, capped


def exponentials(s: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(e, total, top): softmax(s) = e / total without overflow; total is 0 where all is hidden."""
    top = jnp.max(s, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    e = jnp.exp(s - top)
    return e, jnp.sum(e, axis=-1, keepdims=True), top
