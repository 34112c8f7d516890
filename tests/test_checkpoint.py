"""A checkpoint comes back byte for byte on any mesh, and another model's is refused."""

import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bigmodel_jax import record
from bigmodel_jax.checkpoint import Checkpointer, read_meta
from bigmodel_jax.errors import InputError
from tests.states import abstract, mesh, place, restore, same, small, values, write

GOLDEN = Path(__file__).parent / "golden" / "checkpoint"


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


def test_a_step_that_is_not_there_is_not_called_damaged(tmp_path):
    write(tmp_path)
    with Checkpointer(tmp_path) as saver, pytest.raises(InputError, match=r"no step 7 in .*; steps there: \[.*3\]"):
        saver.restore({"w": jnp.zeros((64, 16)), "step": jnp.int32(0)}, step=7)


def test_another_model_is_refused_and_not_called_damaged(tmp_path):
    write(tmp_path)
    cases = {
        "1 arrays missing .b.*1 unexpected .w": {"b": jnp.zeros((64, 16)), "step": jnp.int32(0)},
        r"w is \[64, 16\], the model has \[64, 8\]": {"w": jnp.zeros((64, 8)), "step": jnp.int32(0)},
        "w is float32, the model has bfloat16": {
            "w": jnp.zeros((64, 16), jnp.bfloat16),
            "step": jnp.int32(0),
        },
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
