"""Decoder and encoder Transformers from one block (Vaswani et al. 2017).

Shapes: B batch, L length, M memory length, D model, H heads, G key-value groups, K head dim, F ffn,
V vocab, N layers. Layers are stacked: their parameters are "layers/..." with a leading axis N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.attention import BACKENDS, attention
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.models.positions import rotary_table, rotate, sinusoidal
from bigmodel_jax.parallel.rules import constrain

POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "none")
PLACEMENTS = ("pre", "post", "sandwich")
RESIDUALS = ("sequential", "parallel")
DTYPES = ("float32", "bfloat16", "float16", "float64")

_SAVE = jax.checkpoint_policies
# What the backward pass finds stored instead of recomputing, from most memory to least.
REMAT = {
    "none": None,  # no rematerialisation: every intermediate that a derivative needs
    "dots": _SAVE.dots_saveable,  # results of all matmuls, attention scores included
    "minimal": _SAVE.save_from_both_policies(  # results of weight matmuls, and attention's
        _SAVE.dots_with_no_batch_dims_saveable,
        _SAVE.save_only_these_names("attention", "attention_lse"),
    ),
    "attention": _SAVE.save_only_these_names("attention", "attention_lse"),  # attention's alone
    "full": _SAVE.nothing_saveable,  # each layer's input alone
}
# Sites of dropout inside a layer; a row's key is folded with the layer, then with the site.
SITE_ATTENTION, SITE_ATTENTION_OUT, SITE_MLP_OUT = 0, 1, 2


@dataclass(frozen=True)
class Spec:
    """Options of `decoder` and `encoder`, checked; documented there."""

    causal: bool
    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int
    positions: str
    rope_theta: float
    rope_fraction: float
    norm: str
    norm_eps: float
    norm_bias: bool
    norm_placement: str
    embed_norm: bool
    activation: str
    bias: bool
    residual: str
    qk_norm: bool
    window: int
    attention_softcap: float
    final_softcap: float
    tied_embeddings: bool
    head_bias: bool
    embed_scale: float
    token_types: int
    mlm_head: bool
    dropout: float
    attention_dropout: float
    embed_dropout: float
    init: str
    init_std: float
    depth_scaled_init: bool
    attention: str
    unroll: int
    remat: str
    dtype: str
    param_dtype: str

    def __post_init__(self) -> None:
        for option, legal in (
            ("positions", POSITIONS), ("norm", tuple(ops.NORMS)), ("norm_placement", PLACEMENTS),
            ("activation", tuple(ops.ACTIVATIONS)), ("residual", RESIDUALS), ("init", ops.INITS),
            ("attention", ("auto", *BACKENDS)), ("remat", tuple(REMAT)),
            ("dtype", DTYPES), ("param_dtype", DTYPES),
        ):  # fmt: skip
            ops.one_of(option, getattr(self, option), legal)
        for option in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_length", "unroll"):
            if getattr(self, option) < 1:
                raise InputError(f"{option}={getattr(self, option)} must be at least 1")
        for option in ("dropout", "attention_dropout", "embed_dropout"):
            if not 0.0 <= getattr(self, option) < 1.0:
                raise InputError(f"{option}={getattr(self, option)} must be in [0, 1)")
        if self.num_heads % self.num_kv_heads:
            legal = [d for d in range(1, self.num_heads + 1) if self.num_heads % d == 0]
            raise InputError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; legal: {legal}"
            )
        if self.norm_placement == "post" and self.residual == "parallel":
            raise InputError("residual='parallel' has no post-norm form; norm_placement: pre or sandwich")
        if self.positions == "rotary" and self.rotary_dim < 2:
            raise InputError(f"rotary positions need head_dim * rope_fraction >= 2, not {self.rotary_dim}")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_fraction) // 2 * 2


class Context(NamedTuple):
    """What every layer is told, besides its input."""

    mask: Mask
    rope: tuple[jax.Array, jax.Array] | None
    dropout_keys: jax.Array | None
    length: jax.Array | None  # tokens a cache already holds, [B]


def _weight(module: nn.Module, name: str, shape, axes, fan_in: int, spec: Spec, scale: float = 1.0):
    init = ops.initializer(spec.init, spec.init_std, fan_in, scale)
    param = module.param(name, nn.with_partitioning(init, axes), shape, jnp.dtype(spec.param_dtype))
    return param.astype(spec.dtype)


def _bias(module: nn.Module, name: str, shape, axes, spec: Spec):
    init = nn.with_partitioning(nn.initializers.zeros, axes)
    return module.param(name, init, shape, jnp.dtype(spec.param_dtype)).astype(spec.dtype)


def _norm_parameters(spec: Spec, name: str, size: int):
    return ops.NormParameters(spec.norm_bias, jnp.dtype(spec.param_dtype), name=name)(size)


def _norm(spec: Spec, name: str, x: jax.Array) -> jax.Array:
    return ops.NORMS[spec.norm](x, *_norm_parameters(spec, name, x.shape[-1]), eps=spec.norm_eps)


def _out_scale(spec: Spec) -> float:
    # GPT-2 (Radford et al. 2019, section 2.3): 2 N layers add into the residual stream.
    return (2 * spec.num_layers) ** -0.5 if spec.depth_scaled_init else 1.0


class Attention(nn.Module):
    """Multi-head attention with its projections; appends to a cache where one is given."""

    spec: Spec

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, number: jax.Array, cache: Any):
        spec, heads = self.spec, ("batch", "length", "heads", "head_dim")
        q = constrain(self._project("q", x, spec.num_heads, "heads"), heads)
        k = constrain(self._project("k", x, spec.num_kv_heads, "kv_heads"), ("batch", "length", "kv_heads", "head_dim"))
        v = constrain(self._project("v", x, spec.num_kv_heads, "kv_heads"), ("batch", "length", "kv_heads", "head_dim"))
        if spec.qk_norm:
            q, k = _norm(spec, "norm_q", q), _norm(spec, "norm_k", k)
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        if cache is not None:
            cache, k, v = _append(cache, k, v, number, context.length)
        y = attention(
            q, k, v, context.mask,
            backend=spec.attention,
            softcap=spec.attention_softcap,
            alibi=spec.positions == "alibi",
            dropout=spec.attention_dropout,
            dropout_keys=ops.fold(context.dropout_keys, SITE_ATTENTION),
        )  # fmt: skip
        y = constrain(y, heads)
        shape = (spec.num_heads, spec.head_dim, spec.embed_dim)
        fan_in = spec.num_heads * spec.head_dim
        w = _weight(self, "out", shape, ("heads", "head_dim", "embed"), fan_in, spec, _out_scale(spec))
        y = jnp.einsum("blhk,hkd->bld", y, w)
        if spec.bias:
            y = y + _bias(self, "out_bias", (spec.embed_dim,), ("norm",), spec)
        return y, cache

    @nn.nowrap
    def _project(self, name: str, x: jax.Array, heads: int, axis: str) -> jax.Array:
        spec = self.spec
        shape = (spec.embed_dim, heads, spec.head_dim)
        w = _weight(self, name, shape, ("embed", axis, "head_dim"), spec.embed_dim, spec)
        y = jnp.einsum("bld,dhk->blhk", x, w)
        if spec.bias:
            y = y + _bias(self, f"{name}_bias", shape[1:], (axis, "head_dim"), spec)
        return y


def _append(cache: dict[str, jax.Array], k: jax.Array, v: jax.Array, number: jax.Array, length: jax.Array):
    """Write new keys and values [B, L, G, K] of layer `number` behind `length` [B] held ones."""
    rows = jnp.arange(k.shape[0])[:, None]
    slots = length[:, None] + jnp.arange(k.shape[1])
    held = {
        name: cache[name].at[number, rows, slots].set(new.astype(cache[name].dtype), mode="drop")
        for name, new in (("k", k), ("v", v))
    }
    k, v = (held[name][number].astype(k.dtype) for name in ("k", "v"))
    return held, k, v


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
        shape = (spec.mlp_dim, spec.embed_dim)
        w = _weight(self, "out", shape, ("mlp", "embed"), spec.mlp_dim, spec, _out_scale(spec))
        y = jnp.einsum("blf,fd->bld", h, w)
        if spec.bias:
            y = y + _bias(self, "out_bias", (spec.embed_dim,), ("norm",), spec)
        return y

    @nn.nowrap
    def _in(self, name: str, x: jax.Array) -> jax.Array:
        spec = self.spec
        shape = (spec.embed_dim, spec.mlp_dim)
        h = jnp.einsum("bld,df->blf", x, _weight(self, name, shape, ("embed", "mlp"), spec.embed_dim, spec))
        if spec.bias:
            h = h + _bias(self, f"{name}_bias", (spec.mlp_dim,), ("mlp",), spec)
        return h


class Block(nn.Module):
    """One layer: attention and feed-forward around the residual stream x [B, L, D]."""

    spec: Spec

    @nn.compact
    def __call__(self, carry, number: jax.Array, context: Context):
        spec = self.spec
        x, cache = carry
        keys = ops.fold(context.dropout_keys, number)
        context = context._replace(dropout_keys=keys)
        pre, post = spec.norm_placement != "post", spec.norm_placement == "sandwich"

        def before(y: jax.Array, name: str) -> jax.Array:
            return _norm(spec, name, y) if pre else y

        def after(y: jax.Array, name: str, site: int) -> jax.Array:
            y = _norm(spec, f"{name}_post", y) if post else y
            return ops.dropout(y, ops.fold(keys, site), spec.dropout)

        def joined(y: jax.Array, name: str) -> jax.Array:
            y = y if pre else _norm(spec, name, y)
            return constrain(y, ("batch", "length", "embed_act"))

        y, cache = Attention(spec, name="attn")(before(x, "norm_attn"), context, number, cache)
        y = after(y, "norm_attn", SITE_ATTENTION_OUT)
        if spec.residual == "parallel":
            z = Mlp(spec, name="mlp")(before(x, "norm_mlp"))
            x = joined(x + y + after(z, "norm_mlp", SITE_MLP_OUT), "")
        else:
            x = joined(x + y, "norm_attn")
            z = Mlp(spec, name="mlp")(before(x, "norm_mlp"))
            x = joined(x + after(z, "norm_mlp", SITE_MLP_OUT), "norm_mlp")
        return (x, cache), None


@dataclass(frozen=True)
class Logits:
    """hidden [..., D] -> logits [..., V], given the head's arrays. Hashable, so a pytree may hold it."""

    spec: Spec

    def __call__(self, arrays: dict[str, Any], hidden: jax.Array) -> jax.Array:
        spec = self.spec
        x = hidden.astype(spec.dtype)
        if spec.mlm_head:
            x = jnp.einsum("...d,de->...e", x, arrays["dense"]) + arrays["dense_bias"]
            x = ops.ACTIVATIONS[spec.activation][0](x)
            x = ops.NORMS[spec.norm](x, *arrays["norm"], eps=spec.norm_eps)
        letters = "...d,vd->...v" if spec.tied_embeddings else "...d,dv->...v"
        high = ops.wide(x.dtype)
        logits = ops.wide_einsum(letters, x, arrays["kernel"])
        if "bias" in arrays:
            logits = logits + arrays["bias"].astype(high)
        if logits.ndim == 3:
            logits = constrain(logits, ("batch", "length", "vocab"))
        return ops.softcap(logits, spec.final_softcap)


