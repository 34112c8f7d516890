"""Attention: one function, several ways to compute it.

Shapes: B batch, L queries, M keys, H heads, G key-value groups, R = H / G heads per group, K head dim.

reference    plain einsums; the definition the others are tested against
blockwise    pure JAX, memory linear in M, recomputes in the backward pass (models/blockwise.py)
dot_product  jax.nn.dot_product_attention compiled by XLA
cudnn        the same function on NVIDIA's fused kernel
splash       jax's Pallas kernel on TPU
"""

from __future__ import annotations

import functools
import logging
import math

import jax
import jax.numpy as jnp

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import ring, target
from bigmodel_jax.models.blockwise import blockwise
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.scores import Part, Rule, biases, exponentials, finish, kept, split

_log = logging.getLogger(__name__)

BACKENDS = ("reference", "dot_product", "cudnn", "blockwise", "splash")


def refusal(
    backend: str, q: jax.Array, k: jax.Array, mask: Mask, rule: Rule, has_bias: bool, platform: str
) -> str | None:
    """Why `backend` cannot compute this, or None when it can."""
    parts, length, memory = mask.parts(), q.shape[1], k.shape[1]
    if mask.zigzag:
        return "the length is stored for a ring of devices"
    if backend == "reference":
        return None
    if backend == "blockwise":
        return "it takes no bias array" if has_bias else None
    if rule.dropout:
        return "it has no attention dropout"
    if backend in ("dot_product", "cudnn"):
        if rule.softcap:
            return "it has no softcap"
        if q.dtype == jnp.float64:
            return "its softmax is float32, the inputs are float64"
        if backend == "dot_product":
            return None
        if platform != "gpu":
            return f"it needs an NVIDIA GPU, the platform is {platform}"
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it needs bfloat16 or float16, not {q.dtype}"
        if q.shape[-1] % 8 or q.shape[-1] > 128:
            return f"it needs a head_dim that is a multiple of 8 up to 128, not {q.shape[-1]}"
        return None
    if platform != "tpu":
        return f"it needs a TPU, the platform is {platform}"
    if has_bias or rule.alibi:
        return "it has no biases"
    beyond = parts & {"prefix", "kv_length", "offset", "segments_kv"}
    if beyond or length != memory:
        return f"it cannot express {sorted(beyond) or 'other keys than the queries have'}"
    if length % 128:
        return f"it needs a length that is a multiple of 128, not {length}"
    if q.dtype == jnp.float64:
        return "it has no float64"
    if q.shape[-1] % 64:
        return f"it needs a head_dim that is a multiple of 64, not {q.shape[-1]}"
    return None


def choose(
    q: jax.Array,
    k: jax.Array,
    mask: Mask,
    *,
    backend: str = "auto",
    softcap: float = 0.0,
    alibi: bool = False,
    bias: bool = False,
    dropout: float = 0.0,
    platform: str | None = None,
) -> tuple[str, str]:
    """(backend, reason) for these shapes; `q` and `k` may be abstract.

    Raises:
      InputError: an explicit backend that cannot compute this, with those that can.
    """
    platform = platform or target.platform()
    rule = Rule(scale=1.0, softcap=softcap, alibi=alibi, dropout=dropout)
    refusals = {b: refusal(b, q, k, mask, rule, bias, platform) for b in BACKENDS}
    able = [b for b in BACKENDS if refusals[b] is None]
    if backend != "auto":
        if backend not in BACKENDS:
            raise InputError(f"attention='{backend}' is not one of {['auto', *BACKENDS]}")
        if refusals[backend]:
            raise InputError(
                f"attention='{backend}' is impossible here: {refusals[backend]}; possible: {['auto', *able]}"
            )
        return backend, "as configured"
    if q.shape[1] == 1:
        return "reference", "a single query: its scores are one row"
    if platform == "tpu" and "splash" in able:
        return "splash", "fused kernel on TPU"
    if platform == "gpu" and "cudnn" in able:
        # cuDNN takes these as an array of biases, which is quadratic in memory.
        dense = mask.parts() & {"segments_q", "prefix"} or alibi
        if not dense or q.shape[1] * k.shape[1] <= 4096 * 4096:
            return "cudnn", "fused kernel on GPU"
    if "blockwise" in able:
        fused = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
        why = f"{fused} cannot: {refusals[fused]}" if fused and refusals[fused] else f"on {platform}"
        return "blockwise", f"{why}; memory linear in length"
    return "reference", f"blockwise cannot: {refusals['blockwise']}"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask = Mask(),
    *,
    backend: str = "auto",
    scale: float | None = None,
    softcap: float = 0.0,
    alibi: bool = False,
    bias: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_keys: jax.Array | None = None,
) -> jax.Array:
    """softmax(softcap(scale q k^T) + biases, where visible) v (Vaswani et al. 2017, eq. 1).

    Args:
      q: [B, L, H, K].
      k, v: [B, M, G, K]; G divides H, head h reads group h // (H / G) (Ainslie et al. 2023).
      scale: default 1 / sqrt(K).
      softcap: cap of the scores before biases; 0 for none.
      alibi: subtract slope[h] * |i - j| from the scores.
      bias: added to the scores, broadcastable to [B, H, L, M].
      dropout: share of the probabilities that is dropped, by `dropout_keys` [B] (None: no dropout).

    Returns:
      [B, L, H, K] in q's dtype; zeros for a query that sees no key.

    Raises:
      InputError: the backend cannot compute this.
    """
    dropout = 0.0 if dropout_keys is None else dropout
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    rule = Rule(scale=scale, softcap=softcap, alibi=alibi, dropout=dropout)
    attend = functools.partial(_attend, backend, rule)
    crossing = ring.crossing(q, k, mask, bias is not None)
    if crossing == "ulysses":
        return ring.ulysses(attend, q, k, v, mask, dropout_keys, bias)
    if crossing == "ring":
        if backend not in ring.BACKENDS:
            raise InputError(
                f"attention='{backend}' cannot go around a ring of devices (mesh.context); possible: "
                f"{list(ring.BACKENDS)}, or all with mesh.context_by=ulysses"
            )
        _log.info("attention: blockwise in a ring of devices")
        return ring.ring(q, k, v, mask, dropout_keys, rule)
    return attend(q, k, v, mask, bias, dropout_keys)


