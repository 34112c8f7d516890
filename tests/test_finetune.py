"""Fine-tuning end to end: pretrain, start a classifier with LoRA from it, stop early, be killed and go on."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from bigmodel_jax import checkpoint, experiment, metrics, record, tree
from bigmodel_jax import train as training
from bigmodel_jax.errors import InputError, Preempted
from bigmodel_jax.inherit import init_from
from bigmodel_jax.programs import Programs


def raw(home, **changes):
    """A classifier of texts by whether they begin with "good", and its leaves."""
    path = home / "texts.csv"
    if not path.exists():
        rows = [f"{('good' if i % 2 else 'poor')} number {i},{i % 2}" for i in range(80)]
        path.write_text("text,label\n" + "\n".join(rows) + "\n")
    base = {
        "seed": 1, "steps": 12, "batch_size": 8,
        "model": {
            "name": "encoder", "num_layers": 2, "embed_dim": 16, "num_heads": 2, "max_length": 16, "token_types": 0,
            "remat": "none", "dropout": 0.0, "attention_dropout": 0.0, "embed_dropout": 0.0,
        },
        "data": {"name": "masked_table", "train": str(path), "length": 16, "validation_share": 0.2},
        "objective": {"name": "masked_lm"},
        "optimizer": {"name": "adamw", "lr": 1e-2}, "schedule": {"name": "constant"},
        "eval": {"batch_size": 8}, "log": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    return {k: base.get(k, {}) | v if isinstance(v, dict) else v for k, v in (base | changes).items()}


def classifier(home, parent, **changes):
    out = raw(home) | {"objective": {"name": "classification"}}
    out["model"] = out["model"] | {"head": "classes", "pooling": "mean"}
    out["data"] = out["data"] | {"name": "labelled_text"}
    out["init_from"] = {"path": str(parent), "skip": ("^head/",)}
    for section, values in changes.items():
        out[section] = out.get(section, {}) | values if isinstance(values, dict) else values
    return experiment.resolve(out)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder; runs below use one device, because nothing here is about layouts."""
    build = functools.partial(experiment.build, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "build", build)
        yield tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def pretrained(home):
    training.train(experiment.resolve(raw(home, steps=2)), str(home / "pretrained"))
    return home / "pretrained"


def lora(home, pretrained, workdir, **changes):
    config = classifier(
        home, pretrained, lora={"rank": 2, "targets": (r"attn/(q|v)$",), "train": ("^head/",)},
        eval={"every": 2, "batch_size": 8, "metric": "validation/nll", "patience": 2, "min_delta": 10.0},
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
    assert "layers/attn/q" in report["loaded"] and "head/kernel" in report["skipped"] and not report["missing"]
    data = json.loads((home / "tuned" / "data.json").read_text())
    assert data["counts"]["train"] == {"0": 32, "1": 32}


def test_the_base_is_the_pretrained_model_for_ever(home, pretrained, tuned):
    base, _ = params(home / "tuned", key="frozen")
    before, _ = params(pretrained)
    assert set(base) == {path for path in before if not path.startswith("head/")}
    assert all(np.array_equal(base[path], before[path]) for path in base)
    target = tree.unflatten({path: np.zeros_like(leaf) for path, leaf in base.items()})
    merged, report = init_from(str(home / "tuned"), target, skip=("^head/",))
    merged = tree.flatten(merged)
    changed = {path for path in base if not np.array_equal(merged[path], base[path])}
    assert changed == {"layers/attn/q", "layers/attn/v"} and not report["missing"]


def test_killed_and_continued_it_stops_at_the_same_step(home, pretrained, tuned, monkeypatch):
    advance = training._Run.advance

    def killed(run, step, state, batch):
        state = advance(run, step, state, batch)
        if step == 4:
            run.preemption.asked = lambda step: True
        return state

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "advance", killed)
        with pytest.raises(Preempted):
            lora(home, pretrained, "killed")
    result = lora(home, pretrained, "killed")
    assert result["state_hash"] == tuned["state_hash"]
    assert (result["step"], result["best"]) == (tuned["step"], tuned["best"])


def test_a_strict_start_names_what_is_missing(home, pretrained, monkeypatch):
    monkeypatch.setattr(Programs, "begin", lambda *_: None)  # it ends before the first step
    config = classifier(home, pretrained, init_from={"skip": ()}, steps=1)
    with pytest.raises(InputError, match=r"1 missing .*unexpected|missing .head|does not fit"):
        training.train(config, str(home / "strict"))
    report = json.loads((home / "strict" / "init_from.json").read_text())
    assert report["missing"] == ["head/kernel"] and "head/dense" in report["unexpected"]