class Embed(nn.Module):
    """Tokens, absolute positions and token types to x [B, L, D]; also returns the token table."""

    spec: Spec

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, token_types: jax.Array | None):
        spec, dim = self.spec, self.spec.embed_dim
        table = _weight(self, "tokens", (spec.vocab_size, dim), ("vocab", "embed"), dim, spec)
        x = jnp.take(table, tokens, axis=0)
        if spec.embed_scale != 1.0:
            x = x * jnp.asarray(spec.embed_scale, x.dtype)
        if spec.positions == "learned":
            where = _weight(self, "positions", (spec.max_length, dim), ("positions", "embed"), dim, spec)
            x = x + jnp.take(where, positions, axis=0)
        elif spec.positions == "sinusoidal":
            x = x + sinusoidal(positions, dim, ops.wide(x.dtype)).astype(x.dtype)
        if spec.token_types:
            types = _weight(self, "types", (spec.token_types, dim), (None, "embed"), dim, spec)
            x = x + jnp.take(types, jnp.zeros_like(tokens) if token_types is None else token_types, axis=0)
        if spec.embed_norm:
            x = _norm(spec, "norm", x)
        return x, table


class Head(nn.Module):
    """Declares the output layer's parameters and returns them as a pytree that can be called."""

    spec: Spec

    @nn.compact
    def __call__(self, table: jax.Array) -> jax.tree_util.Partial:
        spec, dim = self.spec, self.spec.embed_dim
        arrays: dict[str, Any] = {"kernel": table}
        if not spec.tied_embeddings:
            shape = (dim, spec.vocab_size)
            arrays["kernel"] = _weight(self, "kernel", shape, ("embed", "vocab"), dim, spec)
        if spec.mlm_head:
            arrays["dense"] = _weight(self, "dense", (dim, dim), ("embed", None), dim, spec)
            arrays["dense_bias"] = _bias(self, "dense_bias", (dim,), ("norm",), spec)
            arrays["norm"] = _norm_parameters(spec, "norm", dim)
        if spec.head_bias:
            arrays["bias"] = _bias(self, "bias", (spec.vocab_size,), ("vocab",), spec)
        return jax.tree_util.Partial(Logits(spec), arrays)


