"""Faults of whole runs at full size: killed, asked to stop, fed batches that are not numbers; counted, resumable.

    python -m benchmarks.faults_of_runs [--row NAME ...] [--limit N]

The run is `bigmodel train` of a small decoder with dropout on the text of Python's standard library, in a process of
its own. A trial of the first two rows sends one signal at a random moment between start and end, gives the same
command again, and passes only if the final state hash and the losses of all steps are those of the run that nobody
disturbed. After SIGTERM the run must also have left with code 75 and go on at the very step it had reached. "harmless"
counts signals that came before the run could answer them, or after its end. In the third row batches with a weight of
nan or inf come at random steps of a run inside this process, and its end must be, bit for bit, that of the run without
them. Where a seed of its own gives the same hash, nothing was proved: that is asked first.

Adds to results/faults.json, beside the rows of benchmarks/faults.py.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import faults  # noqa: E402
from bigmodel_jax import experiment, metrics  # noqa: E402
from bigmodel_jax.parallel.feed import global_batch  # noqa: E402
from bigmodel_jax.programs import Programs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs" / "lm_tiny.py")
STEPS = 150
WORDS = [f"--config.{word}" for word in (
    f"steps={STEPS}", "batch_size=4", "model.num_layers=1", "model.embed_dim=32", "model.num_heads=2",
    "model.mlp_dim=64", "model.dropout=0.1", "data.length=64", "data.tokenizer=bytes", "eval.batches=1",
    "checkpoint.every=10", "log.every=1", "log.tensorboard=False", "sample.length=0",
)]  # fmt: skip


ALONE = {**os.environ, "XLA_FLAGS": ""}  # one device; faults.py simulates eight for its own trials


def command(workdir: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "bigmodel_jax.cli", "train", "--config", CONFIG, "--workdir", str(workdir), *WORDS, *more
    ]  # fmt: skip


def finished(workdir: Path, *more: str) -> str:
    """What the command says on its way to the end."""
    done = subprocess.run(command(workdir, *more), capture_output=True, text=True, env=ALONE)
    if done.returncode:
        raise AssertionError(f"ended with {done.returncode}: {done.stderr[-200:]}")
    return done.stderr


def outcome(workdir: Path) -> tuple[str, list[tuple[int, float]]]:
    """(state hash, (step, loss) of every training row)."""
    return json.loads((workdir / "result.json").read_text())["state_hash"], losses(workdir)


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metrics.read(workdir, "")]


@functools.cache
def undisturbed() -> tuple[tuple[str, list[tuple[int, float]]], float]:
    """(outcome, seconds) of the run that nobody disturbs."""
    with tempfile.TemporaryDirectory() as work:
        finished(Path(work) / "warm")
        began = time.monotonic()
        finished(Path(work) / "run")
        seconds, found = time.monotonic() - began, outcome(Path(work) / "run")
        if [step for step, _ in found[1]] != list(range(1, STEPS + 1)):
            raise SystemExit("the undisturbed run has not one row a step")
        finished(Path(work) / "other", "--config.seed=1")
        if outcome(Path(work) / "other")[0] == found[0]:
            raise SystemExit("another seed ends with the same state: the hash proves nothing")
    return found, seconds


def disturbed(number: signal.Signals, rng: np.random.Generator, work: Path) -> str:
    """One signal at a random moment, and the same command again."""
    expected, seconds = undisturbed()
    run = work / "run"
    process = subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ALONE)
    time.sleep(rng.uniform(0.2, seconds))
    process.send_signal(number)
    code, reached, over = process.wait(), len(losses(run)), (run / "result.json").exists()
    said = finished(run)
    if outcome(run) != expected:
        return "another state, or other losses, at the end"
    if over:
        return "harmless"  # it had written its result, and was on its way out
    if number is signal.SIGKILL:
        return "passed"
    if code == -number and not reached:
        return "harmless"  # it was still importing, and had nothing to save
    again = re.search(r"resuming at step (\d+)", said)
    start = int(again.group(1)) if again else 0
    return (
        "passed" if code == 75 and start == reached else f"left with {code} after {reached} steps, went on at {start}"
    )


class Fed:
    """A compiled training step, fed by hand."""

    def __init__(self) -> None:
        config = experiment.resolve(experiment.read(CONFIG), [*WORDS, "--config.guard.limit=1000"])
        self.exp = experiment.build(config, devices=jax.devices()[:1])
        self.programs, self.key = Programs(self.exp), jax.random.key(0)
        self.size = self.exp.run.batch_size
        self.step = self.programs.step(self.size)
        self.good = [self.exp.data.train.batch(n) for n in range(24)]

    def run(self, batches: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """Everything a run is made of, except the guard's count of what it has skipped."""
        state = self.programs.init(self.key)
        for batch in batches:
            rows = functools.partial(_rows, batch)
            state, _ = self.step(
                state, global_batch(rows, self.programs.batch_sharding, self.exp.cut(self.size)), self.key
            )
        return jax.device_get({name: part for name, part in state.items() if name != "guard"})

    @functools.cached_property
    def clean(self) -> dict[str, Any]:
        return self.run(self.good)


def _rows(batch: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value[rows] for name, value in batch.items()}


fed = functools.cache(Fed)


def poisoned(rng: np.random.Generator, work: Path) -> str:
    """Bad batches at random places of a run."""
    batches = list(fed().good)
    for _ in range(int(rng.integers(1, 5))):
        bad = {name: value.copy() for name, value in fed().good[rng.integers(len(fed().good))].items()}
        weights = bad["weights"].reshape(-1)
        weights[rng.integers(weights.size)] = rng.choice([np.nan, np.inf, -np.inf])
        batches.insert(int(rng.integers(len(batches) + 1)), bad)
    return "passed" if faults.equal(fed().run(batches), fed().clean) else "the bad batches have left a trace"


ROWS = {
    "kill -9 of a run": (100, functools.partial(disturbed, signal.SIGKILL)),
    "SIGTERM of a run": (50, functools.partial(disturbed, signal.SIGTERM)),
    "nan or inf in batches": (100, poisoned),
}


if __name__ == "__main__":
    faults.main(ROWS, __doc__.splitlines()[0])
