"""A run in one process on eight simulated devices: what it leaves, refuses, skips and counts."""

from __future__ import annotations

import json
import logging

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bigmodel_jax import experiment, metrics
from bigmodel_jax import train as training
from bigmodel_jax.errors import InputError, NumericAbort
from bigmodel_jax.programs import Programs
from bigmodel_jax.study.compare import compare
from tests import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


def resolved(home, kind="decoder", *overrides, **changes):
    return experiment.resolve(tiny.raw(kind, home) | changes, overrides)


@pytest.fixture(scope="module")
def finished(home):
    """(config, workdir, result, names compiled) of a decoder run with a sample, on eight devices."""
    sample = {"prompt": "alpha ", "length": 8, "temperature": 0.0}
    config = resolved(home, sample=sample, steps=20, checkpoint={"every": 5}, log={"every": 1, "norms": True})
    names = []
    handler = logging.Handler()
    handler.emit = lambda record: names.append(record.getMessage())
    logger = logging.getLogger("jax._src.interpreters.pxla")
    # Not the context manager: it sees its own thread only, and programs are compiled in others.
    jax.config.update("jax_log_compiles", True)
    logger.addHandler(handler)
    result = training.train(config, str(home / "finished"))
    logger.removeHandler(handler)
    jax.config.update("jax_log_compiles", False)
    return config, home / "finished", result, names


def test_a_run_leaves_what_it_promises(finished):
    config, workdir, result, _ = finished
    assert json.loads((workdir / "result.json").read_text())["state_hash"] == result["state_hash"]
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 259, "256 bytes, end of text, padding, mask"
    start = json.loads((workdir / "env.json").read_text())["starts"][0]
    assert start["devices"] == 8 and start["versions"]["jax"] == jax.__version__
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = metrics.read(workdir, "")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    # AdamW's cosine after 3 warm-up steps, by hand.
    expected = 3e-3 * 0.5 * (1 + np.cos(np.pi * (10 + 1 - 3) / 17))
    assert rows[10]["lr"] == pytest.approx(expected, rel=1e-5)
    assert {"norm/grad/layers/attn", "norm/param/layers/mlp", "norm/update/embed/tokens"} <= set(rows[0])
    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    tag = next(tag for tag in events.Tags()["scalars"] if tag.endswith("loss") and "weight" not in tag)
    written = {event.step: event.value for event in events.Scalars(tag)}
    assert written[20] == pytest.approx(rows[-1]["loss"])
    assert result["sample"].startswith("alpha ")
    spent = result["time"]
    assert sum(spent["seconds"].values()) == pytest.approx(spent["wall_s"], rel=1e-3)


def test_the_train_step_is_compiled_once_in_twenty_steps(finished):
    names = finished[3]
    assert sum("jit(train_step)" in name and "Compiling" in name for name in names) == 1, names
    assert any("eval_step" in name for name in names), "control: the log sees other programs"


def test_the_same_command_again_is_a_resume_with_nothing_to_do(finished, capsys):
    config, workdir, result, _ = finished
    again = training.train(config, str(workdir))
    assert again["state_hash"] == result["state_hash"] and again["eval"] == result["eval"]
    assert len([r for r in metrics.read(workdir) if r.get("event") == "eval"]) == 1


def test_a_changed_config_is_shown_and_refused(finished, capsys):
    config, workdir, result, _ = finished
    changed = {**config, "steps": 22, "schedule": {**config["schedule"], "warmup": 4}}
    with pytest.raises(InputError, match=r"schedule.warmup: 3 -> 4; steps: 20 -> 22.*--allow-config-change"):
        training.train(changed, str(workdir))
    mechanics = {**config, "log": {**config["log"], "every": 2}}
    assert training.train(mechanics, str(workdir))["state_hash"] == result["state_hash"]
    assert "config changed: log.every: 1 -> 2" in capsys.readouterr().err


def test_a_batch_ramp_compiles_each_size_once_and_resumes(home):
    ramp = ((0, 8), (5, 16))
    config = resolved(home, batch_size=ramp, steps=8, microbatch=8)
    result = training.train(config, str(home / "ramp"))
    exp = experiment.build(config)
    assert exp.batch_sizes() == (8, 16)
    assert [exp.cut(size) for size in (8, 16)] == [(1, 8), (2, 8)]
    assert result["time"]["examples"] == 5 * 8 + 3 * 16


def poisoned(monkeypatch, steps):
    """One device's image of the named steps becomes NaN."""
    original = training.Loop.fetch

    def fetch(run, step):
        batch = original(run, step)
        if step in steps:
            image = np.array(batch["image"])
            image[0, 3] = np.nan
            batch["image"] = jax.device_put(image, batch["image"].sharding)
        return batch

    monkeypatch.setattr(training.Loop, "fetch", fetch)


