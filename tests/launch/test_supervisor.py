"""The supervisor with processes that only pretend to train: what it starts, ends and starts again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from bigmodel_jax.launch.supervisor import Job, Supervisor

# Counts its starts in a file, saves a "checkpoint", then behaves as told for this start and process.
WORKER = """
import os, pathlib, signal, sys, time
me, folder = int(os.environ.get("BIGMODEL_PROCESS_ID", 0)), pathlib.Path(sys.argv[1])
start = len(list(folder.glob(f"start-{me}-*")))
(folder / f"start-{me}-{start}").write_text(os.environ.get("BIGMODEL_COORDINATOR", ""))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
for part in ("meta", "state"):
    (folder / "checkpoints" / str(start) / part).mkdir(parents=True, exist_ok=True)
plan = sys.argv[2].split(";")
what = plan[min(start, len(plan) - 1)].split(",")[me]
print("process", me, "start", start, "does", what, flush=True)
if what == "wait":
    time.sleep(60)
elif what == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
elif what.startswith("-"):
    os.kill(os.getpid(), -int(what))
    time.sleep(60)
sys.exit(int(what) if what.isdigit() else 0)
"""


def run(folder: Path, plan: str, processes: int = 2, **options) -> tuple[int, Supervisor, list[str]]:
    said: list[str] = []
    job = Job([sys.executable, "-c", WORKER, str(folder), plan], processes, folder, **options)
    supervisor = Supervisor(job, said.append)
    return supervisor.run(), supervisor, said


def test_done_at_once(tmp_path, capfdbinary):
    code, supervisor, _ = run(tmp_path, "0,0")
    assert (code, supervisor.attempts) == (0, 1)
    addresses = {path.read_text() for path in tmp_path.glob("start-*")}
    assert len(addresses) == 1 and addresses.pop().startswith("127.0.0.1:")
    assert b"process 1 start 0 does 0" in (tmp_path / "logs" / "process-1.log").read_bytes()
    assert b"process 0 start 0" in (tmp_path / "logs" / "process-0.log").read_bytes()
    assert b"process 0 start 0" in capfdbinary.readouterr().out  # process 0 is also on the screen


def test_one_process_needs_no_coordinator(tmp_path):
    assert run(tmp_path, "0", processes=1)[0] == 0
    assert (tmp_path / "start-0-0").read_text() == ""


def test_a_killed_worker_takes_the_rest_along_and_all_start_again(tmp_path):
    began = time.monotonic()
    code, supervisor, said = run(tmp_path, "wait,-9;0,0", grace_s=0.5)
    assert (code, supervisor.attempts) == (0, 2)
    assert time.monotonic() - began < 10
    assert any("[0] have not left" in line for line in said)
    assert (tmp_path / "start-0-0").read_text() != (tmp_path / "start-0-1").read_text()  # a fresh port


def test_a_stopped_process_is_ended_once_its_peer_has_left(tmp_path):
    code, supervisor, _ = run(tmp_path, "134,stop;0,0", grace_s=0.5)
    assert (code, supervisor.attempts) == (0, 2)


def test_exit_2_is_not_retried(tmp_path):
    code, supervisor, _ = run(tmp_path, "2,wait", grace_s=0.3)
    assert (code, supervisor.attempts) == (2, 1)


def test_asked_to_stop_it_forwards_the_signal_once_and_leaves_with_75(tmp_path):
    def ask() -> None:
        while not (tmp_path / "start-1-0").exists():
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    code, supervisor, said = run(tmp_path, "wait,wait")
    thread.join()
    assert (code, supervisor.attempts) == (75, 1), said


def test_a_process_preempted_by_itself_is_started_again(tmp_path):
    code, supervisor, _ = run(tmp_path, "75,75;0,0")
    assert (code, supervisor.attempts) == (0, 2)
