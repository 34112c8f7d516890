"""Start from parameters that exist: another run's checkpoint or a published model, by name, checked, strict.

What was loaded and what was not is a report; silence about a parameter that stayed random is the failure that
this file is there to prevent. Tables whose rows are words or places may be resized where that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import checkpoint, record, tree
from bigmodel_jax.data import packages
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import lora
from bigmodel_jax.record import Corrupt, few

PUBLISHED = "hf:"
RESIZE = {"vocab": ("mean", "initial"), "positions": ("interpolate", "initial")}
"""{logical axis: ways to fill new rows}."""
KINDS = ("loaded", "resized", "missing", "unexpected", "shape_mismatch", "skipped")

Report = dict[str, list[str]]


@dataclass(frozen=True)
class Stored:
    """Parameters somewhere else.

    where: for messages. shapes: {path: shape}. load: {path: ShapeDtypeStruct with the stored shape and a
    sharding} -> arrays, checked, in any dtype.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[Mapping[str, Any]], dict[str, Any]]


def stored(path: str, *, ema: bool = False, step: int | None = None) -> Stored:
    """A run, a checkpoint directory, or a published model as "hf:FOLDER" or "hf:package:..." (see packages.py).

    Raises:
      InputError: nothing there that can be read, or a damaged checkpoint.
    """
    if str(path).startswith(PUBLISHED):
        return _published(str(path).removeprefix(PUBLISHED))
    place = record.resolve(path)
    if not record.steps(place) and (place / "checkpoints").exists():
        place = place / "checkpoints"
    step, about = record.find(place, step)
    leaves = about["leaves"]
    if any(name.startswith("frozen/") for name in leaves):
        return _merged(place, step, about, ema)
    prefix = "ema/" if ema and any(name.startswith("ema/") for name in leaves) else "params/"
    where = f"step {step} in {place}"

    def load(wanted: Mapping[str, Any]) -> dict[str, Any]:
        try:
            full = {prefix + name: leaf for name, leaf in wanted.items()}
            found = checkpoint.load(place / str(step), leaves, full)
        except Corrupt as error:
            raise InputError(f"{where} is damaged: {error}") from error
        return {name: found[prefix + name] for name in wanted}

    names = [name.removeprefix(prefix) for name in leaves if name.startswith(prefix)]
    return Stored(where, {name: record.shape_of(leaves[prefix + name]) for name in names}, load)


def _merged(place: Any, step: int, about: Mapping[str, Any], ema: bool) -> Stored:
    """A run that trained low-rank updates, as the plain model that it stands for."""
    leaves, settings = about["leaves"], about["meta"]["config"]["lora"]
    prefix = "ema/" if ema and any(name.startswith("ema/") for name in leaves) else "params/"
    factors = f"{prefix}{lora.PREFIX}"
    own = [name for name in leaves if name.startswith(prefix) and not name.startswith(factors)]
    names = {name.split("/", 1)[1]: name for name in [*(n for n in leaves if n.startswith("frozen/")), *own]}

    def load(wanted: Mapping[str, Any]) -> dict[str, Any]:
        full = {names[path]: leaf for path, leaf in wanted.items()}
        for path, leaf in wanted.items():
            for half in ("a", "b"):
                name = f"{factors}{path}/{half}"
                if name in leaves:
                    shape, dtype = record.shape_of(leaves[name]), leaves[name]["dtype"]
                    full[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=whole(leaf.sharding))
        try:
            found = checkpoint.load(place / str(step), leaves, full)
        except Corrupt as error:
            raise InputError(f"step {step} in {place} is damaged: {error}") from error
        out = {}
        for path, leaf in wanted.items():
            out[path] = found[names[path]]
            if f"{factors}{path}/a" in full:
                halves = [found[f"{factors}{path}/{half}"] for half in ("a", "b")]
                scale = settings["alpha"] / settings["rank"]
                out[path] = jax.jit(lora.add, out_shardings=leaf.sharding)(out[path], *halves, scale)
        return out

    shapes = {path: record.shape_of(leaves[name]) for path, name in names.items()}
    return Stored(f"step {step} in {place}", shapes, load)


