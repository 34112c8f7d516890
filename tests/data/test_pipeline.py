"""A batch is a function of the step: for any host count, from any step, in numpy and in tf.data."""

import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import shard_files

from bigmodel_jax.data.order import BatchRamp
from bigmodel_jax.data.pipeline import Pipeline, describe, prefetch
from bigmodel_jax.data.sources import Arrays, Mixture, SyntheticTokens, TokenShards
from bigmodel_jax.data.text import Documents, MaskTokens, TargetBytes
from bigmodel_jax.errors import InputError


def numbers(n):
    return Arrays({"x": np.arange(n), "y": np.arange(n) * 2.0})


@dataclass(frozen=True)
class Jitter:
    """A transform with random numbers."""

    scale: float = 1.0

    def __call__(self, batch, rng):
        return {**batch, "noise": np.float32(self.scale) * rng.normal(3, salt="jitter")}


@dataclass(frozen=True)
class Mix:
    """A transform over pairs."""

    partners = True

    def __call__(self, batch, rng, other):
        return {**batch, "pair": other["x"], "pair_noise": other["noise"]}


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def joined(parts):
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    docs = [shard_files.documents(60, 1), shard_files.documents(45, 2)]
    return shard_files.write(tmp_path_factory.mktemp("shards"), docs)


def lm(folder, mode="pack", batch=16, **kwargs):
    source = TokenShards(folder, "train", 24, mode)
    return Pipeline(source, batch, seed=5, transforms=(TargetBytes(np.arange(200)), Jitter()), **kwargs)


@pytest.mark.parametrize("mode", ["stream", "pack"])
def test_union_of_host_batches_is_the_global_batch(shards, mode):
    reference = lm(shards, mode, block=4, window=2)
    pipes = {hosts: [lm(shards, mode, block=4, window=2) for _ in range(hosts)] for hosts in (1, 2, 4, 8)}
    for step in range(1000):
        want = reference.batch(step)
        for hosts in (1, 2, 4, 8) if step % 10 == 0 else (8,):
            rows = np.split(np.arange(16), hosts)
            assert equal(joined([p.batch(step, r) for p, r in zip(pipes[hosts], rows, strict=True)]), want)
        # Two hosts of one tensor group ask for the same rows; another for scattered ones.
        a, b = pipes[2][0].batch(step, np.arange(4, 12)), pipes[2][1].batch(step, slice(4, 12))
        assert equal(a, b) and equal(a, {k: v[4:12] for k, v in want.items()})
    odd = np.array([15, 2, 2, 7])
    assert equal(reference.batch(3, odd), {k: v[odd] for k, v in reference.batch(3).items()})
    assert not equal(reference.batch(3, odd), {k: v[odd] for k, v in reference.batch(4).items()})


