"""Search and lanes from the command line on real runs: linear models on digits, a dozen in one program."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bigmodel_jax import cli
from bigmodel_jax.study import runner, spec
from bigmodel_jax.study.store import Store

RATES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
STUDY = dict(
    name="tuned", title="Decay, each at its best rate", source="none", seeds=(0, 1), tune_seeds=(7, 8),
    metric="validation/loss", mode="min", baseline="none",
    variants={"none": {"optimizer.weight_decay": 0.0}, "much": {"optimizer.weight_decay": 1.0}},
    base=dict(
        steps=10, batch_size=64, model=dict(name="linear"), objective=dict(name="classification"),
        optimizer=dict(name="momentum", lr=1.0), schedule=dict(name="constant"), data=dict(name="digits"),
        eval=dict(batch_size=360), log=dict(tensorboard=False), checkpoint=dict(every=0),
    ),
)  # fmt: skip


def carried_out(folder, **fields):
    """(file, {purpose: {(variant, lr, seed): metric}} as each run's own result.json has it, tuned.json)."""
    file, workdir = folder / "configs" / "tuned.py", folder / "w"
    file.parent.mkdir()
    file.write_text(f"def get_study():\n    return {STUDY | fields!r}\n")
    cli.run(["study", "run", str(file), "--workdir", str(workdir), "--together", "16"])
    found: dict[str, dict] = {"tune": {}, "seeds": {}}
    for path in workdir.glob("cells/*/cell.json"):
        cell, result = (json.loads((path.parent / name).read_text()) for name in ("cell.json", "result.json"))
        key = cell["variant"], cell["config"]["optimizer"]["lr"], cell["seed"]
        found[cell["purpose"]][key] = result["eval"]["validation"]["loss"]
    return str(file), found, json.loads((workdir / "tuned.json").read_text())


def best(tried, variant):
    rates = sorted({lr for name, lr, _ in tried if name == variant})
    means = [np.mean([loss for (name, lr, _), loss in tried.items() if (name, lr) == (variant, r)]) for r in rates]
    assert len(set(means)) == len(rates)
    return rates[int(np.argmin(means))]


def test_each_variant_runs_at_the_rate_that_is_best_on_its_tuning_seeds(tmp_path, capsys):
    walk = dict(method="walk", leaves={"optimizer.lr": RATES}, start=RATES[3])
    file, found, kept = carried_out(tmp_path, search=walk)
    chosen = {variant: best(found["tune"], variant) for variant in STUDY["variants"]}
    assert {v: c["overrides"]["optimizer.lr"] for v, c in kept.items()} == chosen
    assert chosen["none"] > RATES[2], "the walk has gone on from where it began"
    for variant, rate in chosen.items():
        tried = {lr for name, lr, _ in found["tune"] if name == variant}
        assert {(variant, lr, s) for lr in tried for s in (7, 8)} <= found["tune"].keys()
        at = RATES.index(rate)
        assert set(RATES[max(at - 1, 0) : at + 2]) <= tried
    assert set(found["seeds"]) == {(v, lr, s) for v, lr in chosen.items() for s in (0, 1)}
    assert "none: 2 of 2 seeds" in capsys.readouterr().out

    # The same cells as processes of their own give the same rows; the same lane of another seed does not.
    store = Store(spec.read(file), tmp_path / "alone")
    cells = store.cells({v: {"optimizer.lr": lr} for v, lr in chosen.items()})[:1]
    [row] = runner.Runner(store, say=lambda line: None).run(cells)
    together = Store(spec.read(file), tmp_path / "w").row(cells[0])
    sums = [name for name in row.values if name.startswith("validation/") or name in ("train/loss", "train/grad_norm")]
    assert {name: row.values[name] for name in sums} == pytest.approx(
        {name: together.values[name] for name in sums}, rel=1e-5
    )
    assert (row.data_fingerprint, row.eval_fingerprint) == (together.data_fingerprint, together.eval_fingerprint)
    other = found["seeds"][cells[0].variant, chosen[cells[0].variant], 1]
    assert abs(other / row.values["validation/loss"] - 1) > 1e-3