def _published(folder: str) -> Stored:
    from bigmodel_jax.hf import published

    opened = published.open_folder(packages.locate(folder))
    shapes = published.shapes_of(opened.model)

    def load(wanted: Mapping[str, Any]) -> dict[str, Any]:
        out = {}
        for name, array in opened.parameters():
            if name in wanted:
                out[name] = jax.device_put(np.asarray(array), wanted[name].sharding)
        return out

    return Stored(folder, {name: tuple(leaf.shape) for name, leaf in shapes.items()}, load)


def init_from(
    path: str,
    target: Any,
    *,
    rename: Sequence[tuple[str, str]] = (),
    skip: Sequence[str] = (),
    strict: bool = True,
    ema: bool = True,
    step: int | None = None,
    axes: Any = None,
    resize: Mapping[str, str] | None = None,
    tell: Callable[[Report], None] = lambda report: None,
) -> tuple[Any, Report]:
    """Parameters of another run, by name. Reads only what it uses, and checks it.

    Args:
      path: see `stored`.
      target: parameters (arrays or ShapeDtypeStruct with shardings) whose leaves are looked for.
      rename: (regex, replacement) applied in order to stored names. skip: regexes of names (of the
        target, after renaming) that keep their value.
      strict: False accepts names without a partner and other shapes.
      ema: prefer the averaged parameters where the run kept them.
      axes: tree like `target` with tuples of logical axes; needed to resize.
      resize: {"vocab": "mean" or "initial", "positions": "interpolate" or "initial"}: leaves that differ in
        the length of that axis alone keep their first rows; new ones are the mean of the old, or the target's
        own. "interpolate" stretches a table of places linearly. Absent: another length is a mismatch.
      tell: receives the report before it is judged.

    Returns:
      (tree like `target`, cast to its dtypes; leaves that were not loaded are the target's own,
      {"loaded", "resized", "missing", "unexpected", "shape_mismatch", "skipped": names}).

    Raises:
      InputError: nothing matches; with `strict`, anything is missing, unexpected or of another
        shape; no checkpoint; a damaged one.
    """
    source = stored(path, ema=ema, step=step)
    flat = tree.flatten(target)
    flat_axes = tree.flatten(axes, is_leaf=lambda a: isinstance(a, tuple)) if axes else {}
    names = renamed(source.shapes, rename)
    report = match({new: source.shapes[old] for new, old in names.items()}, flat, skip)
    plans = {}
    for name in report["shape_mismatch"]:
        plan = _plan(source.shapes[names[name]], flat[name].shape, flat_axes.get(name), resize or {})
        if plan is not None:
            plans[name] = plan
    report["resized"] = sorted(plans)
    report["shape_mismatch"] = [name for name in report["shape_mismatch"] if name not in plans]
    tell(report)
    judge(report, strict, source.where)
    wanted = {}
    for name in (*report["loaded"], *plans):
        shape = source.shapes[names[name]]
        place = whole(checkpoint.sharding(flat[name])) if name in plans else checkpoint.sharding(flat[name])
        wanted[names[name]] = jax.ShapeDtypeStruct(shape, flat[name].dtype, sharding=place)
    found = source.load(wanted)
    for name in report["loaded"]:
        flat[name] = found[names[name]].astype(flat[name].dtype)
    for name, (axis, how) in plans.items():
        flat[name] = _resized(found[names[name]], flat[name], axis, how)
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(target), list(flat.values())), report


def renamed(names: Iterable[str], rename: Sequence[tuple[str, str]]) -> dict[str, str]:
    """{name after the rules: stored name}.

    Raises:
      InputError: two stored names become one, or a rule is not a regular expression.
    """
    out: dict[str, str] = {}
    for old in names:
        new = old
        for pattern, replacement in rename:
            try:
                new = re.sub(pattern, replacement, new)
            except re.error as error:
                raise InputError(f"rename rule {pattern!r} is not a regex: {error}") from error
        if new in out:
            raise InputError(f"rename rules map '{out[new]}' and '{old}' both to '{new}'")
        out[new] = old
    return out


def match(shapes: Mapping[str, tuple[int, ...]], flat: Mapping[str, Any], skip: Sequence[str]) -> Report:
    """What of `flat` (a target) is found among stored shapes, by name.

    Raises:
      InputError: a skip rule is not a regular expression.
    """
    try:
        skipped = {path for path in {**flat, **shapes} if any(re.search(s, path) for s in skip)}
    except re.error as error:
        raise InputError(f"skip rule {error.pattern!r} is not a regex: {error}") from error
    same = [path for path in flat if path in shapes and path not in skipped]
    fits = {path: tuple(shapes[path]) == tuple(flat[path].shape) for path in same}
    return {
        "loaded": [path for path in same if fits[path]],
        "missing": [path for path in flat if path not in shapes and path not in skipped],
        "unexpected": [path for path in shapes if path not in flat and path not in skipped],
        "shape_mismatch": [path for path in same if not fits[path]],
        "skipped": sorted(skipped),
    }