@pytest.mark.parametrize("n, batch, block", [(37, 8, 1), (37, 8, 5), (8, 8, 1), (3, 10, 1), (1, 4, 1), (100, 7, 16)])
def test_each_example_comes_once_per_epoch(n, batch, block):
    pipe = Pipeline(numbers(n), batch, seed=3, block=block, window=2)
    seen = np.concatenate([pipe.batch(step)["x"] for step in range(-(-n * 5 // batch))])[: n * 5].reshape(5, n)
    assert (np.sort(seen, axis=1) == np.arange(n)).all()
    ids = np.concatenate([pipe.ids(step) for step in range(-(-n * 5 // batch))])[: n * 5]
    assert np.array_equal(ids, seen.ravel())
    if n > 10:
        assert not np.array_equal(seen[0], seen[1])


def test_any_step_can_come_first(shards):
    run = [lm(shards).batch(step) for step in range(40)]
    for start in (39, 0, 17):
        assert equal(lm(shards).batch(start), run[start])
    assert not equal(run[0], run[1])


@pytest.mark.parametrize("depth, workers", [(0, 1), (1, 1), (2, 1), (5, 3)])
def test_prefetch_changes_nothing(shards, depth, workers):
    pipe = lm(shards)
    with prefetch(pipe.batch, 7, depth=depth, workers=workers) as ahead:
        for step in range(7, 20):
            assert equal(next(ahead), pipe.batch(step))
    assert [*prefetch(lambda s: s * s, 2, depth=depth, stop=6, workers=workers)] == [4, 9, 16, 25]


def test_prefetch_runs_ahead_and_raises_where_it_belongs():
    started = threading.Event()

    def slow(step):
        if step == 1:
            started.set()
        if step == 3:
            raise InputError("shard 3 is gone")
        return step

    ahead = prefetch(slow, 0, depth=2)
    assert next(ahead) == 0 and started.wait(5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(InputError, match="shard 3"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(prefetch(lambda s: next(iter(())), 0))


def test_prefetch_closes_cleanly():
    before = set(threading.enumerate())
    calls = []

    def work(step):
        calls.append(step)
        time.sleep(0.01)
        return step

    ahead = prefetch(work, 0, depth=50)
    next(ahead)
    ahead.close()
    ahead.close()
    assert set(threading.enumerate()) <= before and len(calls) < 50
    assert list(ahead) == []


def test_numpy_and_tfdata_give_the_same_batches(shards):
    pipes = {
        "pack": lm(shards), "stream": lm(shards, "stream", block=4),
        "masked": Pipeline(
            TokenShards(shards, "train", 24), 4, 1, (Documents(0), MaskTokens(200, 2, (0, 1, 2)))
        ),
        "ramp": Pipeline(numbers(50), BatchRamp(((0, 2), (6, 5))), transforms=(Jitter(), Mix())),
        "eval": Pipeline(numbers(50), 8, shuffle=False),
    }  # fmt: skip
    for name, pipe in pipes.items():
        rows = np.array([3, 0, 1]) if name == "pack" else None
        taken = 0
        for step, got in zip(range(3, 12), pipe.tfdata(3, rows).as_numpy_iterator(), strict=False):
            assert equal(got, pipe.batch(step, rows)), (name, step)
            taken += 1
        assert taken == (pipe.num_eval_batches - 3 if name == "eval" else 9)
    first = next(iter(pipes["pack"].tfdata(0).as_numpy_iterator()))
    assert not equal(first, pipes["pack"].batch(1))
    assert pipes["pack"].tfdata(0).element_spec["tokens"].shape == (16, 24)
    assert pipes["ramp"].tfdata(0).element_spec["x"].shape.as_list() == [None]


def test_tensorflow_sees_no_accelerator():
    from bigmodel_jax.data.tfds import tensorflow

    assert tensorflow().config.get_visible_devices("GPU") == []


def test_evaluation_reads_everything_once_and_pads():
    for batch in (1, 5, 8, 37, 64):
        pipe = Pipeline(numbers(37), batch, shuffle=False)
        batches = [pipe.batch(step) for step in range(pipe.num_eval_batches)]
        real = joined(batches)
        assert real["x"][real["weights"] > 0].tolist() == list(range(37)) and len(real["x"]) % batch == 0
        ids = np.concatenate([pipe.ids(step) for step in range(pipe.num_eval_batches)])
        assert ids[:37].tolist() == list(range(37)) and (ids[37:] == -1).all()
        assert len(batches) == -(-37 // batch)
    assert pipe.batch(5)["weights"].sum() == 0
    assert (Pipeline(numbers(37), 8, shuffle=False, repeat=True).batch(4)["x"] == [32, 33, 34, 35, 36, 0, 1, 2]).all()


def test_padding_rows_weigh_nothing_in_any_field(shards):
    pipe = lm(shards, batch=512, shuffle=False)
    batch, n = pipe.batch(0), len(pipe)
    assert n < 512 and batch["weights"][n:].sum() == 0 and batch["bytes"][n:].sum() == 0
    assert batch["weights"][:n].sum() == pipe.source.report["tokens"]
    masked = Pipeline(
        TokenShards(shards, "train", 24), 512, transforms=(MaskTokens(200, 2, (0, 1, 2)),), shuffle=False
    ).batch(0)
    assert masked["masked_weights"][200:].sum() == 0 and masked["masked_weights"][:40].sum() > 0


def test_partners_are_global_rows():
    pipe = Pipeline(numbers(100), 10, seed=2, transforms=(Jitter(), Mix()))
    whole = pipe.batch(4)
    assert np.array_equal(whole["pair"], whole["x"][::-1])
    assert np.array_equal(whole["pair_noise"], whole["noise"][::-1])
    assert equal(pipe.batch(4, np.array([2, 9])), {k: v[[2, 9]] for k, v in whole.items()})


def test_ramp_is_continuous():
    pipe = Pipeline(numbers(64), BatchRamp(((0, 2), (5, 7), (8, 16))), seed=1)
    plain = Pipeline(numbers(64), 1, seed=1)
    flat = np.concatenate([pipe.batch(step)["x"] for step in range(20)])
    assert flat.tolist() == [int(plain.batch(p)["x"][0]) for p in range(len(flat))]
    assert [pipe.size(s) for s in (0, 4, 5, 7, 8, 99)] == [2, 2, 7, 7, 16, 16]
    assert pipe.steps(1) == 5 + 3 + 3 and pipe.ramp.offset(11) >= 64 > pipe.ramp.offset(10)
    assert plain.steps(2.5) == 160 and Pipeline(numbers(10), 4).steps(1) == 3


def test_mixture_pipeline_is_pure_and_in_proportion():
    mixture = Mixture((numbers(20), Arrays({"x": np.arange(1000, 1300), "y": np.zeros(300)})), (3, 1))
    pipe = Pipeline(mixture, 8, seed=1, transforms=(Jitter(),))
    seen = joined([pipe.batch(step) for step in range(50)])
    assert (seen["x"] < 1000).sum() == 300
    assert (np.sort(seen["x"][seen["x"] < 1000].reshape(15, 20)) == np.arange(20)).all()
    assert equal(pipe.batch(31, slice(2, 5)), {k: v[31 * 8 + 2 : 31 * 8 + 5] for k, v in seen.items()})
    once = joined([Pipeline(mixture, 8, shuffle=False).batch(step) for step in range(40)])
    assert once["x"].tolist() == [*range(20), *range(1000, 1300)]


def test_fingerprint_moves_with_what_decides_the_data():
    base = dict(source=numbers(10), batch_size=4, seed=1, transforms=(Jitter(),))
    one = Pipeline(**base).fingerprint
    assert one == Pipeline(**{**base, "source": numbers(10), "transforms": (Jitter(),)}).fingerprint
    assert one == Pipeline(**{**base, "batch_size": 8}).fingerprint
    for change in (
        dict(source=numbers(11)), dict(seed=2), dict(transforms=()), dict(transforms=(Jitter(2.0),)),
        dict(block=4), dict(shuffle=False),
    ):  # fmt: skip
        assert Pipeline(**{**base, **change}).fingerprint != one, change


def test_descriptions_are_stable_and_complete():
    def closed(k):
        return lambda batch, rng: {"x": batch["x"] + k}

    assert describe(closed(1)) == describe(closed(1)) != describe(closed(2))
    table = np.arange(5)
    assert describe(TargetBytes(table)) == describe(TargetBytes(table.copy())) != describe(TargetBytes(table + 1))
    assert "0x" not in describe(closed(1)) + describe(TargetBytes(table))
    with pytest.raises(TypeError, match="fingerprint"):
        describe(threading.Lock())


BAD = {
    "empty source": (lambda: Pipeline(Empty(), 4), "empty"),
    "batch of none": (lambda: Pipeline(numbers(3), 0), "batch size 0"),
    "row too high": (
        lambda: Pipeline(numbers(9), 4).batch(0, [4]),
        "rows 4 to 4 asked of step 0, which has 4",
    ),
    "row below": (lambda: Pipeline(numbers(9), 4).batch(0, [-1]), "rows -1"),
    "rows as floats": (lambda: Pipeline(numbers(9), 4).batch(0, np.array([0.5])), "list of numbers"),
    "rows as a table": (lambda: Pipeline(numbers(9), 4).batch(0, np.zeros((2, 2), int)), "list of numbers"),
    "negative step": (lambda: Pipeline(numbers(9), 4).batch(-1), "step -1"),
    "ramped evaluation": (lambda: Pipeline(numbers(9), BatchRamp(((0, 4),)), shuffle=False), "ramp"),
    "no window": (lambda: Pipeline(numbers(9), 4, block=2, window=0).batch(0), "window 0"),
}


class Empty:
    fingerprint = ""

    def __len__(self):
        return 0


@pytest.mark.parametrize("name", BAD)
def test_impossible_requests_get_one_line(name):
    make, words = BAD[name]
    with pytest.raises(InputError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_no_rows_is_a_batch_of_none(shards):
    for pipe in (lm(shards), lm(shards, "stream"), Pipeline(SyntheticTokens(10, 4, 9), 4)):
        empty, full = pipe.batch(0, []), pipe.batch(0)
        assert {k: v.shape[1:] for k, v in empty.items()} == {k: v.shape[1:] for k, v in full.items()}
        assert all(len(v) == 0 for v in empty.values())
