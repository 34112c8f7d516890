"""A checkpoint comes back byte for byte on any mesh, or says why not and steps back to one that does."""

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
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigmodel_jax import checkpoint, fingerprint, record, tree
from bigmodel_jax.checkpoint import Checkpointer, init_from, read_meta
from bigmodel_jax.errors import InputError, RunError

GOLDEN = Path(__file__).parent / "golden" / "checkpoint"
VOCAB = 37


def mesh(rows, columns):
    return Mesh(np.array(jax.devices()[: rows * columns]).reshape(rows, columns), ("a", "b"))


def values(seed=0):
    """A state with an odd vocabulary, many dtypes, scalars, an empty leaf and typed keys."""
    rng = np.random.default_rng(seed)
    return {
        "step": np.int32(seed),
        "params": {
            "embed": rng.standard_normal((VOCAB, 16), np.float32),
            "layers": {"w": rng.standard_normal((8, 16, 8), np.float32).astype(ml_dtypes.bfloat16)},
        },
        "opt": ({"count": np.int32(3)}, {"mu": rng.standard_normal((16, 8), np.float32)}),
        "flags": rng.integers(0, 2, 24).astype(bool),
        "none": np.zeros((0, 3), np.float32),
    }


def place(state, grid):
    def put(x):
        spec = [None] * x.ndim
        for axis, name in zip(range(x.ndim), ("a", "b"), strict=False):
            if x.shape[axis] and x.shape[axis] % grid.shape[name] == 0:
                spec[axis] = name
        return jax.device_put(x, NamedSharding(grid, PartitionSpec(*spec)))

    return {**jax.tree.map(put, state), "key": jax.random.key(7), "keys": jax.random.split(jax.random.key(8), 3)}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def raw(x):
    return np.asarray(jax.random.key_data(x) if record.is_key(x) else x)


