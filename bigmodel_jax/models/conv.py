"""Convolution, pooling and the two image norms, as functions and thin modules.

Legend: B batch, H W height and width, C input channels, O output channels, K kernel side.

Everything is written so that a platform choice changes the speed and never the parameters:
kernels are [K, K, C, O] however the product is taken.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bigmodel_jax.errors import InputError
from bigmodel_jax.parallel.rules import active

Pads = tuple[tuple[int, int], tuple[int, int]]
ROWS = 4096
NHWC = ("NHWC", "HWIO", "NHWC")


def same(kernel_side: int) -> Pads:
    """(K - 1) // 2 zeros on both sides: the padding of every published ResNet for any stride.

    XLA's "SAME" pads asymmetrically when the stride is 2, which shifts the grid by a pixel.
    """
    side = (kernel_side - 1) // 2
    return ((side, side), (side, side))


def _out(size: int, kernel: int, stride: int, pads: tuple[int, int]) -> int:
    return (size + pads[0] + pads[1] - kernel) // stride + 1


def _windows(x: jax.Array, kernel: tuple[int, int], stride: int, pads: Pads) -> list[jax.Array]:
    """The K*K shifted views [B, H', W', C] of a zero-padded x, in kernel order."""
    ho, wo = (_out(x.shape[i + 1], kernel[i], stride, pads[i]) for i in (0, 1))
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return [
        x[:, i : i + (ho - 1) * stride + 1 : stride, j : j + (wo - 1) * stride + 1 : stride]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


def lax_conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """XLA's own convolution: the reference, and the fast one on accelerators."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=NHWC)


def patch_conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """The same sums as one matrix product over gathered patches [B, H', W', K*K*C]."""
    kh, kw, c, o = kernel.shape
    if kh == kw == 1 and pads == ((0, 0), (0, 0)):
        return jnp.einsum("bhwc,co->bhwo", x[:, ::stride, ::stride], kernel[0, 0])
    patches = jnp.concatenate(_windows(x, (kh, kw), stride, pads), axis=-1)
    return jnp.einsum("bhwk,ko->bhwo", patches, kernel.reshape(kh * kw * c, o))


def prefers_patches(positions: int, kernel_side: int, channels: int) -> bool:
    """Whether patches + matmul is the faster convolution on XLA:CPU.

    Measured on two Xeon cores with AVX-512, float32, forward and both gradients together, ms
    (lax.conv / patches): 3x3, 512 channels, B 8: 2x2 outputs from 2x2 467 / 7, from 4x4 158 / 7,
    3x3 19 / 11, 4x4 25 / 17; 3x3, 128 channels, B 64, 2x2 33 / 3. At 4x4 and 64 channels (2.2 / 2.9)
    and on every larger image lax.conv wins, by up to 3.7x at 28x28 and 16 channels (36 / 133).
    1x1: 12 / 5 with stride 2, between 8.4 / 2.7 (2x2) and 3.3 / 4.3 (4x4, 1024 channels) without.
    The cause is that XLA:CPU splits a convolution by output positions and the gradients of a small
    image have very few of these.

    Args:
      positions: H' * W' of the output.
      kernel_side: K.
      channels: C.
    """
    if kernel_side == 1:
        return True
    return positions <= 9 or (positions <= 16 and channels >= 256)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, pads: Pads | None = None) -> jax.Array:
    """2-D convolution (cross-correlation, as everywhere in deep learning).

    Args:
      x: [B, H, W, C].
      kernel: [K, K, C, O], same dtype.
      pads: zeros around H and W; default `same(K)`.

    Returns:
      [B, H', W', O]. The platform is looked up when the program is lowered, not when it is traced,
      so a program compiled here for an accelerator gets the accelerator's convolution. Reverse-mode
      differentiable.
    """
    pads = same(kernel.shape[0]) if pads is None else pads
    return _conv(x, kernel, stride, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda a, b: cpu_conv(a, b, stride, pads),
        default=lambda a, b: lax_conv(a, b, stride, pads),
    )


