"""Damage, failing writes, full disks and kills: seen, said, and never at the cost of a good step."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import checkpoint
from bigmodel_jax.checkpoint import Checkpointer
from bigmodel_jax.errors import InputError, RunError
from tests.states import restore, same, small, write


def largest(directory):
    return max((p for p in Path(directory).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(step):
    path = largest(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def zero_page(step):
    path = largest(step)
    data = bytearray(path.read_bytes())
    data[1024:2048] = bytes(1024)
    path.write_bytes(data)


def swap(step):
    other = step.parent / "1"
    (step / "state").rename(step / "x")
    shutil.copytree(other / "state", step / "state")


FAULTS = {
    "bit flip": flip,
    "truncated": lambda step: os.truncate(largest(step), 100),
    "deleted": lambda step: largest(step).unlink(),
    "zero page": zero_page,
    "state of another step": swap,
    "whole other step": lambda step: (shutil.rmtree(step), shutil.copytree(step.parent / "1", step)),
    "no manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "record changed": lambda step: (step / "meta" / "metadata").write_text(
        (step / "meta" / "metadata").read_text().replace("64", "65")
    ),
    "record torn": lambda step: os.truncate(step / "meta" / "metadata", 40),
    "record gone": lambda step: (step / "meta" / "metadata").unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_seen_and_walked_back(tmp_path, fault):
    write(tmp_path)
    assert restore(tmp_path) == (3, [])
    FAULTS[fault](tmp_path / "3")
    step, said = restore(tmp_path)
    assert step == 2 and any("3" in line and "damaged" in line for line in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3.corrupt"]
    assert restore(tmp_path) == (2, [])
    write(tmp_path, [3])  # and training goes on from there
    assert restore(tmp_path)[0] == 3


@pytest.mark.parametrize("ghost", ["empty", "no marker", "unfinished"])
def test_ghosts_are_never_the_latest(tmp_path, ghost):
    write(tmp_path)
    path = tmp_path / ("9" if ghost != "unfinished" else "9.orbax-checkpoint-tmp")
    if ghost == "no marker":
        shutil.copytree(tmp_path / "3", path)
        (path / "commit_success.txt").unlink()
    else:
        path.mkdir()
    with Checkpointer(tmp_path) as saver:
        assert saver.latest() == 3 and saver.steps() == [1, 2, 3]
    assert restore(tmp_path)[0] == 3
    write(tmp_path, [9])
    assert restore(tmp_path) == (9, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3", "9"]


def test_nothing_valid_is_an_error_and_nothing_at_all_is_not(tmp_path):
    assert restore(tmp_path / "none") == (None, [])
    write(tmp_path, [1])
    flip(tmp_path / "1")
    for _ in range(2):  # the second start must not silently begin from scratch either
        with pytest.raises(InputError, match="1.corrupt"):
            restore(tmp_path)


def test_an_explicit_step_is_that_step_or_an_error(tmp_path):
    write(tmp_path)
    assert restore(tmp_path, step=2)[0] == 2
    flip(tmp_path / "2")
    with pytest.raises(InputError, match="step 2 .* damaged"):
        restore(tmp_path, step=2)
    with pytest.raises(InputError, match="7"):
        restore(tmp_path, step=7)
    assert (tmp_path / "2").exists()


def test_a_reader_changes_nothing(tmp_path):
    write(tmp_path)
    flip(tmp_path / "3")
    with Checkpointer(tmp_path, readonly=True, log=lambda line: None) as reader:
        assert reader.restore(small(0))[1]["step"] == 2
        with pytest.raises(RunError, match="read-only"):
            reader.save(4, small(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3"]


def test_old_steps_outlive_a_failed_save(tmp_path, monkeypatch):
    saver = Checkpointer(tmp_path, keep_last=1)
    saver.save(1, small(1), {"step": 1})
    saver.wait()
    _fail(monkeypatch, OSError(errno.EROFS, "Read-only file system"), times=99)
    with pytest.raises(InputError, match="step 2 was not written .*Read-only"):
        saver.save(2, small(2), {"step": 2})
        saver.close()
    monkeypatch.undo()
    assert restore(tmp_path) == (1, [])


def _fail(monkeypatch, error, times):
    """Make Orbax's background write of arrays fail a number of times."""
    import orbax.checkpoint as ocp

    original = ocp.PyTreeCheckpointHandler.async_save
    left = [times]

    class Broken:
        def result(self, timeout=None):
            raise error

    async def async_save(self, *args, **kwargs):
        futures = await original(self, *args, **kwargs)
        left[0] -= 1
        return [*futures, Broken()] if left[0] >= 0 else futures

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", async_save)
    return left