def same(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(
        raw(a[p]).dtype == raw(b[p]).dtype and raw(a[p]).tobytes() == raw(b[p]).tobytes() for p in a
    )


def small(seed):
    return {"w": jnp.asarray(np.random.default_rng(seed).standard_normal((64, 16), np.float32)), "step": jnp.int32(seed)}


def write(directory, steps=(1, 2, 3), **options):
    with Checkpointer(directory, keep_last=10, **options) as saver:
        for step in steps:
            saver.save(step, small(step), {"step": step})


def restore(directory, **options):
    """(step restored, or None; what was said)."""
    said = []
    with Checkpointer(directory, log=said.append) as saver:
        found = saver.restore(small(0), **options)
    if found is None:
        return None, said
    state, meta = found
    assert same(state, small(meta["step"])), "restored something that was never saved"
    return meta["step"], said


@pytest.mark.parametrize("grid", [(8, 1), (4, 2), (2, 4), (1, 1)])
def test_bytes_are_equal_on_every_mesh(tmp_path, grid):
    state = place(values(), mesh(8, 1))
    with Checkpointer(tmp_path) as saver:
        saver.save(5, state, {"config": {"shape": (1, 2)}})
        target = abstract(place(values(1), mesh(*grid)))
        back, meta = saver.restore(target)
    assert same(state, back) and not same(place(values(1), mesh(8, 1)), back)
    assert jax.tree.map(lambda x: x.sharding, back["params"]) == jax.tree.map(lambda x: x.sharding, target["params"])
    assert meta["config"] == {"shape": [1, 2]} and meta["versions"]["jax"] == jax.__version__
    assert jax.random.bits(back["key"]) == jax.random.bits(state["key"])
    assert read_meta(tmp_path) == read_meta(tmp_path, 5) == meta


def test_double_precision_comes_back(tmp_path, x64):
    state = {"x": jnp.arange(7, dtype=jnp.float64) / 3, "n": jnp.int64(1 << 40)}
    with Checkpointer(tmp_path) as saver:
        saver.save(1, state)
        assert same(saver.restore(state)[0], state)


def test_a_donating_step_may_follow_at_once(tmp_path):
    grid = NamedSharding(mesh(8, 1), PartitionSpec("a"))
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpointer(tmp_path) as saver:
        for number in (1, 2):
            x = jax.device_put(np.full((1 << 20,), number, np.float32), grid)
            saver.save(number, {"x": x})
            for _ in range(3):
                x = step(x)
        assert np.asarray(x).max() == -1
        for number in (1, 2):
            assert np.all(np.asarray(saver.restore({"x": x}, step=number)[0]["x"]) == number)


DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool", "complex64", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_sees_bits_and_order_on_any_mesh(dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((8, 6, 4)) * 9).astype(jnp.dtype(dtype))
    x[0, 0, 0], x[7, 5, 3] = 0, 1
    expected = fingerprint.of_numpy(x)
    for spec in (PartitionSpec(), PartitionSpec("a"), PartitionSpec("a", None, "b")):
        y = jax.device_put(x, NamedSharding(mesh(4, 2), spec))
        assert fingerprint.of_leaves({"y": y}) == {"y": expected}
    swapped = x.copy()
    swapped[0, 0, 0], swapped[7, 5, 3] = x[7, 5, 3], x[0, 0, 0]
    assert fingerprint.of_numpy(swapped) != expected
    for _ in range(20 if dtype != "bool" else 0):
        flipped = bytearray(x.tobytes())
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        assert fingerprint.of_numpy(np.frombuffer(bytes(flipped), x.dtype).reshape(x.shape)) != expected


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


def test_another_model_is_refused_and_not_called_damaged(tmp_path):
    write(tmp_path)
    cases = {
        "1 arrays missing .b.*1 unexpected .w": {"b": jnp.zeros((64, 16)), "step": jnp.int32(0)},
        r"w is \[64, 16\], the model has \[64, 8\]": {"w": jnp.zeros((64, 8)), "step": jnp.int32(0)},
        "w is float32, the model has bfloat16": {"w": jnp.zeros((64, 16), jnp.bfloat16), "step": jnp.int32(0)},
    }
    for message, target in cases.items():
        with Checkpointer(tmp_path) as saver, pytest.raises(InputError, match=message):
            saver.restore(target)
    assert restore(tmp_path) == (3, [])


def test_retention_keeps_the_last_and_every_nth(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_every=4) as saver:
        for step in range(1, 11):
            saver.save(step, small(step), {"step": step})
    assert record.steps(record.resolve(tmp_path)) == [4, 8, 9, 10]


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
    with pytest.raises(InputError, match="needs 0 MB free .*step 4 not saved"), Checkpointer(tmp_path) as saver:
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


def test_unwritable_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/x"), Checkpointer(tmp_path / "file" / "x") as saver:
        saver.save(1, small(1))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../b", "..", "", "a b", "a\0", "a\\b", "é", "a//b", "~", "%2e"])
def test_hostile_leaf_names_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="cannot be saved"), Checkpointer(tmp_path / "c") as saver:
        saver.save(1, {name: jnp.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_directories_are_resolved_and_urls_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("relative", [1])
    assert restore(tmp_path / "relative") == (1, [])
    for url in ("gs://bucket/a/b", "s3://bucket/a"):
        assert str(record.resolve(url)) == url


def test_a_plain_copy_restores(tmp_path):
    write(tmp_path / "a")
    subprocess.run(["cp", "-r", tmp_path / "a", tmp_path / "b"], check=True)
    shutil.rmtree(tmp_path / "a")
    assert restore(tmp_path / "b") == (3, [])


def test_saving_a_step_twice(tmp_path):
    said = []
    with Checkpointer(tmp_path, log=said.append) as saver:
        assert saver.save(1, small(1), {"step": 1}) and not saver.save(1, small(5), {"step": 5})
        saver.restore(small(0))
        assert not saver.save(1, small(5), {"step": 5})
    with Checkpointer(tmp_path, log=said.append) as saver:  # another branch: what is there gives way
        assert saver.save(1, small(6), {"step": 6})
    assert restore(tmp_path) == (6, []) and len(said) == 1


def test_memory_stays_flat_over_fifty_saves(tmp_path):
    import psutil

    process = psutil.Process()
    state = {"w": jnp.zeros((1 << 20,), jnp.float32)}  # 4 MB: a leak of one copy a save is 200 MB
    with Checkpointer(tmp_path, keep_last=1) as saver:
        for step in range(10):
            saver.save(step, state)
        saver.wait()
        before = process.memory_info().rss
        for step in range(10, 60):
            saver.save(step, state)
        saver.wait()
    assert process.memory_info().rss - before < 60e6


def test_golden_checkpoint_of_version_0_1_still_restores():
    state = {**jax.tree.map(jnp.asarray, values(42)), "keys": jax.random.split(jax.random.key(8), 3)}
    with Checkpointer(GOLDEN, readonly=True) as reader:
        back, meta = reader.restore(state)
    assert same(back, state) and meta["step"] == 42
    assert not same(back, {**state, "step": jnp.int32(1)})


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
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=env)
        restored, deadline = None, None
        for line in child.stdout:
            word, number = line.split()
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


def _trained(tmp_path, ema=False):
    params = {"embed": jnp.arange(12.0).reshape(4, 3), "block": {"w": jnp.ones((3, 3)), "b": jnp.zeros(3)}}
    state = {"params": params, "opt": {"mu": params}, "step": jnp.int32(1)}
    if ema:
        state["ema"] = jax.tree.map(lambda x: x + 100, params)
    with Checkpointer(tmp_path / "checkpoints") as saver:
        saver.save(1, state)
    return params


def test_init_from_loads_by_name_and_reads_only_that(tmp_path, monkeypatch):
    params = _trained(tmp_path)
    read = []
    original = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path, leaves, wanted: read.extend(wanted) or original(path, leaves, wanted))
    target = {"embed": jnp.zeros((4, 3), jnp.bfloat16), "layer": {"w": jnp.zeros((3, 3)), "b": jnp.ones(3)}}
    loaded, report = init_from(tmp_path, target, rename=[("^block/", "layer/")])
    assert set(read) == {"params/embed", "params/block/w", "params/block/b"}
    assert same(loaded["layer"], params["block"]) and loaded["embed"].dtype == jnp.bfloat16
    assert sorted(report["loaded"]) == ["embed", "layer/b", "layer/w"]
    assert not (report["missing"] or report["unexpected"] or report["shape_mismatch"])