class Transformer(nn.Module):
    """Embedding, N scanned layers, final norm, head."""

    spec: Spec

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        train: bool,
        dropout_keys: jax.Array | None = None,
        cache: dict[str, jax.Array] | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        prefix: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> Output:
        spec = self.spec
        _check_inputs(spec, tokens, cache, segments, prefix, token_types)
        keys = dropout_keys if train else None
        length = None if cache is None else cache["length"]
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None] + (0 if length is None else length[:, None])
        x, table = Embed(spec, name="embed")(tokens, positions, token_types)
        x = ops.dropout(x, ops.fold(keys, spec.num_layers), spec.embed_dropout)
        x = constrain(x, ("batch", "length", "embed_act"))
        mask = Mask(
            causal=spec.causal, window=spec.window, segments_q=segments, prefix=prefix, offset=length
        )  # fmt: skip
        rope = None
        if spec.positions == "rotary":
            rope = rotary_table(positions, spec.rotary_dim, spec.rope_theta, ops.wide(x.dtype))
        held = None if cache is None else {name: cache[name] for name in ("k", "v")}
        (x, held), _ = _stack(spec)((x, held), jnp.arange(spec.num_layers), Context(mask, rope, keys, length))
        if spec.norm_placement != "post":
            x = _norm(spec, "norm_final", x)
        if cache is not None:
            held["length"] = length + tokens.shape[1]
        return Output(x, Head(spec, name="head")(table), held)


