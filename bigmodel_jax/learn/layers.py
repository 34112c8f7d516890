"""Learning rates by depth, and a prefix of layers that stays as it is, on stacks of layers.

Layer-wise decay (Clark et al. 2020, ELECTRA, appendix B): what reads the top layer trains at the full rate, layer n
of N (from 0) at decay^(N - n), the embeddings below at decay^(N + 1). A frozen prefix is the embeddings and the first
layers. Layers are one array with a leading axis, so both are vectors along it, and a partly frozen array keeps its
slots and its share of the backward pass: freezing here is for what is learned, not for speed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import tree as trees
from bigmodel_jax.errors import InputError

BELOW = re.compile(r"(^|/)(embed|stem|patches|class_token|positions|relative)(/|$)")
"""Paths of what lies below every layer; relative: a table of biases that all of them share."""


def _stacks(params: Any, axes: Any) -> dict[str, int]:
    """{path: layers} of the parameters that are stacks of layers."""
    flat = trees.flatten(params)
    named = trees.flatten(axes, is_leaf=lambda a: isinstance(a, tuple)) if axes else {}
    return {path: leaf.shape[0] for path, leaf in flat.items() if (named.get(path) or (None,))[0] == "layers"}


def _stack_of(path: str) -> str:
    """What a path has before its stack: an encoder and a decoder are two."""
    return path.split("layers/")[0]


def frozen_rows(params: Any, axes: Any, freeze_layers: int) -> dict[str, int]:
    """{path: leading rows that stay as they are}; what lies below the layers is frozen over its whole length.

    Args:
      params: tree of arrays or ShapeDtypeStruct. axes: same tree with logical axis names.

    Raises:
      InputError: there are no stacked layers, or fewer than `freeze_layers`.
    """
    if not freeze_layers:
        return {}
    stacks = _stacks(params, axes)
    deepest = max(stacks.values(), default=0)
    if not 0 <= freeze_layers <= deepest:
        raise InputError(
            f"optimizer.freeze_layers {freeze_layers} must lie in 0..{deepest}, the model's stacked layers; "
            "freeze other parameters with a group: (regex, {'freeze': True})"
        )
    out = {path: min(freeze_layers, count) for path, count in stacks.items()}
    below = {path: leaf for path, leaf in trees.flatten(params).items() if BELOW.search(path) and path not in stacks}
    return out | {path: max(leaf.shape, default=1) for path, leaf in below.items()}


def multipliers(params: Any, axes: Any, layer_decay: float, freeze_layers: int) -> dict[str, Any]:
    """{path: factor of the learning rate}, a float or an array that broadcasts along the layers.

    Raises:
      InputError: a decay outside (0, 1], or one without stacked layers.
    """
    if not 0 < layer_decay <= 1:
        raise InputError(f"optimizer.layer_decay {layer_decay} must lie in (0, 1]")
    stacks = _stacks(params, axes)
    if layer_decay != 1 and not stacks:
        raise InputError("optimizer.layer_decay needs a model of stacked layers; use groups with an lr factor")
    rows = frozen_rows(params, axes, freeze_layers)
    out: dict[str, Any] = {}
    deepest = max(stacks.values(), default=0)
    for path, leaf in trees.flatten(params).items():
        if path in stacks:
            count = stacks[path]
            factor = layer_decay ** (count - np.arange(count, dtype=np.float64))
            factor[: rows.get(path, 0)] = 0.0
            if layer_decay != 1 or path in rows:
                out[path] = factor.astype(np.float32).reshape(-1, *[1] * (len(leaf.shape) - 1))
        elif layer_decay != 1 and BELOW.search(path):
            own = [n for other, n in stacks.items() if _stack_of(other) == path[: BELOW.search(path).start()]]
            out[path] = float(layer_decay ** (max(own, default=deepest) + 1))
    return out


def keep_rows(flat: dict[str, jax.Array], rows: Mapping[str, int]) -> dict[str, jax.Array]:
    """Parameters through whose first `rows` no gradient flows."""
    out = dict(flat)
    for path, count in rows.items():
        if path in out:
            leaf = out[path]
            free = (np.arange(leaf.shape[0]) >= count).reshape(-1, *[1] * (leaf.ndim - 1))
            out[path] = jnp.where(free, leaf, jax.lax.stop_gradient(leaf))
    return out
