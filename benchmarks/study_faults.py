"""A study of 2x2 variants and 3 seeds, killed at random five times, against the same one left alone.

    python -m benchmarks.study_faults [--trials N]

Each kill comes when the study has gone a random share of its way. Kinds, in turn: SIGKILL to the runner and its
runs (a power cut), SIGKILL to the runner alone (its runs go on), SIGTERM to the runner (it must leave with 75, or
with 0 where that was its end).
After the fifth the study is started once more and must end. Passes when every cell's final state and metric equal,
bit for bit, those of the unbroken study; when no cell is started after it was done; and when a kill costs no more
than a restart of what was under way. In odd trials three cells are trained as lanes of one program. A trial is
a function of its number, and those in results/study_faults.json are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "study_faults.json"
PROCESSES, KILLS, CELLS, STEPS = 2, 5, 12, 1200
KINDS = ("kill all", "kill the runner", "ask the runner")
STUDY = """
def get_study():
    return dict(
        name="faults", title="a study to be killed", source="none", seeds=(0, 1, 2), metric="validation/loss",
        base=dict(
            steps=1200, batch_size=128, model=dict(name="linear"), objective=dict(name="classification"),
            optimizer=dict(name="sgd", lr=0.1), schedule=dict(name="cosine"), data=dict(name="table", source="digits"),
            eval=dict(batch_size=360, every=600), checkpoint=dict(every=100), log=dict(every=100, tensorboard=False),
        ),
        grid={"optimizer.lr": (0.1, 0.5), "optimizer.name": ("sgd", "momentum")},
        mode="min", baseline="lr=0.1,name=sgd", budget_minutes=5,
    )
"""


def start(file: Path, workdir: Path, together: int = 1) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "bigmodel_jax.cli", "study", "run", str(file), "--workdir", str(workdir),
        "--processes", str(PROCESSES), "--together", str(together),
    ]  # fmt: skip
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def runs(workdir: Path) -> list[int]:
    """Processes that train below `workdir`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0") if folder.name.isdigit() else []
        except OSError:
            continue
        if "train" in words and any(word.startswith(f"{workdir}/") for word in words):
            found.append(int(folder.name))
    return found


def progress(workdir: Path) -> float:
    """Share of all steps that were ever reported, from 0 to 1."""
    steps = 0
    for path in workdir.glob("cells/*/metrics.jsonl"):
        found = [int(step) for step in re.findall(r'"step": (\d+)', path.read_text())]
        steps += max(found, default=0)
    return steps / (CELLS * STEPS)


def listens(pid: int) -> bool:
    """Whether a process handles SIGTERM by now; while it still imports there is nothing to be stopped."""
    try:
        found = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return False
    return bool(int(found[1], 16) >> (signal.SIGTERM - 1) & 1)


def broken(kind: str, runner: subprocess.Popen, workdir: Path, share: float) -> str:
    """Break the study once it has come so far; what went wrong with that, "" for nothing."""
    while runner.poll() is None and (progress(workdir) < share or not listens(runner.pid)):
        time.sleep(0.05)
    if runner.poll() is not None:
        return f"the study ended with {runner.returncode} before the kill"
    runner.send_signal(signal.SIGTERM if kind == "ask the runner" else signal.SIGKILL)
    for pid in runs(workdir) if kind == "kill all" else ():
        os.kill(pid, signal.SIGKILL)
    code = runner.wait(timeout=300)
    wanted = 75 if kind == "ask the runner" else -signal.SIGKILL
    over = code == 0 and len(list(workdir.glob("cells/*/row.json"))) == CELLS  # it was asked as it came to its end
    return "" if code == wanted or over else f"after '{kind}' the runner left with {code}, not {wanted}"


def table(workdir: Path) -> dict[str, list]:
    """{cell: [variant, seed, metric, hash of the final state]}"""
    out = {}
    for path in sorted(workdir.glob("cells/*/row.json")):
        row, result = json.loads(path.read_text()), json.loads((path.parent / "result.json").read_text())
        out[row["cell"]] = [row["variant"], row["seed"], row["values"]["validation/loss"], result["state_hash"]]
    return out


def starts(workdir: Path) -> tuple[int, int]:
    """(starts of runs, starts of runs that were done already)"""
    count = again = 0
    for path in workdir.glob("cells/*/attempts.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        times = [line["start"] for line in lines if "start" in line]
        count += len(times)
        again += sum(at > (path.parent / "result.json").stat().st_mtime for at in times)
    return count, again


def trial(number: int, file: Path, folder: Path, wanted: dict[str, list]) -> dict:
    rng = random.Random(number)
    shares = sorted(round(rng.uniform(0.0, 0.95), 3) for _ in range(KILLS))
    workdir = folder / f"broken{number}"
    wrong, kills, together = [], [], (1, 3)[number % 2]
    for turn in range(KILLS):
        kind, share = KINDS[(number + turn) % len(KINDS)], shares[turn]
        problem = broken(kind, start(file, workdir, together), workdir, share)
        kills.append([kind, share, len(list(workdir.glob("cells/*/result.json")))])
        wrong += [problem] if problem else []
    code = start(file, workdir, together).wait(timeout=1800)
    count, again = starts(workdir)
    wrong += [f"the last start ended with {code}"] if code else []
    wrong += [f"{again} cells were started after they were done"] if again else []
    wrong += ["another table"] if table(workdir) != wanted else []
    wrong += [f"{count} starts"] if count > CELLS + KILLS * PROCESSES * together else []
    return {"together": together, "kills": kills, "starts": count, "wrong": wrong, "passed": not wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=2)
    args = parser.parse_args()
    done = json.loads(RESULTS.read_text())["trials"] if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "configs" / "faults.py"
        file.parent.mkdir()
        file.write_text(STUDY)
        wanted: dict[str, list] = {}
        for number in range(args.trials):
            if str(number) in done:
                continue
            if not wanted:
                if start(file, folder / "unbroken").wait(timeout=1800):
                    raise SystemExit((folder / "unbroken.log").read_text())
                wanted = table(folder / "unbroken")
            done[str(number)] = trial(number, file, folder, wanted)
            print(number, json.dumps(done[str(number)]), flush=True)
            if not done[str(number)]["passed"]:
                print((folder / f"broken{number}.log").read_text())
            passed = sum(each["passed"] for each in done.values())
            summary = {"cells": CELLS, "processes": PROCESSES, "passed": passed, "trials": done}
            RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    if not all(each["passed"] for each in done.values()):
        raise SystemExit("benchmarks.study_faults: FAILED")


if __name__ == "__main__":
    main()
