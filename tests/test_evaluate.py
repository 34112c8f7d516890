"""37 examples give one answer: any batch size, any number of devices, in the loop or after it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import assess, experiment
from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.evaluate import collect, evaluate, means
from bigmodel_jax.learn.losses import cross_entropy, token_losses
from bigmodel_jax.learn.objectives import OBJECTIVES, token_records
from bigmodel_jax.learn.step import make_record_step
from bigmodel_jax.measures.classification import softmax
from bigmodel_jax.models.model import Output
from bigmodel_jax.parallel.feed import global_batch, local_columns
from bigmodel_jax.parallel.mesh import batch_sharding, fill, make_mesh
from bigmodel_jax.programs import Programs
from bigmodel_jax.train import train
from tests import tiny


def stand_in(state, batch):
    """Sums of a made-up metric, with numpy's weights."""
    weight = batch["weights"].sum()
    return {"loss": ((batch["x"] * batch["weights"]).sum(), weight)}


def test_every_example_counts_once_for_any_batch_size_and_devices():
    x = np.random.default_rng(0).normal(size=37)
    source = Arrays({"x": x, "weights": np.ones(37, np.float32)})
    step = jax.jit(stand_in)
    for devices, sizes in ((1, (1, 5, 37, 64)), (8, (8, 16, 40))):
        sharding = batch_sharding(make_mesh(None, jax.devices()[:devices]), accumulated=False)
        for size in sizes:
            out = evaluate(step, {}, Pipeline(source, size, shuffle=False), sharding, size, coefficients={"loss": 1.0})
            assert out["loss"] == pytest.approx(x.mean(), rel=1e-6)
            assert out["examples"] == 37
    # Control: a mean of batch means is another number.
    assert abs(np.mean([x[i : i + 8].mean() for i in range(0, 37, 8)]) - x.mean()) > 1e-4


def linear(weights):
    """A classifier whose records the objective makes, and numpy's of the same."""

    def apply(variables, *, train, rngs=None, image):
        del train, rngs
        return Output(image.reshape(len(image), -1) @ variables["params"], jax.tree_util.Partial(lambda h: h))

    return make_record_step(apply, OBJECTIVES["classification"]()), {"params": jnp.asarray(weights), "stats": {}}


