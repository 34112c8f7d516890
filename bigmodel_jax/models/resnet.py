"""Residual networks: v1.5 and v2, for ImageNet and CIFAR, and their plain twins.

v1 is He et al. 2015 (arXiv:1512.03385), a bottleneck's stride on its first convolution; "v1.5" puts it on the 3x3 one.
v2 is He et al. 2016 (arXiv:1603.05027): norm and ReLU before each convolution.

Legend: B batch, H W height and width, C channels, D pooled features, V classes.
Parameter paths: stem/conv/kernel, stages/1/block2/conv3/kernel, stages/2/block1/project/kernel,
.../norm1/scale, head/kernel. Running statistics sit under the path of their norm.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import flops
from bigmodel_jax.errors import InputError, nearest
from bigmodel_jax.models.conv import BatchNorm, Conv, GroupNorm, max_pool
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.parallel.rules import constrain

# Table 1 of the 2015 paper: blocks per stage.
IMAGENET = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
IMAGE = ("batch", None, None, None)


@dataclass(frozen=True)
class Plan:
    """One network as numbers: everything its parts have to agree on."""

    version: str
    block: str
    blocks: tuple[int, ...]
    channels: int
    stem: str
    norm: str
    bn_group: int
    gn_groups: int
    eps: float
    shortcut: bool
    projection: str
    zero_init: bool
    num_classes: int
    in_channels: int
    remat: str
    dtype: Any
    param_dtype: Any

    def branch(self, stage: int, block: int) -> list[tuple[int, int, int]]:
        """(features, kernel, stride) of each convolution of a block, counted from 0."""
        f = self.channels * 2**stage
        stride = 2 if stage > 0 and block == 0 else 1
        if self.block == "basic":
            return [(f, 3, stride), (f, 3, 1)]
        first, second = (stride, 1) if self.version == "v1" else (1, stride)
        return [(f, 1, first), (f, 3, second), (4 * f, 1, 1)]

    def conv(self, features: int, kernel: int, stride: int, name: str, zero: bool = False) -> Conv:
        return Conv(features, kernel, stride, zero, self.dtype, self.param_dtype, name=name)

    def normalise(self, name: str, zero: bool = False) -> BatchNorm | GroupNorm:
        last = (self.eps, zero, self.param_dtype)
        if self.norm == "batch":
            return BatchNorm(self.bn_group, *last, name=name)
        return GroupNorm(self.gn_groups, *last, name=name)


class Block(nn.Module):
    """One residual block (or, without shortcut, the same convolutions alone). Paths: conv1, norm1, ..."""

    plan: Plan
    stage: int
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        plan, branch = self.plan, self.plan.branch(self.stage, self.index)
        before = plan.version == "v2"
        # Goyal et al. 2017 (arXiv:1706.02677), 5.1: a block starts as the identity. In v2 nothing but
        # the last kernel can be zeroed: a zero scale before a ReLU would never get a gradient.
        zero = plan.zero_init and plan.shortcut
        y = inner = x
        for i, (features, kernel, stride) in enumerate(branch):
            last = i == len(branch) - 1
            if before:
                y = nn.relu(plan.normalise(f"norm{i + 1}")(y, train))
                inner = y if i == 0 else inner
            y = plan.conv(features, kernel, stride, f"conv{i + 1}", zero and before and last)(y)
            if not before:
                y = plan.normalise(f"norm{i + 1}", zero and last)(y, train)
                y = y if last else nn.relu(y)
        if plan.shortcut:
            y = y + self.skip(x, inner if before else x, y.shape[-1], train)
        return constrain(y if before else nn.relu(y), IMAGE)

    def skip(self, x: jax.Array, inner: jax.Array, features: int, train: bool) -> jax.Array:
        """What is added to the branch: x, or x brought to the branch's size."""
        plan = self.plan
        stride = max(s for _, _, s in plan.branch(self.stage, self.index))
        if stride == 1 and x.shape[-1] == features:
            return x
        if plan.projection == "pad":  # option A of the 2015 paper: no parameters
            return jnp.pad(x[:, ::stride, ::stride], ((0, 0),) * 3 + ((0, features - x.shape[-1]),))
        y = plan.conv(features, 1, stride, "project")(inner)
        return y if plan.version == "v2" else plan.normalise("project_norm")(y, train)