def test_init_from_prefers_the_average(tmp_path):
    params = _trained(tmp_path, ema=True)
    assert float(init_from(tmp_path, params)[0]["embed"][0, 0]) == 100
    assert float(init_from(tmp_path, params, ema=False)[0]["embed"][0, 0]) == 0


def test_init_from_is_strict_and_never_vacuous(tmp_path):
    params = _trained(tmp_path)
    target = {**params, "embed": jnp.full((9, 3), 5.0), "head": jnp.full((3,), 7.0)}
    with pytest.raises(InputError, match="1 missing .head.*1 shape mismatch .embed"):
        init_from(tmp_path, target)
    loaded, report = init_from(tmp_path, target, strict=False)
    assert report["missing"] == ["head"] and report["shape_mismatch"] == ["embed"]
    assert np.all(loaded["embed"] == 5) and np.all(loaded["head"] == 7) and same(loaded["block"], params["block"])
    loaded, report = init_from(tmp_path, target, skip=["^head$", "^embed$"])
    assert report["skipped"] == ["embed", "head"] and len(report["loaded"]) == 2
    with pytest.raises(InputError, match="no parameter name matches"):
        init_from(tmp_path, {"other": jnp.zeros(3)}, strict=False)
    with pytest.raises(InputError, match="both to 'x'"):
        init_from(tmp_path, params, rename=[("^.*$", "x")])
    with pytest.raises(InputError, match="not a regex"):
        init_from(tmp_path, params, rename=[("(", "x")])
    with pytest.raises(InputError, match="no checkpoint"):
        init_from(tmp_path / "nowhere", params)
    flip_record = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    flip_record.write_text(flip_record.read_text().replace("[4, 3]", "[3, 4]"))
    with pytest.raises(InputError, match="damaged"):
        init_from(tmp_path, params)
