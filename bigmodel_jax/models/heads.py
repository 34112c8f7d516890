"""What a Transformer puts out: logits over a vocabulary, of a text, of each token, or of spans.

Shapes: B batch, L length, D model, V outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.block import bias, norm_parameters, weight
from bigmodel_jax.models.spec import Spec
from bigmodel_jax.parallel.rules import constrain


@dataclass(frozen=True)
class Logits:
    """hidden [..., D] -> logits [..., V], given the head's arrays. Hashable, so a pytree may hold it."""

    spec: Spec

    def __call__(self, arrays: dict[str, Any], hidden: jax.Array) -> jax.Array:
        spec = self.spec
        if "kernel" not in arrays:
            return hidden
        x = hidden.astype(spec.dtype)
        if spec.head == "lm" and spec.tied_embeddings and spec.ratio.width != 1:
            x = x / spec.ratio.width  # a table starts and learns as an input: see mup.py
        if "project" in arrays:
            x = jnp.einsum("...d,de->...e", x, arrays["project"])
        if "dense" in arrays:
            x = jnp.einsum("...d,de->...e", x, arrays["dense"]) + arrays["dense_bias"]
            x = ops.ACTIVATIONS[spec.activation][0](x)
            x = ops.NORMS[spec.norm](x, *arrays["norm"], eps=spec.norm_eps)
        letters = "...d,vd->...v" if spec.head == "lm" and spec.tied_embeddings else "...d,dv->...v"
        high = ops.wide(x.dtype)
        logits = ops.wide_einsum(letters, x, arrays["kernel"])
        if "bias" in arrays:
            logits = logits + arrays["bias"].astype(high)
        if spec.head != "lm":
            return logits
        if logits.ndim == 3:
            logits = constrain(logits, ("rows", "length", "vocab"))
        return ops.softcap(logits, spec.final_softcap)


class Head(nn.Module):
    """Declares the output layer's parameters and returns them as a pytree that can be called."""

    spec: Spec

    @nn.compact
    def __call__(self, table: jax.Array) -> jax.tree_util.Partial:
        spec, dim = self.spec, self.spec.embed_dim
        arrays: dict[str, Any] = {}
        if spec.head == "lm":
            width = spec.token_dim if spec.tied_embeddings else dim
            arrays["kernel"] = table if spec.tied_embeddings else self._kernel(spec.vocab_size, "vocab")
            if self.has_variable("laid", "kernel"):
                arrays["kernel"] = self.get_variable("laid", "kernel")
            if spec.mlm_transform:
                arrays["dense"] = weight(self, "dense", (dim, width), ("embed", "embed_act"), dim, spec)
                arrays["dense_bias"] = bias(self, "dense_bias", (width,), ("norm",), spec)
                arrays["norm"] = norm_parameters(spec, "norm", width)
            elif width != dim:
                arrays["project"] = weight(self, "project", (dim, width), ("embed", None), dim, spec)
            if spec.head_bias:
                arrays["bias"] = bias(self, "bias", (spec.vocab_size,), ("vocab",), spec)
        elif spec.head != "none":
            classes = 2 if spec.head == "spans" else spec.num_classes
            arrays["kernel"] = self._kernel(classes, "classes")
            if spec.head_bias:
                arrays["bias"] = bias(self, "bias", (classes,), ("classes",), spec)
        return jax.tree_util.Partial(Logits(spec), arrays)

    @nn.nowrap
    def _kernel(self, outputs: int, axis: str) -> jax.Array:
        dim = self.spec.embed_dim
        return weight(self, "kernel", (dim, outputs), ("embed", axis), dim, self.spec)


class Dense(nn.Module):
    """x [B, D] -> [B, outputs]: the pooler (Devlin et al. 2019) and the next-sentence head."""

    spec: Spec
    outputs: int
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec, dim = self.spec, x.shape[-1]
        kernel = weight(self, "kernel", (dim, self.outputs), ("embed", self.axis), dim, spec)
        return x @ kernel + bias(self, "bias", (self.outputs,), (self.axis,), spec)


def pooled(x: jax.Array, segments: jax.Array | None, how: str) -> jax.Array:
    """One state per text [B, D] of x [B, L, D]: of its first or last token, or their mean.

    Args:
      segments: [B, L], 0 is padding and never pooled; None: no padding.
      how: "first", "last" or "mean", the last in at least float32.
    """
    if how == "first":
        return x[:, 0]
    real = jnp.ones(x.shape[:2], bool) if segments is None else segments > 0
    if how == "last":
        last = jnp.max(jnp.where(real, jnp.arange(x.shape[1]), 0), axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    w = real.astype(ops.wide(x.dtype))
    mean = jnp.einsum("bl,bld->bd", w, x.astype(w.dtype)) / jnp.maximum(w.sum(1), 1)[:, None]
    return mean.astype(x.dtype)


def read_out(spec: Spec, x: jax.Array, segments: jax.Array | None, keys: jax.Array | None):
    """(what the head reads, extra outputs by name) of the last hidden states x [B, L, D].

    Declares the pooler and the next-sentence head in the module that calls it.
    """
    extra: dict[str, jax.Array] = {}
    if spec.pooler or spec.head == "classes":
        y = pooled(x, segments, spec.pooling)
        if spec.pooler:
            y = jnp.tanh(Dense(spec, spec.embed_dim, "embed_act", name="pooler")(y))
        if spec.nsp:
            extra["nsp"] = Dense(spec, 2, "classes", name="nsp")(y).astype(ops.wide(y.dtype))
        if spec.head == "classes":
            x = y
        else:
            extra["pooled"] = y
    if spec.head in ("classes", "tokens"):
        x = ops.dropout(x, ops.fold(keys, spec.num_layers + 1), spec.head_dropout)
    return x, extra


def head_flops(spec: Spec, length: int) -> float:
    """Forward FLOPs per token of all heads at a length."""
    dim = spec.embed_dim
    width = spec.token_dim if spec.tied_embeddings else dim
    per_text = dim**2 * spec.pooler + 2 * dim * spec.nsp + dim * spec.num_classes * (spec.head == "classes")
    per_token = dim * {"tokens": spec.num_classes, "spans": 2}.get(spec.head, 0)
    if spec.head == "lm":
        per_token = width * spec.vocab_size + dim * width * (spec.mlm_transform or width != dim)
    return 2.0 * (per_token + per_text / length)
