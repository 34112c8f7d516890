"""`bigmodel plan` from end to end on simulated devices: what it says, what it writes, what it advises."""

from __future__ import annotations

import json

import jax
import pytest

from bigmodel_jax import cli, experiment
from bigmodel_jax.errors import DoesNotFit, InputError
from bigmodel_jax.plan import plan
from bigmodel_jax.planner import compile as compiling
from bigmodel_jax.planner import memory, targets, verdict

MiB = 2**20
RAW = {
    "batch_size": 8, "steps": 100,
    "model": {
        "name": "decoder", "vocab_size": 512, "num_layers": 1, "embed_dim": 128, "num_heads": 2, "max_length": 16,
        "bias": False, "positions": "rotary",
    },
    "objective": {"name": "causal_lm"}, "optimizer": {"name": "adamw"}, "schedule": {"name": "constant"},
    "data": {"name": "text", "corpus": "stdlib", "tokenizer": "bytes", "length": 16},
}  # fmt: skip
ROOM = 4.0  # MiB: replicas need 5.5, shards 3.0


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """(what was said, plan.json) of a config whose four replicas do not fit."""
    out = tmp_path_factory.mktemp("plan")
    with pytest.raises(DoesNotFit) as error:
        plan(experiment.resolve(RAW), "cpu:4", memory_gib=ROOM / 1024, out=str(out), price=2.0)
    return str(error.value), json.loads((out / "plan.json").read_text()), out


def test_what_does_not_fit_is_refused_with_advice_that_fits_when_followed(refused):
    said, written, _ = refused
    words = [word for word in said.split() if word.startswith("--config.")]
    assert "does not fit" in said and "\n" not in said and words
    assert written["fits"] is False and written["advice"]["checked"] and written["advice"]["words"] == words
    followed = plan(experiment.resolve(RAW, words), "cpu:4", memory_gib=ROOM / 1024)
    assert followed.fits is True and followed.memory["needs"].value < ROOM * MiB < written["memory"]["needs"]["value"]


def test_every_number_says_where_it_is_from_and_the_parts_are_those_of_the_shapes(refused):
    _, written, out = refused
    figures = [figure for part in ("memory", "time", "run") for figure in written[part].values()]
    assert len(figures) > 12 and all(figure["source"] for figure in figures)
    assert written["label"] == "estimate" and "estimate" in written["memory"]["needs"]["source"]
    parameters = 512 * 128 + 4 * 128 * 128 + 2 * 128 * 512 + 3 * 2 * 128
    assert written["memory"]["parameters"]["value"] == 4 * parameters
    assert written["memory"]["optimizer"]["value"] == 8 * parameters + 4
    assert written["run"]["tokens"]["value"] == 100 * 8 * 16
    assert written["time"]["step"]["value"] is None, "nothing is known of how fast a simulated device is"
    assert (out / "layout.png").read_bytes()[:4] == b"\x89PNG"


def test_arithmetic_agrees_with_what_was_compiled(refused):
    _, written, _ = refused
    guess = memory.estimate(experiment.resolve(RAW), 4)
    assert guess.parameters == written["memory"]["parameters"]["value"]
    assert guess.optimizer == written["memory"]["optimizer"]["value"]
    assert 0.5 < guess.total / written["memory"]["needs"]["value"] < 2


def test_recomputation_and_microbatches_store_less_and_every_axis_cuts_the_state():
    def needs(*words):
        return memory.estimate(experiment.resolve(RAW, words), 8)

    plain = needs()
    assert needs("--config.model.remat=full").activations < plain.activations
    assert 1.9 < needs("--config.batch_size=16").activations / plain.activations <= 2
    assert needs("--config.batch_size=16", "--config.microbatch=8").activations == plain.activations
    fsdp = needs("--config.mesh.data=1", "--config.mesh.fsdp=8")
    assert plain.optimizer / 8 <= fsdp.optimizer < plain.optimizer / 7.5
    with pytest.raises(InputError, match="does not fit 8 devices"):
        needs("--config.mesh.data=3")


def test_a_compilers_refusal_is_read():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 29.25G of "
        "15.75G hbm. Exceeded hbm capacity by 13.50G."
    )
    found = compiling.out_of_memory(text)
    assert found == {"needs": int(29.25 * 2**30), "limit": int(15.75 * 2**30)}
    text = "Ran out of memory on HBM, the total memory required for HLO temporaries (17.07G) exceeds "
    found = compiling.out_of_memory(text + "available HBM (15.75G). HLO module: jit_train_step.")
    assert found == {"needs": int(17.07 * 2**30), "limit": int(15.75 * 2**30)}
    assert compiling.out_of_memory("INTERNAL: something else") == {}


@pytest.mark.parametrize(
    "target, mesh, torus, slow",
    [
        ("v5p:4x4x4", {"data": 2, "fsdp": 32}, (4, 4, 4), {}),
        ("2xv5e:4x4", {"data": 2, "fsdp": 16}, (4, 4), {"data": 2}),
        ("h100:8x8", {"fsdp": 64}, (), {"fsdp": 8}),
        ("h100:8x8", {"data": 4, "fsdp": 8, "tensor": 2}, (), {"data": 4, "fsdp": 2}),
    ],
)
def test_outer_axes_cross_the_slow_network(target, mesh, torus, slow):
    whole = {axis: mesh.get(axis, 1) for axis in ("data", "stage", "fsdp", "expert", "context", "tensor")}
    found = verdict.links(targets.parse(target), whole)
    assert found.torus == torus and dict(found.slow) == slow


@pytest.mark.parametrize(
    "words, says", [(["--target", "v5q:8x8x8"], "did you mean 'v5p'"), (["--target", "cpu:3"], "legal sizes")]
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, capsys, monkeypatch, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(f"def get_config():\n    return {RAW!r}\n")
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--config", str(file), *words])
    assert stop.value.code == 2 and says in capsys.readouterr().err
    assert jax.config.jax_platforms == "cpu"
