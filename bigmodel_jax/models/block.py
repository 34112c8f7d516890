"""One Transformer layer (Vaswani et al. 2017), from which decoder and encoder are stacked.

Shapes: B batch, L length, M memory length, D model, H heads, G key-value groups, K head dim, F ffn,
V vocab, N layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bigmodel_jax import mup
from bigmodel_jax.models import cache as caches
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.attention import attention
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.positions import rotate
from bigmodel_jax.models.scores import Rule
from bigmodel_jax.models.spec import Spec
from bigmodel_jax.parallel.rules import constrain

# Sites of dropout inside a layer; a row's key is folded with the layer, then with the site.
SITE_ATTENTION, SITE_ATTENTION_OUT, SITE_MLP_OUT, SITE_CROSS, SITE_CROSS_OUT = range(5)


class Context(NamedTuple):
    """What every layer is told, besides its input."""

    mask: Mask  # of a layer with the window, where some have it
    rope: tuple[jax.Array, jax.Array] | None
    dropout_keys: jax.Array | None
    length: jax.Array | None  # tokens a cache already holds, [B]; None: none, or no cache
    bias: jax.Array | None = None  # added to the scores of self-attention, [B or 1, H, L, M]
    memory: jax.Array | None = None  # what cross-attention reads, [B, M, D]; None: the cache holds it
    memory_mask: Mask = Mask()
    local_rope: tuple[jax.Array, jax.Array] | None = None  # of a layer with the window; None: as the others


def weight(module: nn.Module, name: str, shape, axes, fan_in: int, spec: Spec, scale: float = 1.0):
    if module.has_variable("laid", name):
        return module.get_variable("laid", name)  # for decoding, see laid.py
    init = nn.with_partitioning(drawn(axes, fan_in, spec, scale), axes)
    param = module.param(name, init, shape, jnp.dtype(spec.param_dtype))
    return param.astype(spec.dtype)


def drawn(axes, fan_in: int, spec: Spec, scale: float = 1.0):
    """Initialiser of a weight: that of the base model, times what its axes say of the width (mup.py)."""
    width = spec.ratio.width
    return ops.initializer(spec.init, spec.init_std, fan_in / width, scale * mup.deviation(*mup.growth(axes, width)))


def bias(module: nn.Module, name: str, shape, axes, spec: Spec):
    init = nn.with_partitioning(nn.initializers.zeros, axes)
    return module.param(name, init, shape, jnp.dtype(spec.param_dtype)).astype(spec.dtype)


def norm_parameters(spec: Spec, name: str, size: int):
    dtype, offset = jnp.dtype(spec.param_dtype), spec.norm_offset
    scale, shift = ops.NormParameters(spec.norm_bias, dtype, offset=offset, name=name)(size)
    return (scale.astype(ops.wide(dtype)) + offset if offset else scale), shift


def norm(spec: Spec, name: str, x: jax.Array) -> jax.Array:
    return ops.NORMS[spec.norm](x, *norm_parameters(spec, name, x.shape[-1]), eps=spec.norm_eps)


def _out_scale(spec: Spec) -> float:
    # GPT-2 (Radford et al. 2019, section 2.3): 2 N layers add into the residual stream.
    return (2 * spec.num_layers / spec.ratio.depth) ** -0.5 if spec.depth_scaled_init else 1.0


class Attention(nn.Module):
    """Multi-head attention with its projections; appends to a cache where one is given.

    cross: keys and values come from the context's memory (Vaswani et al. 2017, section 3.2.3), without
      positions. They go into the cache once; a context without memory takes them from there.
    """

    spec: Spec
    cross: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, number: jax.Array, cache: Any):
        spec, heads = self.spec, ("batch", "length", "heads", "head_dim")
        q = constrain(self._project("q", x, spec.num_heads, "heads"), heads)
        read = context.memory if self.cross else x
        kv = None
        if read is not None:
            kv = {name: self._project(name, read, spec.num_kv_heads, "kv_heads") for name in "kv"}
            kv = {name: constrain(y, ("batch", "length", "kv_heads", "head_dim")) for name, y in kv.items()}
        if not self.cross:
            if spec.qk_norm:
                q, kv["k"] = norm(spec, "norm_q", q), norm(spec, "norm_k", kv["k"])
            if context.rope is not None:
                rope = _rope(spec, context, number)
                q, kv["k"] = rotate(q, *rope), rotate(kv["k"], *rope)
        y, cache = self._attend(q, kv, context, number, cache)
        y = constrain(y, heads)
        shape = (spec.num_heads, spec.head_dim, spec.embed_dim)
        fan_in = spec.num_heads * spec.head_dim
        axes = ("heads", "head_dim", "embed")
        y = ops.project("blhk,hkd->bld", y, weight(self, "out", shape, axes, fan_in, spec, _out_scale(spec)), axes)
        if spec.bias:
            y = ops.add_bias(y, bias(self, "out_bias", (spec.embed_dim,), ("norm",), spec))
        return y, cache

    @nn.nowrap
    def _attend(self, q: jax.Array, kv: Any, context: Context, number: jax.Array, cache: Any):
        """(what the queries found [B, L, H, K], the cache with the new keys and values)."""
        spec = self.spec
        scale = spec.score_scale
        alibi = spec.positions == "alibi" and not self.cross
        bias = None if self.cross else context.bias
        if caches.is_open(cache):
            window = spec.window if spec.local[number] and not self.cross else 0
            rule = Rule(scale, spec.attention_softcap, alibi)
            return caches.attend(cache, number, q, None if self.cross else kv, window, rule, bias)[::-1]
        if self.cross:
            cache, k, v = _remember(cache, kv, number, q.dtype)
        else:
            k, v = kv["k"], kv["v"]
            if cache is not None:
                cache, k, v = caches.append(cache, k, v, number, context.length)
        attend = functools.partial(
            attention, q, k, v,
            backend=spec.attention, scale=scale, softcap=spec.attention_softcap, alibi=alibi, bias=bias,
            dropout=spec.attention_dropout,
            dropout_keys=ops.fold(context.dropout_keys, SITE_CROSS if self.cross else SITE_ATTENTION),
        )  # fmt: skip
        if self.cross or not spec.mixed:
            return attend(context.memory_mask if self.cross else context.mask), cache
        # Each branch knows its window: blocks outside it are never computed.
        whole = dataclasses.replace(context.mask, window=0)
        return jax.lax.cond(_local(spec, number), lambda: attend(context.mask), lambda: attend(whole)), cache

    @nn.nowrap
    def _project(self, name: str, x: jax.Array, heads: int, axis: str) -> jax.Array:
        spec = self.spec
        shape, axes = (spec.embed_dim, heads, spec.head_dim), ("embed", axis, "head_dim")
        y = ops.project("bld,dhk->blhk", x, weight(self, name, shape, axes, spec.embed_dim, spec), axes)
        if spec.bias if spec.qkv_bias is None else spec.qkv_bias:
            y = ops.add_bias(y, bias(self, f"{name}_bias", shape[1:], (axis, "head_dim"), spec))
        return y


def _local(spec: Spec, number: jax.Array) -> jax.Array:
    return jnp.asarray(spec.local)[number]


def _rope(spec: Spec, context: Context, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of layer `number`."""
    if context.local_rope is None:
        return context.rope
    if not spec.mixed:
        return context.local_rope if spec.local[0] else context.rope
    pairs = zip(context.local_rope, context.rope, strict=True)
    return tuple(jnp.where(_local(spec, number), own, other) for own, other in pairs)


