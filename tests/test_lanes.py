"""Lane k of a program of several runs equals run k alone: the step at every leaf, and whole runs through a stop."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from bigmodel_jax import experiment, lanes, metrics, train_lanes, tree
from bigmodel_jax.errors import InputError, Preempted
from bigmodel_jax.parallel import hosts
from bigmodel_jax.programs import Programs
from bigmodel_jax.train import train

LINEAR = {
    "steps": 100, "batch_size": 32, "model": {"name": "linear"}, "objective": {"name": "classification"},
    "optimizer": {"name": "momentum", "lr": 0.1, "weight_decay": 0.01}, "schedule": {"name": "cosine", "warmup": 5},
    "data": {"name": "table", "source": "digits"}, "eval": {"batch_size": 120, "every": 50},
    "checkpoint": {"every": 25}, "log": {"every": 25, "tensorboard": False},
}  # fmt: skip
POINTS = ({"seed": 0}, {"seed": 5}, {"seed": 5, "optimizer.lr": 0.3}, {"seed": 0, "optimizer.weight_decay": 0.0})


def resolved(raw: dict, point: dict) -> dict:
    return experiment.resolve(raw, [f"--config.{leaf}={value}" for leaf, value in point.items()])


def batch(exp: experiment.Experiment, step: int) -> dict[str, np.ndarray]:
    size = exp.data.train.size(step)
    return train_lanes.shaped(exp.data.train.batch(step), exp.cut(size))


def built(raw: dict) -> list[experiment.Experiment]:
    return [experiment.build(resolved(raw, point), devices=jax.devices()[:1]) for point in POINTS]


def alone(exp: experiment.Experiment, steps: int) -> dict:
    """State of a run after `steps`."""
    programs, key = Programs(exp), jax.random.key(exp.run.seed)
    state = programs.init(key)
    for step in range(steps):
        state, _ = programs.step(exp.data.train.size(step))(state, batch(exp, step), key)
    return state


def together(exps: list[experiment.Experiment], by: str, steps: int) -> list[dict]:
    """States of all lanes after `steps`."""
    programs = lanes.LanePrograms(exps, by)
    keys = [jax.random.key(exp.run.seed) for exp in exps]
    states, key = programs.init(keys), programs.together(keys)
    for step in range(steps):
        batches = programs.together([batch(exp, step) for exp in exps])
        states, _ = programs.step(exps[0].data.train.size(step))(states, batches, key)
    return [programs.lane(states, k) for k in range(len(exps))]


def apart(a: dict, b: dict) -> float:
    """Largest difference of parameters, relative to the largest parameter of its leaf."""
    pairs = zip(tree.flatten(a["params"]).values(), tree.flatten(b["params"]).values(), strict=True)
    return max(float(np.abs(x - y).max() / (np.abs(y).max() + 1e-12)) for x, y in pairs)


def test_two_hundred_steps_in_float64(x64):
    raw = LINEAR | {"runtime": {"x64": True}, "model": {"name": "linear", "dtype": "float64", "param_dtype": "float64"}}
    exps = built(raw)
    wanted = alone(exps[2], 200)
    for by in ("vmap", "turns"):
        found = together(exps, by, 200)
        assert apart(found[2], wanted) < 1e-9
        assert apart(found[1], wanted) > 1e-3  # the learning rates of lanes 1 and 2 differ, and it shows


def test_dropout_and_augmentation_are_those_of_the_lane():
    raw = LINEAR | {
        "model": {"name": "mlp", "hidden": (32,), "dropout": 0.3},
        "data": {"name": "digits", "pad_crop": 1, "rotate": 10.0, "mixup": 0.2},
    }  # fmt: skip
    exps = built(raw)
    found = together(exps, "vmap", 20)
    assert apart(found[1], alone(exps[1], 20)) < 1e-5
    assert apart(found[0], found[1]) > 1e-3


def test_a_group_that_was_stopped_leaves_what_each_run_leaves_alone(tmp_path, monkeypatch):
    configs = [resolved(LINEAR, point) for point in POINTS[:2]]
    folders = [str(tmp_path / name) for name in "ab"]
    with monkeypatch.context() as patch:
        patch.setattr(hosts.Preemption, "asked", lambda self, step: step == 65)
        with pytest.raises(Preempted):
            train_lanes.train_lanes(configs, folders, str(tmp_path / "group"))
    found = train_lanes.train_lanes(configs, folders, str(tmp_path / "group"))
    solo = train(configs[1], str(tmp_path / "alone"))
    written = json.loads((tmp_path / "b" / "result.json").read_text())
    assert written == json.loads(json.dumps(found[1]))
    for key in ("config_hash", "data", "examples", "updates", "parameters"):
        assert written[key] == solo[key], key
    loss = solo["eval"]["validation"]["loss"]
    assert written["eval"]["validation"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found[0]["eval"]["validation"]["loss"] != pytest.approx(loss, rel=1e-3)
    for event in ("", "eval"):
        rows, theirs = (metrics.read(tmp_path / name, event) for name in ("b", "alone"))
        assert [row["step"] for row in rows] == [row["step"] for row in theirs]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)
    with pytest.raises(InputError, match="other lanes"):
        train_lanes.train_lanes(configs[::-1], folders[::-1], str(tmp_path / "group"))


def test_what_cannot_share_a_program_is_refused():
    config = resolved(LINEAR, {})
    for point, says in (
        ({"optimizer.beta": 0.5}, "lanes differ in optimizer.beta"),
        ({"eval.metric": "validation/loss"}, "eval.metric is decided run by run"),
    ):
        other = resolved(LINEAR, point)
        with pytest.raises(InputError, match=says):
            lanes.check([other, other] if "eval" in says else [config, other])
