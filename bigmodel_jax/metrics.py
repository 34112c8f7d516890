"""What a run says about itself: metrics.jsonl is the truth, TensorBoard files mirror it.

One JSON object a line, always with "step" (steps finished when it was written) and "time" (Unix
seconds); what is not a row of training metrics has "event" ("eval", "bad_step", ...) and may have
"name". JSON has no NaN: non-finite numbers are the strings "NaN",
"Infinity" and "-Infinity", which `read` turns back. On object stores, which cannot append, the
lines are spread over metrics-00000.jsonl, metrics-00001.jsonl, ...
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from bigmodel_jax import atomic, events
from bigmodel_jax.parallel import hosts

RESERVED = ("step", "event", "name", "time")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
WINDOW = 50  # steps over which speeds are averaged
_SEGMENT_ROWS = 512  # on an object store, lines kept back until a segment is worth writing


def encode(value: Any) -> Any:
    """A JSON value: numpy scalars and arrays as plain ones, non-finite floats as strings."""
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return encode(np.asarray(value).tolist())


def decode(value: Any) -> Any:
    """Inverse of `encode` for non-finite floats."""
    if isinstance(value, dict):
        return {k: decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [decode(v) for v in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def read(workdir: Any, event: str | None = None) -> list[dict[str, Any]]:
    """Rows of a run, in order: all, those of one event, or with "" those of training metrics.

    A torn last line is left out.
    """
    rows = [row for path in _files(epath.Path(workdir)) for row, _ in _lines(path)]
    return [decode(row) for row in rows if event in (None, row.get("event", ""))]


def _files(workdir: epath.Path) -> list[epath.Path]:
    one = workdir / "metrics.jsonl"
    return ([one] if one.exists() else []) + sorted(workdir.glob("metrics-*.jsonl"))


def _lines(path: epath.Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a block of zeros, as a power cut leaves behind
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row, line + b"\n"


class Log:
    """The metrics of one run. Append only, except that a resume cuts it to the restored step.

    Args:
      workdir: local directory or URL. tensorboard: also write event files, in workdir/tensorboard.
      enabled: False writes nothing (processes other than 0).
      segmented: numbered segments instead of one file; default for URLs.
    """

    def __init__(self, workdir: Any, *, tensorboard: bool = True, enabled: bool = True, segmented: bool | None = None):
        self.workdir = epath.Path(workdir)
        self.enabled = enabled
        self._segmented = "://" in str(workdir) if segmented is None else segmented
        self._mirror = self.workdir / "tensorboard" if tensorboard and enabled else None
        self._file: Any = None
        self._events: Any = None
        self._held: list[bytes] = []
        self._held_events: list[bytes] = []
        self._opened = 0
        self._found: dict[tuple[int, str, str], dict[str, Any]] = {}

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def truncate(self, step: int) -> int:
        """Forget rows after `step`, torn lines included; returns how many were dropped.

        Rows of step `step` itself are kept: its evaluation belongs to the restored state.
        """
        self.close()
        self._found.clear()
        dropped = 0
        for path in _files(self.workdir):
            content = path.read_bytes()
            kept = []
            for row, line in _lines(path):
                if row["step"] <= step:
                    kept.append(line)
                    self._remember(row)
            dropped += len([x for x in content.split(b"\n") if x]) - len(kept)
            if self.enabled and b"".join(kept) != content:
                self._replace(path, b"".join(kept))
        if self._mirror is not None and self._mirror.exists():
            self._emit(events.restart(step + 1))
        return dropped

    def _replace(self, path: epath.Path, content: bytes) -> None:
        if not content:
            path.unlink()
            return
        atomic.write(path, content)

    def write(self, step: int, row: Mapping[str, Any], *, event: str = "", name: str = "") -> None:
        """Append one row of numbers and mirror its scalars to TensorBoard.

        Raises:
          ValueError: a key of `row` is one of step, event, name, time.
        """
        if not self.enabled:
            return
        now = time.time()
        full = self._append(step, event, name, row, now)
        if self._mirror is not None:
            prefix = "/".join(part for part in (event or "train", name) if part)
            numbers = {
                f"{prefix}/{key}": float(decode(value))
                for key, value in full.items()
                if key not in RESERVED and _is_number(decode(value))
            }
            if numbers:
                self._emit(events.scalars(step, numbers, now))

    def event(self, step: int, event: str, values: Mapping[str, Any], *, name: str = "") -> None:
        """Append a row of any JSON values (an evaluation, a bad step, the ids of a batch)."""
        self.write(step, values, event=event, name=name)

    def find(self, step: int, event: str, name: str = "") -> dict[str, Any] | None:
        """Values of the row of that step, event and name, or None; the same on every process."""
        found = self._found.get((step, event, name))
        there = bool(hosts.from_first(int(found is not None)))
        return (found or {}) if there else None

    def history(self, event: str, name: str = "") -> list[tuple[int, dict[str, Any]]]:
        """(step, values) of every row of that event and name, by step. Complete on process 0 only."""
        rows = [(step, values) for (step, e, n), values in self._found.items() if (e, n) == (event, name)]
        return sorted(rows, key=lambda row: row[0])

    def _append(self, step: int, event: str, name: str, values: Mapping[str, Any], now: float) -> dict[str, Any]:
        clash = [key for key in RESERVED if key in values]
        if clash:
            raise ValueError(f"metric names {clash} are taken by the row itself")
        row: dict[str, Any] = {"step": int(step), "time": round(now, 3)}
        row |= {"event": event} if event else {}
        row |= {"name": name} if name else {}
        row |= encode(values)
        self._remember(row)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self._segmented:
            self._held.append(line)
            if len(self._held) >= _SEGMENT_ROWS:
                self.flush()
        else:
            if self._file is None:
                self._file = open(self.workdir / "metrics.jsonl", "ab")
            self._file.write(line)
            self._file.flush()  # in the kernel: a killed process loses nothing
        return row

    def _remember(self, row: Mapping[str, Any]) -> None:
        if row.get("event", "batch") != "batch":  # the ledger is long, and nobody looks it up
            values = {k: v for k, v in row.items() if k not in RESERVED}
            self._found[row["step"], row["event"], row.get("name", "")] = decode(values)

    def _emit(self, data: bytes) -> None:
        if self._segmented:
            self._held_events.append(data)
            return
        if self._events is None:
            self._mirror.mkdir(parents=True, exist_ok=True)
            self._events = open(self._mirror / events.file_name(self._opened), "ab")
            self._opened += 1
            self._events.write(events.header())
        self._events.write(data)

    def flush(self) -> None:
        """Bring everything to the disk (or the store): what a checkpoint may rely on."""
        for file in (self._file, self._events):
            if file is not None:
                file.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._held:
            taken = [int(p.stem.split("-")[1]) for p in self.workdir.glob("metrics-*.jsonl")]
            number = max(taken, default=-1) + 1
            (self.workdir / f"metrics-{number:05d}.jsonl").write_bytes(b"".join(self._held))
            self._held = []
        if self._held_events:
            self._mirror.mkdir(parents=True, exist_ok=True)
            path = self._mirror / events.file_name(self._opened)
            path.write_bytes(events.header() + b"".join(self._held_events))
            self._held_events, self._opened = [], self._opened + 1

    def close(self) -> None:
        """Flush and close; the log may be written to again."""
        self.flush()
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = self._events = None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Clock:
    """Where the wall time of a run goes, and how fast it is.

    Spans are exclusive: time in an inner span is not counted in the outer one, so that spans and
    "other" add up to the wall time. Goodput is the share spent in "step". One thread only.
    """

    def __init__(self, now: Any = time.perf_counter):
        self._now = now
        self.began = now()
        self._since = self.began
        self._open: list[str] = []
        self._total: dict[str, float] = {}
        self._marks: dict[str, float] = {}
        self.steps = self.examples = 0
        self._recent: deque[tuple[int, int, float]] = deque(maxlen=WINDOW + 1)
        self.tokens_per_example = self.flops_per_example = 0.0
        self.peak: float | None = None

    def describe(
        self, *, tokens_per_example: float = 0.0, flops_per_example: float = 0.0, peak: float | None = None
    ) -> None:
        """Say what an example is worth: tokens, training FLOPs, and the FLOP/s of all devices."""
        self.tokens_per_example = tokens_per_example
        self.flops_per_example = flops_per_example
        self.peak = peak

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block under `name`."""
        self._settle()
        if not self._recent and name in ("step", "input"):
            self._recent.append((self.steps, self.examples, self._in_training()))
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        now = self._now()
        name = self._open[-1] if self._open else "other"
        self._total[name] = self._total.get(name, 0.0) + now - self._since
        self._since = now

    def mark(self, name: str) -> None:
        """Remember when something happened for the first time, in seconds since the start."""
        self._marks.setdefault(name, self._now() - self.began)

    def count(self, examples: int) -> None:
        """One more step is finished, of that many examples."""
        self._settle()
        self.steps += 1
        self.examples += int(examples)
        self._recent.append((self.steps, self.examples, self._in_training()))

    def _in_training(self) -> float:
        return sum(self._total.get(name, 0.0) for name in ("step", "input", "other"))

    def rates(self) -> dict[str, float]:
        """Speed over the last steps: step_s, examples_per_s, tokens_per_s, mfu (where known).

        Time in preparation, compilation, checkpoints and evaluation is left out; waiting for input
        is not.
        """
        if not self._recent:
            return {}
        (steps, examples, began), (last, total, until) = self._recent[0], self._recent[-1]
        steps, examples, seconds = last - steps, total - examples, until - began
        if steps <= 0 or seconds <= 0:
            return {}
        found = {"step_s": seconds / steps, "examples_per_s": examples / seconds}
        if self.tokens_per_example:
            found["tokens_per_s"] = examples * self.tokens_per_example / seconds
        if self.flops_per_example and self.peak:
            found["mfu"] = examples * self.flops_per_example / seconds / self.peak
        return found

    def summary(self) -> dict[str, Any]:
        """wall_s, seconds per span (they add up to it), goodput, steps, examples, marks (s)."""
        self._settle()
        wall = sum(self._total.values())
        goodput = self._total.get("step", 0.0) / wall if wall else 0.0
        return {
            "wall_s": wall,
            "seconds": dict(sorted(self._total.items())),
            "goodput": goodput,
            "steps": self.steps,
            "examples": self.examples,
            "marks": dict(self._marks),
        }