def _attend(backend: str, rule: Rule, q, k, v, mask: Mask, bias, dropout_keys, part: Part | None = None) -> jax.Array:
    """Attention of arrays that are all there; `part` says of what."""
    name, reason = choose(
        q, k, mask, backend=backend, softcap=rule.softcap, alibi=rule.alibi, bias=bias is not None, dropout=rule.dropout
    )
    if q.shape[1] > 1:
        _log.info("attention: %s (%s)", name, reason)
    if name == "blockwise":
        return blockwise(q, k, v, mask, dropout_keys, part, rule)
    if name in ("dot_product", "cudnn"):
        return _library(q, k, v, mask, bias, rule, part, "xla" if name == "dot_product" else "cudnn")
    if name == "splash":
        from bigmodel_jax.models.splash import splash

        return splash(q, k, v, mask, rule)
    return _reference(q, k, v, mask, bias, dropout_keys, rule, part)


def _reference(q, k, v, mask: Mask, bias, dropout_keys, rule: Rule, part: Part | None) -> jax.Array:
    tile = (0, q.shape[1], 0, k.shape[1])
    high = jnp.promote_types(q.dtype, jnp.float32)
    q5 = split(q, k.shape[2])
    raw = jnp.einsum("blgrk,bmgk->bgrlm", q5, k, preferred_element_type=high)
    e, total, _ = exponentials(finish(raw, mask, rule, tile, bias, part)[0])
    p = e / jnp.where(total > 0, total, 1.0)
    if rule.dropout:
        keep = kept(dropout_keys, rule, tile, part or Part(q.shape[2], k.shape[1]), q.shape[2]).reshape(p.shape)
        p = jnp.where(keep, p / (1.0 - rule.dropout), 0.0)
    out = jnp.einsum("bgrlm,bmgk->blgrk", p.astype(v.dtype), v, preferred_element_type=high)
    return out.reshape(q.shape[:3] + v.shape[3:]).astype(q.dtype)


def _library(q, k, v, mask: Mask, bias, rule: Rule, part: Part | None, implementation: str) -> jax.Array:
    """jax.nn.dot_product_attention: plain masks by its flags, the others as an array."""
    length, memory = q.shape[1], k.shape[1]
    if rule.alibi:
        line = biases(mask, q.shape[2], (0, length, 0, memory), q.dtype, part)
        bias = line if bias is None else bias + line
    if bias is not None:
        bias = jnp.broadcast_to(bias, (bias.shape[0], q.shape[2], length, memory)).astype(q.dtype)
    flags: dict = {}
    visible = None
    if mask.parts() <= {"causal", "window"}:
        flags["is_causal"] = mask.causal
        if mask.window:
            flags["local_window_size"] = (mask.window - 1, 0 if mask.causal else mask.window - 1)
    else:
        visible = mask.visible(0, length, 0, memory)[:, None]
        flags["mask"] = visible
    out = jax.nn.dot_product_attention(q, k, v, bias, scale=rule.scale, implementation=implementation, **flags)
    if visible is None:
        if length <= memory or not mask.window:
            return out
        visible = mask.visible(0, length, 0, memory)[:, None]
    # The library spreads a row without visible keys evenly over all keys.
    return jnp.where(visible.any(-1)[:, 0, :, None, None], out, 0)
