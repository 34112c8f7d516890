"""The key-value cache as a value, in the two forms generation needs.

Shapes: B batch, L new tokens, S slots, M memory length, H heads, G key-value groups, K head dim, N layers.

filling   {"k", "v": [N, B, S, G, K], "length": [B]}: what `Model.cache` makes and a scanned stack of layers
          writes. A prompt fills one that has exactly its length; with more slots, tokens may come in pieces.
open      {"k", "v": N arrays [B, G, S, K], ...}: what `opened` makes of it, for one token per row and call.
          Each layer has its own array, so a layer with a window keeps a ring of that many slots, nothing
          is sliced or copied per step, and each head's keys lie together. In int8 each head's vector of
          a token has its own scale, in "k_scale", "v_scale" [B, G, S].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bigmodel_jax.models.positions import alibi_slopes
from bigmodel_jax.models.scores import Rule
from bigmodel_jax.parallel.rules import constrain

Cache = dict[str, Any]
ROWS = ("batch", "kv_heads", None, "head_dim")
# A quantised vector is off by at most half a step: 1 / 254 of its largest component.
STEPS = 127.0


def is_open(cache: Cache | None) -> bool:
    """Whether layers have arrays of their own: one token per row and call."""
    return cache is not None and isinstance(cache.get("k"), tuple)


def slots(cache: Cache) -> int:
    """Tokens that the cache has room for (a layer with a window may hold fewer)."""
    return max(k.shape[2] for k in cache["k"]) if is_open(cache) else cache["k"].shape[2]


def held(cache: Cache | None, tokens: jax.Array) -> jax.Array | None:
    """Tokens each row held before this call, [B]; None where there was none: without a cache, or with one
    that these tokens [B, L] fill exactly."""
    if cache is None or (not is_open(cache) and slots(cache) == tokens.shape[1]):
        return None
    return cache["length"]


def append(cache: Cache, k: jax.Array, v: jax.Array, number: jax.Array, length: jax.Array | None):
    """(cache, k, v) with new keys and values [B, L, G, K] of layer `number` behind `length` [B] held ones.

    length None: there are none; the new ones are all.
    """
    new = {"k": k, "v": v}
    if length is None:
        return cache | {x: cache[x].at[number].set(y.astype(cache[x].dtype)) for x, y in new.items()}, k, v
    rows = jnp.arange(k.shape[0])[:, None]
    places = length[:, None] + jnp.arange(k.shape[1])
    cache = cache | {
        x: cache[x].at[number, rows, places].set(y.astype(cache[x].dtype), mode="drop") for x, y in new.items()
    }
    return cache, *(cache[x][number].astype(k.dtype) for x in new)


def quantised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [..., K], scales [...]) of x [..., K]; the error of a component is at most scale / 2."""
    scale = jnp.maximum(jnp.max(jnp.abs(x), -1), 1e-30) / STEPS
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def opened(cache: Cache, lengths: jax.Array, capacity: int, windows: tuple[int, ...] = (), int8: bool = False) -> Cache:
    """A filled cache, made ready for decoding.

    Args:
      lengths: tokens that count in each row, [B]; what lies behind them is padding.
      capacity: tokens there will be at most, in prompt and continuation.
      windows: per layer, tokens that one sees at most; 0 (and ()) for all.
      int8: store keys and values as int8.
    """
    out: Cache = {x: leaf for x, leaf in cache.items() if x not in ("k", "v", "cross_k", "cross_v")}
    out["length"] = lengths.astype(jnp.int32)
    layers = range(cache["k"].shape[0])
    rings = [windows[n] if windows and windows[n] < capacity else 0 for n in layers]
    for name in ("k", "v"):
        parts = [_slots(cache[name][n], lengths, rings[n], capacity) for n in layers]
        if int8:
            parts, scales = zip(*(quantised(part) for part in parts), strict=True)
            out[f"{name}_scale"] = tuple(constrain(scale, ROWS[:3]) for scale in scales)
        out[name] = tuple(constrain(part, ROWS) for part in parts)
        if f"cross_{name}" in cache:
            out[f"cross_{name}"] = tuple(constrain(jnp.swapaxes(x, 1, 2), ROWS) for x in cache[f"cross_{name}"])
    return out


def _slots(x: jax.Array, lengths: jax.Array, ring: int, capacity: int) -> jax.Array:
    """x [B, L, G, K] as [B, G, S, K]; in a ring token p lies in slot p mod ring."""
    if not ring:
        grown = jnp.pad(x, ((0, 0), (0, max(capacity - x.shape[1], 0)), (0, 0), (0, 0)))
        return jnp.swapaxes(grown, 1, 2)
    newest = lengths[:, None] - 1
    token = newest - (newest - jnp.arange(ring)) % ring  # negative: nothing there yet, and never looked at
    return jnp.swapaxes(jnp.take_along_axis(x, jnp.maximum(token, 0)[:, :, None, None], 1), 1, 2)


