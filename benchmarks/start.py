"""Seconds from starting the command to its first finished steps, with and without a warm cache.

    python benchmarks/start.py [--repeats 3]

Runs lm_tiny on a prepared corpus in fresh processes, cold (no compiled programs) and warm in turn,
until metrics.jsonl has its first row, which is written while the second step runs. Writes
results/start.json with the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"cold": 6.0, "warm": 3.0}


def seconds(cache: Path, workdir: Path) -> float:
    """One start, ended as soon as the first row is there."""
    command = [
        sys.executable, "-m", "bigmodel_jax.cli", "train", "--config", str(ROOT / "configs" / "lm_tiny.py"),
        "--workdir", str(workdir), "--config.log.every=1",
    ]  # fmt: skip
    rows = workdir / "metrics.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "BIGMODEL_CACHE": str(cache)}, stderr=subprocess.DEVNULL)
    while not (rows.exists() and rows.stat().st_size):
        if process.poll() is not None:
            raise SystemExit(f"the run ended with code {process.returncode}")
        time.sleep(0.01)
    took = time.perf_counter() - began
    process.kill()
    process.wait()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        seconds(cache, Path(scratch) / "prepare")
        for repeat in range(repeats):
            shutil.rmtree(cache / "compiled")
            for kind in times:
                times[kind].append(seconds(cache, Path(scratch) / f"{kind}{repeat}"))
    found = {kind: statistics.median(values) for kind, values in times.items()}
    for kind, value in found.items():
        print(f"{kind}: {value:.2f} s to the first row (goal {GOALS[kind]:.0f} s)")
    row = {"median_s": found, "all_s": times, "goal_s": GOALS, "python": sys.version.split()[0]}
    (ROOT / "results" / "start.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
