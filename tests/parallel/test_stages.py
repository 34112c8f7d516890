"""A pipeline computes what the plain stack computes, in the ticks it says, and moves rows instead of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import tree as trees
from bigmodel_jax.models import MODELS
from bigmodel_jax.parallel import pipeline, rules
from bigmodel_jax.parallel.mesh import batch_sharding, make_mesh
from bigmodel_jax.planner import costs, hlo

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ROWS, LENGTH, WIDTH = 16, 3, 6
# (mesh, microbatches, repeats, layers): in turn as many microbatches as stages and more, one piece and several,
# pieces of one layer and of two, and every axis that rows and weights are cut over.
SCHEDULES = [
    ({"stage": 4, "fsdp": 2}, 8, 1, 8),
    ({"data": 2, "stage": 2, "tensor": 2}, 0, 3, 6),
    ({"data": 2, "stage": 4}, 8, 2, 16),
]


def layer(leaves, x, context):
    """Something of everything a block does: weights, segments and keys of its rows, its own number."""
    w, number = leaves
    x = rules.constrain(x, ("batch", "length", "embed_act"))
    noise = jnp.cos(jax.random.key_data(context["keys"]).sum(-1) + number)[:, None, None]
    same = context["segments"][:, :, None] == context["segments"][:, None]
    mixed = jnp.einsum("blm,bmd->bld", same / LENGTH, x)
    y = x + jnp.tanh(jnp.einsum("bld,de->ble", mixed, w)) * context["shared"] + 0.1 * noise
    return rules.constrain(y, ("batch", "length", "mlp")), {"sums": jnp.sum(y, (1, 2))}, {"mean": jnp.mean(y)}


def inputs(layers):
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(layers, WIDTH, WIDTH)) / WIDTH, rng.normal(size=(ROWS, LENGTH, WIDTH))
    segments = rng.integers(0, 2, (ROWS, LENGTH)).astype(np.int32)
    return w, x, segments, rng.normal(size=(1, LENGTH, 1))


def passes(stack, layers, gradients=True):
    """(w, x, segments, shared) -> everything a pass gives, and the gradients of a sum of it."""

    def loss(w, x, segments, shared):
        keys = jax.vmap(jax.random.key)(jnp.arange(ROWS))
        context = {"segments": segments, "shared": shared, "keys": keys, "absent": None}
        y, by_row, by_batch = stack((w, jnp.arange(layers)), x, context)
        out = {"y": y, **by_row, **by_batch}
        return jnp.sum(jnp.sin(y)) + 0.1 * jnp.sum(by_row["sums"] ** 2) + jnp.sum(by_batch["mean"]), out

    return jax.value_and_grad(loss, (0, 1, 3), has_aux=True) if gradients else loss


def plain(stacked, x, context):
    def one(x, leaves):
        y, *said = layer(leaves, x, context)
        return y, said

    y, (by_row, by_batch) = jax.lax.scan(one, x, stacked)
    return y, by_row, by_batch


def compiled(sizes, microbatches, repeats, layers, gradients=True):
    """The pipelined pass on a mesh, with weights where the layout keeps them."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    layout = rules.Layout(make_mesh(sizes, devices), microbatches=microbatches, repeats=repeats)

    def stack(stacked, x, context):
        with rules.use(layout):
            plan = pipeline.planned(layers, ROWS)
            return pipeline.run(layer, stacked, x, context, plan)

    given = inputs(layers)
    weights = rules.shardings(("layers", "embed", "mlp"), given[0], layout.mesh)
    rows = batch_sharding(layout.mesh, accumulated=False)
    places = (weights, rows, rows, None)
    lowered = jax.jit(passes(stack, layers, gradients), in_shardings=places).lower(*given)
    program = lowered.compile(compiler_options=QUICK)
    placed = [x if place is None else jax.device_put(x, place) for x, place in zip(given, places, strict=True)]
    return program, program(*placed)


def plain_result(layers, gradients=True):
    return jax.jit(passes(plain, layers, gradients), compiler_options=QUICK)(*inputs(layers))


def gap(a, b):
    a, b = (trees.flatten(jax.device_get(x)) for x in (a, b))
    assert a.keys() == b.keys()
    return max(np.abs(a[k] - b[k]).max() / np.abs(a[k]).max() for k in a)


@pytest.mark.parametrize("sizes, microbatches, repeats, layers", SCHEDULES, ids=str)
def test_equals_the_plain_stack(sizes, microbatches, repeats, layers, x64):
    program, got = compiled(sizes, microbatches, repeats, layers)
    assert gap(plain_result(layers), got) < 1e-12
    found = costs.costs(hlo.read(program.as_text()), make_mesh(sizes).shape).collectives
    over_stages = [c for c in found if "stage" in c.axes]
    assert any(c.kind == "collective-permute" and c.count >= plan_of(sizes, microbatches, repeats).ticks for c in found)
    # What else crosses stages is no weights: sums, and at the end what each layer said of its rows.
    layer_bytes = 8 * WIDTH * WIDTH
    assert all(c.payload_bytes / c.count < layer_bytes for c in over_stages if c.kind == "all-reduce")
    gathered = [c for c in over_stages if c.kind == "all-gather"]
    assert all(c.count == 1 for c in gathered) and sum(c.payload_bytes for c in gathered) < layers * layer_bytes / 2
    assert all(c.count == 1 for c in found if c.kind == "all-reduce" and "data" in c.axes)


def plan_of(sizes, microbatches, repeats):
    return pipeline.schedule(rules.Layout(make_mesh(sizes), microbatches=microbatches, repeats=repeats))


