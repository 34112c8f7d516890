"""Variants of a config as plain dicts: named overrides by leaf, and every combination of a grid."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from bigmodel_jax import schema
from bigmodel_jax.errors import InputError


def overridden(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a raw config with {"section.leaf": value} set, in order; a section given as a dict replaces it."""
    out = _copy(base)
    for leaf, value in overrides.items():
        schema.override(out, leaf, _copy(value))
    return out


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def grid(axes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """{"lr=0.1,decay=0.01": {"optimizer.lr": 0.1, ...}} of every combination, first axis slowest.

    Raises:
      InputError: an axis without values, or with one twice.
    """
    for leaf, values in axes.items():
        if not isinstance(values, (tuple, list)) or not values:
            raise InputError(f"grid: '{leaf}' needs a list of values, not {values!r}")
        if len({repr(value) for value in values}) < len(values):
            raise InputError(f"grid: '{leaf}' has a value twice in {tuple(values)!r}")
    short = [leaf.rpartition(".")[2] for leaf in axes]
    names = short if len(set(short)) == len(short) else list(axes)
    out = {}
    for point in itertools.product(*axes.values()):
        name = ",".join(f"{name}={value}" for name, value in zip(names, point, strict=True))
        out[name] = dict(zip(axes, point, strict=True))
    return out


def expand(named: Any, axes: Any) -> dict[str, dict[str, Any]]:
    """The variants of a study: those named, every point of its grid, or each of the named ones at every point.

    Raises:
      InputError: not {name: {leaf: value}} or {leaf: values}.
    """
    if not isinstance(named, Mapping) or not isinstance(axes, Mapping):
        raise InputError("study: 'variants' is {name: {leaf: value}}, and 'grid' is {leaf: values}")
    for name, overrides in named.items():
        if not isinstance(overrides, Mapping):
            raise InputError(f"study variant '{name}' should be {{leaf: value}}, not {overrides!r}")
    if not axes:
        return {name: dict(overrides) for name, overrides in named.items()}
    points = grid(axes)
    if not named:
        return points
    return {f"{n},{p}": {**over, **point} for n, over in named.items() for p, point in points.items()}
