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

from bigmodel_jax.models import target
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.scores import Part, Rule, Tile, exponentials, finish, kept, split

UNROLLED = 16


def block_rows() -> int:
    """Queries per block: 64 keeps a tile in a CPU's cache, accelerators want larger matmuls."""
    return 64 if target.platform() == "cpu" else 512


def bands(length: int, rows: int, unrolled: int = 0) -> list[tuple[int, int, int]]:
    """Cut `length` queries into (first query, queries per block, blocks), `unrolled` or UNROLLED such bands."""
    whole = length // rows
    per = max(1, -(-whole // (unrolled or UNROLLED)))
    out = [(i * rows, rows, min(per, whole - i)) for i in range(0, whole, per)]
    if length % rows:
        out.append((whole * rows, length % rows, 1))
    return out


def _blocks(fn, start: int, rows: int, count: int, carry):
    """carry, outs = fn(carry, i0) for each block of a band; outs [B, G, R, rows, ...] joined."""
    if count == 1:
        return fn(carry, start)
    carry, outs = jax.lax.scan(fn, carry, start + rows * jnp.arange(count))

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    return carry, jax.tree.map(join, outs)


def _cut(x: jax.Array, i0, rows: int) -> jax.Array:
    """Queries i0 .. i0 + rows of x [B, G, R, L, ...]."""
    if isinstance(i0, int):
        return x[:, :, :, i0 : i0 + rows]
    return jax.lax.dynamic_slice_in_dim(x, i0, rows, axis=3)


def _dot(a: jax.Array, b: jax.Array, high: jnp.dtype) -> jax.Array:
    """[B, G, R, l, x] . [B, G, x, y] -> [B, G, R, l, y]: one plain matmul per group.

    Every product below is written so that rows meet columns without a transposed operand, which
    XLA:CPU runs at half speed.
    """
    flat = a.reshape(*a.shape[:2], -1, a.shape[-1])
    out = jax.lax.dot_general(flat, b, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=high)
    return out.reshape(*a.shape[:-1], b.shape[-1])


def _columns(x: jax.Array) -> jax.Array:
    """[B, G, R, l, x] -> [B, G, x, R l]."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1, x.shape[-1]), 2, 3)


def heads_first(x: jax.Array, groups: int) -> jax.Array:
    """[B, L, H, K] -> [B, G, R, L, K]."""
    return jnp.transpose(split(x, groups), (0, 2, 3, 1, 4))


def heads_last(x: jax.Array) -> jax.Array:
    """[B, G, R, L, K] -> [B, L, H, K]."""
    x = jnp.transpose(x, (0, 3, 1, 2, 4))
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, keys: jax.Array | None, part: Part | None, rule: Rule
) -> jax.Array:
    """Attention of q [B, L, H, K] over k, v [B, M, G, K]; see attention.attention.

    part: which part of attention this is, for what depends on it (ALiBi, dropout); None: all of it.
    """
    return _forward(q, k, v, mask, keys, part, rule)[0]


def _forward(q, k, v, mask: Mask, keys, part: Part | None, rule: Rule):
    kh, vh = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    out, lse = forward(heads_first(q, k.shape[2]), kh, vh, mask, keys, part, rule, q.dtype)
    out = checkpoint_name(heads_last(out), "attention")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, mask, keys, part, out, lse)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, keys: jax.Array | None, part: Part | None, rule: Rule,
    dtype: jnp.dtype, unrolled: int = 0,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out [B, G, R, L, K] in `dtype`, log-sum-exp of the scores [B, G, R, L], -inf where no key is seen).

    Args:
      q: [B, G, R, L, K]. k, v: [B, G, M, K].
      unrolled: bands of queries, each of which compiles to code of its own; 0 means UNROLLED.
    """
    high = jnp.promote_types(q.dtype, jnp.float32)
    memory, kt = k.shape[2], jnp.swapaxes(k, 2, 3)
    heads = q.shape[1] * q.shape[2]
    outs, sums = [], []
    for start, rows, count in bands(q.shape[3], block_rows(), unrolled):
        lo, hi = mask.extent(start, rows * count, memory)
        if lo == hi:
            shape = (*q.shape[:3], rows * count)
            outs.append(jnp.zeros((*shape, v.shape[-1]), dtype))
            sums.append(jnp.full(shape, -jnp.inf, high))
            continue

        def block(carry, i0, rows=rows, lo=lo, hi=hi):
            tile = (i0, rows, lo, hi - lo)
            s, _ = finish(_dot(_cut(q, i0, rows), kt[..., lo:hi], high), mask, rule, tile, part=part)
            e, total, top = exponentials(s)
            seen = total > 0
            total = jnp.where(seen, total, 1.0)
            if rule.dropout:
                keep = kept(keys, rule, tile, part or Part(heads, memory), heads).reshape(e.shape)
                e = jnp.where(keep, e / (1.0 - rule.dropout), 0.0)
            out = _dot(e.astype(v.dtype), v[:, :, lo:hi], high) / total
            lse = jnp.where(seen, jnp.log(total) + top, -jnp.inf)[..., 0]
            return carry, (out.astype(dtype), lse)

        _, (out, lse) = _blocks(block, start, rows, count, None)
        outs.append(out)
        sums.append(lse)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(sums, axis=3)


def _backward(rule: Rule, saved, d_out):
    q, k, v, mask, keys, part, out, lse = saved
    groups = k.shape[2]
    kh, vh = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    mine = [heads_first(x, groups) for x in (q, d_out, correction(out, d_out))]
    dq, *sums = backward(*mine, lse, kh, vh, mask, keys, part, rule, q.dtype)
    dk, dv = (jnp.transpose(x, (0, 3, 1, 2)).astype(k.dtype) for x in sums)
    return heads_last(dq), dk, dv, None, None, None


def correction(out: jax.Array, d_out: jax.Array) -> jax.Array:
    """out . d_out [..., 1], the "D" of Dao et al. 2022: what a softmax's gradient subtracts in each row."""
    high = jnp.promote_types(out.dtype, jnp.float32)
    return jnp.sum(d_out.astype(high) * out.astype(high), axis=-1, keepdims=True)


def backward(
    q: jax.Array, d_out: jax.Array, delta: jax.Array, lse: jax.Array, k: jax.Array, v: jax.Array, mask: Mask,
    keys: jax.Array | None, part: Part | None, rule: Rule, dtype: jnp.dtype, unrolled: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of `forward`: of q in `dtype`, and of k and v, transposed to [B, G, K, M], in at least float32.

    delta [B, G, R, L, 1] (see `correction`) and lse may be those of more keys than are here: the gradients are
    then the share of these keys.
    """
    high = lse.dtype
    kt, vt = (jnp.swapaxes(x, 2, 3) for x in (k, v))
    rows_of = [q, d_out, delta, jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]]
    total = None
    dqs = []
    # Backwards: the last queries see most keys, so that their gradient is where the others add up.
    for start, rows, count in reversed(bands(q.shape[3], block_rows(), unrolled)):
        lo, hi = mask.extent(start, rows * count, k.shape[2])
        if lo == hi:
            dqs.append(jnp.zeros((*q.shape[:3], rows * count, q.shape[-1]), dtype))
            continue
        cut = (k[:, :, lo:hi], kt[..., lo:hi], vt[..., lo:hi])

        def block(carry, i0, rows=rows, lo=lo, hi=hi, cut=cut):
            tile = (i0, rows, lo, hi - lo)
            mine = [_cut(x, i0, rows) for x in rows_of]
            whole = part or Part(q.shape[1] * q.shape[2], k.shape[2])
            dq, *sums = _gradient(mine, cut, mask, keys, whole, rule, tile, dtype)
            return _add(carry, sums), dq

        whole = total is None and (lo, hi) == (0, k.shape[2]) and count == 1
        if total is None and not whole:
            total = [jnp.zeros(x.shape, high) for x in (kt, vt)]
        carry = None if whole else [x[..., lo:hi] for x in total]
        sums, dq = _blocks(block, start, rows, count, carry)
        total = sums if whole else [x.at[..., lo:hi].set(y) for x, y in zip(total, sums, strict=True)]
        dqs.append(dq)
    dkt, dvt = total or [jnp.zeros(x.shape, high) for x in (kt, vt)]
    return jnp.concatenate(dqs[::-1], axis=3), dkt, dvt


def _add(carry, new):
    return new if carry is None else [a + b for a, b in zip(carry, new, strict=True)]


def _gradient(mine, cut, mask: Mask, keys, part: Part, rule: Rule, tile: Tile, dtype: jnp.dtype):
    """dq [B, G, R, rows, K] and, transposed, dk and dv [B, G, K, cols] of one tile."""
    q, d_out, delta, lse = mine
    kh, kt, vt = cut
    high = lse.dtype
    s, capped = finish(_dot(q, kt, high), mask, rule, tile, part=part)
    p = jnp.exp(s - lse)
    dp = _dot(d_out, vt, high)
    used = p
    if rule.dropout:
        keep = kept(keys, rule, tile, part, q.shape[1] * q.shape[2]).reshape(p.shape)
        used = jnp.where(keep, p / (1.0 - rule.dropout), 0.0)
        dp = jnp.where(keep, dp / (1.0 - rule.dropout), 0.0)
    ds = p * (dp - delta)
    if rule.softcap:
        ds = ds * (1.0 - jnp.square(capped / rule.softcap))
    ds = (ds * rule.scale).astype(q.dtype)
    dq = _dot(ds, kh, high).astype(dtype)
    flat = (*ds.shape[:2], -1, ds.shape[-1])
    dkt = _dot(_columns(q)[:, :, None], ds.reshape(flat), high)[:, :, 0]
    dvt = _dot(_columns(d_out)[:, :, None], used.astype(q.dtype).reshape(flat), high)[:, :, 0]
    return dq, dkt, dvt


blockwise.defvjp(_forward, _backward)