def test_records_hold_each_example_once_for_any_batch_size_and_devices():
    rng = np.random.default_rng(0)
    image, label = rng.normal(size=(37, 2, 2, 1)).astype(np.float32), rng.integers(5, size=37).astype(np.int32)
    weights = rng.normal(size=(4, 5)).astype(np.float32)
    source = Arrays({"image": image, "label": label, "weights": np.ones(37, np.float32)})
    logits = image.reshape(37, 4) @ weights
    nats = -np.log(softmax(logits))[np.arange(37), label]
    record_step, state = linear(weights)
    step = jax.jit(record_step)
    for devices, sizes in ((1, (3, 7, 37)), (8, (3, 7, 37))):
        mesh = make_mesh(None, jax.devices()[:devices])
        sharding = batch_sharding(mesh, accumulated=False)
        for size in sizes:
            rows = fill(size, mesh)
            out = collect(step, state, Pipeline(source, rows, shuffle=False), sharding, rows)
            np.testing.assert_array_equal(out["id"], np.arange(37))
            np.testing.assert_array_equal(out["label"], label)
            np.testing.assert_allclose(out["logits"], logits, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(out["loss"], nats, rtol=1e-4)
    some = collect(step, state, Pipeline(source, 8, shuffle=False), sharding, 8, batches=2)
    np.testing.assert_array_equal(some["id"], np.arange(16))
    # Control: padding that is not dropped makes another loss.
    batch = Pipeline(source, 24, shuffle=False).batch(1)
    padded = np.asarray(step(state, {k: jnp.asarray(v) for k, v in batch.items()})["loss"])
    assert abs(padded.mean() - nats[24:].mean()) > 1e-3


def test_token_losses_are_those_of_the_training_loss():
    rng = np.random.default_rng(1)
    hidden, table = rng.normal(size=(3, 7, 4)).astype(np.float32), rng.normal(size=(4, 9)).astype(np.float32)
    targets = rng.integers(9, size=(3, 7))
    head = jax.tree_util.Partial(lambda w, h: h @ w, table)
    log_p = np.log(softmax(hidden @ table))
    for chunk in (0, 3):
        nats, correct = token_losses(jnp.asarray(hidden), head, jnp.asarray(targets), chunk=chunk)
        np.testing.assert_allclose(nats, -np.take_along_axis(log_p, targets[..., None], -1)[..., 0], rtol=1e-5)
        np.testing.assert_array_equal(correct, log_p.argmax(-1) == targets)
    weights = (rng.random((3, 7)) < 0.5).astype(np.float32)
    out = token_records(jnp.asarray(hidden), head, jnp.asarray(targets), jnp.asarray(weights), chunk=3)
    _, aux = cross_entropy(jnp.asarray(hidden), head, jnp.asarray(targets), jnp.asarray(weights), chunk=2)
    assert float(out["loss"].sum()) == pytest.approx(float(aux["nll"]), rel=1e-5)
    assert float(out["correct"].sum()) == float(aux["accuracy"])


def test_means_of_sums():
    sums = {"loss": (6.0, 3.0), "nll": (3.0, 3.0), "bits_per_byte": (10.0, 4.0)}
    out = means(sums, {"loss": 0.5})
    assert out == {"loss": 1.0, "nll": 1.0, "perplexity": np.e, "bits_per_byte": 2.5}


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8, "data": 1}])
def test_the_global_batch_holds_the_rows_it_should(sizes):
    sharding = batch_sharding(make_mesh(sizes))
    asked = []

    def fetch(rows):
        asked.append(rows)
        return {"row": np.asarray(rows), "wide": np.stack([rows, rows * 10], axis=1)}

    batch = global_batch(fetch, sharding, (3, 8))
    np.testing.assert_array_equal(batch["row"], np.arange(24).reshape(3, 8))
    np.testing.assert_array_equal(batch["wide"][..., 1], 10 * np.arange(24).reshape(3, 8))
    assert batch["row"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(asked, [np.arange(24)])


def test_a_process_asks_only_for_what_its_devices_hold():
    """Two hosts of four devices each, and two hosts that share every row over a tensor axis."""

    class Host:
        def __init__(self, sharding, devices):
            self.sharding, self.devices = sharding, devices

        def addressable_devices_indices_map(self, shape):
            every = self.sharding.devices_indices_map(shape)
            return {device: every[device] for device in self.devices}

    sharding = batch_sharding(make_mesh({"data": 8}))
    halves = [local_columns(Host(sharding, jax.devices()[i : i + 4]), (3, 16)) for i in (0, 4)]
    np.testing.assert_array_equal(np.concatenate(halves), np.arange(16))
    shared = batch_sharding(make_mesh({"data": 1, "tensor": 8}))
    for i in (0, 4):
        np.testing.assert_array_equal(local_columns(Host(shared, jax.devices()[i : i + 4]), (3, 16)), np.arange(16))


def test_in_the_loop_equals_offline_and_changes_nothing(tmp_path):
    raw = tiny.raw("encoder", tmp_path) | {"steps": 4, "eval": {"every": 2, "batch_size": 8}}
    often = train(experiment.resolve(raw), str(tmp_path / "often"))
    raw["eval"] = {"batch_size": 16}
    once = train(experiment.resolve(raw), str(tmp_path / "once"))
    assert often["state_hash"] == once["state_hash"]
    found = assess.evaluate_run(str(tmp_path / "often"), ["--config.eval.batch_size=37"])
    for name, value in once["eval"]["validation"].items():
        assert found["eval"]["validation"][name] == pytest.approx(value, rel=1e-5)
        assert often["eval"]["validation"][name] == pytest.approx(value, rel=1e-5)
    other = assess.evaluate_run(str(tmp_path / "often"), [], step=4)
    assert other["step"] == 4
    programs = Programs(experiment.build(experiment.resolve(raw)))
    assert programs.compilations == 0
