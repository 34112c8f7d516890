"""Each layout once: a tiny decoder, eight simulated devices, float64, against one device; and wrong ones are caught.

Pairs of layouts and other models: benchmarks/certify_all.py, whose last result is results/certificates.json.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import agreement, certify, cli, experiment, small, tree
from bigmodel_jax.errors import Disagreement, InputError
from bigmodel_jax.parallel import context, pipeline

CONFIG = {
    "steps": 10,
    "batch_size": 16,
    "model": {"name": "decoder", "num_layers": 4, "embed_dim": 16, "num_heads": 4, "mlp_dim": 32, "vocab_size": 32,
              "max_length": 16, "positions": "rotary", "activation": "relu", "norm": "rmsnorm", "norm_bias": False,
              "remat": "none"},
    "objective": {"name": "causal_lm"},
    "optimizer": {"name": "momentum", "lr": 0.1, "weight_decay": 0.1},
    "schedule": {"name": "constant"},
    "data": {"name": "text", "length": 16, "mode": "pack"},
}  # fmt: skip
EXPERTS = {"num_experts": 4, "expert_group": 1, "activation": "swiglu", "bias": False}
STEPS = 2
LAYOUTS = {
    "data, fsdp and tensor": "data=2,fsdp=2,tensor=2",
    "ZeRO-1 on two slices, optimizer in host memory": "data=4,fsdp=2,zero=1,slices=2,offload=optimizer",
    "pipeline": "data=2,stage=4",
    "circular pipeline": "fsdp=2,stage=2,repeats=2,tensor=2",
    "ring": "data=2,context=4",
    "ulysses": "fsdp=2,context=4,context_by=ulysses",
    "experts": "data=2,expert=4",
}


@functools.cache
def resolved(kind: str) -> dict:
    raw = json.loads(json.dumps(CONFIG))
    raw["model"] |= EXPERTS if kind == "experts" else {}
    return certify.in_precision(experiment.resolve(raw), "float64")


def build(layout: str, kind: str = "dense") -> experiment.Experiment:
    return certify.built(resolved(kind), certify.parse_mesh(LAYOUTS.get(layout, layout)))


@functools.cache
def side(layout: str, kind: str) -> certify.Side:
    return certify.Side(build(layout, kind))


@functools.cache
def reference(kind: str):
    """(initial state, what one device computes from it)."""
    one = side("one", kind)
    start = certify.initial(one.exp)
    return start, one.run(start, certify.made_up, STEPS)


def verdict(found: certify.Side, kind: str = "dense", batches=certify.made_up) -> agreement.Verdict:
    start, expected = reference(kind)
    before = {"parameters": tree.flatten(start["params"])}
    zeros = agreement.zero_gradients(expected)
    return agreement.compare(expected, found.run(start, batches, STEPS), "float64", zeros, start=before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_computes_what_one_device_does(layout, x64):
    kind = "experts" if layout == "experts" else "dense"
    found = verdict(side(layout, kind), kind)
    assert found.agreed, found.reason()
    assert found.moved > 1e-3 and found.rows[0].error > 0


def test_control_rows_of_one_shard_exchanged(x64):
    def wrong(exp, step, rows):
        batch = dict(certify.made_up(exp, step, rows))
        batch["tokens"] = batch["tokens"][[1, 0, *range(2, 16)]]
        return batch

    found = verdict(side("data, fsdp and tensor", "dense"), batches=wrong)
    assert not found.agreed and found.rows[0].error > 1e-2


def test_control_gradient_of_one_shard_for_the_sum_over_all(x64):
    """The loss is right: only the gradient of the last hidden states is that of the first shard, eightfold."""
    exp = build("data=8")

    def apply(variables, **inputs):
        out = exp.model.apply(variables, **inputs)
        first = (jnp.arange(16) < 2)[:, None, None]
        local = jnp.where(first, 8.0, 0.0) * out.hidden
        return out._replace(hidden=local + jax.lax.stop_gradient(out.hidden - local))

    def sums(_, *rest):
        return exp.objective.sums(apply, *rest)

    found = verdict(certify.Side(dataclasses.replace(exp, objective=dataclasses.replace(exp.objective, sums=sums))))
    errors = {(row.part, row.leaf): row.error for row in found.rows}
    assert not found.agreed and errors["gradients", "layers/attn/q"] > 0.1
    assert errors["loss", "step 0"] < 1e-14


def test_control_stages_in_another_order(x64, monkeypatch):
    """Each stage gets the layers of the one before it."""
    dealt = pipeline._Rows.dealt

    def wrong(rows, x):
        return dealt(rows, jnp.roll(x, x.shape[0] // rows.plan.stages, axis=0))

    monkeypatch.setattr(pipeline._Rows, "dealt", wrong)
    found = verdict(certify.Side(build("pipeline")))
    assert not found.agreed and found.rows[0].error > 1e-2


def test_control_a_ring_that_skips_its_last_block(x64, monkeypatch):
    hops = context.Round.hops
    monkeypatch.setattr(context.Round, "hops", lambda tour: (hops(tour)[0] - 1, hops(tour)[1]))
    found = verdict(certify.Side(build("ring")))
    assert not found.agreed and found.rows[0].error > 1e-2


def run_of(**leaves) -> dict:
    values = {"w": np.array([1.0, -2.0]), "k_bias": np.array([1e-17, 2e-17])} | leaves
    return {"gradients": values, "parameters": {name: value + 1 for name, value in values.items()}}


def test_what_counts_as_agreement():
    exact = run_of()
    zeros = agreement.zero_gradients(exact)
    assert zeros == {"k_bias"}
    start = {"parameters": {"w": np.zeros(2)}}

    def judge(b, precision="float64", a=exact, **more):
        return agreement.compare(a, b, precision, zeros, start=start, **more)

    assert judge(run_of(w=np.array([1.0, -2.0 - 1e-12]))).agreed
    worst = judge(run_of(w=np.array([1.0, -2.0 - 1e-9])))
    assert not worst.agreed and worst.reason() == "worst leaf gradients w: 5.0e-10 of 1e-10 allowed"
    # A gradient that is zero in theory: noise in it is nothing, a wrong value is something.
    assert judge(run_of(k_bias=np.array([-3e-17, 1e-16]))).agreed
    assert not judge(run_of(k_bias=np.array([1e-8, 0.0]))).agreed
    # A narrower precision: as far from float64 as the first layout is, though not near that layout itself.
    a, b, c = (run_of(w=np.array([1.0, -2.0 + far])) for far in (0.01, -0.03, 0.2))
    assert judge(b, "bfloat16", a, exact=exact).agreed and not judge(b, "bfloat16", a).agreed
    assert not judge(c, "bfloat16", a, exact=exact).agreed
    # Nothing is proven by numbers that are none, or by steps that move nothing.
    assert not judge(run_of(w=np.array([np.nan, 1.0]))).agreed
    still = agreement.compare(exact, exact, "float64", zeros, start={"parameters": exact["parameters"]})
    assert not still.agreed and "no parameter moved" in still.reason()


def test_the_verb_writes_a_certificate_and_ends_in_its_own_exit_code(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "linear.py", tmp_path / "certificate.json"
    raw = {"model": {"name": "linear"}, "objective": {"name": "classification"}, "data": {"name": "digits"}}
    raw |= {"optimizer": {"name": "sgd"}, "schedule": {"name": "constant"}}
    file.write_text(f"def get_config():\n    return {raw}\n")
    command = ["certify", "--config", str(file), "--mesh", "one", "--mesh", "data=2,fsdp=2", "--out", str(out)]
    cli.run([*command, "--steps", "2", "--config.batch_size=12"])
    found = json.loads(out.read_text())
    assert found["agreed"] and [v["precision"] for v in found["verdicts"]] == ["float64", "float32"]
    assert {row["leaf"] for row in found["verdicts"][0]["leaves"]} == {"step 0", "step 1", "head/kernel", "head/bias"}
    assert "batch_size" not in found["changes"] and "worst leaf" in capsys.readouterr().out

    def wrong(*args, **kwargs):
        start, good = {"w": np.zeros(1)}, {"w": np.ones(1)}
        runs = [{"loss": {"step 0": loss}, "parameters": good} for loss in (np.ones(1), np.zeros(1))]
        return (agreement.compare(*runs, "float64", start={"parameters": start}),)

    monkeypatch.setattr(certify, "certify", wrong)
    message = "mesh data=2,fsdp=2 does not compute what one does, in float64: worst leaf loss step 0: 1.0e+00 of 1e-10"
    with pytest.raises(Disagreement, match=re.escape(message)) as caught:
        cli.run(command)
    assert caught.value.exit_code == 78 and not json.loads(out.read_text())["agreed"]
    with pytest.raises(InputError, match="'mesh.fsd'; did you mean 'fsdp'"):
        certify.parse_mesh("data=2,fsd=2")
    with pytest.raises(InputError, match="'data' has no value"):
        certify.parse_mesh("data")


def test_made_up_batches_are_legal():
    """Packed rows: documents count from 1 in order, positions from 0 in each, and padding weighs nothing."""
    config = resolved("dense")
    spec = small.fields(config)
    batch = small.batch(config, spec, 64, 0)
    assert {name: (x.shape[1:], x.dtype.name) for name, x in batch.items()} == spec
    segments, positions = batch["segments"], batch["positions"]
    assert set(np.unique(segments)) == {0, 1, 2, 3} and 0 < batch["tokens"].max() < 32
    assert not batch["weights"][segments == 0].any() and 0.5 < batch["weights"][segments > 0].mean() < 0.95
    for row, places in zip(segments, positions, strict=True):
        kept = row[row > 0]
        assert (np.diff(kept) >= 0).all() and (np.diff(kept) <= 2).all()
        for number in set(kept):
            assert places[row == number].tolist() == list(range((row == number).sum()))


def test_made_up_pairs_that_share_a_row_each_have_their_source():
    root = Path(__file__).resolve().parents[2]
    config = experiment.resolve(experiment.read(str(root / "configs" / "g2p_cmudict.py")))
    config = small.shrunk(small.sized(config))[0]
    batch = small.batch(config, small.fields(config), 64, 0)
    assert batch["segments"].max() == 3 and (batch["source_segments"] == 0).any()
    for source, places, target in zip(
        *(batch[n] for n in ("source_segments", "source_positions", "segments")), strict=True
    ):
        assert set(target) <= {0, *source} and (np.diff(source[source > 0]) >= 0).all()
        for number in set(source):
            assert places[source == number].tolist() == list(range((source == number).sum()))


def test_shrinking_keeps_what_decides_the_layout():
    raw = json.loads(json.dumps(CONFIG)) | {"batch_size": 512, "microbatch": 64}
    raw["model"] |= {"num_layers": 32, "embed_dim": 4096, "num_heads": 32, "num_kv_heads": 8, "vocab_size": 128256}
    config = experiment.resolve(raw)
    made, changes = small.shrunk(config, layers=4, kept=["model.mlp_dim"])
    assert changes["model.num_layers"] == (32, 4) and changes["model.embed_dim"] == (4096, 32)
    assert made["model"]["num_heads"] == 8 and made["model"]["num_kv_heads"] == 2 and made["model"]["mlp_dim"] == 32
    assert (made["batch_size"], made["microbatch"]) == (16, 8) and "model.mlp_dim" not in changes
    assert config["model"]["num_layers"] == 32
