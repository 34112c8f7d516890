"""`bigmodel status` on directories made by hand: each state, the arithmetic, and damage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bigmodel_jax import cli, status
from bigmodel_jax.errors import InputError

START = 1_700_000_000


def run(folder: Path, steps: list[int], *, every_s: float = 2.0, total: int = 100) -> Path:
    """A run that took `every_s` per step from START on, with a row at each of `steps`."""
    (folder / "config.json").write_text(json.dumps({"steps": total}))
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(START))
    env = {"time": began, "host": "a", "device_kind": "cpu", "devices": 4, "processes": 2}
    (folder / "env.json").write_text(json.dumps({"starts": [env]}))
    rows = [{"step": s, "time": START + every_s * s, "loss": 5.0 / s, "tokens_per_s": 1000.0} for s in steps]
    rows.append({"step": steps[-1], "time": rows[-1]["time"], "event": "eval", "name": "validation", "nll": 2.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_running_job(tmp_path):
    found = status.read(str(run(tmp_path, [10, 20, 30, 40])), now=START + 85)
    assert found["state"] == "running" and found["step"] == 40 and found["checkpoint"] == -1
    assert found["step_s"] == pytest.approx(2.0) and found["eta_s"] == pytest.approx(120.0)
    assert found["goodput"] == pytest.approx(1.0)
    text = "\n".join(status.show(found))
    for part in ("running: step 40 of 100 (40%); about 2 min to go", "2000 ms per step, 1,000 tokens/s", "nll 2.5"):
        assert part in text
    assert "4 x cpu in 2 processes, first on a" in text


def test_time_nobody_ran_lowers_goodput_and_not_the_eta(tmp_path):
    run(tmp_path, [10, 20, 30, 40])
    later = [{"step": s, "time": START + 1000 + 2.0 * s, "loss": 0.1} for s in (50, 60)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in later)
    found = status.read(str(tmp_path), now=START + 1125)
    assert found["eta_s"] == pytest.approx(80.0)
    assert found["goodput"] == pytest.approx(120 / 1120)


def test_silent_finished_starting(tmp_path):
    run(tmp_path, [10, 20])
    assert status.read(str(tmp_path), now=START + 40 + 119)["state"] == "running"
    silent = status.read(str(tmp_path), now=START + 40 + 7200)
    assert silent["state"] == "silent" and "no row for 2 h" in status.show(silent)[0]
    (tmp_path / "result.json").write_text("{}")
    assert status.read(str(tmp_path))["state"] == "finished"
    (tmp_path / "result.json").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "env.json").write_text("{broken")
    found = status.read(str(tmp_path))
    assert found["state"] == "starting" and "step 0 of 100" in status.show(found)[0]


def test_not_a_run(tmp_path):
    with pytest.raises(InputError, match="not a run"):
        cli.run(["status", str(tmp_path)])