def judge(report: Report, strict: bool, where: str) -> None:
    """Refuse a start from other parameters that would not be what was meant.

    Raises:
      InputError: nothing was loaded, or, with `strict`, something does not fit.
    """
    kinds = ("missing", "unexpected", "shape_mismatch")
    parts = [f"{len(report[k])} {k.replace('_', ' ')} ({few(report[k])})" for k in kinds if report[k]]
    if not report["loaded"] and not report["resized"]:
        raise InputError(f"{where}: no parameter name matches: {'; '.join(parts) or 'all skipped'}")
    if strict and parts:
        raise InputError(
            f"{where} does not fit: {'; '.join(parts)}; give init_from.rename, skip or resize rules, or strict=False"
        )


def say(report: Report, where: str) -> str:
    """The report in one line: counts, and the first names of what kept its initial values."""
    kept = [*report["missing"], *report["shape_mismatch"]]
    parts = [f"loaded {len(report['loaded'])}"]
    parts += [f"resized {len(report['resized'])} ({few(report['resized'])})"] if report["resized"] else []
    parts += [f"{len(kept)} missing or of another shape ({few(kept)})"] if kept else []
    parts += [f"{len(report['unexpected'])} unexpected ({few(report['unexpected'])})"] if report["unexpected"] else []
    parts += [f"skipped {len(report['skipped'])} ({few(report['skipped'])})"] if report["skipped"] else []
    return f"initialised from {where if len(where) < 100 else where[:60] + ' ...'}: {', '.join(parts)}"


def _plan(
    old: Sequence[int], new: Sequence[int], axes: Sequence[str | None] | None, resize: Mapping[str, str]
) -> tuple[int, str] | None:
    """(dimension, how) where these shapes differ in one resizable dimension alone."""
    if axes is None or len(old) != len(new):
        return None
    differ = [d for d in range(len(new)) if old[d] != new[d]]
    how = resize.get(str(axes[differ[0]]), "") if len(differ) == 1 else ""
    if how and how not in RESIZE[str(axes[differ[0]])]:
        name = axes[differ[0]]
        raise InputError(f"init_from.resize_{name} = '{how}' should be '' or one of {', '.join(RESIZE[name])}")
    return (differ[0], how) if how else None


def whole(place: Any) -> Any:
    """The same devices, each holding everything."""
    if isinstance(place, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    return place


def _resized(old: jax.Array, target: Any, axis: int, how: str) -> jax.Array:
    n, wanted = old.shape[axis], target.shape[axis]

    def fill(old: jax.Array, own: jax.Array | None) -> jax.Array:
        old = old.astype(jnp.promote_types(target.dtype, jnp.float32))
        if how == "interpolate":
            return _stretched(old, axis, wanted).astype(target.dtype)
        kept = jax.lax.slice_in_dim(old, 0, min(n, wanted), axis=axis)
        if wanted <= n:
            return kept.astype(target.dtype)
        if how == "mean" or own is None:
            rest = jnp.mean(old, axis=axis, keepdims=True)
            rest = jnp.broadcast_to(rest, (*old.shape[:axis], wanted - n, *old.shape[axis + 1 :]))
        else:
            rest = jax.lax.slice_in_dim(own, n, wanted, axis=axis)
        return jnp.concatenate([kept.astype(target.dtype), rest.astype(target.dtype)], axis=axis)

    own = target if isinstance(target, jax.Array) else None
    return jax.jit(fill, out_shardings=checkpoint.sharding(target))(old, own)


def _stretched(x: jax.Array, axis: int, wanted: int) -> jax.Array:
    """Linear interpolation along `axis`, first and last rows fixed."""
    n = x.shape[axis]
    at = jnp.linspace(0, n - 1, wanted)
    low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, max(n - 2, 0))
    share = (at - low).reshape([-1 if d == axis else 1 for d in range(x.ndim)]).astype(x.dtype)
    return jnp.take(x, low, axis) * (1 - share) + jnp.take(x, jnp.minimum(low + 1, n - 1), axis) * share
