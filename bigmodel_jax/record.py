"""Which steps there are, and what each says of itself: names, shapes, dtypes, fingerprints.

The record carries its own digest, so that a damaged record is told apart from another model's.
Nothing here reads arrays, and nothing read here is ever executed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from bigmodel_jax import __version__, tree
from bigmodel_jax.errors import InputError

FORMAT = 1
_LEFTOVER = re.compile(r"\d+(\.orbax-checkpoint-tmp.*|\.replaced)")
_NAME = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


class Corrupt(Exception):
    """A committed step whose content is not what was saved."""


def line(error: BaseException) -> str:
    """An exception as one line of at most 300 characters."""
    first = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first[0][:300] if first else ''}"


def error_number(error: BaseException) -> int | None:
    """The system's error number, also where tensorstore wrapped it into text."""
    wrapped = re.search(r"os_error_code='(\d+)'", str(error))
    return int(wrapped.group(1)) if wrapped else getattr(error, "errno", None)


def resolve(directory: Any) -> epath.Path:
    """Absolute path of a local directory; a URL (gs://, s3://) is left as it is."""
    text = str(directory)
    return epath.Path(text) if "://" in text else epath.Path(text).expanduser().resolve()


def children(directory: epath.Path) -> list[epath.Path]:
    """Entries of a directory, none if it does not exist."""
    return list(directory.iterdir()) if directory.exists() else []


def is_committed(path: epath.Path) -> bool:
    """Whether a step directory was finished (not: whether its bytes are right)."""
    # Written last; a local directory is also renamed into place only after it.
    return all((path / part).exists() for part in ("commit_success.txt", "state", "meta"))


def steps(directory: epath.Path) -> list[int]:
    """Committed steps in a checkpoint directory, ascending."""
    numeric = [p for p in children(directory) if re.fullmatch(r"0|[1-9]\d{0,17}", p.name)]
    return sorted(int(p.name) for p in numeric if is_committed(p))


def sweep(directory: epath.Path) -> None:
    """Delete what interrupted saves left behind. Only the writer of a directory may do this."""
    for path in children(directory):
        if not _LEFTOVER.fullmatch(path.name):
            continue
        original = directory / path.name.split(".")[0]
        if path.name.endswith(".replaced") and is_committed(path) and not original.exists():
            path.rename(original)  # its replacement never came
        else:
            path.rmtree()


def set_aside(directory: epath.Path, step: int) -> None:
    """Rename a damaged step to `<step>.corrupt` (or `<step>-1.corrupt`, ...)."""
    names = {path.name for path in children(directory)}
    if str(step) not in names:
        return
    new, number = f"{step}.corrupt", 1
    while new in names:
        new, number = f"{step}-{number}.corrupt", number + 1
    (directory / str(step)).rename(directory / new)


def make_way(directory: epath.Path, step: int) -> bool:
    """Move what is at `step` (a ghost, an abandoned branch) aside; whether there was something."""
    path, aside = directory / str(step), directory / f"{step}.replaced"
    if not path.exists():
        return False
    if aside.exists():
        aside.rmtree()
    path.rename(aside)
    return True