def test_bad_steps_are_skipped_and_their_examples_named(home, monkeypatch, capsys):
    config = resolved(home, "resnet", steps=6)
    poisoned(monkeypatch, {2, 4})
    result = training.train(config, str(home / "skips"))
    assert result["updates"] == 4 and result["step"] == 6
    bad = [row for row in metrics.read(home / "skips") if row.get("event") == "bad_step"]
    exp = experiment.build(config)
    assert [row["step"] for row in bad] == [3, 5]
    assert bad[0]["ids"] == exp.data.train.ids(2).tolist()
    assert "bad step 2" in capsys.readouterr().err


def test_bad_steps_in_a_row_abort_and_keep_the_last_good_state(home, monkeypatch):
    poisoned(monkeypatch, {3, 4, 5})
    config = resolved(home, "resnet", steps=6, guard={"limit": 3}, checkpoint={"every": 2})
    with pytest.raises(NumericAbort, match="3 bad steps in a row"):
        training.train(config, str(home / "abort"))
    config = resolved(home, "resnet", steps=6, guard={"policy": "crash"}, checkpoint={"every": 2})
    with pytest.raises(NumericAbort, match="1 bad steps in a row"):
        training.train(config, str(home / "crash"))
    assert sorted(p.name for p in (home / "crash" / "checkpoints").iterdir() if p.name.isdigit()) == ["2"]


def test_init_from_another_run(finished, home, capsys):
    config, workdir, _, _ = finished
    start = {"path": str(workdir), "skip": ("embed/positions",)}
    sgd = {"optimizer": {"name": "sgd", "lr": 0.0}, "schedule": {"name": "constant"}}
    fresh = resolved(home, steps=1, init_from=start, **sgd)
    training.train(fresh, str(home / "child"))
    assert "initialised" in capsys.readouterr().err
    from bigmodel_jax.checkpoint import Checkpointer

    exp = experiment.build(fresh)
    with Checkpointer(home / "child" / "checkpoints", readonly=True) as child:
        state, _ = child.restore(Programs(exp).state)
    parent_exp = experiment.build(config)
    with Checkpointer(workdir / "checkpoints", readonly=True) as parent:
        trained, _ = parent.restore(Programs(parent_exp).state)
    np.testing.assert_array_equal(state["params"]["embed"]["tokens"], trained["params"]["embed"]["tokens"])
    assert not np.array_equal(state["params"]["embed"]["positions"], trained["params"]["embed"]["positions"])


def test_other_data_under_the_same_name_is_refused(home):
    """The corpus grows between two starts: the order of the data would not be that of the first."""
    raw = tiny.raw("decoder", home / "grows") | {"steps": 2, "schedule": {"name": "constant"}}
    config = experiment.resolve(raw)
    training.train(config, str(home / "grown"))
    longer = {**config, "steps": 4}
    (home / "grows" / "corpus" / "more.txt").write_text("one more document, of other words\n" * 9)
    with pytest.raises(InputError, match="the data is not that of step 2"):
        training.train({**config}, str(home / "grown"))
    assert training.train(longer, str(home / "grown"), allow_config_change=True)["step"] == 4


def test_a_profile_window_leaves_a_trace(home, capsys):
    config = resolved(home, steps=4, runtime={"profile": (1, 9)})
    training.train(config, str(home / "profiled"))
    assert list((home / "profiled" / "profile").rglob("*.xplane.pb"))
    assert "attention: blockwise" in capsys.readouterr().err


def test_tf_data_feeds_the_same_run(home, monkeypatch):
    """Augmented digits through tf.data and through numpy end in the same state, bit for bit."""
    states = {}
    for name in ("numpy", "tfdata"):
        kept = {"log": {"every": 1, "ledger": True}}
        config = resolved(home, "resnet", steps=4, runtime={"input": name}, batch_size=16, microbatch=8, **kept)
        states[name] = training.train(config, str(home / f"fed by {name}"))["state_hash"]
    assert states["numpy"] == states["tfdata"]
    found = compare(*(str(home / f"fed by {name}") for name in states))
    assert found["batches"] == {"lacking": [], "steps": 4, "ids": None, "hash": None, "hashed": 4}
    assert found["parted"]["loss"] == {"steps": 4, "bitwise": None, "beyond": None, "largest": None}
    assert list(found["config"]) == ["runtime.input"] and len(set(found["state"])) == 1
    ledger = metrics.read(home / "fed by numpy", "batch")
    assert len({row["hash"] for row in ledger}) == 4 and len(ledger[0]["ids"]) == 16
    with pytest.raises(InputError, match="with a ramp of sizes use numpy"):
        ramp = {"batch_size": ((0, 8), (2, 16)), "runtime": {"input": "tfdata"}}
        training.train(resolved(home, "resnet", **ramp), str(home / "ramped"))