def _remember(cache: dict[str, jax.Array] | None, kv: dict[str, jax.Array] | None, number: jax.Array, dtype: Any):
    """Keys and values [B, M, G, K] of the memory: stored in the cache when new, else read from it."""
    if kv is None:
        return cache, cache["cross_k"][number].astype(dtype), cache["cross_v"][number].astype(dtype)
    if cache is not None:
        new = {f"cross_{name}": y for name, y in kv.items()}
        cache = cache | {name: cache[name].at[number].set(y.astype(cache[name].dtype)) for name, y in new.items()}
    return cache, kv["k"], kv["v"]


class Mlp(nn.Module):
    """Feed-forward layer, gated or not."""

    spec: Spec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        fn, gated = ops.ACTIVATIONS[spec.activation]
        if gated:
            h = fn(self._in("gate", x)) * self._in("up", x)
        else:
            h = fn(self._in("in", x))
        h = constrain(h, ("batch", "length", "mlp"))
        shape, axes = (spec.mlp_dim, spec.embed_dim), ("mlp", "embed")
        y = ops.project("blf,fd->bld", h, weight(self, "out", shape, axes, spec.mlp_dim, spec, _out_scale(spec)), axes)
        if spec.bias:
            y = ops.add_bias(y, bias(self, "out_bias", (spec.embed_dim,), ("norm",), spec))
        return y

    @nn.nowrap
    def _in(self, name: str, x: jax.Array) -> jax.Array:
        spec = self.spec
        shape, axes = (spec.embed_dim, spec.mlp_dim), ("embed", "mlp")
        h = ops.project("bld,df->blf", x, weight(self, name, shape, axes, spec.embed_dim, spec), axes)
        if spec.bias:
            h = ops.add_bias(h, bias(self, f"{name}_bias", (spec.mlp_dim,), ("mlp",), spec))
        return h


