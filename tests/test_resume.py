"""2N steps equal N + kill -9 + more, bit for bit; a signal at any moment loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

DRIVE = Path(__file__).parent / "drive.py"
NEVER = ("step", "-1", "SIGKILL")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder shared by the runs of this file: corpora, compiled programs."""
    return tmp_path_factory.mktemp("resume")


def config_file(home: Path, kind: str, **changes) -> Path:
    raw = tiny.raw(kind, home) | {"checkpoint": {"every": 4}} | changes
    path = home / f"{kind}.py"
    path.write_text(f"def get_config():\n    return {raw!r}\n")
    return path


def drive(home: Path, config: Path, workdir: Path, moment=NEVER, *overrides) -> subprocess.CompletedProcess:
    environment = {**os.environ, "BIGMODEL_CACHE": str(home / "cache"), "XLA_FLAGS": ""}
    command = [sys.executable, str(DRIVE), *moment, "train", "--config", str(config), "--workdir", str(workdir)]
    return subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=300)


def result(workdir: Path) -> dict:
    return json.loads((workdir / "result.json").read_text())


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curve(workdir: Path) -> dict[int, float]:
    """{step: loss} of the training rows; each step must be there once."""
    train = [row for row in rows(workdir) if "event" not in row]
    assert [row["step"] for row in train] == list(range(1, len(train) + 1))
    return {row["step"]: row["loss"] for row in train}


@pytest.mark.parametrize("kind", ["decoder", "encoder", "resnet"])
def test_killed_twice_equals_unbroken(kind, home):
    # 1,437 digits, about 180 rows of text: rows per step chosen so that 12 steps cross an epoch.
    batch = {"decoder": 32, "encoder": 32, "resnet": 160}[kind]
    config = config_file(home, kind, batch_size=batch)
    whole, broken = home / f"{kind}-whole", home / f"{kind}-broken"
    done = drive(home, config, whole)
    assert done.returncode == 0, done.stderr
    first = drive(home, config, broken, ("step", "6", "SIGKILL"))
    second = drive(home, config, broken, ("save", "8", "SIGKILL"))
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, -signal.SIGKILL), second.stderr
    last = drive(home, config, broken)
    assert last.returncode == 0, last.stderr
    assert "resuming at step" in last.stderr
    assert result(broken)["state_hash"] == result(whole)["state_hash"]
    assert result(broken)["eval"] == result(whole)["eval"]
    assert curve(broken) == curve(whole)
    if kind == "resnet":  # Control, where it is cheapest: another order of the data is another state.
        other = home / f"{kind}-other"
        assert drive(home, config, other, NEVER, "--config.seed=4").returncode == 0
        assert result(other)["state_hash"] != result(whole)["state_hash"]


@pytest.mark.parametrize("moment", [("step", "5"), ("eval", "6"), ("save", "4"), ("compile", "0")])
def test_sigterm_saves_and_exits_75(moment, home):
    config = config_file(home, "decoder", eval={"batch_size": 8, "every": 6})
    whole = home / "sigterm-whole"
    if not (whole / "result.json").exists():
        assert drive(home, config, whole).returncode == 0
    workdir = home / f"sigterm-{moment[0]}"
    stopped = drive(home, config, workdir, (*moment, "SIGTERM"))
    assert stopped.returncode == 75, stopped.stderr
    assert "the same command continues" in stopped.stderr.splitlines()[-1]
    assert drive(home, config, workdir, NEVER, "--config.runtime.prefetch=5").returncode == 0
    assert result(workdir)["state_hash"] == result(whole)["state_hash"]
    assert curve(workdir) == curve(whole)
    evaluations = [row["step"] for row in rows(workdir) if row.get("event") == "eval"]
    assert evaluations == [6, 12]
