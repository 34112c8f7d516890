"""The layout as a table: logical axis -> mesh axes.

Models name the axes of their weights and activations ("embed", "heads", ...); this table says
where those axes live. Changing a layout is changing rows here, never a model.

A rule places one mesh axis (or group) on one logical axis. Rules are tried in order; a mesh axis
is used at most once per array, and a dimension that does not divide is passed over, so that a
later rule can still place the mesh axis on another dimension of the same array. What stays whole
although the mesh has an axis for it is listed by `report`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigmodel_jax import tree as trees
from bigmodel_jax.errors import InputError, nearest
from bigmodel_jax.parallel.mesh import BATCH_AXES

Rules = tuple[tuple[str, tuple[str, ...]], ...]

LOGICAL = (
    "batch", "rows", "group", "length", "vocab", "vocab_act", "embed", "embed_act", "heads", "kv_heads", "head_dim",
    "mlp", "layers", "norm", "conv_in", "conv_out", "classes", "spatial", "positions", "experts",
)  # fmt: skip

# Of a weight, the dimensions that an fsdp axis may cut: the one that is gathered before use, or,
# where that one does not divide (3 input channels, an odd width), another.
CUT = (
    "embed", "conv_in", "mlp", "conv_out", "vocab", "heads", "kv_heads", "head_dim", "positions", "classes",
    "experts",
)  # fmt: skip
STATE_AXES = ("fsdp", "expert", "context", "stage")
# Of rows outside a layer stack, where stages would otherwise repeat each other's work.
ROW_AXES = (*BATCH_AXES, "stage")

RULES: Rules = (
    *(("batch", group) for size in (3, 2, 1) for group in itertools.combinations(BATCH_AXES, size)),
    *(("rows", group) for size in (4, 3, 2, 1) for group in itertools.combinations(ROW_AXES, size)),
    # Groups of rows whose experts lie on the expert axis, which cut those rows until then.
    ("group", ("data", "fsdp")),
    ("length", ("context",)),
    ("layers", ("stage",)),
    ("experts", ("expert",)),
    # Megatron: one dimension of every matrix, so that a pair of matmuls costs one all-reduce.
    ("vocab", ("tensor",)),
    ("vocab_act", ("tensor",)),  # of a table being read: whole over fsdp, which cuts the rows that are read
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("classes", ("tensor",)),
    # conv_out is not on "tensor": with batch cut over data and fsdp as well, XLA's partitioner
    # (jax 0.10.2 on CPU) then gives wrong kernel gradients; tests/invariants found it.
    *((name, (axis,)) for axis in STATE_AXES for name in CUT),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything lives, and how what is cut is put together: the value behind the mesh section of a config.

    context: how attention crosses the context axis, "ring" (keys and values travel) or "ulysses" (heads and
      length change places).
    microbatches: of a pipeline; 0 is as many as stages. repeats: pieces of the stack on each stage (circular).
    zero: 3 cuts parameters and optimizer state over the fsdp axes, 1 the optimizer state alone.
    offload: "optimizer" keeps the optimizer state in host memory between steps.
    dispatch: how choices of dropless experts travel, "bounded" or "ragged" (TPU only). room: of one device on
      another, as a multiple of an even share; 0 has room for all. See models/dispatch.py.
    rings: sizes of the rings that the fsdp axis runs along, to scatter gradients along one after the other; () leaves
      that to the compiler. See parallel/rings.py.
    apart: mesh axes on each place of which the work at hand is done for itself, see `within`.
    """

    mesh: Mesh
    rules: Rules = RULES
    context: str = "ring"
    microbatches: int = 0
    repeats: int = 1
    zero: int = 3
    offload: str = ""
    dispatch: str = "bounded"
    room: float = 0.0
    rings: tuple[int, ...] = ()
    apart: tuple[str, ...] = ()

    @property
    def weights(self) -> Rules:
        """The rules of parameters while they are used: whole over the fsdp axes under ZeRO-1."""
        if self.zero == 3:
            return self.rules
        kept = (("experts", ("expert",)), ("layers", ("stage",)))
        return tuple(rule for rule in self.rules if rule in kept or not set(rule[1]) <= set(STATE_AXES))

    def within(self, axes: tuple[str, ...]) -> Layout:
        """This layout for work that is done on each place of these mesh axes apart: they cut no rows in it."""
        left = (
            (name, tuple(axis for axis in group if axis not in axes)) if name in ("batch", "group") else (name, group)
            for name, group in self.rules
        )
        return dataclasses.replace(self, rules=tuple(left), apart=axes)

    def size(self, axis: str) -> int:
        """Devices along a mesh axis."""
        return self.mesh.shape[axis]


