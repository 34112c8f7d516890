"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): the encoder's block over patches of an image.

Legend: B batch, H W height and width in pixels, P patch side, C channels, h w patches per side, L tokens (h w,
and the class token), D model, V classes.
Parameter paths: patches/kernel, patches/bias, class_token, positions, layers/..., norm_final/scale, head/kernel.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import flops
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.block import Context, bias, norm, weight
from bigmodel_jax.models.heads import Head, head_flops, read_out
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.models.spec import EncoderSpec
from bigmodel_jax.models.transformer import run_layers
from bigmodel_jax.parallel.rules import constrain


@dataclass(frozen=True)
class Plan:
    """What the options of an encoder do not say; documented at `vit`."""

    spec: EncoderSpec
    in_channels: int
    patch_size: int
    grid: int

    @property
    def first(self) -> int:
        """Tokens before the patches: the class token, or none."""
        return int(self.spec.pooling == "first")

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """(h, w). Raises InputError where patches do not tile the image."""
        if height % self.patch_size or width % self.patch_size or min(height, width) < 1:
            raise InputError(f"patches of {self.patch_size} pixels do not tile an image of {height} x {width}")
        return height // self.patch_size, width // self.patch_size


def resized(table: jax.Array, grid: int, shape: tuple[int, int]) -> jax.Array:
    """Positions [grid * grid, D] of a square grid as [h * w, D] of another, bilinear (section 3.2 of the paper)."""
    if shape == (grid, grid):
        return table
    square = table.reshape(grid, grid, -1).astype(ops.wide(table.dtype))
    out = jax.image.resize(square, (*shape, square.shape[-1]), "bilinear", antialias=False)
    return out.reshape(-1, square.shape[-1]).astype(table.dtype)


class Patches(nn.Module):
    """image [B, H, W, C] -> [B, h w, D]: one matrix for every patch. Parameters: kernel [P, P, C, D], bias [D]."""

    plan: Plan

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        plan, spec = self.plan, self.plan.spec
        side, channels = plan.patch_size, plan.in_channels
        batch, (h, w) = image.shape[0], plan.patches(*image.shape[1:3])
        shape, axes = (side, side, channels, spec.embed_dim), ("spatial", "spatial", "conv_in", "embed")
        kernel = weight(self, "kernel", shape, axes, side * side * channels, spec)
        cut = image.reshape(batch, h, side, w, side, channels).swapaxes(2, 3).reshape(batch, h * w, -1)
        y = ops.project("bli,id->bld", cut, kernel.reshape(-1, spec.embed_dim))
        return ops.add_bias(y, bias(self, "bias", (spec.embed_dim,), ("norm",), spec))


class VisionTransformer(nn.Module):
    """image [B, H, W, C] -> Output(pooled hidden [B, D], head). See `vit`."""

    plan: Plan

    @nn.compact
    def __call__(self, *, image: jax.Array, train: bool, dropout_keys: jax.Array | None = None) -> Output:
        plan, spec = self.plan, self.plan.spec
        if image.ndim != 4 or image.shape[-1] != plan.in_channels:
            raise InputError(f"images are {tuple(image.shape)}, the model takes [B, H, W, {plan.in_channels}]")
        keys = dropout_keys if train else None
        x = Patches(plan, name="patches")(image.astype(spec.dtype))
        rows = plan.first + plan.grid**2
        table = weight(self, "positions", (rows, spec.embed_dim), ("positions", "embed"), spec.embed_dim, spec)
        x = x + resized(table[plan.first :], plan.grid, plan.patches(*image.shape[1:3]))
        if plan.first:
            token = bias(self, "class_token", (spec.embed_dim,), ("norm",), spec) + table[0]
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, spec.embed_dim)), x], axis=1)
        x = ops.dropout(x, ops.fold(keys, spec.num_layers), spec.embed_dropout)
        x = constrain(x, ("rows", "length", "embed_act"))
        context = Context(Mask(), None, keys, None)
        (x, _), _ = run_layers(self, spec, x, None, context)
        x, extra = read_out(spec, norm(spec, "norm_final", x), None, keys)
        return Output(x, Head(spec, name="head")(None), extra=extra)


