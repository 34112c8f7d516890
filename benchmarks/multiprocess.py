"""Faults of a job of several processes, injected for real: it recovers, and ends with the same bits.

    python -m benchmarks.multiprocess [--row NAME ...] [--processes 2 4] [--trials 3] [--answers]

A tiny decoder is trained by `launch local` on four simulated devices, saving every few steps. Each
trial starts N processes, waits for a step, injects its fault, lets the supervisor do its work, and
compares the hash of the final state with that of an unbroken run of as many processes. (Sums over
four devices add up in another order inside one process than between two: other last bits.)
--answers compares what `eval` and `generate` say of a finished run in one process and in several.
Resumable: results/multiprocess.json is written after every trial, trials that are in it are skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigmodel_jax import tree
from bigmodel_jax.launch.supervisor import Attempt, Job, Supervisor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "multiprocess.json"
DEVICES, STEPS, EVERY = 4, 30, 5
START_S, GRACE_S = 10, 15.0

CONFIG = """
def get_config():
    return {{
        "seed": 3, "steps": {steps}, "batch_size": 8, "eval": {{"batch_size": 8}},
        "model": {{"name": "decoder", "num_layers": 2, "embed_dim": 32, "num_heads": 2, "max_length": 32}},
        "objective": {{"name": "causal_lm"}},
        "optimizer": {{"name": "adamw", "lr": 3e-3}}, "schedule": {{"name": "cosine", "warmup": 3}},
        "data": {{"name": "text", "corpus": {corpus!r}, "tokenizer": "bytes", "length": 32, "cache": {cache!r}}},
        "log": {{"every": 1, "tensorboard": False}}, "checkpoint": {{"every": {every}}},
        "mesh": {{"fsdp": 2}}, "runtime": {{"watchdog_s": 60.0}},
    }}
