"""Processes of one job: start, agree, wait with a bound, stop when asked, never hang silently."""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
import numpy as np

from bigmodel_jax.errors import EXIT_WATCHDOG, InputError, RunError

PATIENCE_S = 600.0
_barriers: dict[str, int] = {}


def require_platform(name: str) -> None:
    """Refuse to run on something else than was asked for.

    Args:
      name: "cpu", "gpu" or "tpu"; "" accepts whatever is there.

    Raises:
      InputError: no such device is usable.
    """
    if not name:
        return
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(f"platform '{name}' was asked for, and is not usable: {first}") from error
    if found != {"cuda": "gpu", "rocm": "gpu"}.get(name, name):
        raise InputError(f"platform '{name}' was asked for, jax sees only '{found}' devices")


def _integer(value: Any, what: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} is {value!r}: it must be an integer") from None


def initialise(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_s: int = 10,
    shutdown_s: int = 30,
    start_s: int | None = None,
    local_device_ids: list[int] | None = None,
) -> bool:
    """Join a job of several processes; with one process, do nothing and open no socket.

    Arguments left out are read from BIGMODEL_COORDINATOR ("host:port"), BIGMODEL_NUM_PROCESSES,
    BIGMODEL_PROCESS_ID, BIGMODEL_START_S and BIGMODEL_LOCAL_DEVICES ("0" or "0,1"). With "auto" as
    coordinator jax asks the cluster (Slurm, TPU, GKE) itself. Call before anything touches a device.

    Args:
      heartbeat_s: a peer silent for this long is dead. shutdown_s: wait for the others at the end.
      start_s: wait for the others at the start, default 300. local_device_ids: devices of this machine
        that are this process's, default all.

    Returns:
      Whether this is a job of several processes.

    Raises:
      InputError: incomplete or impossible arguments. RunError: the others did not come in time.
    """
    env = os.environ
    coordinator = coordinator or env.get("BIGMODEL_COORDINATOR") or None
    given = {"num_processes": num_processes, "process_id": process_id}
    for key, value in given.items():
        value = env.get(f"BIGMODEL_{key.upper()}") if value is None else value
        given[key] = None if value in (None, "") else _integer(value, key)
    count, index = given["num_processes"], given["process_id"]
    if coordinator is None:
        if (count or 1) > 1:
            raise InputError(f"{count} processes need a coordinator: host:port of process 0")
        return False
    if coordinator != "auto":
        if count is None or index is None or not 0 <= index < count:
            raise InputError(f"process {index} of {count}: need 0 <= process_id < num_processes")
        if count == 1:
            return False
    start_s = _integer(env.get("BIGMODEL_START_S") or 300, "BIGMODEL_START_S") if start_s is None else start_s
    if local_device_ids is None and env.get("BIGMODEL_LOCAL_DEVICES"):
        local_device_ids = [_integer(n, "BIGMODEL_LOCAL_DEVICES") for n in env["BIGMODEL_LOCAL_DEVICES"].split(",")]
    options: dict[str, Any] = (
        {}
        if coordinator == "auto"
        else {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    )
    if (jax.config.jax_platforms or "cpu").split(",")[0] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **options,
            local_device_ids=local_device_ids,
            initialization_timeout=start_s,
            heartbeat_timeout_seconds=heartbeat_s,
            shutdown_timeout_seconds=shutdown_s,
        )
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise RunError(f"process {index} of {count} could not join {coordinator}: {first}") from error
    return True


def roster(timeout_s: float = 120.0) -> list[str]:
    """One line per process (host, its devices), once all of them answered and a sum over all devices is right.

    With one process there is nothing to ask, and the list is empty.

    Raises:
      RunError: names the processes that did not answer in time, or says that the devices add up wrong.
    """
    count = jax.process_count()
    if count == 1:
        return []
    from jax._src import distributed
    from jax.experimental import multihost_utils

    client, index = distributed.global_state.client, jax.process_index()
    mine = jax.local_devices()
    client.key_value_set(f"roster/{index}", f"{platform.node()}  {len(mine)} x {mine[0].device_kind}")
    barrier("start", timeout_s)
    with Watchdog(timeout_s):
        total = int(np.sum(multihost_utils.process_allgather(np.int32(len(mine)))))
    if total != jax.device_count():
        raise RunError(f"the processes have {total} devices together, jax counts {jax.device_count()}")
    lines = [client.blocking_key_value_get(f"roster/{n}", int(timeout_s * 1000)) for n in range(count)]
    return [f"process {n}: {line}" for n, line in enumerate(lines)]


