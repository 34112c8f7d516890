"""Attention in blocks of queries, pure JAX: memory linear in length, forward and backward.

Each block of queries meets at once all the keys it can see, so the softmax of a row is exact and
needs no running maximum (unlike Rabe and Staats 2021, Dao et al. 2022); blocks of keys above the
causal diagonal or left of the window are cut off statically. The backward pass recomputes the
scores of a block from the saved log-sum-exp (Dao et al. 2022, algorithm 4). On two CPU cores this
takes half the time of `jax.nn.dot_product_attention`.

Up to `UNROLLED` blocks are unrolled with exact extents; longer rows are cut into that many bands,
each a loop over its blocks, so that compile time does not grow with the length.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.scores import Rule, Tile, attend, kept, scores, split

UNROLLED = 16


def block_rows(platform: str | None = None) -> int:
    """Queries per block: 64 keeps a tile in a CPU's cache, accelerators want larger matmuls."""
    return 64 if (platform or jax.default_backend()) == "cpu" else 512


def bands(length: int, rows: int) -> list[tuple[int, int, int]]:
    """Cut `length` queries into (first query, queries per block, blocks)."""
    whole = length // rows
    per = max(1, -(-whole // UNROLLED))
    out = [(i * rows, rows, min(per, whole - i)) for i in range(0, whole, per)]
    if length % rows:
        out.append((whole * rows, length % rows, 1))
    return out


def _blocks(fn, start: int, rows: int, count: int, carry):
    """carry, outs = fn(carry, i0) for each block of a band; outs stacked along axis 1 (length)."""
    if count == 1:
        return fn(carry, start)
    carry, outs = jax.lax.scan(fn, carry, start + rows * jnp.arange(count))
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), outs)


def _cut(x: jax.Array, i0, rows: int) -> jax.Array:
    if isinstance(i0, int):
        return x[:, i0 : i0 + rows]
    return jax.lax.dynamic_slice_in_dim(x, i0, rows, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, keys: jax.Array | None, rule: Rule
) -> jax.Array:
    """Attention of q [B, L, H, K] over k, v [B, M, G, K]; see attention.attention."""
    return _forward(q, k, v, mask, keys, rule)[0]


def _forward(q, k, v, mask, keys, rule):
    memory = k.shape[1]
    outs, sums = [], []
    for start, rows, count in bands(q.shape[1], block_rows()):
        lo, hi = mask.extent(start, rows * count, memory)

        def block(carry, i0, rows=rows, lo=lo, hi=hi):
            tile = (i0, rows, lo, hi - lo)
            out, lse = attend(
                _cut(q, i0, rows), k[:, lo:hi], v[:, lo:hi], mask, rule, tile, keys=keys, memory=memory
            )
            return carry, (out, jnp.moveaxis(lse, -1, 1))

        _, (out, lse) = _blocks(block, start, rows, count, None)
        outs.append(out)
        sums.append(lse)
    out = checkpoint_name(jnp.concatenate(outs, axis=1), "attention")
    lse = checkpoint_name(jnp.concatenate(sums, axis=1), "attention_lse")
    return out, (q, k, v, mask, keys, out, lse)


def _backward(rule, saved, d_out):
    q, k, v, mask, keys, out, lse = saved
    high = lse.dtype
    dk, dv = jnp.zeros(k.shape, high), jnp.zeros(v.shape, high)
    dqs = []
    for start, rows, count in bands(q.shape[1], block_rows()):
        lo, hi = mask.extent(start, rows * count, k.shape[1])
        if lo == hi:
            dqs.append(jnp.zeros((q.shape[0], rows * count, *q.shape[2:]), q.dtype))
            continue

        def block(carry, i0, rows=rows, lo=lo, hi=hi):
            tile = (i0, rows, lo, hi - lo)
            cut = [_cut(x, i0, rows) for x in (q, out, lse, d_out)]
            dq, dk, dv = _tile_gradient(cut, k[:, lo:hi], v[:, lo:hi], mask, keys, rule, tile, k.shape[1])
            return (carry[0] + dk, carry[1] + dv), dq

        (dk_band, dv_band), dq = _blocks(block, start, rows, count, (dk[:, lo:hi], dv[:, lo:hi]))
        dk, dv = dk.at[:, lo:hi].set(dk_band), dv.at[:, lo:hi].set(dv_band)
        dqs.append(dq)
    dq = jnp.concatenate(dqs, axis=1)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _tile_gradient(cut, k, v, mask: Mask, keys, rule: Rule, tile: Tile, memory: int):
    """Gradients (dq, dk, dv) of one tile; dk and dv in the dtype of the scores."""
    q, out, lse, d_out = cut
    groups = k.shape[2]
    q5, o5, d5 = (split(x, groups) for x in (q, out, d_out))
    s, capped = scores(q5, k, mask, rule, tile)
    lse = jnp.moveaxis(lse, 1, -1)[..., None]
    p = jnp.exp(s - jnp.where(jnp.isfinite(lse), lse, 0.0))
    high = p.dtype
    dp = jnp.einsum("blgrk,bmgk->bgrlm", d5, v, preferred_element_type=high)
    pd = p
    if rule.dropout:
        keep = kept(keys, rule, q.shape[2], tile, memory).reshape(p.shape)
        pd = jnp.where(keep, p / (1.0 - rule.dropout), 0.0)
        dp = jnp.where(keep, dp / (1.0 - rule.dropout), 0.0)
    delta = jnp.sum(d5.astype(high) * o5.astype(high), axis=-1)
    ds = p * (dp - jnp.moveaxis(delta, 1, -1)[..., None])
    if rule.softcap:
        ds = ds * (1.0 - jnp.square(capped / rule.softcap))
    ds = (ds * rule.scale).astype(q.dtype)
    dv = jnp.einsum("bgrlm,blgrk->bmgk", pd.astype(q.dtype), d5, preferred_element_type=high)
    dq = jnp.einsum("bgrlm,bmgk->blgrk", ds, k, preferred_element_type=high)
    dk = jnp.einsum("bgrlm,blgrk->bmgk", ds, q5, preferred_element_type=high)
    return dq.reshape(q.shape).astype(q.dtype), dk, dv


blockwise.defvjp(_forward, _backward)
