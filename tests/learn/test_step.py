"""The train step on a one-matrix model: guard, accumulation weights, EMA, layout, compilations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import tree as trees
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import objectives, optim, schedules
from bigmodel_jax.learn import state as states
from bigmodel_jax.learn import step as steps
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel.rules import Layout

VOCAB, DIM, LENGTH = 16, 8, 4
AXES = {"params": {"embed": ("vocab", "embed"), "head": ("embed", "vocab")}, "stats": {}}


class Out(NamedTuple):
    hidden: Any
    head: Any
    cache: Any = None
    updates: Any = {}
    extra: Any = {}


def apply(variables, *, train, rngs=None, tokens):
    p = variables["params"]
    head = jax.tree_util.Partial(lambda w, h: h @ w, p["head"])
    return Out(jnp.take(p["embed"], tokens, axis=0), head)


def init(key):
    a, b = jax.random.split(key)
    return {
        "params": {
            "embed": jax.random.normal(a, (VOCAB, DIM)),
            "head": 0.1 * jax.random.normal(b, (DIM, VOCAB)),
        },
        "stats": {},
    }


def batch(seed, accumulation=1, rows=8):
    rng = np.random.default_rng(seed)
    shape = (accumulation, rows // accumulation, LENGTH)
    tokens = rng.integers(0, VOCAB, shape).astype(np.int32)
    return {"tokens": tokens, "targets": tokens[..., ::-1].copy(), "weights": np.ones(shape, np.float32)}


class Setup:
    def __init__(self, sizes=(("data", 1),), devices=1, ema=0.0, frozen_rule=None, **options):
        self.mesh = meshes.make_mesh(dict(sizes), jax.devices()[:devices])
        lr = schedules.make("cosine", 0.05, 2, 50)
        shapes = jax.eval_shape(init, jax.random.key(0))["params"]
        groups = [(frozen_rule, {"freeze": True})] if frozen_rule else []
        groups.append((".*", {}))
        tx = optim.make(shapes, lr=lr, clip=1.0, weight_decay=0.1, groups=groups)

        def create(key):
            return states.create(init, tx, key, ema=ema > 0, window=4)

        self.shardings = states.shardings(jax.eval_shape(create, jax.random.key(0)), AXES, Layout(self.mesh))
        self.state = states.initialize(create, self.shardings, jax.random.key(0))
        self.fn = steps.make_train_step(
            apply, lambda stats, updates: stats, objectives.causal_lm(), tx, lr=lr, ema=ema,
            layout=Layout(self.mesh), gradients=self.shardings["params"],
            frozen=optim.frozen(groups, shapes), **options,
        )  # fmt: skip
        self.jitted = steps.jit_train_step(self.fn, self.shardings, self.mesh)

    def run(self, batches, poison=lambda n, state: state):
        """Final state and the metrics of each step."""
        state, log = jax.tree.map(jnp.copy, self.state), []
        for n, one in enumerate(batches):
            state, metrics = self.jitted(poison(n, state), one, jax.random.key(7))
            log.append(jax.device_get(metrics))
        return jax.device_get(state), log


def equal(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def without_guard(state):
    return {k: v for k, v in state.items() if k != "guard"}


def bad_batch(kind):
    one = batch(99)
    one["weights"] = one["weights"] * {"nan": np.nan, "inf": np.inf}[kind]
    return one


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_bad_step_leaves_the_run_bitwise_as_if_it_had_not_been(kind):
    setup = Setup(ema=0.9)
    good = [batch(n) for n in range(4)]
    clean, _ = setup.run(good)
    state, log = setup.run(good[:2] + [bad_batch(kind)] * 2 + good[2:])
    assert equal(without_guard(state), without_guard(clean))
    assert [bool(m["skipped"]) for m in log] == [False, False, True, True, False, False]
    assert [int(m["bad_streak"]) for m in log] == [0, 0, 1, 2, 0, 0]
    assert [bool(m["finite"]) for m in log] == [True, True, False, False, True, True]
    assert state["guard"]["skipped"] == 2 and state["guard"]["admitted"] == 4
    assert np.isfinite(state["guard"]["losses"]).all() and state["step"] == 4
    unguarded = Setup(ema=0.9, guard=steps.Guard(skip=False))
    broken, _ = unguarded.run(good[:2] + [bad_batch(kind)])
    assert not np.isfinite(broken["params"]["head"]).all(), "the control: without the guard it spreads"


def test_a_spike_is_skipped_once_the_window_is_full():
    spiky = batch(0)
    spiky["targets"] = (spiky["targets"] + 5) % VOCAB

    setup, steady = Setup(guard=steps.Guard(spike=1.3)), [batch(0)] * 30
    _, log = setup.run(steady + [spiky])
    ratio = log[-1]["loss"] / np.median([m["loss"] for m in log[-5:-1]])
    assert ratio > 1.5, "the batch is a spike indeed"
    state, log = setup.run(steady + [spiky])
    expected, _ = setup.run(steady)
    assert bool(log[-1]["skipped"]) and bool(log[-1]["finite"])
    assert equal(without_guard(state), without_guard(expected))
    state, log = setup.run([batch(0), spiky])
    assert not log[-1]["skipped"], "two steps are no statistic"


def test_metrics_and_norms():
    setup = Setup(norms=1)
    one = batch(0)
    one["weights"][0, :3] = 0
    _, (first, second) = setup.run([one, one])
    assert first["weight/loss"] == 20.0
    assert first["lr"] == pytest.approx(0.025) and second["lr"] == pytest.approx(0.05)
    parts = [first[f"norm/grad/{name}"] for name in ("embed", "head")]
    assert first["grad_norm"] == pytest.approx(np.hypot(*parts), rel=1e-5)
    w = np.asarray(setup.state["params"]["head"])
    assert first["norm/param/head"] == pytest.approx(np.linalg.norm(w), rel=1e-5)
    logits = np.asarray(setup.state["params"]["embed"])[one["tokens"]] @ w
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, one["targets"][..., None], -1)[..., 0]
    assert first["loss"] == pytest.approx((nll * one["weights"]).sum() / 20, rel=1e-5)


def test_a_batch_without_any_weight_has_loss_zero():
    empty = batch(0)
    empty["weights"] *= 0
    _, (metrics,) = Setup().run([empty])
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["finite"]


def test_ema_is_the_average_by_hand():
    setup = Setup(ema=0.75)
    average = np.asarray(setup.state["params"]["head"])
    for n in range(1, 4):
        state, _ = setup.run([batch(k) for k in range(n)])
        average = 0.75 * average + 0.25 * state["params"]["head"]
    np.testing.assert_allclose(state["ema"]["head"], average, rtol=1e-5)
    evaluate = steps.make_eval_step(apply, objectives.causal_lm(), ema=True)
    one = {k: v[0] for k, v in batch(0).items()}
    total, weight = evaluate(state, one)["loss"]
    raw, _ = steps.make_eval_step(apply, objectives.causal_lm())(state, one)["loss"]
    assert weight == 32 and abs(total - raw) > 1e-3


def test_frozen_parameters_stay_bitwise_and_have_no_slots():
    setup = Setup(frozen_rule="embed")
    state, _ = setup.run([batch(0)] * 3)
    assert set(state["opt"]["mu"]) == {"head"}
    assert np.array_equal(state["params"]["embed"], setup.state["params"]["embed"])
    assert not np.array_equal(state["params"]["head"], setup.state["params"]["head"])


def test_accumulation_is_refused_where_the_loss_is_no_sum():
    own = objectives.causal_lm()
    fixed = objectives.Objective(own.weights, own.sums, additive=False)
    step = steps.make_train_step(apply, lambda s, u: s, fixed, None)
    with pytest.raises(InputError, match="not a sum over examples"):
        step({"params": {}, "stats": {}, "step": 0}, batch(0, 2), jax.random.key(0))


def test_compiled_once_sharded_and_donated(caplog):
    sizes = (("data", 2), ("fsdp", 2), ("tensor", 2))
    setup = Setup(sizes, 8)
    state = setup.state
    with jax.log_compiles():
        for n in range(4):
            placed = jax.device_put(batch(n), meshes.batch_sharding(setup.mesh))
            before = state
            state, _ = setup.jitted(state, placed, jax.random.key(0))
    compiles = [r for r in caplog.records if "Finished XLA compilation of jit(train_step)" in r.getMessage()]
    assert len(compiles) == 1 and setup.jitted._cache_size() == 1
    assert before["params"]["head"].is_deleted() and before["opt"]["nu"]["embed"].is_deleted()
    for path, leaf in trees.flatten(state).items():
        assert leaf.sharding.is_equivalent_to(trees.flatten(setup.shardings)[path], leaf.ndim), path
    for path in ("params/embed", "opt/mu/head", "opt/nu/embed"):
        leaf = trees.flatten(state)[path]
        assert leaf.addressable_shards[0].data.size == leaf.size // 4, path
    compiled = setup.jitted.lower(state, placed, jax.random.key(0)).compile()
    aliased = compiled.memory_analysis().alias_size_in_bytes
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert aliased == own, "every byte of the state is updated in place"
    tokens = compiled.input_shardings[0][1]["tokens"]
    assert tokens.shard_shape((1, 8, LENGTH)) == (1, 2, LENGTH)


def test_slots_follow_their_parameters():
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    sizes = {"w": (16, 8), "norm": (16,)}
    shapes = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
    axes = {"params": {"w": ("embed", "mlp"), "norm": ("norm",)}, "stats": {}}
    zeros = lambda key: {"params": jax.tree.map(lambda s: jnp.zeros(s.shape), shapes), "stats": {}}  # noqa: E731
    tx = optim.make(shapes, name="adafactor", lr=lambda s: jnp.float32(0), min_factored=4)
    abstract = jax.eval_shape(lambda k: states.create(zeros, tx, k), jax.random.key(0))
    got = states.shardings(abstract, axes, Layout(mesh))
    P = jax.sharding.PartitionSpec
    assert got["params"]["w"].spec == P("fsdp", "tensor")
    assert got["opt"]["nu_rows"]["w"].spec == P("fsdp")
    assert got["opt"]["nu_columns"]["w"].spec == P("tensor")
    assert got["opt"]["nu"]["norm"].spec == got["step"].spec == P()
