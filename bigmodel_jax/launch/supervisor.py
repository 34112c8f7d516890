"""Several processes of one job on this machine, started together and restarted together.

A collective job has no use for a part of itself: when one process dies, its peers notice within
their heartbeat and leave; who has not left after a grace is killed, and all start again from the
newest checkpoint, if the policy says so. Standard library only, so that the supervisor cannot die of
what the job dies of.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bigmodel_jax.launch import policy

POLL_S = 0.05


@dataclass(frozen=True)
class Job:
    """command: what every process runs; BIGMODEL_* variables tell them apart.

    environment: added to this process's own; per_process: added for one process, by its number.
    grace_s: between the first death and the killing of who is left. stop_s: after a signal to this
    supervisor, time to save and leave. Logs are appended to <workdir>/logs/process-<n>.log; process
    0 also writes to this terminal.
    """

    command: Sequence[str]
    processes: int
    workdir: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    per_process: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    grace_s: float = 15.0
    stop_s: float = 600.0


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _tee(stream, log) -> None:
    for chunk in iter(lambda: stream.read1(65536), b""):
        log.write(chunk)
        log.flush()
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()


class Attempt:
    """The processes of one start."""

    def __init__(self, job: Job, number: int):
        self.job = job
        self.processes: list[subprocess.Popen] = []
        self._logs, self._threads = [], []
        folder = job.workdir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{free_port()}"
        for index in range(job.processes):
            env = {**os.environ, **job.environment, **job.per_process.get(index, {})}
            if job.processes > 1:
                env |= {
                    "BIGMODEL_COORDINATOR": address, "BIGMODEL_NUM_PROCESSES": str(job.processes),
                    "BIGMODEL_PROCESS_ID": str(index),
                }  # fmt: skip
            log = open(folder / f"process-{index}.log", "ab")
            log.write(f"--- start {number}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            log.flush()
            out = subprocess.PIPE if index == 0 else log
            # A session of its own: Ctrl-C reaches the supervisor alone, which forwards it once.
            process = subprocess.Popen(
                job.command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            if index == 0:
                thread = threading.Thread(target=_tee, args=(process.stdout, log), daemon=True)
                thread.start()
                self._threads.append(thread)
            self.processes.append(process)
            self._logs.append(log)

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def signal(self, number: int) -> None:
        """To every process that is still there, with its children."""
        for process in self.processes:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue

    def close(self) -> None:
        """End what is left and close the logs."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for thread in self._threads:
            thread.join(timeout=5)
        for log in self._logs:
            log.close()


class Supervisor:
    """Starts a job until it is done, asked to stop, or not worth another try."""

    def __init__(self, job: Job, say: Callable[[str], None] = lambda line: print(f"launch: {line}", flush=True)):
        self.job, self.say = job, say
        self.attempts = 0
        self.current: Attempt | None = None  # the processes that run now
        self._asked = False

    def _ask(self, *_: object) -> None:
        self._asked = True

    def run(self) -> int:
        """Exit status of the job: 0 done, 75 stopped when asked to, else that of the last failure."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while True:
                codes = self._attempt()
                verdict = policy.consider(self.job.workdir, codes)
                shown = ", ".join(str(policy.shell_code(code)) for code in codes)
                self.say(f"processes left with {shown}: {verdict.reason}")
                if self._asked or not verdict.again:
                    return verdict.code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempt(self) -> list[int]:
        self.attempts += 1
        attempt = self.current = Attempt(self.job, self.attempts)
        forwarded, deadline = False, None
        try:
            while None in (codes := attempt.codes()):
                if self._asked and not forwarded:
                    forwarded, deadline = True, time.monotonic() + self.job.stop_s
                    attempt.signal(signal.SIGTERM)
                if deadline is None and any(code is not None for code in codes):
                    deadline = time.monotonic() + self.job.grace_s
                if deadline is not None and time.monotonic() > deadline:
                    left = [n for n, code in enumerate(codes) if code is None]
                    self.say(f"processes {left} have not left: killed")
                    attempt.signal(signal.SIGKILL)
                    deadline = math.inf
                time.sleep(POLL_S)
            return codes
        finally:
            attempt.close()