"""
# Process 1 of the first start never gets anywhere; every other start is the job itself.
LATE = """
import os, pathlib, sys, time
marker = pathlib.Path(sys.argv[1])
if os.environ.get("BIGMODEL_PROCESS_ID") == "1" and not marker.exists():
    marker.touch()
    time.sleep(3600)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def write_config(folder: Path, steps: int = STEPS) -> Path:
    """A corpus and a config file in `folder`; the file."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        words = " ".join(str((number * 7919 + n * 104729) % 9973) for n in range(60))
        (corpus / f"{number}.txt").write_text(words + "\n")
    path = folder / "configs" / "job.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONFIG.format(steps=steps, every=EVERY, corpus=str(corpus), cache=str(folder / "cache")))
    return path


def job(config: Path, workdir: Path, processes: int, late: bool = False) -> Job:
    run = ["-m", "bigmodel_jax.cli", "train", "--config", str(config), "--workdir", str(workdir)]
    command = [sys.executable, "-c", LATE, str(workdir / "late"), *run] if late else [sys.executable, *run]
    env = {
        "JAX_PLATFORMS": "cpu", "BIGMODEL_START_S": str(START_S * processes), "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
    }  # fmt: skip
    workdir.mkdir(parents=True, exist_ok=True)
    return Job(command, processes, workdir, env, grace_s=GRACE_S)


def at_step(workdir: Path, step: int, stop: threading.Event) -> bool:
    """Wait until a row of `step` is written; False if the job ended before."""
    path = workdir / "metrics.jsonl"
    while not stop.wait(0.01):
        text = path.read_text() if path.exists() else ""
        if f'{{"step": {step},' in text:
            return True
    return False


def _to(*indices: int, number: int) -> Callable[[Attempt], None]:
    return lambda attempt: [os.kill(attempt.processes[i].pid, number) for i in indices]


def _to_all(number: int) -> Callable[[Attempt], None]:
    return lambda attempt: [os.kill(process.pid, number) for process in attempt.processes]


FAULTS: dict[str, Callable[[Attempt], None] | None] = {
    "kill worker": _to(1, number=signal.SIGKILL),
    "kill coordinator": _to(0, number=signal.SIGKILL),
    "kill all": _to_all(signal.SIGKILL),
    "sigterm one": _to(1, number=signal.SIGTERM),
    "sigterm all": _to_all(signal.SIGTERM),
    "sigstop one": _to(1, number=signal.SIGSTOP),
    "never starts": None,
}


def final_hash(workdir: Path) -> str:
    return json.loads((workdir / "result.json").read_text())["state_hash"]


def unbroken(config: Path, folder: Path, processes: int) -> str:
    """State hash of the run with the same processes and nothing injected."""
    workdir = folder / f"unbroken-{processes}"
    assert Supervisor(job(config, workdir, processes), print).run() == 0
    return final_hash(workdir)


def trial(fault: str, processes: int, step: int, config: Path, workdir: Path) -> dict[str, Any]:
    """One injected fault. From it, detected_s: until a process left (for a kill, the one that was killed); recovery_s:
    until the next start, or the end."""
    said: list[str] = []
    supervisor = Supervisor(job(config, workdir, processes, late=fault == "never starts"), said.append)
    ended, times = threading.Event(), {}

    def inject() -> None:
        if at_step(workdir, step, ended):
            attempt = supervisor.current
            FAULTS[fault](attempt)
            times["fault"] = time.monotonic()
            while supervisor.attempts < 2 and not ended.wait(0.05):
                if "left" not in times and any(code is not None for code in attempt.codes()):
                    times["left"] = time.monotonic()
            times["again"] = time.monotonic()

    began = time.monotonic()
    thread = threading.Thread(target=inject) if FAULTS[fault] else None
    if thread:
        thread.start()
    code = supervisor.run()
    ended.set()
    if thread:
        thread.join()
    since = {name: round(at - times["fault"], 1) for name, at in times.items()}
    return {
        "code": code, "starts": supervisor.attempts, "hash": final_hash(workdir) if code == 0 else "",
        "detected_s": since.get("left"), "recovery_s": since.get("again"),
        "seconds": round(time.monotonic() - began, 1), "said": said,
    }  # fmt: skip


def answers(config: Path, workdir: Path, processes: int) -> dict[str, Any]:
    """What `bigmodel eval` and `bigmodel generate` say of a finished run, as a job of so many processes."""
    out = workdir.parent / f"{workdir.name}-asked-by-{processes}"
    asked = {
        "eval": ["--json", "--out", str(out / "report")],
        "generate": ["--json", "--length", "24", "--temperature", "0.7", "--prompt", "17 4", "--prompt", "99"],
    }
    found = {}
    for verb, options in asked.items():
        one = job(config, out / verb, processes)
        command = [sys.executable, "-m", "bigmodel_jax.cli", verb, "--workdir", str(workdir), *options]
        assert Supervisor(dataclasses.replace(one, command=command), lambda line: None).run() == 0, out
        said = (out / verb / "logs" / "process-0.log").read_text()
        found[verb] = [json.loads(line) for line in said.splitlines() if line.startswith('{"prompt')]
    found["eval"] = json.loads((out / "report" / "eval.json").read_text())["eval"]
    return found


def apart(a: Any, b: Any) -> float:
    """The largest relative difference of numbers at the same place; infinite where anything else differs."""
    a, b = tree.flatten(a), tree.flatten(b)
    floats = {path for path, leaf in a.items() if isinstance(leaf, float)}
    if a.keys() != b.keys() or any(a[path] != b[path] for path in a.keys() - floats):
        return math.inf
    return max(abs(a[path] - b[path]) / max(abs(a[path]), 1e-30) for path in floats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", action="append", choices=list(FAULTS))
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--answers", action="store_true", help="instead: evaluation and generation as in one process")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder)
        if args.answers:
            workdir = folder / "answers"
            assert Supervisor(job(config, workdir, 2), print).run() == 0
            one = answers(config, workdir, 1)
            for processes in args.processes:
                found = apart(one, answers(config, workdir, processes))
                results[f"eval and generate, 1 and {processes} processes"] = {"apart": found, "alone": one}
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print("eval and generate", processes, f"differ by {found:.1e}", flush=True)
            return
        wanted = {processes: unbroken(config, folder, processes) for processes in args.processes}
        for fault in args.row or FAULTS:
            for processes in args.processes:
                row = results.setdefault(f"{fault}, {processes} processes", [])
                for number in range(len(row), args.trials):
                    workdir = folder / "trial"
                    found = trial(fault, processes, 7 + 5 * number, config, workdir)
                    found["equal"] = found.pop("hash") == wanted[processes]
                    row.append(found)
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                    print(fault, processes, {k: v for k, v in found.items() if k != "said"}, flush=True)
                    if not found["equal"]:
                        print("\n".join(found["said"]))
                    shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
