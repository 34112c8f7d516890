"""Linear models trained by the one train step against closed forms and scikit-learn; perceptrons against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import objectives, optim, schedules
from bigmodel_jax.learn import state as states
from bigmodel_jax.learn import step as steps
from bigmodel_jax.models import MODELS

WIDE = dict(dtype="float64", param_dtype="float64")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def trained(model, objective, batch, *, lr, count, decay=0.0, beta=0.9):
    """Parameters and loss after `count` full-batch steps of the real train step, in one program."""
    rate = schedules.make("constant", lr, 0, count)
    shapes = model.abstract()[0]["params"]
    tx = optim.make(shapes, name="nesterov", lr=rate, beta=beta, decay="l2", weight_decay=decay)
    step = steps.make_train_step(model.apply, model.merge, objective, tx, lr=rate)
    whole = {name: jnp.asarray(value)[None] for name, value in batch.items()}

    def run(key):
        def body(state, _):
            state, metrics = step(state, whole, key)
            return state, metrics["loss"]

        return jax.lax.scan(body, states.create(model.init, tx, key), length=count)

    state, losses = jax.jit(run, compiler_options=QUICK)(jax.random.key(0))
    return jax.device_get(state["params"]), np.asarray(losses)


def standard(x):
    return (x - x.mean(0)) / x.std(0)


def test_linear_regression_equals_the_normal_equations(x64):
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = standard(x), np.stack([y, y**2 / 100], 1)
    weights = (np.random.default_rng(0).random(len(x)) < 0.7).astype(np.float64)
    model = MODELS["linear"](num_features=10, num_classes=2, **WIDE)
    batch = {"features": x, "target": y, "weights": weights}
    params, losses = trained(model, objectives.regression(), batch, lr=0.1, count=1500, beta=0.95)
    ones = np.concatenate([x, np.ones((len(x), 1))], 1)
    exact = np.linalg.solve(ones.T @ (weights[:, None] * ones), ones.T @ (weights[:, None] * y))
    got = np.concatenate([params["head"]["kernel"], params["head"]["bias"][None]])
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-5)
    squares = ((ones @ exact - y) ** 2).mean(1)
    np.testing.assert_allclose(losses[-1], (weights * squares).sum() / weights.sum(), rtol=1e-9)
    # Control: rows of weight 0 were really left out.
    everything = np.linalg.lstsq(ones, y, rcond=None)[0]
    assert np.abs(got - everything).max() > 1.0


def test_logistic_regression_equals_scikit_learn(x64):
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    x = standard(x)
    reference = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000).fit(x, y)
    model = MODELS["linear"](num_features=13, num_classes=3, **WIDE)
    batch = {"features": x, "label": y.astype(np.int32), "weights": np.ones(len(x))}
    # scikit-learn minimises C sum(nll) + |W|^2 / 2 and leaves the intercept free, as our groups do.
    decay = 1 / (0.5 * len(x))
    params, _ = trained(model, objectives.classification(), batch, lr=0.5, count=600, decay=decay)
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    np.testing.assert_allclose(kernel, reference.coef_.T, atol=1e-5)
    np.testing.assert_allclose(bias - bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=1e-5)
    logits = x @ kernel + bias
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probability, reference.predict_proba(x), atol=1e-6)
    other = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(x, y)
    assert np.abs(kernel - other.coef_.T).max() > 1e-2  # control: another penalty is another solution


def test_perceptron_equals_numpy_on_rows_and_on_images(x64):
    model = MODELS["mlp"](num_features=12, num_classes=4, hidden=(7, 5), activation="tanh", **WIDE)
    r = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.asarray(r.normal(size=s.shape)), model.abstract()[0])
    x = r.normal(size=(3, 12))

    @jax.jit
    def both(v, x):
        rows = model.apply(v, train=False, features=x)
        pixels = model.apply(v, train=False, image=x.reshape(3, 2, 2, 3))
        return rows.head(rows.hidden), pixels.head(pixels.hidden)

    rows, pixels = both(variables, x)
    p = jax.tree.map(np.asarray, variables["params"])
    y = x
    for name in ("layer0", "layer1"):
        y = np.tanh(y @ p[name]["kernel"] + p[name]["bias"])
    expected = y @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(rows, expected, atol=1e-12)
    np.testing.assert_array_equal(rows, pixels)
    shapes = model.abstract()[0]["params"]
    assert model.flops() == 2 * (tree.count(shapes) - 7 - 5 - 4)
    with pytest.raises(InputError, match="takes 12 numbers"):
        model.apply(variables, train=False, features=x[:, :5])
    with pytest.raises(InputError, match="either features or images"):
        model.apply(variables, train=False)


def test_dropout_belongs_to_the_row_and_trains_only():
    model = MODELS["mlp"](num_features=4, num_classes=2, hidden=(32,), dropout=0.5)
    variables = model.init(jax.random.key(0))
    x, keys = jnp.ones((2, 4)), jax.random.split(jax.random.key(1), 2)

    @jax.jit
    def runs(x, keys):
        def hidden(train, rows):
            return model.apply(variables, train=train, rngs={"dropout": keys[rows]}, features=x[rows]).hidden

        return hidden(True, slice(None)), hidden(True, slice(1, 2)), hidden(False, slice(None))

    both, alone, plain = runs(x, keys)
    np.testing.assert_allclose(alone[0], both[1], rtol=1e-6)
    assert np.abs(both[0] - both[1]).max() > 0.1
    np.testing.assert_allclose(plain[0], plain[1])
