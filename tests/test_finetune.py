"""Fine-tuning end to end: train, start a run with LoRA and a new head from it, stop early, be killed and go on."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from bigmodel_jax import checkpoint, cli, experiment, metrics, record, tree
from bigmodel_jax import train as training
from bigmodel_jax.errors import InputError, Preempted
from bigmodel_jax.inherit import init_from
from bigmodel_jax.programs import Programs


def raw(**changes):
    """A small network on 8x8 digits: the programs around it are those of any model, and compile fast."""
    base = {
        "seed": 1, "steps": 12, "batch_size": 8, "model": {"name": "mlp", "hidden": (16, 16)},
        "data": {"name": "digits", "limit": 200}, "objective": {"name": "classification"},
        "optimizer": {"name": "adamw", "lr": 1e-2}, "schedule": {"name": "constant"},
        "eval": {"batch_size": 120}, "log": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    return experiment.resolve(base | changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder; runs below use one device, because nothing here is about layouts."""
    build = functools.partial(experiment.build, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "build", build)
        yield tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def pretrained(home):
    training.train(raw(steps=2), str(home / "pretrained"))
    return home / "pretrained"


def lora(home, pretrained, workdir, **changes):
    config = raw(
        init_from={"path": str(pretrained), "skip": ("^head/",)},
        lora={"rank": 2, "targets": ("layer1/kernel",), "train": ("^head/",)},
        eval={"every": 2, "batch_size": 120, "metric": "validation/nll", "patience": 2, "min_delta": 10.0},
        checkpoint={"every": 4}, steps=20, **changes,
    )  # fmt: skip
    return training.train(config, str(home / workdir))


@pytest.fixture(scope="module")
def tuned(home, pretrained):
    return lora(home, pretrained, "tuned")


def params(workdir, folder="checkpoints", key="params"):
    """({path: array}, step) of the newest checkpoint in a folder of a run."""
    step, about = record.find(record.resolve(workdir / folder), None)
    names = {name for name in about["leaves"] if name.startswith(f"{key}/")}
    wanted = {n: np.zeros(about["leaves"][n]["shape"], about["leaves"][n]["dtype"]) for n in names}
    found = checkpoint.load(record.resolve(workdir / folder) / str(step), about["leaves"], wanted)
    return {name.removeprefix(f"{key}/"): leaf for name, leaf in found.items()}, step


def test_a_run_stops_when_nothing_improves_and_keeps_the_best(home, pretrained, tuned):
    # 10 nats is an improvement that never comes: the first evaluation is the best, two more end the run.
    assert tuned["step"] == 6 and tuned["best"]["step"] == 2
    rows = {row["step"]: row for row in metrics.read(home / "tuned", "eval")}
    assert sorted(rows) == [2, 4, 6]
    assert tuned["best"]["validation/nll"] == rows[2]["nll"] == tuned["best"]["eval"]["validation"]["nll"]
    best, step = params(home / "tuned", "best")
    last, _ = params(home / "tuned")
    assert step == 2 and any(np.any(best[p] != last[p]) for p in best)
    report = json.loads((home / "tuned" / "init_from.json").read_text())
    assert "layer1/kernel" in report["loaded"] and "head/kernel" in report["skipped"] and not report["missing"]


def test_every_verb_can_take_the_best_checkpoint_or_one_of_a_step(home, pretrained, tuned, tmp_path, capsys):
    rows = {row["step"]: row["nll"] for row in metrics.read(home / "tuned", "eval")}
    assert len(set(rows.values())) == 3  # the control: a wrong checkpoint shows
    for options, step in ((["--best"], 2), (["--step", "4"], 4), ([], 6)):
        cli.run(["eval", "--workdir", str(home / "tuned"), *options, "--resamples", "20", "--out", str(tmp_path)])
        report = json.loads((tmp_path / "eval.json").read_text())
        assert report["step"] == step and report["eval"]["validation"]["nll"] == pytest.approx(rows[step], rel=1e-6)
    best, _ = params(home / "tuned", "best", "params")
    started, _ = init_from(
        str(home / "tuned" / "best"), {"head": {"kernel": np.zeros((16, 10), np.float32)}}, strict=False
    )
    assert np.array_equal(started["head"]["kernel"], best["head/kernel"])
    where = [["eval", "--workdir"], ["generate", "--workdir"], ["convert", "--to", f"hf:{tmp_path}/out", "--from"]]
    for verb in where:
        for run, options, words in (
            (pretrained, ["--best"], r"no best checkpoint.*eval.metric.*one of \[2\]"),
            (home / "tuned", ["--step", "3"], r"no step 3.*steps there: \[4, 6\]"),
            (home / "tuned", ["--step", "4", "--best"], "not allowed with"),
        ):
            with pytest.raises(InputError, match=words):
                cli.run([*verb, str(run), *options])
    with pytest.raises(InputError, match="--best are for exports"):
        cli.run(["convert", "--from", "hf:nowhere", "--to", str(tmp_path / "run"), "--best"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.run(["eval", "--help"])
    assert "eval.metric was best" in capsys.readouterr().out


def test_the_base_is_the_pretrained_model_for_ever(home, pretrained, tuned):
    base, _ = params(home / "tuned", key="frozen")
    before, _ = params(pretrained)
    assert set(base) == {path for path in before if not path.startswith("head/")}
    assert all(np.array_equal(base[path], before[path]) for path in base)
    target = tree.unflatten({path: np.zeros_like(leaf) for path, leaf in base.items()})
    merged, report = init_from(str(home / "tuned"), target, skip=("^head/",))
    merged = tree.flatten(merged)
    changed = {path for path in base if not np.array_equal(merged[path], base[path])}
    assert changed == {"layer1/kernel"} and not report["missing"]


def test_killed_and_continued_it_stops_at_the_same_step(home, pretrained, tuned, monkeypatch):
    advance = training.Loop.advance

    def killed(run, step, state, batch):
        state = advance(run, step, state, batch)
        if step == 4:
            run.preemption.asked = lambda step: True
        return state

    with monkeypatch.context() as patch:
        patch.setattr(training.Loop, "advance", killed)
        with pytest.raises(Preempted):
            lora(home, pretrained, "killed")
    result = lora(home, pretrained, "killed")
    assert result["state_hash"] == tuned["state_hash"]
    assert (result["step"], result["best"]) == (tuned["step"], tuned["best"])


def test_a_strict_start_names_what_is_missing(home, pretrained, monkeypatch):
    monkeypatch.setattr(Programs, "begin", lambda *_: None)  # it ends before the first step
    config = raw(init_from={"path": str(pretrained)}, model={"name": "mlp", "hidden": (16,)}, steps=1)
    with pytest.raises(InputError, match="does not fit: 2 unexpected .layer1/bias, layer1/kernel"):
        training.train(config, str(home / "strict"))
    report = json.loads((home / "strict" / "init_from.json").read_text())
    assert report["unexpected"] == ["layer1/bias", "layer1/kernel"] and len(report["loaded"]) == 4
