"""Gradients written by hand against those of autodiff, dropout by row, initialisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import layers, target


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_lookup_gradient_adds_in_float32(platform):
    """A token that occurs 3,000 times: bfloat16 sums stop growing at 256, the gradient must not."""
    table = jnp.zeros((5, 2), jnp.bfloat16)
    ids = np.array([[3] * 3000 + [1]], np.int32)
    with target.compile_for(platform):
        grad = jax.grad(lambda t: layers.lookup(t, ids).astype(jnp.float32).sum())(table)
    expected = np.zeros((5, 2))
    np.add.at(expected, ids[0], 1.0)
    np.testing.assert_allclose(grad.astype(jnp.float32), expected, rtol=0.01)
    naive = jnp.zeros((), jnp.bfloat16)
    for _ in range(300):
        naive = naive + jnp.bfloat16(1)
    assert naive == 256


@pytest.mark.parametrize("letters", ["bld,dhk->blhk", "blhk,hkd->bld", "bld,df->blf"])
def test_project_gradient(letters):
    rng = np.random.default_rng(0)
    sizes = dict(zip("bldhkf", (2, 3, 4, 2, 5, 6), strict=True))
    x, w = (jnp.asarray(rng.normal(size=[sizes[c] for c in part])) for part in letters.split("->")[0].split(","))
    gradients = [
        jax.grad(lambda x, w, f=f: jnp.sin(f(letters, x, w)).sum(), (0, 1))(x, w) for f in (layers.project, jnp.einsum)
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.abs(b).max() > 0.1


def test_dropout_rate_scale_and_rows():
    keys = jax.random.split(jax.random.key(0), 4)
    y = layers.dropout(jnp.ones((4, 5000)), keys, 0.3)
    np.testing.assert_allclose(np.unique(y), [0.0, 1 / 0.7], rtol=1e-6)
    np.testing.assert_allclose((y == 0).mean(1), 0.3, atol=0.03)
    np.testing.assert_array_equal(layers.dropout(jnp.ones((2, 5000)), keys[2:], 0.3), y[2:])
    assert (y[0] != y[1]).any()
    x = jnp.ones((4, 3))
    assert layers.dropout(x, None, 0.3) is x and layers.dropout(x, keys, 0.0) is x


@pytest.mark.parametrize(("kind", "std"), [("normal", 0.05), ("truncated", 0.05 * 0.8796), ("fan_in", 1 / 16)])
def test_initialisers(kind, std):
    w = layers.initializer(kind, 0.05, 256, scale=0.5)(jax.random.key(0), (256, 400), jnp.float32)
    assert abs(float(w.std()) / (0.5 * std) - 1) < 0.02
    assert (np.abs(w).max() > 3 * w.std()) == (kind == "normal")


def test_options_are_refused_with_the_nearest():
    layers.one_of("norm", "rmsnorm", tuple(layers.NORMS))
    with pytest.raises(InputError, match="did you mean 'rmsnorm'"):
        layers.one_of("norm", "rms_norm", tuple(layers.NORMS))


def test_activations_are_their_formulas():
    x = np.linspace(-4, 4, 41).astype(np.float32)
    sigmoid = 1 / (1 + np.exp(-x))
    wanted = {"relu": np.maximum(x, 0), "swish": x * sigmoid, "swiglu": x * sigmoid, "reglu": np.maximum(x, 0),
              "glu": sigmoid, "bilinear": x}  # fmt: skip
    for name, expected in wanted.items():
        fn, gated = layers.ACTIVATIONS[name]
        np.testing.assert_allclose(fn(x), expected, atol=1e-6)
        assert gated == (name in ("swiglu", "reglu", "glu", "bilinear"))
