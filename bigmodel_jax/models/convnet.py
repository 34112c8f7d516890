"""Plain convolutional networks: LeNet-5 and AlexNet, as they were and for small images.

LeNet-5 is LeCun et al. 1998, section II.B, with every map of C3 connected and a linear output. AlexNet is
Krizhevsky 2014 (arXiv:1404.5997), the one-tower form whose weights are in circulation, without local
response normalisation.

Legend: B batch, H W height and width, C channels, D features of the last hidden layer, V classes.
Parameter paths: conv0/kernel, conv0/bias, ..., layer0/kernel, ..., head/kernel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import flops
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.conv import conv, pool
from bigmodel_jax.models.mlp import ACTIVATIONS, WHOLE, Affine, affine
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.models.spec import DTYPES
from bigmodel_jax.parallel.rules import constrain

IMAGE = ("batch", None, None, None)


class Stage(NamedTuple):
    """A convolution, its activation, and a pool (side 0: none)."""

    features: int
    kernel: int
    stride: int = 1
    padding: int = 0
    pool: int = 0
    pool_stride: int = 0


class Form(NamedTuple):
    stages: tuple[Stage, ...]
    hidden: tuple[int, ...]
    activation: str
    pooling: str
    dropout: float


FORMS: dict[str, Form] = {
    "lenet5": Form((Stage(6, 5, 1, 2, 2, 2), Stage(16, 5, 1, 0, 2, 2)), (120, 84), "tanh", "mean", 0.0),
    # For images of 8 to 16 pixels, on which two valid 5x5 convolutions leave nothing.
    "lenet_small": Form((Stage(32, 3, 1, 1), Stage(64, 3, 1, 1, 2, 2)), (128,), "relu", "max", 0.0),
    "alexnet": Form(
        (
            Stage(64, 11, 4, 2, 3, 2), Stage(192, 5, 1, 2, 3, 2), Stage(384, 3, 1, 1), Stage(256, 3, 1, 1),
            Stage(256, 3, 1, 1, 3, 2),
        ),
        (4096, 4096), "relu", "max", 0.5,
    ),
    # 28 to 64 pixels: no stride in the first convolution, 3x3 throughout.
    "alexnet_small": Form(
        (
            Stage(64, 3, 1, 1, 2, 2), Stage(192, 3, 1, 1, 2, 2), Stage(384, 3, 1, 1), Stage(256, 3, 1, 1),
            Stage(256, 3, 1, 1, 2, 2),
        ),
        (1024, 512), "relu", "max", 0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One network, checked; documented at `convnet`."""

    form: Form
    num_classes: int
    in_channels: int
    image_size: int
    dtype: str
    param_dtype: str

    def __post_init__(self) -> None:
        ops.one_of("activation", self.form.activation, tuple(ACTIVATIONS))
        ops.one_of("pooling", self.form.pooling, ("max", "mean"))
        for option in ("dtype", "param_dtype"):
            ops.one_of(option, getattr(self, option), DTYPES)
        for option in ("num_classes", "in_channels", "image_size"):
            if getattr(self, option) < 1:
                raise InputError(f"{option}={getattr(self, option)} must be at least 1")
        if not 0.0 <= self.form.dropout < 1.0:
            raise InputError(f"dropout={self.form.dropout} must be in [0, 1)")
        for n, (before, _, after) in enumerate(self.sides()):
            if after < 1:
                raise InputError(
                    f"an image of {self.image_size} pixels is {before} wide at convolution {n} and nothing behind it; "
                    "a smaller form or other stages fit"
                )

    def sides(self) -> list[tuple[int, int, int]]:
        """(before, after the convolution, after the pool) of each stage, in pixels."""
        out, size = [], self.image_size
        for stage in self.form.stages:
            wide = (size + 2 * stage.padding - stage.kernel) // stage.stride + 1
            left = (wide - stage.pool) // stage.pool_stride + 1 if stage.pool else wide
            out.append((size, wide, left))
            size = left
        return out


