"""A best layout is planted by the hardware's numbers; the search must find it, and another one on other hardware."""

from __future__ import annotations

import collections
import dataclasses

import pytest

from bigmodel_jax import experiment
from bigmodel_jax.chips import Chip
from bigmodel_jax.models.spec import REMAT
from bigmodel_jax.planner import memory, search, targets
from bigmodel_jax.planner.roofline import Links

DEVICES = targets.parse("cpu:8")
CHIP = Chip("planted", "", {"float32": 1e12}, memory_bytes=1e12, memory_rate=1e12, link_rate=1e9)
RAW = {
    "batch_size": 64,
    "model": {
        "name": "decoder", "vocab_size": 64, "num_layers": 1, "embed_dim": 64, "num_heads": 4, "mlp_dim": 256,
        "max_length": 16, "positions": "rotary", "norm_bias": False, "bias": False,
    },
    "objective": {"name": "causal_lm"}, "optimizer": {"name": "adamw"}, "schedule": {"name": "constant"},
    "data": {"name": "text", "corpus": "stdlib", "tokenizer": "bytes", "length": 16},
}  # fmt: skip


@pytest.fixture(autouse=True)
def two_policies(monkeypatch):
    """Every policy is traced once; two show that the choice is made."""
    monkeypatch.setattr(search, "REMAT", {name: REMAT[name] for name in ("none", "full")})


@pytest.fixture(scope="module")
def config():
    return experiment.resolve(RAW)


def found(config, chip=CHIP, room=1e12, best=1, slower=()):
    """The search, with a compiler that agrees with arithmetic but for layouts it finds `slower`."""

    def compiled(changed, candidate):
        assert experiment.resolve(config, candidate.words) == changed
        return candidate.step_s + 1e6 * (candidate.mesh in slower), candidate.text

    return search.search(config, DEVICES, chip, lambda mesh: Links(), room=room, compile=compiled, best=best)


def axes(candidate):
    return {axis: size for axis, size in candidate.mesh.items() if size > 1}


def test_few_tokens_and_a_slow_network_plant_tensor_parallelism_and_many_tokens_replicas(config):
    few = found(config | {"batch_size": 2}).ranked[0]
    assert axes(few)["tensor"] == 4, "weights are heavier than two rows of activations"
    many = found(config | {"batch_size": 4096}).ranked[0]
    assert "tensor" not in axes(many) and many.remat == "none" and many.microbatch == 0


def test_little_memory_plants_the_one_layout_that_fits(config):
    everything = found(config)
    least = min(everything.ranked, key=lambda candidate: candidate.bytes)
    others = sorted(candidate.bytes for candidate in everything.ranked)
    room = (least.bytes + next(size for size in others if size > least.bytes)) / 2 / search.MARGIN
    tight = found(config, room=room)
    assert {c.words for c in tight.ranked} == {c.words for c in everything.ranked if c.bytes == least.bytes}
    assert tight.ranked[0].remat == "full" and tight.ranked[0].mesh["data"] == 1, "all of the state is cut"
    # Control: where all fits, that layout does not win.
    assert everything.ranked[0].mesh != tight.ranked[0].mesh


def test_arithmetic_decides_what_is_kept_and_every_layout_is_one_that_builds(config):
    roomy = found(config)
    assert roomy.tried >= len(roomy.ranked) > 20
    for candidate in roomy.ranked[:: len(roomy.ranked) // 5]:
        changed = experiment.resolve(config, candidate.words)
        assert memory.estimate(changed, 8).total == candidate.bytes
        experiment.build(changed, load=False)


def test_what_was_compiled_has_the_last_word(config):
    first, second = found(config, best=2).compiled
    turned = found(config, best=2, slower=[first[0].mesh]).compiled
    assert first[0].step_s <= second[0].step_s
    assert first[0].mesh == second[0].mesh or turned[0][0].mesh == second[0].mesh


def payloads(spent):
    out = collections.Counter()
    for c in spent.collectives:
        out[c.kind] += c.payload_bytes
    return out


def test_a_slow_link_counts_in_the_closed_form(config, monkeypatch):
    mesh = {"data": 1, "stage": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    changed = search.changed_by(config, mesh, "none", 0)
    spent = search.closed_form(changed, memory.traced(changed, "cpu"), mesh)
    params = 2 * 64 * 64 + 4 * 64 * 64 + 2 * 64 * 256 - 64 * 64  # table, attention, feed-forward
    norms = 3 * 64
    weights = 4 * (params + norms)
    assert payloads(spent) == {"all-gather": weights, "reduce-scatter": weights}
    # Rows of the table are exchanged instead, forward and backward; tied, it is still gathered for the head.
    changed["mesh"]["weights_by"] = "rings"
    assert payloads(search.closed_form(changed, memory.traced(changed, "cpu"), mesh)) == payloads(spent), "few rows"
    monkeypatch.setattr(search.rings, "exchanged", lambda tokens, table, shards: tokens == 64 * 16)
    spent, rows = search.closed_form(changed, memory.traced(changed, "cpu"), mesh), 2 * 4 * 64 * 16 * 64 / 8
    assert payloads(spent) == {"all-gather": weights, "reduce-scatter": weights, "all-to-all": rows}
    changed["model"]["tied_embeddings"] = False
    spent = search.closed_form(changed, memory.traced(changed, "cpu"), mesh)
    assert payloads(spent) == {"all-gather": weights, "reduce-scatter": weights, "all-to-all": rows}  # the head's alone
    slow = dataclasses.replace(CHIP, link_rate=1e3)
    assert found(config, slow).ranked[0].step_s > 100 * found(config).ranked[0].step_s
