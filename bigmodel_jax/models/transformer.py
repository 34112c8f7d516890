"""Decoder and encoder Transformers from one block (Vaswani et al. 2017).

Shapes: B batch, L length, M memory length, D model, H heads, G key-value groups, K head dim, F ffn,
V vocab, N layers. Layers are stacked: their parameters are "layers/..." with a leading axis N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import flops
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.block import Block, Context, bias, norm, norm_parameters, weight
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.models.positions import rotary_table, sinusoidal
from bigmodel_jax.models.spec import REMAT, Spec
from bigmodel_jax.parallel.rules import constrain


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
    def __call__(self, tokens: jax.Array, positions: jax.Array, plain: bool, token_types: jax.Array | None):
        spec, dim = self.spec, self.spec.embed_dim
        table = weight(self, "tokens", (spec.vocab_size, dim), ("vocab", "embed"), dim, spec)
        x = ops.lookup(table, tokens)
        if spec.embed_scale != 1.0:
            x = x * jnp.asarray(spec.embed_scale, x.dtype)
        if spec.positions == "learned":
            where = weight(self, "positions", (spec.max_length, dim), ("positions", "embed"), dim, spec)
            x = x + (where[: tokens.shape[1]] if plain else ops.lookup(where, positions))
        elif spec.positions == "sinusoidal":
            x = x + sinusoidal(positions, dim, ops.wide(x.dtype)).astype(x.dtype)
        if spec.token_types:
            types = weight(self, "types", (spec.token_types, dim), (None, "embed"), dim, spec)
            x = x + (types[0] if token_types is None else ops.lookup(types, token_types))
        if spec.embed_norm:
            x = norm(spec, "norm", x)
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
            arrays["kernel"] = weight(self, "kernel", shape, ("embed", "vocab"), dim, spec)
        if spec.mlm_head:
            arrays["dense"] = weight(self, "dense", (dim, dim), ("embed", None), dim, spec)
            arrays["dense_bias"] = bias(self, "dense_bias", (dim,), ("norm",), spec)
            arrays["norm"] = norm_parameters(spec, "norm", dim)
        if spec.head_bias:
            arrays["bias"] = bias(self, "bias", (spec.vocab_size,), ("vocab",), spec)
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
        plain = positions is None and cache is None  # 0, 1, 2, ... in every row
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None] + (0 if length is None else length[:, None])
        x, table = Embed(spec, name="embed")(tokens, positions, plain, token_types)
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
            x = norm(spec, "norm_final", x)
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
    """Forward matmul FLOPs per token at a length (see flops.py), with the masked-LM transform."""
    stack = flops.transformer_forward(
        layers=spec.num_layers, width=spec.embed_dim, heads=spec.num_heads, head_dim=spec.head_dim,
        mlp=spec.mlp_dim, vocab=spec.vocab_size, length=length, kv_heads=spec.num_kv_heads,
        gated=ops.ACTIVATIONS[spec.activation][1],
    )  # fmt: skip
    return stack + (2.0 * spec.embed_dim**2 if spec.mlm_head else 0.0)


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
    remat: str = "minimal",
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
    remat: str = "minimal",
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
