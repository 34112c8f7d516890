"""`bigmodel launch slurm` on a real Slurm: two tasks, preempted twice in mid-run, the same bits in the end.

    launch/slurm_here start /tmp/slurm && source /tmp/slurm/env
    python -m benchmarks.slurm; launch/slurm_here stop /tmp/slurm

The job of benchmarks/multiprocess.py with one task on each of two nodes. `scontrol requeue` hits it after a
few steps, then SIGTERM by `scancel --signal=TERM` (the job requeues itself on 75). It must come back both
times by itself, end as COMPLETED, and its final state must equal that of an unbroken run. Shards that
are not there must fail with 2 and stay failed. Writes results/slurm.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.multiprocess import DEVICES, ROOT, at_step, final_hash, unbroken, write_config

RESULTS = ROOT / "results" / "slurm.json"
BOUND_S = 600.0
STEPS = 80  # a signal at step 17 finds it running, however slow Slurm's commands are


def shell(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def submit(config: Path, workdir: Path, *overrides: str) -> str:
    """Job id of the launched run."""
    command = [
        sys.executable, "-m", "bigmodel_jax.cli", "launch", "slurm", "--config", str(config), "--workdir", str(workdir),
        "--nodes", "2", "--devices-per-process", str(DEVICES // 2), "--grace", "30", f"--env=PYTHONPATH={ROOT}",
        "--sbatch=--mem=1500", *overrides,
    ]  # fmt: skip
    return re.search(r"submitted job (\d+)", shell(*command))[1]


def fields(job: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shell("scontrol", "show", "job", job).split() if "=" in pair)


def wait_for(job: str, states: tuple[str, ...]) -> dict[str, str]:
    """The job's fields once its state is one of `states`; pending after a requeue is cut short."""
    deadline = time.monotonic() + BOUND_S
    while time.monotonic() < deadline:
        found = fields(job)
        if found["JobState"] in states:
            return found
        if found["JobState"] == "PENDING" and found.get("Reason") == "BeginTime":
            # Slurm holds a requeued job back for two minutes; nothing is learnt by waiting. But a node refuses
            # a job for ever that comes back within the second in which it was killed there.
            time.sleep(2)
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True, check=False)
        time.sleep(0.5)
    raise SystemExit(f"job {job} is {fields(job)['JobState']} after {BOUND_S:.0f} s, not {states}")


def preempted_twice(config: Path, workdir: Path) -> dict:
    never = threading.Event()
    job = submit(config, workdir)
    wait_for(job, ("RUNNING",))
    at_step(workdir, 7, never)
    shell("scontrol", "requeue", job)
    began = time.monotonic()
    wait_for(job, ("PENDING",))
    wait_for(job, ("RUNNING",))
    back = time.monotonic() - began
    at_step(workdir, 17, never)
    shell("scancel", "--signal=TERM", job)
    time.sleep(1)
    last = wait_for(job, ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"))
    return {
        "state": last["JobState"], "exit": last["ExitCode"], "restarts": int(last["Restarts"]),
        "starts": len(json.loads((workdir / "env.json").read_text())["starts"]), "back_after_requeue_s": round(back, 1),
    }  # fmt: skip


def main() -> None:
    if "SLURM_CONF" not in os.environ or not shutil.which("sbatch"):
        raise SystemExit("benchmarks.slurm: NOT RUN: no Slurm here; see launch/slurm_here")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder, STEPS)
        wanted = unbroken(config, folder, 2)
        found = preempted_twice(config, folder / "job")
        found["equal"] = (folder / "job" / "result.json").exists() and final_hash(folder / "job") == wanted
        job = submit(config, folder / "bad", "--config.data.shards=/nowhere")
        refused = wait_for(job, ("FAILED", "COMPLETED"))
        found["refused"] = {"state": refused["JobState"], "exit": refused["ExitCode"], "restarts": refused["Restarts"]}
        daemons = Path(os.environ["SLURM_CONF"]).parent.glob("slurm*.log")
        logs = {path.name: path.read_text()[-2000:] for path in (*(folder / "job" / "logs").glob("*.log"), *daemons)}
    print(json.dumps(found, indent=1))
    passed = (
        found["equal"] and found["state"] == "COMPLETED" and found["restarts"] == 2
        and found["refused"] == {"state": "FAILED", "exit": "2:0", "restarts": "0"}
    )  # fmt: skip
    if not passed:
        print("\n".join(f"--- {name}\n{text}" for name, text in logs.items()))
        raise SystemExit("benchmarks.slurm: FAILED")
    found["slurm"] = shell("sinfo", "--version")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