def _forward(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> tuple[jax.Array, tuple]:
    return _conv(x, kernel, stride, pads), (x, kernel)


def _backward(stride: int, pads: Pads, kept: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    def default(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda a, b: lax_conv(a, b, stride, pads), x, kernel)[1](dy)

    return lax.platform_dependent(*kept, dy, cpu=lambda x, k, d: cpu_gradients(x, k, d, stride, pads), default=default)


_conv.defvjp(_forward, _backward)


def cpu_conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """The faster forward convolution on XLA:CPU."""
    way = patch_conv if _small(x.shape, kernel.shape, stride, pads) else lax_conv
    return way(x, kernel, stride, pads)


def _small(x: tuple[int, ...], kernel: tuple[int, ...], stride: int, pads: Pads) -> bool:
    positions = _out(x[1], kernel[0], stride, pads[0]) * _out(x[2], kernel[1], stride, pads[1])
    return prefers_patches(positions, max(kernel[:2]), kernel[2])


def cpu_gradients(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """(dx, dkernel) on XLA:CPU, the same sums as the gradients of `lax_conv`."""
    small = _small(x.shape, kernel.shape, stride, pads)
    way = patch_conv if small else lax_conv
    (dx,) = jax.vjp(lambda a: way(a, kernel, stride, pads), x)[1](dy)
    layout = active()
    if not small and prefers_rows(dy.shape, kernel.shape, stride) and (layout is None or layout.mesh.size == 1):
        return dx, rows_kernel_gradient(x, dy, kernel.shape, pads)
    return dx, jax.vjp(lambda b: way(x, b, stride, pads), kernel)[1](dy)[0]


def prefers_rows(dy: tuple[int, ...], kernel: tuple[int, ...], stride: int) -> bool:
    """Whether `rows_kernel_gradient` beats XLA:CPU's own.

    Measured as above, kernel gradient alone, ms (lax.conv / rows): 64 channels 32x32, B 16: 37 / 17;
    16 channels 28x28, B 64: 12 / 6; 128 channels 16x16, B 16: 15 / 17, but there lax.conv also needs
    transposed copies of both operands (10).
    """
    return stride == 1 and max(kernel[:2]) == 3 and dy[1] * dy[2] >= 256


def rows_kernel_gradient(x: jax.Array, dy: jax.Array, kernel: tuple[int, ...], pads: Pads) -> jax.Array:
    """dkernel [K, K, C, O] of a stride 1 convolution as one product [K*C, rows] x [rows, K*O].

    Column shifts are gathered on x's side and row shifts on dy's, so each side grows by K and not
    one of them by K*K. Images go a few at a time, so that the gathered copies stay in the cache.

    Args:
      x: [B, H, W, C].
      dy: [B, H', W', O].
    """
    kh, kw, c, o = kernel
    b, h, w, _ = dy.shape
    tall = x.shape[1] + sum(pads[0])  # = h + kh - 1
    some = max(m for m in range(1, b + 1) if b % m == 0 and (m == 1 or m * h * w <= ROWS))
    xs = jnp.pad(x, ((0, 0), *pads, (0, 0))).reshape(b // some, some, tall, w + kw - 1, c)
    ds = jnp.pad(dy, ((0, 0), (kh - 1, kh - 1), (0, 0), (0, 0)))
    ds = ds.reshape(b // some, some, h + 2 * (kh - 1), w, o)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        xi, di = part
        across = jnp.concatenate([xi[:, :, j : j + w] for j in range(kw)], axis=-1)
        down = jnp.concatenate([di[:, kh - 1 - i : kh - 1 - i + tall] for i in range(kh)], axis=-1)
        return total + across.reshape(-1, kw * c).T @ down.reshape(-1, kh * o), None

    total = lax.scan(add, jnp.zeros((kw * c, kh * o), x.dtype), (xs, ds))[0]
    return total.reshape(kw, c, kh, o).transpose(2, 0, 1, 3)


def max_pool(x: jax.Array, side: int = 3, stride: int = 2) -> jax.Array:
    """Maximum over side x side windows with `same` padding by -inf. [B, H, W, C] -> [B, H', W', C]."""
    window, strides = (1, side, side, 1), (1, stride, stride, 1)
    low = np.array(-np.inf, x.dtype)  # a constant: jax differentiates only a literal -inf
    return lax.reduce_window(x, low, lax.max, window, strides, ((0, 0), *same(side), (0, 0)))


def pool(x: jax.Array, kind: str, side: int, stride: int) -> jax.Array:
    """Pooling, "max" or "mean", over side x side windows that lie inside. [B, H, W, C] -> [B, H', W', C]."""
    views = _windows(x, (side, side), stride, ((0, 0), (0, 0)))
    return functools.reduce(jnp.maximum, views) if kind == "max" else sum(views) / len(views)


class Conv(nn.Module):
    """Convolution without bias; the norm behind it has one. Parameter: kernel [K, K, C, O]."""

    features: int
    kernel: int = 3
    stride: int = 1
    zero: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # He et al. 2015 (arXiv:1502.01852), eq. 14, the fan_out form used by later ResNets.
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        init = nn.initializers.zeros if self.zero else init
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        axes = (None, None, "conv_in", "conv_out")
        kernel = self.param("kernel", nn.with_partitioning(init, axes), shape, self.param_dtype)
        return conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


def _affine(module: nn.Module, channels: int, zero: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
    one = nn.initializers.zeros if zero else nn.initializers.ones
    scale = module.param("scale", nn.with_partitioning(one, ("norm",)), (channels,), dtype)
    none = nn.with_partitioning(nn.initializers.zeros, ("norm",))
    return scale, module.param("bias", none, (channels,), dtype)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167) over fixed groups of rows.

    In training, rows [0, g), [g, 2g), ... of the microbatch are normalised each by their own mean
    and biased variance, whatever device they live on and however the step's batch was cut into
    microbatches: with one group size the result is the same. group=0 takes the whole microbatch as
    one group; then accumulation changes the statistics, and with them the result.

    Reports mean and *unbiased* variance, averaged over groups, as updates; running statistics move
    once per optimizer step, in `resnet.merge`. Evaluation uses the running statistics only.
    Statistics are in promote_types(x.dtype, float32); the result has x's dtype.

    Raises:
      InputError: B is not a multiple of `group`, or a group holds a single value per channel.
    """

    group: int = 0
    eps: float = 1e-5
    zero_scale: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c = x.shape[-1]
        scale, bias = _affine(self, c, self.zero_scale, self.param_dtype)
        mean0 = nn.with_partitioning(nn.initializers.zeros, ("norm",))
        var0 = nn.with_partitioning(nn.initializers.ones, ("norm",))
        shape = ((c,), self.param_dtype)
        running_mean = self.variable("stats", "mean", mean0, None, *shape).value
        running_var = self.variable("stats", "var", var0, None, *shape).value
        if not train:
            return normalise(x, running_mean, running_var, scale, bias, self.eps)
        y, mean, var = batch_norm(x, scale, bias, self.group, self.eps)
        self.put_variable("updates", "mean", mean)
        self.put_variable("updates", "var", var)
        return y


def normalise(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    eps: float,
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias in at least float32, returned in x's dtype."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    factor = lax.rsqrt(var.astype(wide) + eps) * scale.astype(wide)
    return ((x.astype(wide) - mean.astype(wide)) * factor + bias.astype(wide)).astype(x.dtype)


def group_rows(batch: int, group: int) -> int:
    """Rows per normalisation group, checked.

    Raises:
      InputError: `group` does not divide the batch; the message lists the sizes that do.
    """
    if group == 0:
        return batch
    if group < 0 or batch % group:
        legal = [g for g in range(1, batch + 1) if batch % g == 0]
        raise InputError(f"bn_group {group} does not divide {batch} rows; legal sizes: {legal}, or 0 for all")
    return group


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, group: int, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise groups of `group` rows.

    Args:
      x: [B, H, W, C].
      scale, bias: [C].

    Returns:
      (y [B, H, W, C], mean over groups of the group mean [C], of the unbiased group variance [C]).
    """
    b, h, w, c = x.shape
    rows = group_rows(b, group)
    n = rows * h * w
    if n < 2:
        raise InputError(
            f"batch norm over a single value per channel (bn_group {group}, image {h}x{w} at this"
            " depth) would return zeros; use a larger group or group norm"
        )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    g = x.reshape(b // rows, rows, h, w, c)
    gw = g.astype(wide)
    mean = gw.mean(axis=(1, 2, 3), keepdims=True)
    # Two passes: E[x^2] - E[x]^2 loses the digits that the layout tests in float32 need.
    var = jnp.square(gw - mean).mean(axis=(1, 2, 3), keepdims=True)
    y = normalise(g, mean, var, scale, bias, eps).reshape(x.shape)
    mean, var = lax.stop_gradient((mean.reshape(-1, c), var.reshape(-1, c)))
    return y, mean.mean(0), var.mean(0) * (n / (n - 1))


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018, arXiv:1803.08494): per row, over H, W and C / groups.

    Raises:
      InputError: `groups` does not divide the channels.
    """

    groups: int = 32
    eps: float = 1e-5
    zero_scale: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        del train
        b, h, w, c = x.shape
        if c % self.groups:
            legal = [g for g in range(1, c + 1) if c % g == 0]
            raise InputError(f"gn_groups {self.groups} does not divide {c} channels; legal: {legal}")
        scale, bias = _affine(self, c, self.zero_scale, self.param_dtype)
        g = x.reshape(b, h, w, self.groups, c // self.groups)
        gw = g.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = gw.mean(axis=(1, 2, 4), keepdims=True)
        var = jnp.square(gw - mean).mean(axis=(1, 2, 4), keepdims=True)
        split = (self.groups, c // self.groups)
        y = normalise(g, mean, var, scale.reshape(split), bias.reshape(split), self.eps)
        return y.reshape(x.shape)
