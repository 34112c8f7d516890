"""One row per weight, read in both directions: foreign names to ours, and back.

A `Row` says which foreign tensors are which of our parameters and how their layouts differ; a `Layout` is a
pair of numpy functions, each bitwise the inverse of the other. "{n}" in a foreign name is the layer: ours are
stacked on axis 0. Nothing is left over silently: names without a partner on either side, and shapes that do
not fit, are one error that lists them, before any data is read.

Letters: D model, H heads, K head dim, F ffn, V vocab, N layers. Foreign linear layers are [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigmodel_jax.errors import InputError

Arrays = tuple[np.ndarray, ...]


class Layout(NamedTuple):
    """to_ours(*foreign) -> ours and to_foreign(*ours) -> foreign, tuples of arrays of one layer."""

    to_ours: Callable[..., Arrays]
    to_foreign: Callable[..., Arrays]


def _one(there: Callable[[np.ndarray], np.ndarray], back: Callable[[np.ndarray], np.ndarray]) -> Layout:
    return Layout(lambda x: (there(x),), lambda x: (back(x),))


same = _one(lambda x: x, lambda x: x)
transpose = _one(lambda x: x.T, lambda x: x.T)  # [out, in] <-> [in, out]


def _merged(x: np.ndarray, axis: int) -> np.ndarray:
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _cut(x: np.ndarray, axis: int, heads: int) -> np.ndarray:
    if x.shape[axis] % heads:
        raise ValueError(f"axis {axis} of {x.shape} is not a multiple of {heads} heads")
    return x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])


def heads_in(heads: int) -> Layout:
    """q, k or v: [H K, D] <-> [D, H, K]."""
    return _one(lambda x: _cut(x.T, 1, heads), lambda x: _merged(x, 1).T)


def heads_out(heads: int) -> Layout:
    """Output projection: [D, H K] <-> [H, K, D]."""
    return _one(lambda x: _cut(x.T, 0, heads), lambda x: _merged(x, 0).T)


def heads_bias(heads: int) -> Layout:
    """Bias of q, k or v: [H K] <-> [H, K]."""
    return _one(lambda x: _cut(x, 0, heads), lambda x: _merged(x, 0))


def then(first: Layout, each: Layout) -> Layout:
    """`first` from foreign to ours, then `each` on every array that comes of it."""

    def to_ours(*foreign: np.ndarray) -> Arrays:
        return tuple(out for x in first.to_ours(*foreign) for out in each.to_ours(x))

    def to_foreign(*ours: np.ndarray) -> Arrays:
        return first.to_foreign(*(out for x in ours for out in each.to_foreign(x)))

    return Layout(to_ours, to_foreign)


def split(parts: int, axis: int = 0) -> Layout:
    """One foreign tensor that holds `parts` equal ones behind each other on `axis`."""
    return Layout(
        lambda x: tuple(np.split(x, parts, axis)),
        lambda *xs: (np.concatenate(xs, axis),),
    )


def split_heads(heads: int, parts: int = 3) -> Layout:
    """One foreign tensor [H parts K, ...] in which every head has its q, k and v side by side (NeoX, BLOOM)."""

    def to_ours(x: np.ndarray) -> Arrays:
        y = x.reshape(heads, parts, -1, *x.shape[1:])
        return tuple(y[:, i].reshape(-1, *x.shape[1:]) for i in range(parts))

    def to_foreign(*xs: np.ndarray) -> Arrays:
        y = np.stack([x.reshape(heads, -1, *x.shape[1:]) for x in xs], axis=1)
        return (y.reshape(-1, *xs[0].shape[1:]),)

    return Layout(to_ours, to_foreign)


def stack(each: Layout) -> Layout:
    """Several foreign tensors (experts) in one of ours, on a new axis 0."""

    def to_ours(*xs: np.ndarray) -> Arrays:
        return (np.stack([each.to_ours(x)[0] for x in xs]),)

    def to_foreign(x: np.ndarray) -> Arrays:
        return tuple(each.to_foreign(part)[0] for part in x)

    return Layout(to_ours, to_foreign)


@dataclass(frozen=True)
class Row:
    """Foreign tensors that are some of our parameters.

    foreign: names; with "{n}" there is one tensor per layer, and ours have the layers on axis 0. A plain string
      is a tuple of one.
    ours: paths of parameters, or of statistics as "stats/...".
    start, step: the foreign number of our layer i is start + step * i.
    """

    foreign: tuple[str, ...] | str
    ours: tuple[str, ...] | str
    layout: Layout = same
    start: int = 0
    step: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return (self.foreign,) if isinstance(self.foreign, str) else tuple(self.foreign)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else tuple(self.ours)

    @property
    def stacked(self) -> bool:
        return any("{n}" in name for name in self.names)

    def layer(self, index: int) -> tuple[str, ...]:
        """Foreign names of our layer `index`."""
        number = str(self.start + self.step * index)
        return tuple(name.replace("{n}", number) for name in self.names)


@dataclass(frozen=True)
class Tied:
    """A foreign name for what another row already holds: may be absent, must be equal where it is present."""

    foreign: str
    of: str


Table = Sequence[Row | Tied]


class Source(Protocol):
    """Foreign tensors; `safetensors.Tensors` is one."""

    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class View:
    """A foreign model under the names its table uses.

    names: {name in the table: name in the file}.
    """

    source: Source
    names: Mapping[str, str]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self.names[name])

    def dtype(self, name: str) -> np.dtype:
        return self.source.dtype(self.names[name])

    def read(self, name: str) -> np.ndarray:
        return self.source.read(self.names[name])


class Plan:
    """A table applied to shapes: every foreign tensor with its shape, every one of ours with its row.

    Args:
      shapes: {path: anything with shape and dtype}, our parameters (and "stats/...").

    Raises:
      InputError: the table and our model do not cover each other (a mistake in the table).
    """

    def __init__(self, table: Table, shapes: Mapping[str, Any]):
        self.shapes = dict(shapes)
        self.rows = [row for row in table if isinstance(row, Row)]
        self.tied = [row for row in table if isinstance(row, Tied)]
        covered = [path for row in self.rows for path in row.paths]
        lost = sorted(set(self.shapes) - set(covered))
        extra = sorted({path for path in covered if path not in self.shapes or covered.count(path) > 1})
        if lost or extra:
            raise InputError(
                "the table of names does not fit the model: "
                + _listed({"parameters without a row": lost, "rows without a parameter, or twice": extra})
            )
        self.foreign: dict[str, tuple[int, ...]] = {}
        self.owner: dict[str, tuple[Row, int]] = {}
        for row in self.rows:
            shapes_of_layer = self._foreign_shapes(row)
            for index in range(self.layers(row)):
                for name, shape in zip(row.layer(index), shapes_of_layer, strict=True):
                    self.foreign[name] = shape
                    self.owner[name] = (row, index)

    def layers(self, row: Row) -> int:
        """Layers that a row is about; 1 for one without layers."""
        return self.shapes[row.paths[0]].shape[0] if row.stacked else 1

    def _layer_shape(self, path: str, row: Row) -> tuple[int, ...]:
        return tuple(self.shapes[path].shape[1:] if row.stacked else self.shapes[path].shape)

    def _foreign_shapes(self, row: Row) -> list[tuple[int, ...]]:
        # Bytes that are never written: the layout is run for its shapes only.
        dummies = [np.zeros(self._layer_shape(path, row), np.bool_) for path in row.paths]
        return [tuple(x.shape) for x in row.layout.to_foreign(*dummies)]

    def check(self, source: Source, ignored: Sequence[str] = ()) -> None:
        """Compare names and shapes of a foreign model with the table's.

        ignored: regexes of foreign names that hold no weights (masks kept as buffers, position ids).

        Raises:
          InputError: one line that lists what is missing, not known, or of another shape.
        """
        there = {name for name in source if not any(re.search(pattern, name) for pattern in ignored)}
        known = self.foreign.keys() | {tied.foreign for tied in self.tied}
        shapes = [
            f"{name} {list(source.shape(name))} instead of {list(shape)}"
            for name, shape in self.foreign.items()
            if name in there and tuple(source.shape(name)) != shape
        ]
        problems = {
            "not in the file": sorted(self.foreign.keys() - there),
            "not known": sorted(there - known),
            "of another shape": shapes,
        }
        if any(problems.values()):
            raise InputError(f"the file and the model do not fit: {_listed(problems)}")

    def to_ours(self, source: Source) -> Iterator[tuple[str, np.ndarray]]:
        """(path, array) of each of our parameters in its dtype; memory for one row at a time.

        Raises:
          InputError: a tied tensor that differs from what it should equal.
        """
        for tied in self.tied:
            if tied.foreign in source and not _equal(source.read(tied.foreign), source.read(tied.of)):
                raise InputError(
                    f"'{tied.foreign}' and '{tied.of}' differ, but config.json says that they are one (tied)"
                )
        for row in self.rows:
            out = [np.empty(self.shapes[path].shape, self.shapes[path].dtype) for path in row.paths]
            for index in range(self.layers(row)):
                parts = row.layout.to_ours(*(source.read(name) for name in row.layer(index)))
                for whole, part in zip(out, parts, strict=True):
                    if row.stacked:
                        whole[index] = part
                    else:
                        whole[...] = part
            yield from zip(row.paths, out, strict=True)

    def to_foreign(self, name: str, ours: Mapping[str, Any]) -> np.ndarray:
        """The foreign tensor `name` of our parameters {path: array}."""
        row, index = self.owner[name]
        arrays = [np.asarray(ours[path][index] if row.stacked else ours[path]) for path in row.paths]
        found = row.layout.to_foreign(*arrays)
        return found[row.layer(index).index(name)]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _listed(problems: Mapping[str, Sequence[str]], most: int = 12) -> str:
    parts = []
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            parts.append(f"{what}: {', '.join(ascii(n)[1:-1] for n in names[:most])}{more}")
    return "; ".join(parts)
