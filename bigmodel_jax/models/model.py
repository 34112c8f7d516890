"""What the rest of the package knows of a model: values and pure functions.

`Model` wraps a Linen module. Parameters leave it as plain nested dicts of arrays; the boxes that
carry Linen's partition metadata are opened in `abstract` and `init` and nowhere else, so that
optimizers, checkpoints and layouts only ever see names and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.mup import STANDARD, Ratio


class Output(NamedTuple):
    """Result of a forward pass.

    hidden: last hidden states [B, L, D] of a Transformer, or pooled features [B, D] of a ResNet.
    head: a pytree; calling it maps hidden [..., D] to logits [..., V] in at least float32. Being a
      function of the hidden states it can be applied to a chunk of tokens, or to masked ones only.
    cache: the key-value cache after this call, where one was given.
    updates: batch statistics of this microbatch, the same tree as `stats`; {} where there are none.
    extra: what else a model gives by name, for example sums of a router's losses; {} for most.
    """

    hidden: jax.Array
    head: Any
    cache: Any = None
    updates: Any = {}
    extra: Any = {}


def keep(stats: Any, updates: Any) -> Any:
    """`merge` of a model without batch statistics."""
    del updates
    return stats


def encoding(module: nn.Module) -> Callable[..., Any]:
    """`encode` of a model whose module has a method of that name: (variables, train, rngs, **inputs) -> memory."""

    def encode(variables: dict[str, Any], *, train: bool = False, rngs: Any = None, **inputs: Any) -> Any:
        given = {name: value for name, value in variables.items() if value}
        keys = (rngs or {}).get("dropout")
        return module.apply(given, train=train, dropout_keys=keys, method="encode", **inputs)

    return encode


def _boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _collections(boxed: Any) -> dict[str, Any]:
    return {"params": boxed.get("params", {}), "stats": boxed.get("stats", {})}


@dataclass(frozen=True)
class Model:
    """A module with everything a trainer needs of it.

    The module is called with keywords: train (bool), dropout_keys (typed keys [B] or None), cache
    (or None) and the inputs by name. It returns an `Output`. A module with running statistics
    keeps them in the collection "stats" and reports those of the batch with
    `self.put_variable("updates", name, value)` under the same names.

    example: example(batch) gives zero inputs of minimal size, enough to initialise with.
    cache: cache(batch, length, dtype) gives an empty key-value cache, or None.
    encode: encode(variables, train=, rngs=, **inputs) gives the memory that `apply` decodes from;
      None for models that are not an encoder and a decoder.
    blocks: path of the decoder's stacked layers, e.g. "layers", for models whose cache can be opened
      (cache.py); "" for others.
    windows: per decoder layer, tokens that one sees at most, 0 for all; () when all see all.
    merge: merge(stats, updates) gives the running statistics after an optimizer step.
    ratio: width and depth over those of a base model, for the optimizer (mup.py).
    flops: forward matmul FLOPs, per token at a length (Transformer) or per image.
    """

    module: nn.Module
    example: Callable[[int], dict[str, np.ndarray]]
    flops: Callable[..., float]
    cache: Callable[..., Any] | None = None
    encode: Callable[..., jax.Array] | None = None
    blocks: str = ""
    windows: tuple[int, ...] = ()
    merge: Callable[[Any, Any], Any] = keep
    ratio: Ratio = STANDARD

    def _init(self, key: jax.Array) -> Any:
        inputs = {name: jnp.asarray(value) for name, value in self.example(1).items()}
        return self.module.init({"params": key}, train=False, **inputs)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """{"params": ..., "stats": ...}: plain nested dicts of arrays. Jit-able."""
        return _collections(nn.meta.unbox(self._init(key)))

    def abstract(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(variables as ShapeDtypeStruct, the same tree with a tuple of logical axes per leaf).

        A leaf declared without axes gets None for every dimension: never sharded.
        """
        boxed = _collections(jax.eval_shape(self._init, jax.random.key(0)))
        shapes = nn.meta.unbox(boxed)

        def axes(leaf: Any) -> tuple[str | None, ...]:
            return tuple(leaf.names) if _boxed(leaf) else (None,) * leaf.ndim

        return shapes, jax.tree.map(axes, boxed, is_leaf=_boxed)

    def whole(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters under the names and shapes that `apply` of the plain model takes: what is exported."""
        return variables["params"]

    def apply(
        self,
        variables: dict[str, Any],
        *,
        train: bool,
        rngs: dict[str, jax.Array] | None = None,
        cache: Any = None,
        **inputs: Any,
    ) -> Output:
        """Forward pass. rngs["dropout"] is one typed key per row, [B]; None means no dropout.

        `variables` may be `laid.lay_out`'s, when the cache is open.
        """
        dropout_keys = (rngs or {}).get("dropout")
        if cache is not None:
            inputs["cache"] = cache
        if "blocks" in variables:
            variables = dict(variables)
            inputs["blocks"] = variables.pop("blocks")
        output, extra = self.module.apply(
            {name: value for name, value in variables.items() if value},
            train=train,
            dropout_keys=dropout_keys,
            mutable=["updates"],
            **inputs,
        )
        return output._replace(updates=extra.get("updates", {}))