def test_controls_rows_left_behind_and_stages_out_of_order_are_seen(monkeypatch, x64):
    roll, dealt = jnp.roll, pipeline._Rows.dealt
    only, expected = ({"stage": 2}, 4, 1, 4, False), plain_result(4, False)
    assert gap(expected, compiled(*only)[1]) < 1e-12
    with monkeypatch.context() as patch:
        patch.setattr(jnp, "roll", lambda x, *a, **k: x if x.dtype == jnp.int32 else roll(x, *a, **k))
        assert gap(expected, compiled(*only)[1]) > 1e-3
    monkeypatch.setattr(pipeline._Rows, "dealt", lambda rows, x: dealt(rows, x)[:, :, ::-1])
    assert gap(expected, compiled(*only)[1]) > 1e-3


def simulated(stages, microbatches, repeats):
    """Ticks until all is done when every stage takes its turns in order, each as soon as what it needs is there."""
    done, free = {}, [0] * stages
    for turn in range(repeats):
        for batch in range(microbatches):
            for stage in range(stages):
                before = (turn, batch, stage - 1) if stage else (turn - 1, batch, stages - 1)
                free[stage] = max(free[stage], done.get(before, 0)) + 1
                done[turn, batch, stage] = free[stage]
    return max(done.values())


def test_ticks_are_those_of_a_simulated_schedule(x64):
    for stages in range(2, 7):
        for microbatches in (stages, 2 * stages, 5 * stages):
            for repeats in (1, 2, 3):
                plan = pipeline.Schedule(stages, microbatches, repeats)
                assert plan.ticks == simulated(stages, microbatches, repeats)
                busy = stages * microbatches * repeats
                assert plan.idle == pytest.approx(1 - busy / (stages * plan.ticks), abs=1e-15)
    sizes, microbatches, repeats, layers = SCHEDULES[2]
    assert plan_of(sizes, microbatches, repeats) == pipeline.Schedule(4, 8, 2)
    layout = rules.Layout(make_mesh(sizes), microbatches=microbatches, repeats=repeats)

    def stack(*args):
        with rules.use(layout):
            return pipeline.run(layer, *args, pipeline.planned(layers, ROWS))

    loops = [e for e in jax.make_jaxpr(passes(stack, layers))(*inputs(layers)).eqns if e.primitive.name == "scan"]
    assert [loop.params["length"] for loop in loops] == [19, 19]
    # For the backward pass every tick keeps what layers computed, not the weights that it took from its pieces.
    kept = [v.aval.shape for v in loops[0].outvars if v.aval.shape[:1] == (19,)]
    assert kept and not [shape for shape in kept if shape[-2:] == (WIDTH, WIDTH)]


@pytest.mark.parametrize("stages", range(2, 8))
def test_pieces_are_dealt_in_rounds_of_permutations(stages):
    for repeats in range(1, 9):
        found = pipeline.rounds(stages, repeats)
        assert sorted(sum(found, [])) == list(range(stages * repeats))
        for sent in found:
            assert [p // repeats for p in sent] == list(range(stages))
            assert sorted(p % stages for p in sent) == list(range(stages))


def test_parameters_per_device_fall_by_the_number_of_stages():
    model = MODELS["decoder"](vocab_size=32, num_layers=8, embed_dim=16, num_heads=4, max_length=8)
    shapes, axes = model.abstract()

    def held(sizes):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        places = trees.flatten(rules.shardings(axes["params"], shapes["params"], mesh))
        leaves = trees.flatten(shapes["params"]).items()
        return {path: np.prod(places[path].shard_shape(leaf.shape)) for path, leaf in leaves}

    one, four = held({"data": 1}), held({"stage": 4})
    assert all(one[path] == 4 * four[path] for path in one if not path.startswith("norm_final"))


SIZES = dict(vocab_size=32, num_layers=2, embed_dim=8, num_heads=2, dtype="float64", param_dtype="float64")
EXPERTS = dict(
    positions="rotary", dropout=0.2, num_experts=2, capacity_factor=0.8, expert_bias_rate=0.1, expert_group=2,
)  # fmt: skip
PAIR = dict(positions="none", relative_buckets=4, dropout=0.0, attention="reference")


@pytest.mark.parametrize("name, options", [("decoder", EXPERTS), ("encoder_decoder", PAIR)], ids=["experts", "pair"])
def test_models_say_the_same(name, options, x64):
    """Positions, segments and memory of each row; masks of dropout; what routers did, and what balances them."""
    model = MODELS[name](**SIZES | options)
    rng = np.random.default_rng(1)
    batch = {key: rng.integers(1, 5, (8, 6)).astype(np.int32) for key in ("tokens", "segments", "positions")}
    batch |= {"source": batch["tokens"][:, ::-1]} if name == "encoder_decoder" else {}
    variables = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(leaf.dtype), model.abstract()[0]
    )
    layout = rules.Layout(make_mesh({"data": 2, "stage": 2}, jax.devices()[:4]))

    def call(layout):
        def apply(variables, batch):
            keys = jax.random.split(jax.random.key(0), 8)
            with rules.use(layout):
                out = model.apply(variables, train=True, rngs={"dropout": keys}, **batch)
            shares = jax.tree.map(lambda x: x / x.sum(), out.updates)
            return {"hidden": out.hidden, "extra": out.extra, "updates": shares}

        lowered = jax.jit(apply).lower(variables, batch)
        return lowered.compile(compiler_options=QUICK)(variables, batch), lowered.as_text()

    (plain_out, _), (piped, text) = call(None), call(layout)
    assert "stage" in text and trees.flatten(plain_out).keys() == trees.flatten(piped).keys()
    for path, leaf in trees.flatten(plain_out).items():
        np.testing.assert_allclose(trees.flatten(piped)[path], leaf, rtol=1e-11, atol=1e-11, err_msg=path)
