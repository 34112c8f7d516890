"""LoRA (Hu et al. 2021): any model with low-rank updates of some weights; everything else does not move.

    W = W0 + (alpha / rank) * A B        A [.., in, r] normal with deviation 1 / sqrt(in), B [.., r, out] zero

W0 and every weight without an update are `variables["frozen"]`: no gradient, no optimizer slots. A and B are parameters
named "lora/<path of W>/a" and "/b", with the logical axes of the side that they share with W, so that the layout's
rules place them. The forward pass runs the plain model on W, which is why any model can be adapted: a step costs
the FLOPs of full fine-tuning, and saves the memory of the slots and of the average. A checkpoint holds base
and factors, so that it needs no other file.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.mup import sides

PREFIX = "lora/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted(Model):
    """A model with updates of rank `rank` at `targets` ((path, (stack, contracted) dimensions), ...); see `lora`."""

    base: Model
    rank: int
    scale: float
    targets: tuple[tuple[str, tuple[int, int]], ...]
    trained: frozenset[str]

    def init(self, key: jax.Array) -> dict[str, Any]:
        """{"params": factors and the weights trained whole, "frozen": all others, "stats"}."""
        variables = self.base.init(key)
        flat = tree.flatten(variables["params"])
        factors = {}
        for path, (stack, inner) in self.targets:
            shape = flat[path].shape
            a, b = (*shape[: stack + inner], self.rank), (*shape[:stack], self.rank, *shape[stack + inner :])
            own = jax.random.fold_in(jax.random.fold_in(key, 0x10A), zlib.crc32(path.encode()) & 0x7FFFFFFF)
            inputs = math.prod(a[stack:-1])
            dtype = flat[path].dtype
            factors[f"{PREFIX}{path}/a"] = (jax.random.normal(own, a) / math.sqrt(inputs)).astype(dtype)
            factors[f"{PREFIX}{path}/b"] = jnp.zeros(b, dtype)
        return {**variables, **self._divided(flat, factors)}

    def abstract(self) -> tuple[dict[str, Any], dict[str, Any]]:
        shapes, axes = self.base.abstract()
        named = tree.flatten(axes["params"], is_leaf=lambda leaf: isinstance(leaf, tuple))
        factors = {}
        for path, (stack, inner) in self.targets:
            factors[f"{PREFIX}{path}/a"] = (*named[path][: stack + inner], None)
            factors[f"{PREFIX}{path}/b"] = (*named[path][:stack], None, *named[path][stack + inner :])
        return jax.eval_shape(self.init, jax.random.key(0)), {**axes, **self._divided(named, factors)}

    def _divided(self, flat: Mapping[str, Any], factors: Mapping[str, Any]) -> dict[str, Any]:
        params = {path: leaf for path, leaf in flat.items() if path in self.trained} | dict(factors)
        frozen = {path: leaf for path, leaf in flat.items() if path not in self.trained}
        return {"params": tree.unflatten(params), "frozen": tree.unflatten(frozen)}

    def whole(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of the plain model: base + scale * A B, summed in at least float32."""
        params, flat = tree.flatten(variables["params"]), tree.flatten(variables["frozen"])
        for path, _ in self.targets:
            flat[path] = add(flat[path], params[f"{PREFIX}{path}/a"], params[f"{PREFIX}{path}/b"], self.scale)
        return tree.unflatten(flat | {path: leaf for path, leaf in params.items() if path in self.trained})

    def apply(self, variables: dict[str, Any], **inputs: Any) -> Output:
        """Forward pass; variables without "frozen" are those of the plain model already (see `whole`)."""
        return self.base.apply(self.plain(variables), **inputs)

    def plain(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of the plain model."""
        if "frozen" not in variables:
            return dict(variables)
        return {"params": self.whole(variables), "stats": variables.get("stats", {})}


def add(base: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """base [stack, in, out] + scale * a [stack, in, r] b [stack, r, out], in the base's dtype; each may be several
    dimensions, which follow from how many there are."""
    stack = a.ndim + b.ndim - 2 - base.ndim
    s, i, o = "stuv"[:stack], "ijkl"[: a.ndim - 1 - stack], "opqw"[: b.ndim - 1 - stack]
    high = jnp.promote_types(base.dtype, jnp.float32)
    delta = jnp.einsum(f"{s}{i}r,{s}r{o}->{s}{i}{o}", a.astype(high), b.astype(high))
    return (base.astype(high) + scale * delta).astype(base.dtype)


def lora(model: Model, rank: int, alpha: float, targets: Sequence[str], train: Sequence[str]) -> Model:
    """`model` with low-rank updates.

    Args:
      rank: of the update, r. alpha: it is scaled by alpha / rank.
      targets: regexes of weights to update. train: regexes of parameters trained whole beside them (a new head).

    Raises:
      InputError: a regex that finds nothing, a target that is no matrix, or a rank above what a target can have.
    """
    shapes, axes = model.abstract()
    shape_of = {path: leaf.shape for path, leaf in tree.flatten(shapes["params"]).items()}
    named = tree.flatten(axes["params"], is_leaf=lambda leaf: isinstance(leaf, tuple))
    trained = frozenset(_matching(train, shape_of, "train"))
    found: dict[str, tuple[int, int]] = {}
    for path in _matching(targets, shape_of, "targets"):
        split = sides(named[path])
        if path in trained or path.endswith("bias"):
            continue
        if split is None:
            raise InputError(f"lora.targets: '{path}' with axes {named[path]} is not a matrix")
        stack, inner = split
        shape = shape_of[path]
        most = min(math.prod(shape[stack : stack + inner]), math.prod(shape[stack + inner :]))
        if not 0 < rank <= most:
            raise InputError(f"lora.rank {rank} must lie in 1..{most} for '{path}'")
        found[path] = split
    if not found:
        raise InputError("lora.targets leave nothing to update")
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(Model)}
    adapted = Adapted(
        **fields, base=model, rank=rank, scale=alpha / rank, targets=tuple(sorted(found.items())), trained=trained
    )
    if model.encode is None:
        return adapted
    encode = model.encode
    return dataclasses.replace(adapted, encode=lambda variables, **more: encode(adapted.plain(variables), **more))


def _matching(patterns: Sequence[str], paths: Mapping[str, Any], what: str) -> list[str]:
    out: list[str] = []
    for pattern in patterns:
        try:
            hits = [path for path in paths if re.search(pattern, path)]
        except re.error as error:
            raise InputError(f"lora.{what}: {pattern!r} is not a regex: {error}") from error
        if not hits:
            some = ", ".join(sorted(paths)[:12])
            raise InputError(f"lora.{what}: no parameter matches {pattern!r}; there are {some}")
        out += [path for path in hits if path not in out]
    return out
