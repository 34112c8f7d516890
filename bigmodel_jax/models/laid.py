"""Weights laid out once for decoding, where a step reads every weight for a few rows.

XLA:CPU multiplies a few rows with a matrix at half the speed of memory: one row on one core, more rows
after packing the whole matrix, and a layer's weights are first copied out of the stack. In tiles of
`COLUMNS` columns, each [contracted, COLUMNS] in one piece, the product is a sum over rows of the tile that
stays in the cache for every row of x, vectorised over columns and shared between cores over tiles.
On two cores, milliseconds of CPU per 226 MB of weights (stacked and plain, own arrays and plain, tiles):
1 row 37, 17, 17; 8 rows 42, 36, 27; 16 rows -, 37, 34.
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

COLUMNS = 32
# Rows up to which a step goes through tiles: beyond, packing costs less than passing over a tile again.
MOST_ROWS = 32
# path in a block -> dimensions that a product contracts
MATRICES = ((r"^(attn|cross)/(q|k|v)$", 3, 1), (r"^(attn|cross)/out$", 3, 2), (r"^mlp/(in|gate|up|out)$", 2, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiled:
    """A weight [contracted..., out...] as tiles [tiles, contracted, COLUMNS]; calling it multiplies."""

    tiles: jax.Array
    one: jax.Array  # 1.0, see __call__
    contracted: int = dataclasses.field(metadata={"static": True})
    out: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, x: jax.Array, wide: bool = False) -> jax.Array:
        """x [..., contracted...] times the weight: [..., out...]; in at least float32 if `wide`."""
        lead = x.shape[: x.ndim - self.contracted]
        rows = math.prod(lead)
        high = jnp.promote_types(x.dtype, jnp.float32)
        # XLA:CPU would fuse what makes x (a norm, an activation) into the product with every tile and write
        # that out, at three times the cost. A division it takes for too expensive to repeat; an
        # optimization_barrier is gone before fusion.
        flat = x.reshape(rows, -1).astype(high) / self.one.astype(high)
        tiles = self.tiles.astype(high)
        if rows == 1:
            y = jnp.sum(flat[0][None, :, None] * tiles, axis=1)
        else:
            y = jnp.swapaxes(jnp.sum(flat[None, :, :, None] * tiles[:, None], axis=2), 0, 1)
        y = y.reshape(rows, -1)[:, : math.prod(self.out)].reshape(*lead, *self.out)
        return y if wide else y.astype(x.dtype)


def tiled(w: jax.Array, contracted: int, dtype: Any = None) -> Tiled:
    """`w` in tiles; its first `contracted` dimensions are those a product sums over."""
    inner = math.prod(w.shape[:contracted])
    flat = w.reshape(inner, -1).astype(dtype or w.dtype)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % COLUMNS)))
    return Tiled(jnp.swapaxes(flat.reshape(inner, -1, COLUMNS), 0, 1), jnp.ones((), flat.dtype), contracted, w.shape[contracted:])


def _at(tree_: Any, path: str) -> Any:
    """The subtree at `path`, or None."""
    for part in path.split("/"):
        tree_ = tree_.get(part) if tree_ is not None else None
    return tree_


def _tiles_of(variables: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Variables of one block, its matrices in tiles in a collection of their own."""
    params, laid = tree.flatten(variables["params"]), {}
    for path in list(params):
        for pattern, dims, contracted in MATRICES:
            if re.search(pattern, path) and params[path].ndim == dims:
                laid[path] = tiled(params.pop(path), contracted, dtype)
    return variables | {"params": tree.unflatten(params), "laid": tree.unflatten(laid)}


def blocks(variables: dict[str, Any], layers: int, path: str = "layers") -> tuple[dict[str, Any], ...]:
    """Variables of each layer, from leaves stacked [N, ...] at `path`; a path that ends in "layer" is one for all."""
    own = {name: _at(collection, path) for name, collection in variables.items()}
    own = {name: collection for name, collection in own.items() if collection}
    if path.endswith("layer"):
        return (own,) * layers
    return tuple(jax.tree.map(lambda x, n=n: x[n], own) for n in range(layers))


def lay_out(model: Model, variables: dict[str, Any]) -> dict[str, Any]:
    """Variables for one token per row and call: each layer's own, its matrices and the output's in tiles.

    Jit-able. The originals are not needed beside them, but for prompts.
    """
    spec = model.module.spec
    dtype = jnp.dtype(spec.dtype)
    each = blocks(variables, len(model.windows), model.blocks)
    made = [_tiles_of(own, dtype) for own in (each[:1] if model.blocks.endswith("layer") else each)]
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
        "laid": {"head": {"kernel": tiled(kernel, 1, dtype)}},
        "blocks": tuple(made[n % len(made)] for n in range(len(model.windows))),
    }