# jit caches must see the active layout, or a function traced under one mesh would be reused
# under another: hence a jax context and not a ContextVar of our own.
_active = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use(layout: Layout | None) -> Iterator[None]:
    """Make `layout` the one that `constrain` refers to. None switches constraints off."""
    with _active(layout):
        yield


def active() -> Layout | None:
    """The layout of the innermost `use`, or None."""
    return _active.value


def _check(names: Sequence[str | None], shape: Sequence[int]) -> None:
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} axis names {tuple(names)} for shape {tuple(shape)}")
    for name in names:
        if name is not None and name not in LOGICAL:
            raise InputError(f"unknown logical axis '{name}'{nearest(name, LOGICAL)}")


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """Where an array lives. Mesh axes of size 1 and trailing Nones are left out.

    Args:
      axes: one logical name (or None: never sharded) per dimension of `shape`.

    Raises:
      InputError: a name that is not in `LOGICAL`.
      ValueError: `axes` and `shape` differ in length.
    """
    _check(axes, shape)
    placed: list[tuple[str, ...]] = [()] * len(shape)
    # An activation's fsdp axes belong to its batch and length, divisible or not: falling back to
    # a feature dimension would trade a replicated batch for a gather in every layer.
    used = {"data", *STATE_AXES} if {"batch", "rows"} & set(axes) else set()
    if "group" in axes:
        used = {"data", "fsdp", "context", "stage"}
    for logical, group in rules:
        group = tuple(axis for axis in group if mesh.shape[axis] > 1)
        for d, name in enumerate(axes):
            if name != logical or not group:
                continue
            free = not placed[d] if name in ("batch", "rows", "group", "length") else not used.intersection(group)
            pieces = math.prod(mesh.shape[axis] for axis in placed[d] + group)
            if free and shape[d] % pieces == 0:
                placed[d] = placed[d] + group
                used.update(group)
    entries = [p[0] if len(p) == 1 else (p or None) for p in placed]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pin an activation to its layout; returns `x` itself without an active mesh."""
    layout = active()
    if layout is None:
        return x
    placed = spec(axes, x.shape, layout.mesh, layout.rules)
    if layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, placed))


def everywhere(tree: Any) -> Any:
    """The leaves, whole on every device of the active layout: what every process of a job can read."""
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), tree)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, (tuple, list)) and all(n is None or isinstance(n, str) for n in leaf)


def shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Tree of NamedSharding.

    Args:
      axes: tree whose leaves are tuples of logical names.
      shapes: same tree with arrays or ShapeDtypeStruct.
    """
    return jax.tree.map(
        lambda a, s: NamedSharding(mesh, spec(a, s.shape, mesh, rules)),
        axes,
        shapes,
        is_leaf=_is_axes,
    )


@dataclasses.dataclass(frozen=True)
class Whole:
    """A leaf that some state-sharding mesh axis does not cut."""

    path: str
    shape: tuple[int, ...]
    bytes_per_device: int
    missing: tuple[str, ...]
    """Mesh axes ("fsdp", "tensor" and so on) of size > 1 that hold equal copies of this leaf."""

    def __str__(self) -> str:
        kept = " and ".join(self.missing)
        return f"{self.path} {self.shape}: {self.bytes_per_device} bytes, whole over {kept}"


def report(axes: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES) -> list[Whole]:
    """Leaves of which an fsdp axis or tensor holds copies, largest first. Empty: everything is cut."""
    flat_axes = trees.flatten(axes, is_leaf=_is_axes)
    wanted = [axis for axis in (*STATE_AXES, "tensor") if mesh.shape[axis] > 1]
    rows = []
    for path, leaf in trees.flatten(shapes).items():
        placed = spec(flat_axes[path], leaf.shape, mesh, rules)
        used = set(jax.tree.leaves(tuple(placed)))
        missing = tuple(axis for axis in wanted if axis not in used)
        if missing:
            cut = math.prod(mesh.shape[axis] for axis in used)
            size = math.prod(leaf.shape) * leaf.dtype.itemsize // cut
            rows.append(Whole(path, tuple(leaf.shape), size, missing))
    return sorted(rows, key=lambda row: -row.bytes_per_device)
