"""Linear models and multilayer perceptrons on rows of numbers, or on flattened images.

`linear` with the objective "regression" is least squares, with "classification" it is multinomial logistic
regression; an l2 decay of the optimizer makes them ridge and regularised logistic regression, whose closed
forms and scikit-learn solutions the tests hold it to.

Legend: B batch, F features, D features of the last hidden layer, V outputs.
Parameter paths: layer0/kernel, layer0/bias, ..., head/kernel, head/bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.models.spec import DTYPES
from bigmodel_jax.parallel.rules import constrain

# Features of a row stay together: left to itself, XLA's partitioner (jax 0.10.2 on CPU) cuts them over "tensor", and
# with the batch cut over two axes as well the gradients are wrong (as in parallel/rules.py); tests/invariants found it.
WHOLE = ("batch", "embed_act")

# Pointwise functions; the gated ones of layers.ACTIVATIONS need two matrices.
ACTIVATIONS = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "identity": lambda x: x} | {
    name: fn for name, (fn, gated) in ops.ACTIVATIONS.items() if not gated
}


@dataclass(frozen=True)
class Plan:
    """Options of `mlp`, checked; documented there."""

    num_features: int
    num_classes: int
    hidden: tuple[int, ...]
    activation: str
    bias: bool
    zero_init: bool
    dropout: float
    dtype: str
    param_dtype: str

    def __post_init__(self) -> None:
        ops.one_of("activation", self.activation, tuple(ACTIVATIONS))
        for option in ("dtype", "param_dtype"):
            ops.one_of(option, getattr(self, option), DTYPES)
        for option in ("num_features", "num_classes"):
            if getattr(self, option) < 1:
                raise InputError(f"{option}={getattr(self, option)} must be at least 1")
        if any(not isinstance(size, int) or size < 1 for size in self.hidden):
            raise InputError(f"hidden={self.hidden} should list sizes of layers, each at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout={self.dropout} must be in [0, 1)")


class Affine(nn.Module):
    """Declares kernel [F, V] and bias [V]; gives them by name, in the compute dtype.

    gain: of the variance 1 / F of a first kernel: 2 before a ReLU (He et al. 2015, arXiv:1502.01852, eq. 10); 0
    starts at zero.
    """

    features: int
    axis: str
    gain: float = 1.0
    bias: bool = True
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    @nn.compact
    def __call__(self, inputs: int) -> dict[str, jax.Array]:
        box, dtype, zeros = nn.with_partitioning, jnp.dtype(self.param_dtype), nn.initializers.zeros
        init = ops.initializer("fan_in", 0.0, inputs, math.sqrt(self.gain)) if self.gain else zeros
        shape = (inputs, self.features)
        arrays = {"kernel": self.param("kernel", box(init, ("embed", self.axis)), shape, dtype)}
        if self.bias:
            arrays["bias"] = self.param("bias", box(zeros, (self.axis,)), shape[1:], dtype)
        return {name: value.astype(self.dtype) for name, value in arrays.items()}


def affine(arrays: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
    """hidden [..., D] times kernel [D, V], plus bias [V] where there is one, in at least float32."""
    y = ops.wide_einsum("...d,dv->...v", hidden.astype(arrays["kernel"].dtype), arrays["kernel"])
    return y + arrays["bias"].astype(y.dtype) if "bias" in arrays else y


class MLP(nn.Module):
    """features [B, F], or image [B, H, W, C] with F = H W C -> Output(hidden [B, D], head). See `mlp`."""

    plan: Plan

    @nn.compact
    def __call__(
        self,
        *,
        train: bool,
        features: jax.Array | None = None,
        image: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> Output:
        plan = self.plan
        x = flat(features, image, plan.num_features).astype(plan.dtype)
        keys = dropout_keys if train else None
        gain = 2.0 if plan.activation == "relu" else 1.0
        for n, size in enumerate(plan.hidden):
            w = Affine(size, "mlp", gain, dtype=plan.dtype, param_dtype=plan.param_dtype, name=f"layer{n}")(x.shape[-1])
            x = ACTIVATIONS[plan.activation](x @ w["kernel"] + w["bias"])
            x = ops.dropout(constrain(x, WHOLE), ops.fold(keys, n), plan.dropout)
        last = 0.0 if plan.zero_init else 1.0
        head = Affine(plan.num_classes, "classes", last, plan.bias, plan.dtype, plan.param_dtype, name="head")
        return Output(x, jax.tree_util.Partial(affine, head(x.shape[-1])))


def flat(features: jax.Array | None, image: jax.Array | None, size: int) -> jax.Array:
    """[B, F] of one of the two inputs, checked."""
    if (features is None) == (image is None):
        raise InputError("the model takes either features or images")
    x = features if image is None else image.reshape(image.shape[0], -1)
    if x.ndim != 2 or x.shape[1] != size:
        raise InputError(f"a row has shape {x.shape[1:]}, the model takes {size} numbers")
    return x


def forward_flops(plan: Plan) -> float:
    """Two per weight of every matrix, for one row."""
    sizes = (plan.num_features, *plan.hidden, plan.num_classes)
    return 2.0 * sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))


def mlp(
    *,
    num_features: int,
    num_classes: int,
    hidden: tuple[int, ...] = (128, 128),
    activation: str = "relu",
    bias: bool = True,
    zero_init: bool = False,
    dropout: float = 0.0,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """A multilayer perceptron.

    Args:
      num_features: numbers per row; of an image, height times width times channels.
      num_classes: outputs: classes, or numbers to predict in a regression.
      hidden: sizes of the hidden layers, () for none.
      activation: relu, tanh, sigmoid, gelu, gelu_exact, identity.
      bias: of the output layer.
      zero_init: the output layer starts at zero.
      dropout: after each hidden layer.

    Inputs of apply: features [B, F] or image [B, H, W, C].

    Raises:
      InputError: options that do not fit together.
    """
    hidden = tuple(hidden)
    plan = Plan(num_features, num_classes, hidden, activation, bias, zero_init, dropout, dtype, param_dtype)

    def example(batch: int) -> dict[str, np.ndarray]:
        return {"features": np.zeros((batch, num_features), np.float32)}

    return Model(module=MLP(plan), example=example, flops=lambda *size: forward_flops(plan))


def linear(
    *,
    num_features: int,
    num_classes: int,
    bias: bool = True,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """Linear or (multinomial) logistic regression: the objective decides. Starts at zero.

    Args are those of `mlp`.
    """
    return mlp(
        num_features=num_features, num_classes=num_classes, hidden=(), bias=bias, zero_init=True, dtype=dtype,
        param_dtype=param_dtype,
    )  # fmt: skip
