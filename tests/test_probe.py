"""The probe sees frozen features as they are, each row once, and is honest about few examples."""

import functools
import json

import jax
import numpy as np
import pytest

from bigmodel_jax import experiment, probe
from bigmodel_jax.data import images
from bigmodel_jax.errors import InputError


def test_few_examples_are_drawn_by_class_and_by_seed():
    labels = np.array([0] * 50 + [1] * 9 + [2] * 30)
    rows = probe.few(labels, 8, seed=0)
    assert np.bincount(labels[rows]).tolist() == [8, 8, 8] and len(set(rows)) == 24
    np.testing.assert_array_equal(rows, probe.few(labels, 8, seed=0))
    assert set(rows) != set(probe.few(labels, 8, seed=1)) and len(probe.few(labels, 0, 0)) == 89
    with pytest.raises(InputError, match="class 1 has 9"):
        probe.few(labels, 10, seed=0)


def test_what_features_know_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    x = rng.normal(size=(400, 5)) + 4.0 * label[:, None] * np.eye(5)[2]
    train, test = (x[:200], label[:200]), {"test": (x[200:], label[200:])}
    found = probe.probe(train, test, [2, 0], repeats=3)
    assert found["all"]["test"]["accuracy"] > 95 and found["all"]["test"]["sd"] is None
    assert 50 < found["2"]["test"]["accuracy"] <= found["all"]["test"]["accuracy"] and found["2"]["test"]["draws"] == 3
    noise = probe.probe((train[0][:, :2], train[1]), {"test": (test["test"][0][:, :2], label[200:])}, [0])
    assert noise["all"]["test"]["accuracy"] < 65


def test_a_config_is_probed_without_augmentation(monkeypatch, tmp_path, capsys):
    build = functools.partial(experiment.build, devices=jax.devices()[:1])
    monkeypatch.setattr(experiment, "build", build)
    raw = {
        "steps": 1, "batch_size": 7, "model": {"name": "linear"}, "objective": {"name": "classification"},
        "optimizer": {"name": "sgd"}, "schedule": {"name": "constant"}, "eval": {"batch_size": 100},
        "data": {"name": "digits", "rotate": 45.0, "limit": 300},
    }  # fmt: skip
    probe.probe_to_file(experiment.resolve(raw), [0], 1, str(tmp_path / "probe.json"))
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["rows"] == 300 and found["features"] == 64
    # The hidden state of a linear model is its input: the same numbers from scikit-learn alone.
    exp = build(experiment.resolve(raw))
    train, test = exp.data.train.source, images.digits("test")
    pixels = [images.unit(s.gather(np.arange(len(s)))["image"]).reshape(len(s), -1) for s in (train, test)]
    labels = [s.gather(np.arange(len(s)))["label"] for s in (train, test)]
    wanted = 100 * (probe.fit(pixels[0], labels[0]).predict(pixels[1]) == labels[1]).mean()
    assert found["accuracy"]["all"]["validation"]["accuracy"] == pytest.approx(wanted, abs=0.3)
    assert wanted > 85 and "validation" in capsys.readouterr().out


def test_data_without_one_label_each_is_refused(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "t.jsonl").write_text((json.dumps(row) + "\n") * 4)
    raw = {
        "steps": 1, "batch_size": 8, "model": {"name": "decoder", "num_layers": 1, "embed_dim": 8, "num_heads": 1},
        "objective": {"name": "causal_lm"}, "optimizer": {"name": "sgd"}, "schedule": {"name": "constant"},
        "data": {"name": "instructions", "train": str(tmp_path / "t.jsonl"), "length": 60, "validation_share": 0.5},
    }  # fmt: skip
    with pytest.raises(InputError, match="one label each"):
        probe.probe_config(experiment.resolve(raw), [0])