class Block(nn.Module):
    """One layer: attention and feed-forward around the residual stream x [B, L, D].

    experts: a module in place of the feed-forward layer, called with x and segments; it gives its result
      and what its router did, which becomes the layer's output beside the carry.
    """

    spec: Spec
    experts: Any = None

    @nn.compact
    def __call__(self, carry, number: jax.Array, context: Context):
        spec = self.spec
        x, cache = carry
        x = checkpoint_name(x, "layer_input")
        keys = ops.fold(context.dropout_keys, number)
        context = context._replace(dropout_keys=keys)
        pre, post = spec.norm_placement != "post", spec.norm_placement == "sandwich"

        def before(y: jax.Array, name: str) -> jax.Array:
            return norm(spec, name, y) if pre else y

        def after(y: jax.Array, name: str, site: int) -> jax.Array:
            y = norm(spec, f"{name}_post", y) if post else y
            y = y / spec.ratio.depth if spec.ratio.depth != 1 else y
            return ops.dropout(y, ops.fold(keys, site), spec.dropout, context.mask.zigzag)

        def joined(y: jax.Array, name: str) -> jax.Array:
            y = y if pre else norm(spec, name, y)
            return constrain(y, ("batch", "length", "embed_act"))

        y, cache = Attention(spec, name="attn")(before(x, "norm_attn"), context, number, cache)
        y = after(y, "norm_attn", SITE_ATTENTION_OUT)
        if spec.residual == "parallel":
            z, routed = self._feed(before(x, "norm_mlp"), context)
            x = joined(x + y + after(z, "norm_mlp", SITE_MLP_OUT), "")
        else:
            x = joined(x + y, "norm_attn")
            if spec.cross:
                y, cache = Attention(spec, cross=True, name="cross")(before(x, "norm_cross"), context, number, cache)
                x = joined(x + after(y, "norm_cross", SITE_CROSS_OUT), "norm_cross")
            z, routed = self._feed(before(x, "norm_mlp"), context)
            x = joined(x + after(z, "norm_mlp", SITE_MLP_OUT), "norm_mlp")
        return (x, cache), routed

    @nn.nowrap
    def _feed(self, x: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        if self.experts is None:
            return Mlp(self.spec, name="mlp")(x), None
        return self.experts(self.spec, name="moe")(x, context.mask.segments_q)