def is_first() -> bool:
    """Whether this process does the bookkeeping (process 0)."""
    return jax.process_index() == 0


def barrier(name: str, timeout_s: float) -> None:
    """Wait for all processes, but not for ever.

    Raises:
      RunError: names the barrier and, where known, the processes that did not come.
    """
    if jax.process_count() == 1:
        return
    from jax._src import distributed

    client = distributed.global_state.client
    _barriers[name] = _barriers.get(name, 0) + 1  # an id can be used once per job
    try:
        client.wait_at_barrier(f"{name}#{_barriers[name]}", int(timeout_s * 1000))
    except Exception as error:
        text = " ".join(str(error).split())[:600]
        raise RunError(
            f"barrier '{name}' was not reached by all {jax.process_count()} processes "
            f"within {timeout_s:g} s (this is process {jax.process_index()}): {text}"
        ) from error


def worst(verdict: int) -> int:
    """The largest value over all processes, so that all take the same branch."""
    if jax.process_count() == 1:
        return verdict
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(verdict))))


def from_first(value: int) -> int:
    """Process 0's value, on every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    parts = np.array([value >> 30, value & (1 << 30) - 1], np.int32)  # x64 is off: two halves
    high, low = multihost_utils.broadcast_one_to_all(parts)
    return (int(high) << 30) | int(low)


class Preemption:
    """Turns SIGTERM and SIGINT into a question to ask after every step.

    One process: a plain signal handler, no socket. Several: jax's synchronisation point, which
    makes all of them answer yes at the same step (it handles SIGTERM itself). A second SIGINT
    raises KeyboardInterrupt. Use as a context manager; handlers are put back at the end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        self._many = jax.process_count() > 1
        caught = (signal.SIGINT,) if self._many else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            for number in caught:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self._many:
            os.kill(os.getpid(), signal.SIGTERM)  # the job's own notifier listens to SIGTERM
        self.requested = True

    def asked(self, step: int) -> bool:
        """Whether to save and leave after `step`; the same answer on every process."""
        if not self._many:
            return self.requested
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))


def patience(asked: float) -> float:
    """Seconds that a run may go without a sign of life: `asked`, or, if that is negative, what is usual.

    In one process for ever: whoever started it looks at it. In several PATIENCE_S, the ten minutes that PyTorch
    gives NCCL: jax notices a peer that is gone or stopped within seconds, but never one that lives and hangs.
    """
    if asked >= 0:
        return asked
    return PATIENCE_S if jax.process_count() > 1 else 0.0


class Watchdog:
    """Ends a process that makes no progress: stacks of all threads to `file`, exit code 77.

    Arm it once and `pat()` it every step. A thread of its own notices the expiry; if even that
    thread cannot run (a C call that holds the interpreter lock), faulthandler's C thread dumps the
    stacks at 1.5x the timeout and ends the process with code 1.

    Args:
      timeout_s: seconds without a pat; 0 turns it off.
      file: an open file with a descriptor; default stderr.
      on_expiry: called first, to say what was going on; its errors are ignored.
    """

    def __init__(
        self,
        timeout_s: float,
        file: TextIO | None = None,
        on_expiry: Callable[[], None] | None = None,
    ):
        self.timeout_s = timeout_s
        self._file = file or sys.__stderr__
        self._on_expiry = on_expiry
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.timeout_s > 0:
            self.pat()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Disarm."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def pat(self, grace_s: float = 0.0) -> None:
        """Say that the run is alive; `grace_s` allows for one long wait (a compilation)."""
        if self.timeout_s <= 0:
            return
        self._last = time.monotonic() + grace_s
        later = 1.5 * self.timeout_s + grace_s
        faulthandler.dump_traceback_later(later, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout_s / 10)):
            silent = time.monotonic() - self._last
            if silent > self.timeout_s:
                self._expire(silent)

    def _expire(self, silent: float) -> None:
        try:
            if self._on_expiry is not None:
                self._on_expiry()
            self._file.write(f"watchdog: no progress for {silent:.1f} s; stacks of all threads:\n")
            self._file.flush()
            faulthandler.dump_traceback(file=self._file, all_threads=True)
            self._file.flush()
        finally:
            os._exit(EXIT_WATCHDOG)