def grown(cache: Cache, capacity: int, windows: tuple[int, ...] = ()) -> Cache:
    """An open cache with room for `capacity` tokens; rings keep their size."""

    def grow(n: int, x: jax.Array) -> jax.Array:
        ring = windows and windows[n] == x.shape[2]
        return x if ring else jnp.pad(x, [(0, capacity - x.shape[2] if d == 2 else 0) for d in range(x.ndim)])

    names = [name for name in ("k", "v", "k_scale", "v_scale") if name in cache]
    return cache | {name: tuple(grow(n, x) for n, x in enumerate(cache[name])) for name in names}


def taken(cache: Cache, rows: jax.Array, stacked: bool = False) -> Cache:
    """The cache of other rows: row b of the result is row rows[b]. For beams.

    stacked: layers come first, as in a cache that is not open.
    """
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=1 if stacked and x.ndim > 2 else 0), cache)


def _write(x: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """x [B, G, S, ...] with new [B, G, ...] in slot [B] of each row, in place."""
    rows = jnp.arange(x.shape[0])
    if x.shape[0] == 1:
        # Of a single row XLA makes an update that it fuses into every reader, each with a copy of the cache
        # (jax 0.10.2 on CPU: eight per layer and step). The same row twice stays a scatter, which is in place.
        rows, slot, new = (jnp.concatenate([y, y]) for y in (rows, slot, new))
    return x.at[rows, :, slot].set(new.astype(x.dtype), mode="drop")


def attend(
    cache: Cache,
    number: int,
    q: jax.Array,
    kv: dict[str, jax.Array] | None,
    window: int,
    rule: Rule,
    bias: jax.Array | None = None,
) -> tuple[Cache, jax.Array]:
    """One step of attention in layer `number` of an open cache.

    Args:
      q: the new token's queries [B, 1, H, K].
      kv: its keys and values [B, 1, G, K], which join the cache; None: cross-attention, to "cross_k", "cross_v".
      window: of the layer, 0 for none.
      bias: [B or 1, H, 1, S].

    Returns:
      (the cache with the new token in it, but its length unchanged; [B, 1, H, K]).
    """
    batch, _, heads, dim = q.shape
    length, prefix = cache["length"], "" if kv is not None else "cross_"
    size = cache[f"{prefix}k"][number].shape[2]
    place = jnp.arange(size, dtype=jnp.int32)[None]
    if kv is not None:
        for name, new in kv.items():
            new = new[:, 0]
            stored, scale = quantised(new) if f"{name}_scale" in cache else (new, None)
            cache = _replaced(cache, name, number, _write(cache[name][number], stored, length % size))
            if scale is not None:
                name = f"{name}_scale"
                cache = _replaced(cache, name, number, _write(cache[name][number], scale, length % size))
        # A ring's slot holds the newest token that belongs there.
        gap = (length[:, None] - place) % size if window and size <= window else length[:, None] - place
        seen = (gap <= length[:, None]) & (gap >= 0) & (gap < window if window else True)
    else:
        seen = cache["memory_segments"] > 0
    k, v = (cache[f"{prefix}{name}"][number] for name in "kv")
    high = jnp.promote_types(q.dtype, jnp.float32)
    groups = k.shape[1]
    s = jnp.einsum("bgrk,bgsk->bgrs", q.reshape(batch, groups, -1, dim), k.astype(q.dtype), preferred_element_type=high)
    if kv is not None and "k_scale" in cache:
        s = s * cache["k_scale"][number][:, :, None]
    s = s * rule.scale
    s = rule.softcap * jnp.tanh(s / rule.softcap) if rule.softcap else s
    if rule.alibi:
        slopes = jnp.asarray(alibi_slopes(heads), high).reshape(groups, -1, 1)
        s = s - slopes * gap[:, None, None].astype(high)
    if bias is not None:
        s = s + bias.reshape(bias.shape[0], groups, -1, bias.shape[-1]).astype(high)
    p = jax.nn.softmax(jnp.where(seen[:, None, None], s, -1e30), axis=-1)
    if kv is not None and "v_scale" in cache:
        p = p * cache["v_scale"][number][:, :, None]
    y = jnp.einsum("bgrs,bgsk->bgrk", p.astype(q.dtype), v.astype(q.dtype), preferred_element_type=high)
    return cache, y.reshape(q.shape).astype(q.dtype)


def _replaced(cache: Cache, name: str, number: int, layer: jax.Array) -> Cache:
    layers = cache[name]
    return cache | {name: (*layers[:number], layer, *layers[number + 1 :])}
