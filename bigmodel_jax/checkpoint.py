"""Checkpoints that describe themselves, restore onto any mesh, and are never believed unchecked.

Orbax writes the bytes; this file adds what Orbax leaves open: a fingerprint per leaf (bit flips
restore silently otherwise), refusal of another model, shape or dtype (a wrong dtype is silently
cast otherwise), and walk-back past damaged or unfinished steps.

    <directory>/<step>/state/    flat {path: array}, uncompressed OCDBT
    <directory>/<step>/meta/     JSON: the caller's meta, versions, {path: shape, dtype, fingerprint}
    <directory>/<step>.corrupt   a step that failed its check: kept for inspection, never read again
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bigmodel_jax import fingerprint, record, tree
from bigmodel_jax.errors import InputError, RunError
from bigmodel_jax.parallel import hosts
from bigmodel_jax.record import Corrupt, error_number, line

SPACE_FACTOR = 1.2  # free space asked for, relative to the state: room for metadata and tmp files
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT}


class Checkpointer:
    """Save and restore steps of one run.

    Args:
      directory: local path (resolved) or URL.
      keep_last: newest steps to keep. keep_every: also keep multiples of this step (0: none).
      asynchronous: write in the background; the caller may donate the state at once either way.
      timeout_s: bound of every wait on other processes.
      readonly: never renames, deletes or writes (for evaluation beside a live run).
      log: receives one line for everything noteworthy that is not an error.

    Attributes:
      fingerprint_s, blocked_s: seconds the last save spent hashing, and otherwise blocked.
      committed: newest step this object has seen committed, or None.
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep_last: int = 3,
        keep_every: int = 0,
        asynchronous: bool = True,
        timeout_s: float = 600.0,
        readonly: bool = False,
        log: Callable[[str], None] | None = None,
    ):
        if keep_last < 1 or keep_every < 0:
            raise InputError(f"keep_last={keep_last}, keep_every={keep_every}: need >= 1 and >= 0")
        self.directory = record.resolve(directory)
        self.keep_last, self.keep_every = keep_last, keep_every
        self.asynchronous, self.readonly, self.timeout_s = asynchronous, readonly, timeout_s
        self.fingerprint_s = self.blocked_s = 0.0
        self.committed: int | None = None
        self._log = log or (lambda line: warnings.warn(line, stacklevel=3))
        self._pending: tuple[int, dict[str, Any], dict[str, Any]] | None = None
        self._known: set[int] = set()  # steps this object wrote or restored: the same branch
        self._cleaned = False
        _quiet()
        self._orbax = ocp.AsyncCheckpointer(
            _handler(),
            async_options=ocp.AsyncOptions(timeout_secs=max(1, int(timeout_s))),
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.close()
        except RunError:
            if kind is None:  # otherwise the error already under way says more
                raise

    def steps(self) -> list[int]:
        """Committed steps, ascending. Directories without a commit marker do not count."""
        return record.steps(self.directory)

    def latest(self) -> int | None:
        """Newest committed step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: Mapping[str, Any] | None = None) -> bool:
        """Save a pytree of arrays as `step`; the state may be donated as soon as this returns.

        Args:
          step: step the state belongs to; a step already written by this object is not repeated.
          state: pytree whose leaf names use only [A-Za-z0-9_-].
          meta: JSON values to store beside it (next data step, seed, config, fingerprints).

        Returns:
          False if the step is already there.

        Raises:
          InputError: disk full, unwritable directory, or an illegal leaf name.
          RunError: this or the previous background write failed.
        """
        self.wait()
        began = time.perf_counter()
        if step in self._known and step in self.steps():
            return False
        if self.readonly:
            raise RunError(f"{self.directory} was opened read-only")
        flat, keys = record.storable(state)
        hashed = time.perf_counter()
        prints = fingerprint.of_leaves(flat)
        self.fingerprint_s = time.perf_counter() - hashed
        about = record.make(step, flat, keys, prints, dict(meta or {}))
        self._make_room(step, tree.nbytes(flat))
        try:
            self._start(step, flat, about)
        except Exception as error:
            self._pending = (step, flat, about)
            self._retry(error)
        if not self.asynchronous:
            self.wait()
        self.blocked_s = time.perf_counter() - began - self.fingerprint_s
        return True

    def check(self) -> None:
        """Raise the error of a failed background write, if there is one; never blocks."""
        try:
            self._orbax.check_for_errors()
        except Exception as error:
            self._retry(error)

    def wait(self) -> None:
        """Block until the save under way is committed; raises its error."""
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            self._retry(error)
        if self._pending is not None:
            step, self._pending = self._pending[0], None
            self._retire(step)

    def close(self) -> None:
        """Wait for the save under way (raising its error) and release the writer."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def restore(self, target: Any, step: int | None = None) -> tuple[Any, dict[str, Any]] | None:
        """Newest valid step (or `step`) as a tree like `target`, byte for byte.

        Args:
          target: pytree of ShapeDtypeStruct with today's shardings (or of arrays; numpy leaves
            come back as numpy). A leaf without a sharding goes to the first local device.
          step: exactly this one: no walk-back. Default: walk back to the newest valid step,
            renaming damaged ones to `<step>.corrupt`.

        Returns:
          (state, meta), or None if no step was ever committed here.

        Raises:
          InputError: the checkpoint is of another model (paths, shapes or dtypes differ), `step`
            is not there or damaged, or every step is damaged.
        """
        self.wait()
        flat = tree.flatten(target)
        for path in self._ghosts() if step is None else ():
            self._log(f"ignoring {path}: not a committed checkpoint")
        candidates = self.steps() if step is None else [step]
        while True:
            chosen = hosts.from_first(max(candidates, default=-1))
            if chosen < 0:
                return self._nothing_valid()
            try:
                arrays, meta = self._read(chosen, flat)
            except Corrupt as error:
                if step is not None:
                    record.find(self.directory, step)  # one that is not there is not damaged
                    raise InputError(f"step {step} in {self.directory} is damaged: {error}") from error
                self._set_aside(chosen, error)
                candidates = [s for s in candidates if s < chosen]
                continue
            self._known.add(chosen)
            leaves = [arrays[path] for path in flat]
            return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(target), leaves), meta

    def _read(self, step: int, flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        arrays: dict[str, Any] = {}
        meta: dict[str, Any] = {}
        problem: Exception | None = None
        try:
            about = record.read(self.directory, step)
            record.same_model(about["leaves"], flat, f"step {step} in {self.directory}")
            arrays = load(self.directory / str(step), about["leaves"], flat)
            meta = about["meta"]
        except (Corrupt, RunError, MemoryError, OSError) as error:
            problem = error
        verdict = 0 if problem is None else 1 if isinstance(problem, Corrupt) else 2
        if hosts.worst(verdict) != verdict:  # all processes must take the same way
            problem = problem if verdict == 2 else Corrupt("damaged as another process sees it")
        if problem is not None:
            raise problem
        return arrays, meta

    def _nothing_valid(self) -> None:
        damaged = sorted(p.name for p in record.children(self.directory) if ".corrupt" in p.name)
        if damaged:
            raise InputError(
                f"no valid checkpoint in {self.directory}: {', '.join(damaged)} failed the check; "
                "delete them to start from scratch, or use another workdir"
            )

    def _set_aside(self, step: int, why: Exception) -> None:
        if jax.process_index() == 0 and not self.readonly:
            record.set_aside(self.directory, step)
        hosts.barrier(f"checkpoint_set_aside_{step}", self.timeout_s)
        self._log(f"checkpoint step {step} in {self.directory} is damaged ({why}); walking back")

    def _ghosts(self) -> list[epath.Path]:
        good = set(self.steps())
        numeric = [p for p in record.children(self.directory) if p.name.isdigit()]
        return [p for p in numeric if int(p.name) not in good]

    def _make_room(self, step: int, size: int) -> None:
        error: RunError | None = None
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                if not self._cleaned:
                    record.sweep(self.directory)
                if record.make_way(self.directory, step):
                    self._log(f"step {step} was there already and not from this run: replacing it")
                free = _free_bytes(self.directory)
                if free is not None and free < SPACE_FACTOR * size:
                    error = InputError(
                        f"{self.directory}: a checkpoint needs {SPACE_FACTOR * size / 1e6:.0f} MB "
                        f"free (1.2 x its size), {free / 1e6:.0f} MB are; step {step} not saved"
                    )
            except OSError as problem:
                error = self._write_error(step, problem)
        if hosts.worst(0 if error is None else 1):
            raise error or RunError(f"step {step} not saved: process 0 could not prepare the save")
        self._cleaned = True

    def _start(self, step: int, flat: dict[str, Any], about: dict[str, Any]) -> None:
        self._orbax.save(
            self.directory / str(step),
            ocp.args.Composite(
                state=ocp.args.PyTreeSave({k: v for k, v in flat.items() if v.size}),
                meta=ocp.args.JsonSave(about),
            ),
        )
        self._pending = (step, flat, about)

    def _retry(self, error: Exception) -> None:
        """Write once more what failed in passing, if the state was not donated meanwhile."""
        step, flat, about = self._pending or (-1, {}, {})
        self._pending = None
        alive = flat and not any(isinstance(x, jax.Array) and x.is_deleted() for x in flat.values())
        if not (error_number(error) in _TRANSIENT and alive and jax.process_count() == 1):
            raise self._write_error(step, error) from error
        self._log(f"retrying the save of step {step} after: {line(error)}")
        try:
            record.sweep(self.directory)
            self._start(step, flat, about)
            self._orbax.wait_until_finished()
        except Exception as again:
            raise self._write_error(step, again) from again

    def _write_error(self, step: int, error: Exception) -> RunError:
        number = error_number(error)
        reason = os.strerror(number) if number else line(error)
        if not self.readonly and jax.process_index() == 0:
            with contextlib.suppress(OSError):  # half a checkpoint would keep a full disk full
                record.sweep(self.directory)
        theirs = number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM)
        kind = InputError if theirs else RunError
        return kind(f"checkpoint step {step} was not written to {self.directory}: {reason}")

    def _retire(self, step: int) -> None:
        """Only now that `step` is in place may older ones go. (Orbax's own callback is too early.)"""
        if not record.is_committed(self.directory / str(step)):
            raise RunError(f"checkpoint step {step} is not in {self.directory} after its commit")
        self.committed = step
        self._known.add(step)
        if jax.process_index() != 0:
            return
        older = [s for s in self.steps() if s <= step]
        kept = set(older[-self.keep_last :])
        if self.keep_every:
            kept |= {s for s in older if s % self.keep_every == 0}
        doomed = [self.directory / str(s) for s in older if s not in kept]
        for path in [*doomed, self.directory / f"{step}.replaced"]:
            try:
                if path.exists():
                    path.rmtree()
            except OSError as error:
                self._log(f"could not delete {path}: {line(error)}")