class Convolution(nn.Module):
    """One stage. Parameters: kernel [K, K, C, O], bias [O]."""

    plan: Plan
    stage: Stage

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        plan, stage, box = self.plan, self.stage, nn.with_partitioning
        dtype = jnp.dtype(plan.param_dtype)
        gain = 2.0 if plan.form.activation == "relu" else 1.0  # He et al. 2015, eq. 10
        init = nn.initializers.variance_scaling(gain, "fan_in", "normal")
        shape = (stage.kernel, stage.kernel, x.shape[-1], stage.features)
        kernel = self.param("kernel", box(init, (None, None, "conv_in", "conv_out")), shape, dtype)
        bias = self.param("bias", box(nn.initializers.zeros, ("conv_out",)), shape[-1:], dtype)
        pads = ((stage.padding, stage.padding),) * 2
        y = conv(x, kernel.astype(x.dtype), stage.stride, pads) + bias.astype(x.dtype)
        y = ACTIVATIONS[plan.form.activation](y)
        return pool(y, plan.form.pooling, stage.pool, stage.pool_stride) if stage.pool else y


class ConvNet(nn.Module):
    """image [B, H, W, C] -> Output(hidden [B, D], head). See `convnet`."""

    plan: Plan

    @nn.compact
    def __call__(self, *, image: jax.Array, train: bool, dropout_keys: jax.Array | None = None) -> Output:
        plan, form = self.plan, self.plan.form
        wanted = (plan.image_size, plan.image_size, plan.in_channels)
        if image.shape[1:] != wanted:
            raise InputError(f"images are {tuple(image.shape[1:])}, the model takes {wanted}")
        x = constrain(image.astype(plan.dtype), IMAGE)
        for n, stage in enumerate(form.stages):
            x = constrain(Convolution(plan, stage, name=f"conv{n}")(x), IMAGE)
        x = constrain(x.reshape(x.shape[0], -1), WHOLE)
        keys = dropout_keys if train else None
        gain = 2.0 if form.activation == "relu" else 1.0
        for n, size in enumerate(form.hidden):
            x = ops.dropout(x, ops.fold(keys, n), form.dropout)
            w = Affine(size, "mlp", gain, dtype=plan.dtype, param_dtype=plan.param_dtype, name=f"layer{n}")(x.shape[-1])
            x = constrain(ACTIVATIONS[form.activation](x @ w["kernel"] + w["bias"]), WHOLE)
        head = Affine(plan.num_classes, "classes", dtype=plan.dtype, param_dtype=plan.param_dtype, name="head")
        return Output(x, jax.tree_util.Partial(affine, head(x.shape[-1])))


def forward_flops(plan: Plan, *size: int) -> float:
    """Two per multiply-accumulate of convolutions and matrices, for one image."""
    del size  # the layers behind the convolutions fix it
    total, channels, side = 0.0, plan.in_channels, plan.image_size
    for stage, (_, wide, side) in zip(plan.form.stages, plan.sides(), strict=True):  # noqa: B007
        total += flops.conv_forward(wide, wide, stage.kernel, channels, stage.features)
        channels = stage.features
    sizes = (side * side * channels, *plan.form.hidden, plan.num_classes)
    return total + 2.0 * sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))


def convnet(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    form: str = "lenet5",
    stages: tuple = (),
    hidden: tuple = (),
    activation: str = "",
    pooling: str = "",
    dropout: float = -1.0,
    width: float = 1.0,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """A plain convolutional network.

    Args:
      image_size: side of the square images.
      form: "lenet5" (28 or 32 pixels), "lenet_small" (8 to 16), "alexnet" (224), "alexnet_small" (28 to 64).
      stages, hidden, activation, pooling, dropout: in place of the form's own, where not (), "" or negative:
        stages of (features, kernel, stride, padding, pool, pool stride), sizes of the hidden layers, relu or
        tanh among others, max or mean, dropout before each hidden layer.
      width: multiplies features and hidden sizes.

    Inputs of apply: image [B, H, W, C].

    Raises:
      InputError: options that do not fit together, or an image too small.
    """
    ops.one_of("form", form, tuple(FORMS))
    own = FORMS[form]
    chosen = tuple(Stage(*stage) for stage in stages) or own.stages
    scaled = Form(
        tuple(stage._replace(features=max(1, round(stage.features * width))) for stage in chosen),
        tuple(max(1, round(size * width)) for size in (hidden or own.hidden)),
        activation or own.activation, pooling or own.pooling, own.dropout if dropout < 0 else dropout,
    )  # fmt: skip
    plan = Plan(scaled, num_classes, in_channels, image_size, dtype, param_dtype)

    def example(batch: int) -> dict[str, Any]:
        return {"image": np.zeros((batch, image_size, image_size, in_channels), np.float32)}

    return Model(module=ConvNet(plan), example=example, flops=functools.partial(forward_flops, plan))
