"""The bytes a training step sends are those of the closed form; a weight left whole turns the budget red."""

import dataclasses

import pytest

from bigmodel_jax import experiment, tree
from bigmodel_jax.planner import budget
from bigmodel_jax.planner.costs import costs
from bigmodel_jax.planner.hlo import read
from bigmodel_jax.programs import Programs

LAYERS, WIDTH, LENGTH, ROWS, VOCAB = 2, 32, 32, 16, 64
RAW = {
    "batch_size": ROWS,
    "model": {
        "name": "decoder", "vocab_size": VOCAB, "num_layers": LAYERS, "embed_dim": WIDTH, "num_heads": 4,
        "max_length": LENGTH, "positions": "rotary", "norm": "rmsnorm", "norm_bias": False, "bias": False,
        "remat": "none",
    },
    "objective": {"name": "causal_lm"}, "optimizer": {"name": "adamw"}, "schedule": {"name": "cosine"},
    "data": {"name": "text", "corpus": "stdlib", "tokenizer": "bytes", "length": LENGTH},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
}  # fmt: skip
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def sent(exp) -> dict[str, float]:
    compiled = Programs(exp).lower_step(ROWS).compile(compiler_options=QUICK)
    return budget.table(costs(read(compiled.as_text()), exp.mesh.shape))


@pytest.fixture(scope="module")
def exp():
    return experiment.build(experiment.resolve(RAW), load=False)


@pytest.fixture(scope="module")
def allowed(exp):
    sizes = {path: leaf.size * 4 for path, leaf in tree.flatten(Programs(exp).state["params"]).items()}
    matrices = {path: size for path, size in sizes.items() if size > 4 * LAYERS * WIDTH}  # without norms
    table = sum(size for path, size in matrices.items() if path.startswith("embed"))
    return budget.dense_decoder(
        layers=LAYERS, layer_bytes=sum(matrices.values()) - table, table_bytes=table,
        activation_bytes=ROWS // 4 * LENGTH * WIDTH * 4, replicas=("data", 2), shards=("fsdp", 2),
        features=("tensor", 2), apart=3,
    )  # fmt: skip


def test_a_step_sends_what_the_closed_form_says(exp, allowed):
    assert budget.departures(sent(exp), allowed) == []


def test_a_weight_left_whole_turns_the_budget_red(exp, allowed):
    kept = tuple(rule for rule in exp.layout.rules if rule != ("mlp", ("tensor",)))
    wrong = dataclasses.replace(exp, layout=dataclasses.replace(exp.layout, rules=kept))
    lines = budget.departures(sent(wrong), allowed)
    assert any("fsdp" in line for line in lines) and any("tensor" in line for line in lines)


def test_departures_go_both_ways_and_small_sums_are_nothing():
    allowed = {"gathered over fsdp": 100e6, "summed over tensor": 10e6, "summed over data+fsdp": 0.1e6}
    assert budget.departures(allowed | {"summed over data+fsdp": 0.2e6}, allowed) == []
    (more,) = budget.departures(allowed | {"gathered over fsdp": 110e6}, allowed)
    assert more == "gathered over fsdp: 110.000 MB, 1.10 of the budget (100.000 MB)"
    (less,) = budget.departures({k: v for k, v in allowed.items() if "tensor" not in k}, allowed)
    assert "0.00 of the budget" in less
    (new,) = budget.departures(allowed | {"exchanged over expert": 50e6}, allowed)
    assert "not in the budget" in new