def read_meta(directory: Any, step: int | None = None) -> dict[str, Any]:
    """The meta of a step (default: the newest) without reading the state.

    Raises:
      InputError: no such step, or its meta is damaged.
    """
    return record.find(record.resolve(directory), step)[1]["meta"]


def load(path: epath.Path, leaves: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read some leaves of one step and compare their fingerprints.

    Args:
      path: the step's directory. leaves: what its record says of each leaf.
      wanted: {path: array or ShapeDtypeStruct}; other leaves are not read.

    Raises:
      Corrupt: unreadable (twice), or the bytes are not those that were saved.
    """
    stored = {name: about for name, about in leaves.items() if name in wanted}
    full = {name: about for name, about in stored.items() if 0 not in about["shape"]}
    arguments = {name: _restore_args(about, wanted[name]) for name, about in full.items()}
    item = ocp.args.PyTreeRestore(item={name: 0 for name in full}, restore_args=arguments, partial_restore=True)
    raw: dict[str, Any] = {}
    for attempt in (1, 2):
        try:
            with ocp.Checkpointer(_handler()) as reader:
                raw = reader.restore(path, ocp.args.Composite(state=item))["state"] if full else {}
            break
        except (MemoryError, PermissionError):
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or "Too many open files" in str(error):
                raise RunError(f"cannot restore {path}: {line(error)}") from error
            if attempt == 2:
                raise Corrupt(line(error)) from error
    for name in stored.keys() - full.keys():
        raw[name] = np.zeros(stored[name]["shape"], stored[name]["dtype"])
        if not isinstance(wanted[name], np.ndarray):
            raw[name] = jax.device_put(raw[name], sharding(wanted[name]))
    found = fingerprint.of_leaves(raw)
    wrong = [name for name in stored if found[name] != stored[name]["fingerprint"]]
    if wrong:
        raise Corrupt(f"the bytes of {len(wrong)} arrays changed, first '{wrong[0]}'")
    for name, about in stored.items():
        if "key" in about:
            raw[name] = jax.random.wrap_key_data(raw[name], impl=about["key"])
    return raw


def sharding(leaf: Any) -> Any:
    """Where a (possibly abstract) leaf lives: the first local device where it does not say."""
    given = getattr(leaf, "sharding", None)
    return given or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _restore_args(about: Mapping[str, Any], leaf: Any) -> ocp.RestoreArgs:
    dtype = np.dtype(about["dtype"])
    if isinstance(leaf, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    return ocp.ArrayRestoreArgs(sharding=sharding(leaf), global_shape=tuple(about["shape"]), dtype=dtype)


def _quiet() -> None:
    """Keep Orbax from printing a stack per failed array: every error it logs is raised as well."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)


def _not_orbax(entry: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in entry.pathname


def _handler() -> ocp.CompositeCheckpointHandler:
    # Uncompressed: zstd is most of the time of a save, and trained float32 weights hardly shrink.
    return ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=True),
        meta=ocp.JsonCheckpointHandler(),
    )


def _free_bytes(directory: epath.Path) -> int | None:
    return None if "://" in str(directory) else shutil.disk_usage(directory).free