class Stage(nn.Module):
    """Blocks of one image size. Paths: block1, block2, ..."""

    plan: Plan
    stage: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        block = nn.remat(Block, static_argnums=(2,)) if self.plan.remat == "full" else Block
        for i in range(self.plan.blocks[self.stage]):
            x = block(self.plan, self.stage, i, name=f"block{i + 1}")(x, train)
        return x


class Stages(nn.Module):
    """Paths: 1, 2, 3, ..."""

    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(len(self.plan.blocks)):
            x = Stage(self.plan, i, name=str(i + 1))(x, train)
        return x


class Stem(nn.Module):
    """[B, H, W, C] -> [B, H/4, W/4, channels] ("imagenet") or [B, H, W, channels] ("cifar")."""

    plan: Plan

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> jax.Array:
        plan = self.plan
        large = plan.stem == "imagenet"
        x = plan.conv(plan.channels, 7 if large else 3, 2 if large else 1, "conv")(image)
        if plan.version != "v2":
            x = nn.relu(plan.normalise("norm")(x, train))
        return max_pool(x) if large else x


def linear_head(kernel: jax.Array, bias: jax.Array, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] in at least float32 of hidden [..., D]."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...d,dv->...v", hidden.astype(wide), kernel.astype(wide)) + bias.astype(wide)


class Head(nn.Module):
    """The classifier as a value. Parameters: kernel [D, V], bias [V]."""

    plan: Plan

    @nn.compact
    def __call__(self, features: int) -> jax.tree_util.Partial:
        v, dtype = self.plan.num_classes, self.plan.param_dtype
        # Standard deviation 0.01: Goyal et al. 2017, 5.1.
        normal = nn.with_partitioning(nn.initializers.normal(0.01), ("conv_in", "classes"))
        none = nn.with_partitioning(nn.initializers.zeros, ("classes",))
        kernel = self.param("kernel", normal, (features, v), dtype)
        return jax.tree_util.Partial(linear_head, kernel, self.param("bias", none, (v,), dtype))


class ResNet(nn.Module):
    """image [B, H, W, C] -> Output(hidden [B, D], head). See `resnet`."""

    plan: Plan

    @nn.compact
    def __call__(self, *, image: jax.Array, train: bool, dropout_keys: jax.Array | None = None) -> Output:
        del dropout_keys
        plan = self.plan
        if image.ndim != 4 or image.shape[-1] != plan.in_channels:
            wanted = f"[batch, height, width, {plan.in_channels}]"
            raise InputError(f"images are {tuple(image.shape)}, the model takes {wanted}")
        x = Stem(plan, name="stem")(constrain(image.astype(plan.dtype), IMAGE), train)
        x = Stages(plan, name="stages")(x, train)
        if plan.version == "v2":
            x = nn.relu(plan.normalise("norm")(x, train))
        hidden = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean(axis=(1, 2))
        head = Head(plan, name="head")(hidden.shape[-1])
        return Output(constrain(hidden, ("batch", None)), head)


def merge(stats: Any, updates: Any, momentum: float) -> Any:
    """running = momentum * running + (1 - momentum) * batch, leaf by leaf. {} for a model without."""
    return jax.tree.map(lambda r, u: momentum * r + (1 - momentum) * u.astype(r.dtype), stats, updates)


def forward_flops(plan: Plan, height: int, width: int) -> float:
    """Two per multiply-accumulate of every convolution and of the classifier, for one image."""

    def half(size: int, stride: int) -> int:
        return (size - 1) // stride + 1

    h, w = height, width
    kernel, stride = (7, 2) if plan.stem == "imagenet" else (3, 1)
    h, w = half(h, stride), half(w, stride)
    total = flops.conv_forward(h, w, kernel, plan.in_channels, plan.channels)
    if plan.stem == "imagenet":
        h, w = half(h, 2), half(w, 2)
    c = plan.channels
    for stage, count in enumerate(plan.blocks):
        for block in range(count):
            before, start = (h, w), c
            for features, kernel, stride in plan.branch(stage, block):
                h, w = half(h, stride), half(w, stride)
                total += flops.conv_forward(h, w, kernel, c, features)
                c = features
            changed = before != (h, w) or start != c
            if changed and plan.shortcut and plan.projection == "conv":
                total += flops.conv_forward(h, w, 1, start, c)
    return total + 2.0 * c * plan.num_classes