@pytest.mark.parametrize("when", ["check", "save", "wait", "close"])
def test_background_errors_are_fatal_at_the_next_call(tmp_path, monkeypatch, when):
    _fail(monkeypatch, OSError(errno.ENXIO, "injected"), times=99)
    saver = Checkpointer(tmp_path)
    saver.save(1, small(1))
    with pytest.raises(RunError, match="checkpoint step 1 was not written"):
        if when == "check":
            for _ in range(2000):
                saver.check()
                time.sleep(0.005)
        elif when == "save":
            saver.save(2, small(2))
        else:
            getattr(saver, when)()
    assert saver.steps() == []


def test_a_passing_error_is_retried_once(tmp_path, monkeypatch):
    _fail(monkeypatch, OSError(errno.EIO, "injected"), times=1)
    said = []
    with Checkpointer(tmp_path, log=said.append) as saver:
        saver.save(1, small(1), {"step": 1})
    assert "retrying" in said[0] and restore(tmp_path) == (1, [])
    monkeypatch.undo()
    _fail(monkeypatch, OSError(errno.EIO, "injected"), times=2)
    saver = Checkpointer(tmp_path, log=said.append)
    saver.save(2, small(2))
    with pytest.raises(RunError, match="step 2"):
        saver.close()


def test_no_retry_of_a_state_that_is_gone(tmp_path, monkeypatch):
    _fail(monkeypatch, OSError(errno.EIO, "injected"), times=1)
    saver = Checkpointer(tmp_path)
    state = small(1)
    saver.save(1, state)
    jax.tree.map(lambda x: x.delete(), state)
    with pytest.raises(RunError, match="step 1"):
        saver.close()


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(checkpoint, "_free_bytes", lambda directory: 1000)
    with (
        pytest.raises(InputError, match="needs 0 MB free .*step 4 not saved"),
        Checkpointer(tmp_path) as saver,
    ):
        saver.save(4, small(4))
    assert restore(tmp_path) == (3, [])
    if os.geteuid() == 0 and shutil.which("mount"):
        _really_full(tmp_path / "full", monkeypatch)


def _really_full(disk, monkeypatch):
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True).returncode:
        return  # no right to mount here: the check above is all there is
    try:
        monkeypatch.setattr(checkpoint, "_free_bytes", lambda directory: None)
        big = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(100_000), jnp.float32)}
        saver = Checkpointer(disk / "run")
        saver.save(1, big)
        saver.wait()
        saver.save(2, big)
        with pytest.raises(InputError, match="step 2 was not written .*No space left on device"):
            saver.close()
        with Checkpointer(disk / "run") as again:
            assert same(again.restore(big)[0], big) and again.steps() == [1]
        assert [p.name for p in (disk / "run").iterdir()] == ["1"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_kill_9_inside_a_save_never_costs_a_committed_step(tmp_path):
    code = f"""
        import itertools, sys, time
        import jax.numpy as jnp
        from bigmodel_jax.checkpoint import Checkpointer
        saver = Checkpointer({str(tmp_path)!r}, keep_last=2, log=print)
        found = saver.restore({{"w": jnp.zeros((300_000,))}})
        first = 0 if found is None else found[1]["step"] + 1
        assert found is None or bool((found[0]["w"] == found[1]["step"]).all())
        print("restored", first - 1, flush=True)
        for step in itertools.count(first):
            saver.save(step, {{"w": jnp.full((300_000,), step, jnp.float32)}}, {{"step": step}})
            print("committed", saver.committed, flush=True)
    """
    committed = -1
    rng = np.random.default_rng(0)
    for _ in range(4):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=env
        )
        restored, deadline = None, None
        for line in child.stdout:
            word, _, number = line.strip().partition(" ")
            if word == "ignoring":  # killed while it deleted an old step
                continue
            if word == "restored":
                restored = int(number)
                assert restored >= committed, "lost a committed step"
            elif number != "None":
                committed = max(committed, int(number))
                deadline = deadline or time.monotonic() + rng.uniform(0, 0.2)
            if deadline and time.monotonic() > deadline:
                child.send_signal(signal.SIGKILL)
                break
        rest = child.stdout.read()
        child.wait()
        for line in rest.splitlines():
            if line.startswith("committed") and not line.endswith("None"):
                committed = max(committed, int(line.split()[1]))
        assert restored is not None
    assert committed >= 3
