"""Leaf names: every table in this package (layouts, optimizer groups, checkpoints) is keyed by them.

A leaf is named by its path, "layers/attn/q". Dict keys, attribute names of named tuples and
positions in sequences all become path parts, so an optimizer state has names too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from bigmodel_jax.errors import InputError

_NO_DEFAULT = object()


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def name(path: Sequence[Any]) -> str:
    """Join a jax key path into "a/b/c"."""
    return "/".join(_part(key) for key in path)


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return {path: leaf} in traversal order, for any pytree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {name(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from {path: leaf}. Inverse of `flatten` for trees of dicts."""
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return root


def map_paths(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Map fn(path, leaf, *rest_leaves) over a pytree."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(name(path), *leaves), tree, *rest, is_leaf=is_leaf)


def first_match(rules: Sequence[tuple[str, Any]], path: str, default: Any = _NO_DEFAULT) -> Any:
    """Value of the first rule whose regex is found in `path` (re.search).

    Raises:
      InputError: no rule matches and no default is given.
    """
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    if default is _NO_DEFAULT:
        raise InputError(f"no rule matches parameter '{path}'; add one, or end with ('.*', ...)")
    return default


def assign(rules: Sequence[tuple[str, Any]], tree: Any, what: str = "rules") -> Any:
    """Tree of the rule values, first match wins.

    Raises:
      InputError: leaves without a rule, all of them listed.
    """
    missing = [p for p in flatten(tree) if first_match(rules, p, None) is None]
    if missing:
        raise InputError(f"{what} cover no rule for: {', '.join(missing)}")
    return map_paths(lambda path, _: first_match(rules, path), tree)


def count(tree: Any) -> int:
    """Number of scalars in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree_util.tree_leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, from shape and dtype (works on abstract leaves)."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(tree))