def forward_flops(plan: Plan, height: int, width: int) -> float:
    """Forward matmul FLOPs of one image (see flops.py)."""
    spec, (h, w) = plan.spec, plan.patches(height, width)
    tokens = h * w + plan.first
    each = flops.transformer_forward(
        layers=spec.num_layers, width=spec.embed_dim, heads=spec.num_heads, head_dim=spec.head_dim, mlp=spec.mlp_dim,
        vocab=0, length=tokens, head_share=0.0, gated=ops.ACTIVATIONS[spec.activation][1],
    )  # fmt: skip
    return tokens * (each + head_flops(spec, tokens)) + flops.conv_forward(
        h, w, plan.patch_size, plan.in_channels, spec.embed_dim
    )


def vit(
    *,
    in_channels: int,
    image_size: int,
    head: str = "classes",
    num_classes: int = 0,
    patch_size: int = 16,
    grid: int = 0,
    num_layers: int = 12,
    embed_dim: int = 768,
    num_heads: int = 12,
    mlp_dim: int = 0,
    pooling: str = "first",
    pooler: bool = False,
    norm: str = "layernorm",
    norm_eps: float = 1e-6,
    activation: str = "gelu_exact",
    bias: bool = True,
    qkv_bias: bool = True,
    qk_norm: bool = False,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    embed_dropout: float = 0.0,
    head_dropout: float = 0.0,
    init: str = "truncated",
    init_std: float = 0.02,
    depth_scaled_init: bool = False,
    mup_width: int = 0,
    mup_depth: int = 0,
    mup_head_dim: int = 0,
    attention: str = "auto",
    unroll: int = 1,
    remat: str = "minimal",
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """Vision Transformer, an image classifier; the defaults are ViT-B/16.

    Args:
      head: "classes", or "none": Output.hidden is then the states of all tokens [B, L, D].
      image_size: side of the images in pixels; others work too, their positions are interpolated.
      grid: patches per side that have a learned position; 0: those of `image_size`. To fine-tune at another
        resolution, set it to what the parameters were trained with.
      mlp_dim: 0 means 4 * embed_dim.
      pooling: "first": a class token is put before the patches; "mean": of the patches, without one.
      pooler: dense layer and tanh before the classifier, as in the paper's pre-training; without a classifier its
        result is Output.extra["pooled"].
      others: as in `spec.Spec`; norms are before each half of a block.

    Inputs of apply: image [B, H, W, C].

    Raises:
      InputError: options that do not fit together, or patches that do not tile the image.
    """
    ops.one_of("pooling", pooling, ("first", "mean"))
    ops.one_of("head", head, ("classes", "none"))
    if patch_size < 1 or image_size % patch_size:
        legal = [p for p in range(2, image_size + 1) if image_size % p == 0]
        raise InputError(f"patch_size {patch_size} does not divide image_size {image_size}; legal: {legal}")
    given = {name: value for name, value in locals().items() if name in _SHARED}
    spec = EncoderSpec(vocab_size=1, positions="none", norm_placement="pre", embed_norm=False, token_types=0, **given)
    plan = Plan(spec, in_channels, patch_size, grid or image_size // patch_size)

    def example(batch: int) -> dict[str, np.ndarray]:
        return {"image": np.zeros((batch, image_size, image_size, in_channels), np.float32)}

    return Model(
        module=VisionTransformer(plan), example=example, ratio=spec.ratio,
        flops=lambda height, width: forward_flops(plan, height, width),
    )  # fmt: skip


# Options of `vit` that it hands to the encoder's block as they are.
_SHARED = {field.name for field in dataclasses.fields(EncoderSpec)}
