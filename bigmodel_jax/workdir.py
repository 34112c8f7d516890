"""The directory of a run: what it was asked to do, where it ran, and the guard against mixing runs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from bigmodel_jax import atomic, schema
from bigmodel_jax.errors import InputError, NumericAbort

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets", "sentencepiece")

DIVERGED = "diverged.json"
RUN = "{run}"  # in a text of a config: the directory of the run


def open_workdir(path: str) -> epath.Path:
    """The directory, made if missing; relative local paths are resolved, URLs are left alone.

    Raises:
      InputError: it cannot be made or written.
    """
    workdir = epath.Path(path) if "://" in path else epath.Path(os.path.abspath(path))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"work directory '{path}' cannot be written: {error.strerror or error}") from error
    return workdir


def existing(path: str) -> epath.Path:
    """The directory of a run that has been started.

    Raises:
      InputError: nothing there, or no config.json in it.
    """
    workdir = epath.Path(path) if "://" in path else epath.Path(os.path.abspath(path))
    if not (workdir / "config.json").exists():
        raise InputError(f"'{path}' is not a run: it has no config.json")
    return workdir


def placed(config: Mapping[str, Any], workdir: epath.Path) -> dict[str, Any]:
    """A config with "{run}" in its texts replaced by where the run is now: a run that was moved finds its files."""

    def of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: of(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(of(item) for item in value)
        return value.replace(RUN, str(workdir)) if isinstance(value, str) else value

    return of(config)


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Keep a second run out of the same local directory. The lock dies with the process."""
    if "://" in str(workdir):
        yield
        return
    import fcntl

    with open(Path(workdir) / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run is writing to '{workdir}'; wait for it or give another --workdir") from None
        yield


def write_json(path: epath.Path, value: Any) -> None:
    """Write in one step, so that a reader never sees half a file."""
    atomic.write(path, json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


@contextlib.contextmanager
def told_of_divergence(workdir: epath.Path) -> Iterator[None]:
    """Write diverged.json when a numeric abort passes: why this run ended without a result.

    The next start of the run removes it (`record_start`).
    """
    try:
        yield
    except NumericAbort as error:
        if jax.process_index() == 0:
            write_json(workdir / DIVERGED, {"reason": str(error)})
        raise


def check_config(
    workdir: epath.Path,
    config: Mapping[str, Any],
    *,
    mechanics: tuple[str, ...],
    derived: tuple[str, ...],
    allow: bool,
) -> list[str]:
    """Lines that show how `config` differs from the one this directory was started with.

    Args:
      mechanics: sections and leaves (how a run is carried out) that may differ freely.
      derived: leaves that `config` may leave at 0, to be taken from the data.

    Raises:
      InputError: another leaf differs and `allow` is False.
    """
    path = workdir / "config.json"
    if not path.exists():
        return []
    try:
        old = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"'{path}' is not JSON ({error}); restore it or give another --workdir") from error
    changes = schema.difference(old, config)
    changes = {leaf: pair for leaf, pair in changes.items() if not (leaf in derived and pair[1] == 0)}
    lines = [f"config changed: {leaf}: {a!r} -> {b!r}" for leaf, (a, b) in changes.items()]
    real = [leaf for leaf in changes if leaf.split(".")[0] not in mechanics]
    if real and not allow:
        shown = "; ".join(f"{leaf}: {changes[leaf][0]!r} -> {changes[leaf][1]!r}" for leaf in real[:8])
        more = f" and {len(real) - 8} more" if len(real) > 8 else ""
        raise InputError(
            f"'{workdir}' was started with another config ({shown}{more}); "
            "give another --workdir, or --allow-config-change to go on with the new one"
        )
    return lines


def _commit() -> str:
    """Of this code, with "-dirty" where tracked files differ; results/ is what runs write."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        name, changed = (
            subprocess.run([*git, *args], capture_output=True, text=True, timeout=5).stdout.strip()
            for args in (["describe", "--always"], ["status", "--porcelain", "-uno", "--", ".", ":(exclude)results"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return f"{name}-dirty" if name and changed else name or "unknown"


def environment() -> dict[str, Any]:
    """What this start of the run ran on: versions, devices, commit, command."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "host": platform.node(),
        "flags": {k: os.environ[k] for k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS") if k in os.environ},
    }


def record_start(workdir: epath.Path, config: Mapping[str, Any]) -> None:
    """Write config.json and append this start to env.json."""
    (workdir / DIVERGED).unlink(missing_ok=True)
    path = workdir / "env.json"
    try:
        starts = json.loads(path.read_text())["starts"] if path.exists() else []
    except (json.JSONDecodeError, KeyError):
        starts = []
    write_json(path, {"starts": [*starts, environment()]})
    write_json(workdir / "config.json", config)
