"""Optimizers against numpy and optax; groups, decay, clipping, slots."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigmodel_jax import tree as trees
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import muon, optim

LR = 0.1


def rate(step):
    return jnp.asarray(LR, jnp.result_type(float))


def some_params():
    rng = np.random.default_rng(0)
    return {"a": {"w": rng.normal(size=(4, 3)), "bias": rng.normal(size=(3,))}}


def run(tx, params, steps=5):
    """Parameters after `steps` updates with seeded gradients, and those gradients."""
    rng = np.random.default_rng(1)
    state, update, grads = tx.init(params), jax.jit(tx.update), []
    for _ in range(steps):
        grads.append(jax.tree.map(lambda p: rng.normal(size=p.shape), params))
        change, state = update(grads[-1], state, params)
        params = optim.apply(params, change)
    return params, grads, state


def numpy_rule(name, p, grads, wd, decay):
    """Textbook loops over one leaf."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if decay == "l2":
            g = g + wd * p
        if name in ("adam", "adamw"):
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g**2
            d = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        elif name == "sgd":
            d = g
        elif name == "lion":
            d, m = np.sign(0.9 * m + 0.1 * g), 0.99 * m + 0.01 * g
        else:
            m = 0.9 * m + g
            d = g + 0.9 * m if name == "nesterov" else m
        p = p - LR * d - (LR * wd * p if decay == "decoupled" else 0)
    return p


@pytest.mark.parametrize("decay", optim.DECAYS)
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum", "nesterov", "lion"])
def test_against_numpy(name, decay, x64):
    params, wd = some_params(), 0.0 if decay == "none" else 0.3
    tx = optim.make(params, name=name, lr=rate, decay=decay, weight_decay=wd, groups=[(".*", {})])
    got, grads, _ = run(tx, params)
    for path, p in trees.flatten(params).items():
        own = [trees.flatten(g)[path] for g in grads]
        want = numpy_rule(name, p, own, wd, decay)
        np.testing.assert_allclose(trees.flatten(got)[path], want, rtol=1e-11, atol=1e-13)
        other = "l2" if decay == "decoupled" else "decoupled"
        if name != "sgd":  # for which the two are the same
            assert not np.allclose(want, numpy_rule(name, p, own, 0.3, other), rtol=1e-6)


def test_adafactor_against_optax(x64):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(8, 6)), "b": rng.normal(size=(5,)) * 1e-5}
    tx = optim.make(params, name="adafactor", lr=rate, groups=[(".*", {})], min_factored=4)
    peer = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=4, decay_rate=0.8),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(1e-3),
        optax.scale(-LR),
    )
    got, grads, state = run(tx, params)
    want, other = params, peer.init(params)
    for g in grads:
        change, other = jax.jit(peer.update)(g, other, want)
        want = optax.apply_updates(want, change)
    assert state["nu_rows"]["w"].shape == (8,) and state["nu_columns"]["w"].shape == (6,)
    for path in params:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-7)
    assert np.abs(got["w"] - params["w"]).max() > 1e-2


def test_stacked_layers_equal_layers_on_their_own(x64):
    """Muon and Adafactor see each layer of a stack as its own matrix."""
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(3, 8, 2, 3)) * np.array([1.0, 10.0, 0.1])[:, None, None, None]
    axes = ("layers", "embed", "heads", "head_dim")
    for name, options in (("muon", {}), ("adafactor", {"min_factored": 2})):
        tx = optim.make({"w": stack}, name=name, lr=rate, axes={"w": axes}, **options)
        change, _ = jax.jit(tx.update)({"w": stack * 0.1}, tx.init({"w": stack}), {"w": stack})
        for n in range(3):
            one = {"w": stack[n]}
            tx = optim.make(one, name=name, lr=rate, axes={"w": axes[1:]}, **options)
            alone, _ = jax.jit(tx.update)({"w": stack[n] * 0.1}, tx.init(one), one)
            np.testing.assert_allclose(change["w"][n], alone["w"], rtol=1e-10)


def test_muon_turns_momentum_into_its_orthogonal_factor(x64):
    rng = np.random.default_rng(0)
    g = rng.normal(size=(2, 12, 5))
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    got = np.array(muon.orthogonalize(g))
    singular = np.linalg.svd(got, compute_uv=False)
    assert 0.6 < singular.min() and singular.max() < 1.3
    # Same singular vectors: U^T X V is diagonal.
    inner = np.einsum("nri,nrc,njc->nij", u, got, vt)
    off = inner * (1 - np.eye(5))
    assert np.abs(off).max() < 1e-10
    assert np.abs(np.einsum("nri,nrc,njc->nij", u, g, vt[:, ::-1]) * (1 - np.eye(5))).max() > 1


