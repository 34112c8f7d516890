"""Learning rates by depth and a frozen prefix: values against hand-made ones, frozen rows bit for bit."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import layers, objectives, optim, schedules
from bigmodel_jax.learn import state as states
from bigmodel_jax.learn import step as steps

N, DIM = 4, 6
AXES = {
    "embed": {"tokens": ("vocab", "embed")}, "layers": {"w": ("layers", "embed", "mlp"), "norm": ("layers", "norm")},
    "head": {"kernel": ("embed", "classes")},
}  # fmt: skip


def init(key=None):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(N, DIM, DIM)).astype(np.float32)
    w[:, 0, 0] = -0.0  # survives only an update that is exactly none
    flat = {"embed/tokens": rng.normal(size=(9, DIM)), "layers/w": w, "layers/norm": np.ones((N, DIM))}
    flat["head/kernel"] = rng.normal(size=(DIM, 3))
    params = tree.unflatten({path: jnp.asarray(leaf, jnp.float32) for path, leaf in flat.items()})
    return {"params": params, "stats": {}}


def apply(variables, *, train, rngs, tokens):
    p = variables["params"]
    x = jnp.take(p["embed"]["tokens"], tokens[:, 0], axis=0)
    for n in range(N):
        x = x + jnp.tanh(x @ p["layers"]["w"][n]) * p["layers"]["norm"][n]
    return SimpleNamespace(hidden=x, head=lambda h: h @ p["head"]["kernel"], updates={})


def run(**options):
    """(parameters before, after three steps, gradient norm of the last)."""
    lr = schedules.make("constant", 0.01, 0, 10)
    params = init()["params"]
    tx = optim.make(params, lr=lr, axes=AXES, weight_decay=0.1, **options)
    freeze = options.get("freeze_layers", 0)
    frozen = optim.frozen(optim.DEFAULT_GROUPS, params, AXES, freeze)
    fn = steps.make_train_step(
        apply, lambda stats, _: stats, objectives.classification(), tx, frozen=frozen,
        frozen_rows=layers.frozen_rows(params, AXES, freeze),
    )  # fmt: skip
    state = states.create(init, tx, jax.random.key(0))
    batch = {"tokens": np.arange(8)[:, None] % 9, "label": np.arange(8) % 3, "weights": np.ones(8, np.float32)}
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    step = jax.jit(fn)
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(1))
    return tree.flatten(params), tree.flatten(state["params"]), float(metrics["grad_norm"]), state["opt"]


@pytest.fixture(scope="module")
def full():
    return run()


def test_a_frozen_prefix_stays_bit_for_bit(full):
    before, after, norm, opt = run(freeze_layers=2)
    for path in ("layers/w", "layers/norm"):
        assert np.asarray(after[path][:2]).tobytes() == np.asarray(before[path][:2]).tobytes()
        assert np.all(np.abs(after[path][2:] - before[path][2:]).sum(-1) > 0)
    assert np.asarray(after["embed/tokens"]).tobytes() == np.asarray(before["embed/tokens"]).tobytes()
    assert "embed" not in opt["mu"] and not np.any(opt["mu"]["layers"]["w"][:2])
    assert not np.array_equal(after["head/kernel"], before["head/kernel"])
    # what is frozen has no part in the gradient norm; unfrozen, all of it moves, even the minus zeros
    assert norm < full[2]
    assert all(np.abs(np.asarray(full[1][p]) - full[0][p]).sum() > 0 for p in before)
    assert np.asarray(full[1]["layers/w"][:2]).tobytes() != np.asarray(before["layers/w"][:2]).tobytes()


def test_layer_decay_scales_the_update_by_depth(full):
    factors = layers.multipliers(init()["params"], AXES, 0.5, 0)
    np.testing.assert_allclose(factors["layers/w"].ravel(), [0.5**4, 0.5**3, 0.5**2, 0.5])
    assert factors["embed/tokens"] == 0.5**5 and "head/kernel" not in factors
    lr = schedules.make("constant", 0.01, 0, 10)
    params, grads = init()["params"], jax.tree.map(jnp.ones_like, init()["params"])
    plain = optim.make(params, lr=lr, axes=AXES, name="sgd")
    scaled = optim.make(params, lr=lr, axes=AXES, name="sgd", layer_decay=0.5, freeze_layers=1)
    a, b = (tree.flatten(tx.update(grads, tx.init(params), params)[0]) for tx in (plain, scaled))
    np.testing.assert_allclose(b["layers/w"], a["layers/w"] * np.array([0, 1 / 8, 1 / 4, 1 / 2]).reshape(-1, 1, 1))
    np.testing.assert_array_equal(b["head/kernel"], a["head/kernel"])
    assert not np.any(b["embed/tokens"])  # below a frozen layer


def test_what_does_not_fit_is_refused():
    params = init()["params"]
    with pytest.raises(InputError, match="freeze_layers 5 must lie in 0..4"):
        layers.frozen_rows(params, AXES, 5)
    with pytest.raises(InputError, match="must lie in 0..0"):
        layers.frozen_rows(params, None, 1)
    with pytest.raises(InputError, match="layer_decay 0.0 must"):
        layers.multipliers(params, AXES, 0.0, 0)
    with pytest.raises(InputError, match="needs a model of stacked layers"):
        layers.multipliers(params, None, 0.9, 0)
