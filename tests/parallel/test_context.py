"""Attention over a cut length equals attention over a whole one, with equal work and no gathering."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.learn.objectives import causal_lm
from bigmodel_jax.models import MODELS, ring
from bigmodel_jax.models.attention import attention
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.parallel import context, rules
from bigmodel_jax.parallel.mesh import batch_sharding, make_mesh

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
B, L, H, G, K = 2, 32, 4, 2, 4
RNG = np.random.default_rng(0)
SEGMENTS = np.sort(RNG.integers(1, 4, (B, L)), axis=1).astype(np.int32)
ARRAYS = [RNG.normal(size=(B, L, heads, K)) for heads in (H, G, G, H)]
CAUSAL = Mask(causal=True)
PACKED = Mask(causal=True, segments_q=SEGMENTS)
KEYS = jax.random.split(jax.random.key(1), B)
EVERYTHING = {"softcap": 2.0, "alibi": True, "dropout": 0.3, "dropout_keys": KEYS}


def layout(by="ring", **sizes):
    count = int(np.prod(list(sizes.values())))
    return rules.Layout(make_mesh(sizes, jax.devices()[:count]), context=by)


def compiled(where, mask, rule, gradients=True):
    """(out, dq, dk, dv) as a compiled function of q, k, v and the cotangent."""

    def all_of_it(q, k, v, d):
        with rules.use(where):
            out, pull = jax.vjp(lambda *x: attention(*x, mask, **rule), q, k, v)
            return (out, *pull(d)) if gradients else (out,)

    return jax.jit(all_of_it, compiler_options=QUICK).lower(*map(jnp.asarray, ARRAYS)).compile()


def stored(where, mask):
    """(the mask of rows as layers store them, their order). Layers with a window do as the others of their model."""
    with rules.use(where):
        if not (mask.zigzag or ring.balances(mask, L, "auto")):
            return mask, np.arange(L)
        segments = context.reordered(mask.segments_q)
        return dataclasses.replace(mask, zigzag=True, segments_q=segments), context.order(L, context.size())


CASES = {
    "causal": (CAUSAL, {}, layout(context=4)),
    "everything, heads cut": (PACKED, EVERYTHING, layout(context=2, tensor=2)),
    "window among others": (dataclasses.replace(PACKED, window=3, zigzag=True), {}, layout(data=2, context=4)),
    "window both sides": (Mask(window=5), {}, layout(context=4)),
    "heads for length": (PACKED, EVERYTHING, layout("ulysses", context=2, tensor=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, x64):
    """Grouped heads, float64; forward and all gradients."""
    mask, rule, where = CASES[name]
    plain = dataclasses.replace(mask, zigzag=False)
    expected = compiled(None, plain, rule | {"backend": "reference"})(*ARRAYS)
    mask, order = stored(where, mask)
    got = compiled(where, mask, rule)(*(x[:, order] for x in ARRAYS))
    for what, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a)[:, np.argsort(order)], b, atol=1e-12, err_msg=what)
        assert np.abs(b).max() > 0.1


def test_controls_a_skipped_block_and_a_wrong_order_are_seen(monkeypatch, x64):
    expected = compiled(None, CAUSAL, {"backend": "reference"}, False)(*ARRAYS)[0]
    mask, order = stored(layout(context=4), CAUSAL)

    def error(fn, order):
        out = fn(*(x[:, order] for x in ARRAYS))[0]
        return np.abs(np.asarray(out)[:, np.argsort(order)] - expected).max()

    right = compiled(layout(context=4), mask, {}, False)
    assert error(right, order) < 1e-12
    assert error(right, np.arange(L)) > 0.1
    monkeypatch.setattr(context.Round, "hops", lambda tour: (2, 0))
    assert error(compiled(layout(context=4), mask, {}, False), order) > 1e-2


@pytest.mark.parametrize("devices", [2, 3, 4, 8, 64])
def test_every_device_has_half_of_the_work_at_every_hop(devices):
    """Counted on the tables that say what is computed."""
    length = 2 * devices * 4
    balanced, plain = (context.Round(devices, zigzag, length, length, low=0) for zigzag in (True, False))
    meets, whole = balanced.tables()
    tiles = meets.sum((2, 3))
    assert (tiles == [3] + [2] * (devices - 1)).all() and balanced.hops() == (devices - 1, 0)
    pairs = (meets & whole).sum((1, 2, 3)) + (meets & ~whole).sum((1, 2, 3)) / 2  # a diagonal tile is half a tile
    assert (pairs == 4 * devices / 2).all()
    assert [turn.always for turn in balanced.turns(range(1, devices))] == [True, True]  # what is compiled: no branch
    work = plain.tables()[0].sum((1, 2, 3))
    assert work.max() == devices * work.min()


def test_a_window_takes_few_hops():
    tours = [context.Round(8, False, 64, 64, low, high=6) for low in (0, -6)]
    assert [tour.hops() for tour in tours] == [(1, 0), (1, 1)]
    assert context.Round(8, False, 64, 64, 0, high=20).hops() == (3, 0)
    assert context.Round(8, True, 64, 64, 0, high=6).hops() == (2, 2)


def test_zigzag_is_an_exchange_of_halves(x64):
    x = jnp.asarray(RNG.normal(size=(2, 24, 3)))
    with rules.use(layout(data=2, context=4)):
        there, pull = jax.vjp(jax.jit(context.zigzag), x)
        order = context.order(24, 4)
        np.testing.assert_array_equal(there, x[:, order])
        np.testing.assert_array_equal(pull(there)[0], x)
        np.testing.assert_array_equal(jax.jit(context.natural)(there), x)
        assert context.reordered(jnp.arange(24)[None])[0].tolist() == order.tolist()
    assert order[:6].tolist() == [0, 1, 2, 21, 22, 23]


def test_other_backends_are_refused_in_a_ring():
    arrays = list(map(jnp.asarray, ARRAYS[:3]))
    with rules.use(layout(context=2)), pytest.raises(InputError, match="'auto', 'blockwise'.*context_by=ulysses"):
        attention(*arrays, CAUSAL, backend="splash")


LENGTH = 256
OPTIONS = dict(
    vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=32, max_length=LENGTH,
    dropout=0.2, embed_dropout=0.2, bias=False, remat="none",
)  # fmt: skip


def program(where, options, fn):
    """fn(loss) of a small decoder with packed rows, as a compiled function of parameters, batch and row keys."""
    model, objective = MODELS["decoder"](**options), causal_lm(chunk=64)
    shapes, axes = model.abstract()
    places = rules.shardings(axes["params"], shapes["params"], where.mesh)

    def step(params, batch, keys):
        def loss(params):
            terms, _, _ = objective(model.apply, {"params": params, "stats": {}}, batch, {"dropout": keys}, True)
            return terms["loss"]

        with rules.use(where):
            return fn(loss)(params)

    rows = batch_sharding(where.mesh, accumulated=False)
    jitted = jax.jit(step, in_shardings=(places, rows, rows), compiler_options=QUICK)
    return jitted.lower(shapes["params"], batch(), KEYS).compile()


def batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 32, (B, LENGTH)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (B, LENGTH)), axis=1).astype(np.int32)
    weights = rng.random((B, LENGTH)).astype(np.float32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": weights, "segments": segments}


def collectives(text, name):
    """Shapes of what each collective of this name gives."""
    return re.findall(rf"= (\S+|\([^=]*?\)) {name}(?:-start)?\(", text)


def gathered(text):
    """Arrays of numbers that are gathered along the length, or along rows and length."""
    long = {str(LENGTH * n // d) for n in (1, B) for d in (1, 2)}
    shapes = collectives(text, "all-gather")
    return [x for x in shapes if x.startswith("f") and long & set(re.findall(r"\d+", x.partition("[")[2]))]


def test_a_model_in_a_ring():
    """Learned positions, dropout, packed rows: loss and gradients as on one device. No activation is gathered, and
    memory falls with the number of devices."""
    one, cut = (program(layout(context=n), OPTIONS, jax.value_and_grad) for n in (1, 2))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) / 4, one.args_info[0][0])
    expected, got = (fn(*jax.device_put((params, batch(), KEYS), fn.input_shardings[0])) for fn in (one, cut))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))
    text = cut.as_text()
    assert gathered(text) == [] and collectives(text, "collective-permute")
    temporary = [fn.memory_analysis().temp_size_in_bytes for fn in (one, cut)]
    assert temporary[1] < 0.6 * temporary[0], temporary


def test_heads_for_length_takes_four_exchanges():
    text = program(layout("ulysses", context=4), OPTIONS | {"positions": "rotary"}, lambda loss: loss).as_text()
    assert gathered(text) == [] and len(collectives(text, "all-to-all")) == 4


def test_control_keys_that_are_gathered_are_seen():
    """A bias array keeps the ring away: keys and values are then gathered."""
    where = layout(context=4)
    q, k, v = (jnp.zeros((B, LENGTH, heads, K)) for heads in (H, G, G))
    rows = jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec(None, "context"))

    def biased(q, k, v):
        with rules.use(where):
            return attention(q, k, v, CAUSAL, bias=jnp.zeros((1, 1, LENGTH, LENGTH)))

    jitted = jax.jit(biased, in_shardings=rows, out_shardings=rows, compiler_options=QUICK)
    assert gathered(jitted.lower(q, k, v).compile().as_text())
