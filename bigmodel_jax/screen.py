"""What a person sees: a header with memory per device, a progress bar, results.

On a terminal a bar with loss, tokens/s, MFU and the time left; in a log file one line now and then.
Nothing here is read by a program: metrics.jsonl and result.json are for that.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bigmodel_jax import tree


def _short(number: float, units: Sequence[str]) -> str:
    *small, largest = units
    for unit in small:
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{largest}"


def _size(number: float) -> str:
    return _short(number, (" B", " KB", " MB", " GB", " TB"))


def count(number: float) -> str:
    return _short(number, ("", "K", "M", "B", "T"))


def device_bytes(abstract: Any) -> int:
    """Bytes of a sharded tree on one device."""
    total = 0
    for leaf in jax.tree.leaves(abstract):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        size = 1
        for length in shape:
            size *= length
        total += size * leaf.dtype.itemsize
    return total


class _Once(logging.Handler):
    """Shows each message of the package's loggers once: programs are traced more often than that."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__(logging.INFO)
        self._say, self._said = say, set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            self._say(text)


class Screen:
    """Progress of one run on stderr and stdout. Only process 0 speaks."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=not _first_process())
        self.live = self.console.is_terminal
        self.bar: Progress | None = None
        self.task: Any = None
        self.clock: Any = None
        self.steps = 0
        self.last_line = 0.0

    def __enter__(self) -> Screen:
        self._logger = logging.getLogger("bigmodel_jax")
        self._handler = _Once(self.say)
        self._logger.addHandler(self._handler)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False  # a library imported later may print the root's records too
        return self

    def __exit__(self, *_: Any) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.propagate = True
        self._logger.setLevel(logging.NOTSET)
        self._close_bar()

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _open_bar(self, text: str, total: float, done: float = 0.0) -> None:
        self._close_bar()
        columns = [
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        ]  # fmt: skip
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.task = self.bar.add_task(text, total=max(total, 1), completed=done, note="")
        self.bar.start()

    def say(self, line: str) -> None:
        """One line above the bar."""
        self.console.print(line, markup=False, emoji=False, soft_wrap=True)

    def preparing(self, what: str, done: float, total: float) -> None:
        """Progress of data preparation."""
        if not self.live:
            return
        if self.bar is None:
            self._open_bar(what, total)
        self.bar.update(self.task, description=what, completed=done, total=max(total, 1))

    def start(self, exp: Any, step: int, state: Any, clock: Any) -> None:
        """Header of a run: what it is, and what it holds on each device before the first step."""
        self._close_bar()
        self.clock, self.steps = clock, exp.run.steps
        device = jax.devices()[0]
        mesh = " x ".join(f"{axis} {size}" for axis, size in exp.mesh.shape.items() if size > 1) or "one device"
        self.say(
            f"{exp.config['model']['name']}: {count(tree.count(state['params']))} parameters on "
            f"{exp.mesh.size} x {device.device_kind} ({mesh}); state {_size(device_bytes(state))} per device"
        )
        if step < self.steps:
            self.say(f"steps {step} to {self.steps}; compiling" if step else f"{self.steps} steps; compiling")
            if self.live:
                self._open_bar("train", self.steps, step)

    def advance(self, done: int, row: dict[str, float]) -> None:
        """After a step whose metrics have arrived."""
        rates = self.clock.rates()
        note = f"loss {row['loss']:.3f}"
        if rates.get("tokens_per_s"):
            note += f"  {count(rates['tokens_per_s'])} tok/s"
        elif rates.get("examples_per_s"):
            note += f"  {count(rates['examples_per_s'])} examples/s"
        if rates.get("mfu") is not None:
            note += f"  MFU {100 * rates['mfu']:.1f}%"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif time.monotonic() - self.last_line > 10 or done in (1, self.steps):
            self.last_line = time.monotonic()
            self.say(f"step {done}/{self.steps}  {note}")

    def evaluated(self, step: int, name: str, metrics: dict[str, float]) -> None:
        """Results of one evaluation set."""
        order = ("loss", "bits_per_byte", "perplexity", "accuracy", "top5")
        shown = "  ".join(f"{key} {metrics[key]:.4f}" for key in order if key in metrics)
        self.say(f"step {step}: {name}  {shown}")

    def sampled(self, text: str) -> None:
        """A sample, between rules so that it is seen where it begins and ends."""
        self._close_bar()
        self.say("--- sample " + "-" * 49)
        self.say(text)
        self.say("-" * 60)

    def finished(self, workdir: Any, result: dict[str, Any]) -> None:
        """The last line: where everything is, and where the time went."""
        self._close_bar()
        spans = result["time"]["seconds"]
        largest = sorted(spans.items(), key=lambda item: -item[1])
        self.say("time: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in largest if seconds >= 0.1))
        self.say(f"done: {workdir} (result.json, metrics.jsonl, loss.png, checkpoints)")
        sys.stderr.flush()


def _first_process() -> bool:
    """Whether to print; asked before devices exist, so a single process never opens a backend."""
    from jax._src import distributed

    return distributed.global_state.process_id in (0, None)