def test_muon_uses_adamw_for_what_is_no_matrix():
    shape = muon.matrix_shape
    assert shape(("layers", "embed", "heads", "head_dim"), (4, 8, 2, 3)) == (4, 8, 6)
    assert shape(("layers", "heads", "head_dim", "embed"), (4, 2, 3, 8)) == (4, 6, 8)
    assert shape(("spatial", "spatial", "conv_in", "conv_out"), (3, 3, 8, 16)) == (1, 72, 16)
    assert shape(("embed", "mlp"), (8, 32)) == (1, 8, 32)
    for axes, sizes in ((("vocab", "embed"), (9, 8)), (("layers", "norm"), (4, 8)), (("mlp",), (8,))):
        assert shape(axes, sizes) is None
    params = {"emb": jnp.ones((9, 8)), "w": jnp.ones((8, 4))}
    axes = {"emb": ("vocab", "embed"), "w": ("embed", "mlp")}
    state = optim.make(params, name="muon", lr=rate, axes=axes).init(params)
    assert set(state["mu"]) == set(state["nu"]) == {"emb"} and set(state["momentum"]) == {"w"}


def test_clipping_is_over_the_whole_tree(x64):
    params = some_params()
    tx = optim.make(params, name="sgd", lr=rate, clip=0.5)
    grads = jax.tree.map(lambda p: p * 10, params)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    change, _ = tx.update(grads, tx.init(params), params)
    for c, g in zip(jax.tree.leaves(change), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(c, -LR * g * 0.5 / norm, rtol=1e-12)
    small = jax.tree.map(lambda g: g * 0.01 / norm, grads)
    change, _ = tx.update(small, tx.init(params), params)
    np.testing.assert_array_equal(change["a"]["w"], -LR * small["a"]["w"])


def test_groups_scale_decay_and_freeze(x64):
    params = {"in": {"w": np.ones((2, 2))}, "mid": {"w": np.ones((2, 2))}, "out": {"w": np.ones(2)}}
    groups = [("^in/", {"freeze": True}), ("^mid/", {"lr": 0.5, "decay": 0.0}), (".*", {})]
    tx = optim.make(params, name="momentum", lr=rate, weight_decay=0.3, groups=groups, clip=1e9)
    state = tx.init(params)
    assert set(state["momentum"]) == {"mid", "out"}, "frozen parameters have no slots"
    grads = jax.tree.map(np.ones_like, params)
    change, state = tx.update(grads, state, params)
    np.testing.assert_array_equal(change["in"]["w"], 0)
    np.testing.assert_allclose(change["mid"]["w"], -LR * 0.5)
    np.testing.assert_allclose(change["out"]["w"], -LR * 1.3)
    assert optim.frozen(groups, params) == {"in/w"}
    del grads["in"]
    change, _ = tx.update(grads, state, params)
    assert optim.apply(params, change)["in"]["w"] is params["in"]["w"]


def test_moments_are_wide_and_the_first_may_be_narrow():
    params = {"w": jnp.ones((4,), jnp.bfloat16)}
    state = optim.make(params, lr=rate).init(params)
    assert state["mu"]["w"].dtype == state["nu"]["w"].dtype == jnp.float32
    tx = optim.make(params, lr=rate, mu_dtype="bfloat16")
    change, state = tx.update(params, tx.init(params), params)
    assert state["mu"]["w"].dtype == jnp.bfloat16 and state["nu"]["w"].dtype == jnp.float32
    assert optim.apply(params, change)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "options, says",
    [
        ({"name": "adamx"}, "did you mean 'adam"),
        ({"bb1": 0.9}, "did you mean 'b1'"),
        ({"decay": "l1"}, "did you mean 'l2'"),
        ({"decay": "none", "weight_decay": 0.1}, "decay 'none'"),
        ({"groups": [("bias", {})]}, "a/w"),
        ({"groups": [(".*", {"decays": 0.0})]}, "did you mean 'decay'"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(InputError, match=says):
        optim.make(some_params(), lr=rate, **options)
