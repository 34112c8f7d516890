"""Weights laid out once for generation, where a step reads every weight for a few rows.

Each layer gets its own arrays, for out of a stack XLA:CPU first copies them, and its matrices are transposed,
which XLA:CPU multiplies with one row at the speed of memory. CPU milliseconds for 226 MB of weights, 1 and 8
rows: from a stack 37 and 42, own arrays 17 and 40, transposed 15 and 30. Tried and dropped: tiles of 32
columns summed over in XLA's own loops, 17 and 27, but on one core only.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from bigmodel_jax import tree

if TYPE_CHECKING:
    from bigmodel_jax.models.model import Model

# path in a block -> dimensions, and how many of them a product contracts
MATRICES = ((r"^(attn|cross)/(q|k|v)$", 3, 1), (r"^(attn|cross)/out$", 3, 2), (r"^mlp/(in|gate|up|out)$", 2, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Laid:
    """A weight [contracted..., out...] as its transpose [out, contracted]; calling it multiplies."""

    array: jax.Array
    contracted: int = dataclasses.field(metadata={"static": True})
    out: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, x: jax.Array, wide: bool = False) -> jax.Array:
        """x [..., contracted...] times the weight: [..., out...]; in at least float32 if `wide`."""
        lead = x.shape[: x.ndim - self.contracted]
        kind = jnp.promote_types(x.dtype, jnp.float32) if wide else x.dtype
        flat = x.reshape(math.prod(lead), -1)
        y = jnp.einsum("zk,nk->zn", flat, self.array, preferred_element_type=kind)
        return y.reshape(*lead, *self.out)


def laid(w: jax.Array, contracted: int, dtype: Any = None) -> Laid:
    """`w` laid out; its first `contracted` dimensions are those a product sums over."""
    flat = w.reshape(math.prod(w.shape[:contracted]), -1).astype(dtype or w.dtype)
    return Laid(flat.T, contracted, w.shape[contracted:])


def _at(tree_: Any, path: str) -> Any:
    """The subtree at `path`, or None."""
    for part in path.split("/"):
        tree_ = tree_.get(part) if tree_ is not None else None
    return tree_


def _matrices(variables: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Variables of one block, its matrices laid out in a collection of their own."""
    params, found = tree.flatten(variables["params"]), {}
    for path in list(params):
        for pattern, dims, contracted in MATRICES:
            if re.search(pattern, path) and params[path].ndim == dims:
                found[path] = laid(params.pop(path), contracted, dtype)
    return variables | {"params": tree.unflatten(params), "laid": tree.unflatten(found)}


def blocks(variables: dict[str, Any], layers: int, path: str = "layers") -> tuple[dict[str, Any], ...]:
    """Variables of each layer, from leaves stacked [N, ...] at `path`; a path that ends in "layer" is one for all."""
    own = {name: _at(collection, path) for name, collection in variables.items()}
    own = {name: collection for name, collection in own.items() if collection}
    if path.endswith("layer"):
        return (own,) * layers
    return tuple(jax.tree.map(lambda x, n=n: x[n], own) for n in range(layers))


def lay_out(model: Model, variables: dict[str, Any]) -> dict[str, Any]:
    """Variables for prompts and steps of a decoder: each layer's own, its matrices and the output's laid out."""
    spec = model.module.spec
    dtype = jnp.dtype(spec.dtype)
    each = blocks(variables, len(model.windows), model.blocks)
    made = [_matrices(own, dtype) for own in (each[:1] if model.blocks.endswith("layer") else each)]
    params = variables["params"]
    kernel = _at(params, "head/kernel")
    if spec.tied_embeddings:
        side = model.blocks.rpartition("/")[0]
        table = _at(params, "embed/tokens")
        kernel = (table if table is not None else _at(params, f"{side}/embed/tokens")).T
    flat = {p: leaf for p, leaf in tree.flatten(params).items() if not p.startswith((f"{model.blocks}/", "encoder/"))}
    rest = {name: leaf for name, leaf in variables.items() if name not in ("params", "stats")}
    return rest | {
        "params": tree.unflatten(flat),
        "laid": {"head": {"kernel": laid(kernel, 1, dtype)}},
        "blocks": tuple(made[n % len(made)] for n in range(len(model.windows))),
    }
