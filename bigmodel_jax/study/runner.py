"""Runs the cells that are missing: `bigmodel train` as a process of its own, some at a time, until all are there.

Everything that must survive is in the store or in a run's own checkpoints, so a runner may be killed at any
moment and started again, and several may work on one study: each takes what nobody holds. What another one holds
is waited for at the end, in case it is left unfinished.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from bigmodel_jax import status
from bigmodel_jax.errors import EXIT_NUMERIC, InputError, Preempted
from bigmodel_jax.launch import policy
from bigmodel_jax.study.spec import Row, fold_words
from bigmodel_jax.study.store import Cell, Claim, Job, Store

POLL_S = 0.1
TRAIN = (sys.executable, "-m", "bigmodel_jax.cli", "train")
# A cell is a job of one process, whatever the runner itself is part of.
NOT_INHERITED = ("BIGMODEL_COORDINATOR", "BIGMODEL_NUM_PROCESSES", "BIGMODEL_PROCESS_ID")


class _Child:
    """A process under way, with the claims of its cells."""

    def __init__(self, store: Store, job: Job, claims: list[Claim], slot: int, cores: set[int] | None):
        self.job, self.slot, self.claims = job, slot, claims
        for cell in job.cells:
            store.begin(cell)
        self.began = time.monotonic()
        env = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        with open(job.folder / "log.txt", "ab") as log:
            # A session of its own: Ctrl-C reaches the runner alone, which asks its children to save.
            self.process = subprocess.Popen(
                job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                pass_fds=[claim.descriptor for claim in claims], env=env,
            )  # fmt: skip
        if cores:
            os.sched_setaffinity(self.process.pid, cores)

    def poll(self) -> tuple[int, float, float] | None:
        """(exit code, wall s, CPU s) once it has ended; the seconds are shared out over its cells."""
        pid, code, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(code)
        count = len(self.job.cells)
        cpu_s = usage.ru_utime + usage.ru_stime
        return self.process.returncode, (time.monotonic() - self.began) / count, cpu_s / count

    def release(self) -> None:
        for claim in self.claims:
            claim.release()
        self.claims = []


class Runner:
    """Args:
    processes: at a time; with more than one, each keeps to its share of this machine's cores.
    together: cells that one process trains as lanes of one program, where they can; 1 for each alone.
    grace_s: after a signal, time for runs to save before they are killed.
    """

    def __init__(
        self, store: Store, processes: int = 1, *, together: int = 1, grace_s: float = 300.0,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ):  # fmt: skip
        self.store, self.say, self.grace_s = store, say, grace_s
        self.processes, self.together = processes, together
        self.slots = _cores(processes)
        self.failed: dict[str, int] = {}  # cell: exit status
        self._asked = False
        self._children: list[_Child] = []

    def run(self, cells: Sequence[Cell]) -> list[Row]:
        """Rows of all cells, in order, once each is done, has diverged, or has failed. Those that they start from
        come first.

        Raises:
          Preempted: a signal came; the runs have saved their state.
          InputError: a run does not fit its study.
        """
        starts = self.store.starts([cell for cell in cells if self.store.row(cell) is None])
        if starts:
            again = [row for cell in starts if not self.store.over(cell) and (row := self.store.from_record(cell))]
            if again:
                took = status.span(sum(row.wall_s for row in again))
                what = f"{len(again)} runs that others start from are recorded, their checkpoints are not"
                self.say(f"{what}: made again here, {took} where they were made")
            self.run(starts)
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            waiting = [cell for cell in cells if self.store.row(cell) is None]
            self._total, self._began = len(cells), time.monotonic()
            if len(waiting) < len(cells):
                self.say(f"{len(cells) - len(waiting)} of {len(cells)} cells are done already")
            while waiting or self._children:
                if self._asked:
                    self._leave()
                waiting = self._start(waiting)
                self._reap(cells)
                if waiting or self._children:
                    time.sleep(POLL_S)
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.store.rows(cells)

    def _ask(self, *_: int | FrameType | None) -> None:
        self._asked = True

    def _start(self, waiting: list[Cell]) -> list[Cell]:
        """Start what there is room for; returns what is still to be started."""
        if len(self._children) >= self.processes:
            return waiting
        started: set[str] = set()
        for cells in self.store.groups(waiting, self.together):
            if len(self._children) < self.processes:
                started |= self._take(cells)
        return [cell for cell in waiting if cell.id not in started]

    def _take(self, cells: Sequence[Cell]) -> set[str]:
        """Claim and start cells, all or none of them; ids of those that need no more looking after."""
        claims = [self.store.claim(cell) for cell in cells]
        # Another runner may have finished some since we looked.
        over = {
            cell.id for cell, claim in zip(cells, claims, strict=True)
            if claim is not None and self.store.row(cell, claimed=True) is not None
        }  # fmt: skip
        held = [claim for claim in claims if claim is not None]
        if len(held) < len(cells) or over:
            for claim in held:
                claim.release()
            return over
        taken = {child.slot for child in self._children}
        self._begin(self.store.job(cells, TRAIN), held, next(n for n in range(self.processes) if n not in taken))
        return {cell.id for cell in cells}

    def _begin(self, job: Job, claims: list[Claim], slot: int) -> None:
        self._children.append(_Child(self.store, job, claims, slot, self.slots[slot]))

    def _reap(self, cells: Sequence[Cell]) -> None:
        for child in list(self._children):
            ended = child.poll()
            if ended is not None:
                self._children.remove(child)
                self._judge(child, *ended, cells)

    def _judge(self, child: _Child, code: int, wall_s: float, cpu_s: float, cells: Sequence[Cell]) -> None:
        """What an exit status means: results, another try, or a failure."""
        store, job = self.store, child.job
        over = code in (0, EXIT_NUMERIC) and all(map(store.over, job.cells))
        verdict = None if over or self._asked else policy.consider(job.folder, [code])
        failed = verdict is not None and not verdict.again
        try:
            for cell in job.cells:
                store.end(cell, code, wall_s, cpu_s, failed=failed)
                if over:
                    self._tell(store.settle(cell), cells)
            if failed:
                self.failed |= {cell.id: policy.shell_code(code) for cell in job.cells}
                log = last_lines(job.folder / "log.txt")
                self.say(f"{name(job.cells)} failed with exit {policy.shell_code(code)}:\n{log}")
            elif verdict is not None:
                self.say(f"{name(job.cells)}: {verdict.reason}")
                self._begin(job, child.claims, child.slot)
                child.claims = []
        finally:
            child.release()

    def _tell(self, row: Row, cells: Sequence[Cell]) -> None:
        done = sum(self.store.row(cell) is not None for cell in cells)
        metric = self.store.study.metric
        value = f"{metric} {row.values[metric]:.5g}" if row.status == "done" and metric in row.values else row.status
        fold = fold_words(self.store.study, row.overrides)
        left = remaining_s(self.store, cells, self.processes)
        to_go = f"; about {status.span(left)} to go" if left and done < len(cells) else ""
        self.say(
            f"[{done}/{len(cells)}] {row.variant} seed {row.seed}{fold}: {value} in {status.span(row.wall_s)}{to_go}"
        )

    def _leave(self) -> None:
        """Ask the runs to save and leave; exit 75."""
        self.say(f"stopping: {len(self._children)} runs are saving")
        deadline = time.monotonic() + self.grace_s
        for child in self._children:
            _signal(child, signal.SIGTERM)
        while self._children and time.monotonic() < deadline:
            self._reap(())
            time.sleep(POLL_S)
        raise Preempted("the study was stopped; the same command continues")

    def _kill(self) -> None:
        for child in self._children:
            _signal(child, signal.SIGKILL)
            child.process.wait()
            child.release()
        self._children = []


def _signal(child: _Child, number: int) -> None:
    try:
        os.killpg(child.process.pid, number)
    except ProcessLookupError:
        pass


def _cores(processes: int) -> list[set[int] | None]:
    """The cores of each slot: equal shares, or all of them where there are fewer cores than slots."""
    if processes < 1:
        raise InputError(f"--processes {processes} must be at least 1")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = len(cores) // processes
    if processes == 1 or not share:
        return [None] * processes
    return [set(cores[n * share : (n + 1) * share]) for n in range(processes)]


def name(cells: Sequence[Cell]) -> str:
    """For a person: variant, seed and what else is set; of several, the first and how many."""
    cell = cells[0]
    extra = "".join(f" {leaf}={value}" for leaf, value in cell.extra.items())
    more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
    return f"{cell.variant} seed {cell.seed}{extra}{more}"


def last_lines(path: Path, count: int = 5) -> str:
    """The end of a log, indented."""
    lines = [line.rstrip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-count:])


def seconds(store: Store, cell: Cell, finished: Sequence[Row]) -> float | None:
    """What a cell costs, from finished cells: those of its variant, or else of any."""
    own = [row.wall_s for row in finished if row.variant == cell.variant] or [row.wall_s for row in finished]
    return sum(own) / len(own) if own else None


def remaining_s(store: Store, cells: Sequence[Cell], processes: int) -> float | None:
    """Estimated wall time until all cells are there; None before the first is."""
    finished = store.rows(cells, failed=False)
    known = {row.cell for row in finished}
    left = [seconds(store, cell, finished) for cell in cells if cell.id not in known]
    return None if None in left else sum(left) / max(1, min(processes, len(left)))