def storable(state: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Flat {path: array} ready to write, and {path: implementation} of typed PRNG keys.

    Raises:
      InputError: a leaf name that could leave the directory or confuse a file system.
    """
    flat = tree.flatten(state)
    keys: dict[str, str] = {}
    for path, leaf in flat.items():
        if not _NAME.fullmatch(path):
            raise InputError(f"leaf name {path!r} cannot be saved: use [A-Za-z0-9_-] between '/'")
        if is_key(leaf):
            keys[path] = str(jax.random.key_impl(leaf))
            flat[path] = jax.random.key_data(leaf)
        elif not isinstance(leaf, jax.Array):
            flat[path] = np.array(leaf)  # a copy: the caller may write into its own
    return flat, keys


def is_key(leaf: Any) -> bool:
    """Whether a (possibly abstract) leaf is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def make(
    step: int,
    flat: Mapping[str, Any],
    keys: Mapping[str, str],
    prints: Mapping[str, int],
    meta: dict[str, Any],
) -> dict[str, Any]:
    """The record of one step: the caller's meta (versions added), every leaf, and a digest."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
    ours = {"bigmodel_jax": __version__, "python": platform.python_version()}
    meta.setdefault("versions", {**packages, **ours})
    leaves: dict[str, Any] = {}
    for path, x in flat.items():
        leaves[path] = {"shape": list(x.shape), "dtype": str(x.dtype), "fingerprint": prints[path]}
        if path in keys:
            leaves[path]["key"] = keys[path]
    body = {"format": FORMAT, "step": step, "meta": meta, "leaves": leaves}
    body = json.loads(json.dumps(body))  # as it will be read: tuples are lists, keys strings
    return {**body, "digest": _digest(body)}


def _digest(body: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in body.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read(directory: epath.Path, step: int) -> dict[str, Any]:
    """The record of a step.

    Raises:
      Corrupt: missing, not JSON, changed since it was written, or of another step.
      InputError: written by a newer format.
    """
    try:
        body = json.loads((directory / str(step) / "meta" / "metadata").read_text())
        right = body["digest"] == _digest(body)
        written = body["step"]
        version = body["format"]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"its record is unreadable ({type(error).__name__})") from error
    if not right:
        raise Corrupt("its record was changed")
    if written != step:
        raise Corrupt(f"its record says step {written}")
    if version > FORMAT:
        raise InputError(f"step {step} in {directory} has format {version}; this reads {FORMAT}")
    return body


def find(directory: epath.Path, step: int | None) -> tuple[int, dict[str, Any]]:
    """(step, record) of `step`, default the newest.

    Raises:
      InputError: no such step, or its record is damaged.
    """
    there = steps(directory)
    if not there or (step is not None and step not in there):
        wanted = "checkpoint" if step is None else f"step {step}"
        raise InputError(f"no {wanted} in {directory}; steps there: {there or 'none'}")
    step = there[-1] if step is None else step
    try:
        return step, read(directory, step)
    except Corrupt as error:
        raise InputError(f"step {step} in {directory} is damaged: {error}") from error


def dtype_name(leaf: Any, about: Mapping[str, Any]) -> tuple[str, str]:
    """(dtype stored, dtype wanted) as text, typed keys as their key type."""
    if "key" not in about:
        return about["dtype"], str(leaf.dtype)
    return str(jax.random.key(0, impl=about["key"]).dtype), str(leaf.dtype)


def shape_of(about: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape as the model sees it: a typed key hides the words of its data."""
    shape = tuple(about["shape"])
    return shape[:-1] if "key" in about else shape


def few(names: list[str], limit: int = 3) -> str:
    """The first names of a list and how many there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def same_model(leaves: Mapping[str, Any], flat: Mapping[str, Any], where: str) -> None:
    """Check that stored leaves are those of the target.

    Raises:
      InputError: other paths, another shape, or another dtype (Orbax would cast it silently).
    """
    missing = [path for path in flat if path not in leaves]
    unexpected = [path for path in leaves if path not in flat]
    if missing or unexpected:
        parts = [f"{len(missing)} arrays missing ({few(missing)})"] if missing else []
        parts += [f"{len(unexpected)} unexpected ({few(unexpected)})"] if unexpected else []
        raise InputError(f"{where} is a checkpoint of another model: {'; '.join(parts)}")
    shapes = [
        f"{path} is {list(shape_of(leaves[path]))}, the model has {list(x.shape)}"
        for path, x in flat.items()
        if shape_of(leaves[path]) != tuple(x.shape)
    ]
    if shapes:
        raise InputError(f"{where} is a checkpoint of another model: {few(shapes)}")
    pairs = {path: dtype_name(x, leaves[path]) for path, x in flat.items()}
    dtypes = [f"{path} is {a}, the model has {b}" for path, (a, b) in pairs.items() if a != b]
    if dtypes:
        raise InputError(f"{where} has another dtype: {few(dtypes)}")