def _table(depth: int, blocks: tuple[int, ...], block: str) -> tuple[str, tuple[int, ...], bool]:
    """(block, blocks per stage, whether it is one of the ImageNet networks)."""
    if depth in IMAGENET:
        kind, counts = IMAGENET[depth]
        return kind if block == "auto" else block, tuple(blocks) or counts, True
    if depth >= 8 and depth % 6 == 2:
        return "basic" if block == "auto" else block, tuple(blocks) or ((depth - 2) // 6,) * 3, False
    raise InputError(
        f"no ResNet of depth {depth}: {', '.join(map(str, IMAGENET))} (ImageNet) or 6n+2, such as 20, 56, 110 (CIFAR)"
    )


def _choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise InputError(f"{name} '{value}' is none of {', '.join(legal)}{nearest(str(value), legal)}")


def resolved(
    depth: int, block: str, blocks: tuple[int, ...], channels: int, width: float, stem: str, projection: str
) -> tuple[str, tuple[int, ...], int, str, str]:
    """(block, blocks per stage, channels of the first stage, stem, projection): what options of `resnet` mean."""
    kind, counts, large = _table(depth, blocks, block)
    base = max(1, round((channels or (64 if large else 16)) * width))
    stem = ("imagenet" if large else "cifar") if stem == "auto" else stem
    return kind, counts, base, stem, ("conv" if large else "pad") if projection == "auto" else projection


def resnet(
    *,
    depth: int = 50,
    version: str = "v1.5",
    block: str = "auto",
    blocks: tuple[int, ...] = (),
    channels: int = 0,
    width: float = 1.0,
    stem: str = "auto",
    norm: str = "batch",
    bn_group: int = 0,
    bn_momentum: float = 0.9,
    gn_groups: int = 32,
    eps: float = 1e-5,
    shortcut: bool = True,
    projection: str = "auto",
    zero_init: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
    remat: str = "none",
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """A ResNet. Inputs: image [B, H, W, in_channels] float32, any H and W.

    Args:
      depth: 18, 34, 50, 101, 152, or 6n+2 for the CIFAR networks of section 4.2.
      version: "v1", "v1.5" or "v2".
      block: "basic", "bottleneck", or "auto": the depth's own.
      blocks: blocks per stage, in place of the depth's own.
      channels: of the stem and first stage; 0: 64, or 16 for 6n+2. Each stage doubles them.
      width: multiplies `channels`.
      stem: "imagenet" (7x7/2 and 3x3/2 max pool), "cifar" (3x3), "auto" by depth.
      norm: "batch" or "group".
      bn_group: rows of the global batch that are normalised together; 0: the whole microbatch, so
        that accumulation changes the statistics.
      bn_momentum: share of the running statistics kept at each optimizer step.
      gn_groups: groups of group norm.
      shortcut: False gives the plain twin: the same convolutions and norms, nothing added.
      projection: shortcut where the size changes: "conv" (1x1), "pad" (option A, no parameters),
        "auto": conv for ImageNet depths, pad for 6n+2.
      zero_init: each residual branch starts at zero; without effect on a plain twin.
      remat: "none", or "full": blocks are recomputed in the backward pass.
      dtype: of activations and products; norms, pooling and logits are at least float32.
      param_dtype: of parameters and running statistics.

    Raises:
      InputError: an impossible combination.
    """
    kind, counts, base, stem, projection = resolved(depth, block, blocks, channels, width, stem, projection)
    for name, value, legal in (
        ("version", version, ("v1", "v1.5", "v2")),
        ("block", kind, ("basic", "bottleneck")),
        ("stem", stem, ("imagenet", "cifar")),
        ("norm", norm, ("batch", "group")),
        ("projection", projection, ("conv", "pad")),
        ("remat", remat, ("none", "full")),
    ):
        _choice(name, value, legal)
    if norm == "group" and base % gn_groups:
        legal_groups = [g for g in range(1, base + 1) if base % g == 0]
        raise InputError(f"gn_groups {gn_groups} does not divide {base} channels; legal: {legal_groups}")
    plan = Plan(
        version, kind, counts, base, stem, norm, bn_group, gn_groups, eps, shortcut, projection,
        zero_init, num_classes, in_channels, remat, jnp.dtype(dtype), jnp.dtype(param_dtype),
    )  # fmt: skip

    def example(batch: int) -> dict[str, np.ndarray]:
        return {"image": np.zeros((batch, 8, 8, in_channels), np.float32)}

    return Model(
        module=ResNet(plan),
        example=example,
        flops=functools.partial(forward_flops, plan),
        merge=functools.partial(merge, momentum=bn_momentum),
    )
