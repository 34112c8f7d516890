"""Norms, activations, dropout and initialisers: numerics as plain functions.

dtype policy: parameters live in `param_dtype`, matmuls run in `dtype`; norms, softmax and logits
are computed in `wide(dtype)`, at least float32 and float64 where the input is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigmodel_jax.errors import InputError, nearest
from bigmodel_jax.models import target
from bigmodel_jax.models.laid import Laid
from bigmodel_jax.parallel import context
from bigmodel_jax.parallel.pieces import pieces
from bigmodel_jax.parallel.rings import own_rows

# XLA:CPU adds scattered rows in a loop of some 20 us each: up to this many table rows a matmul wins.
ONE_HOT_ROWS = 2048


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which precision matters: float32, or float64 if `dtype` is that."""
    return jnp.promote_types(dtype, jnp.float32)


def one_of(option: str, value: str, legal: tuple[str, ...]) -> None:
    """Refuse an option value that is not in `legal`.

    Raises:
      InputError: names the option, its legal values and the nearest one.
    """
    if value not in legal:
        raise InputError(f"{option}='{value}' is not one of {list(legal)}{nearest(value, legal)}")


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, eps: float = 1e-5) -> jax.Array:
    """Layer normalisation over the last axis (Ba et al. 2016). Same shape and dtype as `x`."""
    y = x.astype(wide(x.dtype))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale.astype(y.dtype)
    return (y if bias is None else y + bias.astype(y.dtype)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, eps: float = 1e-5) -> jax.Array:
    """Root-mean-square normalisation (Zhang and Sennrich 2019). Same shape and dtype as `x`."""
    y = x.astype(wide(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale.astype(y.dtype)
    return (y if bias is None else y + bias.astype(y.dtype)).astype(x.dtype)


NORMS = {"layernorm": layer_norm, "rmsnorm": rms_norm}


def _wide(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """fn in `wide`, rounded once: in bfloat16 XLA:CPU rounds after every operation, a third as fast."""
    return fn(x.astype(wide(x.dtype))).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Gaussian error linear unit, tanh form (Hendrycks and Gimpel 2016)."""
    return _wide(functools.partial(jax.nn.gelu, approximate=True), x)


def gelu_exact(x: jax.Array) -> jax.Array:
    """Gaussian error linear unit, x * Phi(x) with erf: on CPU half the time of `jax.nn.gelu`, which takes erfc."""
    return _wide(lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))), x)


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x)."""
    return _wide(jax.nn.silu, x)


# name -> (pointwise function, whether a second matrix gates it: Shazeer 2020)
ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "gelu": (gelu, False),
    "gelu_exact": (gelu_exact, False),
    "relu": (jax.nn.relu, False),
    "swish": (silu, False),
    "swiglu": (silu, True),
    "geglu": (gelu, True),
    "reglu": (jax.nn.relu, True),
    "glu": (functools.partial(_wide, jax.nn.sigmoid), True),
    "bilinear": (lambda x: x, True),
}


def project(letters: str, x: jax.Array, w: jax.Array | Laid, axes: Sequence[str | None] = ()) -> jax.Array:
    """jnp.einsum(letters, x, w) of activations [B, L, ...] and a weight of logical `axes`, e.g. "bld,df->blf"."""
    return w(x) if isinstance(w, Laid) else own_rows(functools.partial(_project, letters), x, w, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(letters: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The same, with a gradient of its own.

    The weight's gradient contracts B and L as one axis. Contracted as two, XLA:CPU first writes a transposed copy of
    x, element by element: in float32 an eighth of a training step lost. In bfloat16 its products over leading axes
    run at a tenth of the speed of the others, and the copy saves two fifths (jax 0.12; 0.10 has no fast bfloat16).
    """
    return jnp.einsum(letters, x, w)


def _project_forward(letters, x, w):
    # Not _project(...): a remat policy does not see the matmul inside a nested custom_vjp.
    return jnp.einsum(letters, x, w), (x, w)


def _project_backward(letters, saved, g):
    x, w = saved
    (left, right), out = letters.split("->")[0].split(","), letters.split("->")[1]
    dx = jnp.einsum(f"{out},{right}->{left}", g, w)
    cut = pieces(*x.shape[:2]).lengths > 1  # as one axis, B and a cut L would be gathered
    if cut or (x.dtype == jnp.bfloat16 and target.platform() == "cpu"):
        return dx, jnp.einsum(f"{left},{out}->{right}", x, g)
    x, g = (y.reshape(-1, *y.shape[2:]) for y in (x, g))
    return dx, jnp.einsum(f"z{left[2:]},z{out[2:]}->{right}", x, g)


_project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, b: jax.Array) -> jax.Array:
    """x [..., *b.shape] + b; the gradient of b is summed in `wide`.

    Autodiff would sum in x's dtype, which XLA:CPU runs five times slower in bfloat16.
    """
    return x + b


def _add_bias_forward(x, b):
    return x + b, b


def _add_bias_backward(b, g):
    return g, jnp.sum(g, tuple(range(g.ndim - b.ndim)), dtype=wide(g.dtype)).astype(b.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _contracted(a: jax.Array, b: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """[..., x] and [..., y] to [x, y]: a product summed over all leading dimensions."""
    lead = tuple(range(a.ndim - 1))
    return jax.lax.dot_general(a, b, ((lead, lead), ((), ())), preferred_element_type=dtype)


@jax.custom_vjp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows ids [...] of table [V, D]; the gradient is summed in `wide`, whatever the table is."""
    return jnp.take(table, ids, axis=0)


def _lookup_forward(table, ids):
    return lookup(table, ids), (table, ids)


def _lookup_backward(saved, g):
    table, ids = saved
    rows, dim = table.shape
    if ids.ndim != 2 or pieces(*ids.shape).lengths == 1:
        ids, g = ids.reshape(-1), g.reshape(-1, dim)
    if rows <= ONE_HOT_ROWS and target.platform() == "cpu":
        one_hot = (ids[..., None] == jnp.arange(rows)).astype(g.dtype)
        dt = _contracted(one_hot, g, wide(g.dtype))
    else:
        dt = jnp.zeros(table.shape, wide(g.dtype)).at[ids].add(g.astype(wide(g.dtype)))
    return dt.astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def wide_einsum(letters: str, a: jax.Array, b: jax.Array | Laid) -> jax.Array:
    """Activations a [..., x] times a weight b, e.g. "...x,xy->...y", in `wide(a.dtype)`."""
    return b(a, wide=True) if isinstance(b, Laid) else _wide_einsum(letters, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_einsum(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The same, with a gradient of its own.

    The cotangent is rounded to the inputs' dtype first. Autodiff would multiply the wide cotangent
    with a narrow operand, which runs as a float32 matmul: half of the output layer's time in
    bfloat16.
    """
    return jnp.einsum(letters, a, b, preferred_element_type=wide(a.dtype))


def _wide_forward(letters, a, b):
    return _wide_einsum(letters, a, b), (a, b)


def _wide_backward(letters, saved, g):
    a, b = saved
    g = g.astype(a.dtype)
    (left, right), out = letters.split("->")[0].split(","), letters.split("->")[1]
    da = jnp.einsum(f"{out},{right}->{left}", g, b)
    if a.ndim != 3 or pieces(*a.shape[:2]).lengths == 1:
        a, g = (x.reshape(-1, x.shape[-1]) for x in (a, g))
    return da, _contracted(a, g) if right == left[3:] + out[3:] else _contracted(g, a)


_wide_einsum.defvjp(_wide_forward, _wide_backward)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap) (Gemma 2, section 2); cap 0 returns `x`."""
    return cap * jnp.tanh(x / cap) if cap else x


def fold(keys: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """One key per row, [B], each folded with `number`."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def dropout(x: jax.Array, keys: jax.Array | None, rate: float, zigzag: bool = False) -> jax.Array:
    """Zero a share `rate` of x [B, ...] and scale up the rest (Srivastava et al. 2014).

    Args:
      keys: one typed key per row, [B]: the mask of a row depends on nothing else, so it is the same
        on every mesh, for every microbatch size and in every precision. None: no dropout.
      zigzag: x [B, L, ...] is stored in that order (parallel/context.py); the mask is brought into it.
    """
    if keys is None or rate == 0.0:
        return x
    share = jnp.float32(1.0 - rate)  # a Python number would draw other bits under float64
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, share, x.shape[1:]))(keys)
    kept = context.zigzag(kept) if zigzag else kept
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


INITS = ("normal", "truncated", "fan_in")


def initializer(kind: str, std: float, fan_in: int, scale: float = 1.0) -> Callable:
    """Initialiser of a weight matrix.

    normal: N(0, std^2) (GPT-2); truncated: the same cut at two sigma (BERT); fan_in: std is
    1 / sqrt(fan_in) instead (LeCun), cut at two sigma. `scale` multiplies the result.
    """
    std = scale * (fan_in**-0.5 if kind == "fan_in" else std)
    if kind == "normal":
        return nn.initializers.normal(std)
    # 0.8796 is the standard deviation of a unit normal cut at +-2.
    return nn.initializers.truncated_normal(std / (0.87962566 if kind == "fan_in" else 1.0))


class NormParameters(nn.Module):
    """Parameters `scale` and, if `use_bias`, `bias` (else None) of a norm over `size` features.

    offset: what the caller adds to the scale, so that it starts at 1 - offset.
    """

    use_bias: bool
    param_dtype: jnp.dtype = jnp.float32
    axis: str = "norm"
    offset: float = 0.0

    @nn.compact
    def __call__(self, size: int) -> tuple[jax.Array, jax.Array | None]:
        ones, zeros = nn.initializers.constant(1.0 - self.offset), nn.initializers.zeros
        box = nn.with_partitioning
        scale = self.param("scale", box(ones, (self.axis,)), (size,), self.param_dtype)
        if not self.use_bias:
            return scale, None
        return scale, self.param("bias", box(zeros, (self.axis,)), (size,), self.param_dtype)