def _stack(spec: Spec) -> nn.Module:
    block = Block
    if spec.remat != "none":
        # Inside a scan the loop already keeps XLA from merging both computations.
        block = nn.remat(Block, policy=REMAT[spec.remat], prevent_cse=False)
    return nn.scan(
        block,
        length=spec.num_layers,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        unroll=min(spec.unroll, spec.num_layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(spec, name="layers")


def _check_inputs(spec: Spec, tokens, cache, segments, prefix, token_types) -> None:
    if not spec.causal and (cache is not None or prefix is not None):
        raise InputError("an encoder takes neither a cache nor a prefix: it sees every token at once")
    if cache is not None and segments is not None:
        raise InputError("a cache holds one document per row: segments cannot be given with it")
    if token_types is not None and not spec.token_types:
        raise InputError("token_types given, but the model has none; set token_types=2")
    longest = tokens.shape[1] if cache is None else cache["k"].shape[2]
    if spec.positions == "learned" and longest > spec.max_length:
        raise InputError(f"length {longest} exceeds max_length={spec.max_length} of learned positions")


def forward_flops(spec: Spec, length: int) -> float:
    """Forward matmul FLOPs per token at a length: 2 N_matmul + 4 N_layers L H K.

    A third of 6 N_matmul + 12 N_layers L D per training token (Chowdhery et al. 2022, appendix B);
    attention is not halved for causality, embeddings are lookups and count nothing.
    """
    spec_heads = spec.num_heads * spec.head_dim
    attn = spec.embed_dim * (2 * spec_heads + 2 * spec.num_kv_heads * spec.head_dim)
    mlp = spec.embed_dim * spec.mlp_dim * (3 if ops.ACTIVATIONS[spec.activation][1] else 2)
    head = spec.embed_dim * spec.vocab_size + (spec.embed_dim**2 if spec.mlm_head else 0)
    matmul = spec.num_layers * (attn + mlp) + head
    return 2.0 * matmul + 4.0 * spec.num_layers * length * spec_heads


def _model(spec: Spec) -> Model:
    def example(batch: int) -> dict[str, np.ndarray]:
        return {"tokens": np.zeros((batch, 1), np.int32)}

    def cache(batch: int, length: int, dtype: Any = None) -> dict[str, jax.Array]:
        shape = (spec.num_layers, batch, length, spec.num_kv_heads, spec.head_dim)
        empty = jnp.zeros(shape, spec.dtype if dtype is None else dtype)
        return {"k": empty, "v": empty, "length": jnp.zeros((batch,), jnp.int32)}

    return Model(
        module=Transformer(spec),
        example=example,
        flops=lambda length: forward_flops(spec, length),
        cache=cache if spec.causal else None,
    )


def decoder(
    *,
    vocab_size: int,
    num_layers: int = 12,
    embed_dim: int = 768,
    num_heads: int = 12,
    num_kv_heads: int = 0,
    head_dim: int = 0,
    mlp_dim: int = 0,
    max_length: int = 1024,
    positions: str = "learned",
    rope_theta: float = 10_000.0,
    rope_fraction: float = 1.0,
    norm: str = "layernorm",
    norm_eps: float = 1e-5,
    norm_bias: bool = True,
    norm_placement: str = "pre",
    embed_norm: bool = False,
    activation: str = "gelu",
    bias: bool = True,
    residual: str = "sequential",
    qk_norm: bool = False,
    window: int = 0,
    attention_softcap: float = 0.0,
    final_softcap: float = 0.0,
    tied_embeddings: bool = True,
    head_bias: bool = False,
    embed_scale: float = 1.0,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    embed_dropout: float = 0.0,
    init: str = "normal",
    init_std: float = 0.02,
    depth_scaled_init: bool = True,
    attention: str = "auto",
    unroll: int = 1,
    remat: str = "none",
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """Causal Transformer; the defaults are GPT-2 small (Radford et al. 2019).

    Args:
      num_kv_heads: 0 means num_heads; 1 is multi-query, between is grouped-query attention.
      head_dim: 0 means embed_dim / num_heads.
      mlp_dim: 0 means 4 * embed_dim.
      max_length: rows of the learned position table; other positions have no limit.
      positions: learned, sinusoidal, rotary, alibi or none.
      rope_fraction: share of each head's features that is rotated.
      norm_placement: pre; post (as in 2017: no final norm); sandwich (before and after).
      activation: gelu (tanh), gelu_exact, relu, swiglu, geglu.
      residual: sequential, or parallel (attention and feed-forward read the same input).
      window: a query sees itself and window - 1 tokens before it; 0 sees all.
      attention_softcap, final_softcap: cap * tanh(x / cap) of scores and logits; 0 for none.
      embed_scale: factor of the token embeddings, e.g. sqrt(embed_dim).
      init: normal, truncated or fan_in; init_std is the deviation of the first two.
      depth_scaled_init: output projections start smaller by sqrt(2 num_layers).
      attention: backend, see models/attention.py.
      unroll: layers per step of the scan over layers; the parameters stay the same.
      remat: what the backward pass keeps: none, dots, minimal, attention or full (see REMAT).
      dtype, param_dtype: of computation and of parameters.

    Inputs of apply: tokens [B, L]; optional segments [B, L], positions [B, L], prefix [B].

    Raises:
      InputError: options that do not fit together.
    """
    return _model(_spec(causal=True, token_types=0, mlm_head=False, **locals()))


def encoder(
    *,
    vocab_size: int,
    num_layers: int = 12,
    embed_dim: int = 768,
    num_heads: int = 12,
    num_kv_heads: int = 0,
    head_dim: int = 0,
    mlp_dim: int = 0,
    max_length: int = 512,
    positions: str = "learned",
    rope_theta: float = 10_000.0,
    rope_fraction: float = 1.0,
    norm: str = "layernorm",
    norm_eps: float = 1e-12,
    norm_bias: bool = True,
    norm_placement: str = "post",
    embed_norm: bool = True,
    activation: str = "gelu_exact",
    bias: bool = True,
    residual: str = "sequential",
    qk_norm: bool = False,
    window: int = 0,
    attention_softcap: float = 0.0,
    final_softcap: float = 0.0,
    tied_embeddings: bool = True,
    head_bias: bool = True,
    embed_scale: float = 1.0,
    token_types: int = 2,
    mlm_head: bool = True,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    embed_dropout: float = 0.1,
    init: str = "truncated",
    init_std: float = 0.02,
    depth_scaled_init: bool = False,
    attention: str = "auto",
    unroll: int = 1,
    remat: str = "none",
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """Bidirectional Transformer; the defaults are BERT base (Devlin et al. 2019).

    Args are those of `decoder`, and:
      token_types: rows of the token type table; 0 for none.
      mlm_head: dense layer, activation and norm before the output matrix.
      window: a query sees window - 1 tokens on each side.

    Inputs of apply: tokens [B, L]; optional segments [B, L] (0 is padding; tokens see only their own
    segment), positions [B, L], token_types [B, L].

    Raises:
      InputError: options that do not fit together.
    """
    return _model(_spec(causal=False, **locals()))


def _spec(**options: Any) -> Spec:
    """Fill in the sizes that follow from others."""
    heads, dim = options["num_heads"], options["embed_dim"]
    options["num_kv_heads"] = options["num_kv_heads"] or heads
    options["mlp_dim"] = options["mlp_dim"] or 4 * dim
    if not options["head_dim"]:
        if heads < 1 or dim % heads:
            raise InputError(f"num_heads={heads} does not divide embed_dim={dim}; set head_dim")
        options["head_dim"] = dim // heads
    return Spec(**options)
