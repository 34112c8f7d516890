"""Rotary scalings against their papers' formulas, layer patterns by gradients, and options that do not fit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import decoder, encoder
from bigmodel_jax.models.layers import NormParameters
from bigmodel_jax.models.positions import rope_frequencies, rotary_table

TINY = {"vocab_size": 37, "num_layers": 3, "embed_dim": 16, "num_heads": 2, "max_length": 24}
PLAIN = 10_000.0 ** (-np.arange(32) / 32)


def llama3(frequency: float, factor=8.0, low=1.0, high=4.0, original=8192) -> float:
    """By wavelengths, branch by branch, as the released code has it."""
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def yarn(i: int, frequency: float, factor=4.0, fast=32.0, slow=1.0, original=2048) -> float:
    """Peng et al. 2023, eq. 23, with the ramp over indices of the released code."""
    at = [32 * math.log(original / (turns * 2 * math.pi)) / math.log(10_000.0) for turns in (fast, slow)]
    ramp = min(max((i - math.floor(at[0])) / (math.ceil(at[1]) - math.floor(at[0])), 0.0), 1.0)
    return ramp * frequency / factor + (1 - ramp) * frequency


SCALINGS = {
    "none": ({}, PLAIN, 1.0),
    "linear": ({"factor": 8.0}, PLAIN / 8, 1.0),
    "llama3": ({"factor": 8.0, "original": 8192}, np.array([llama3(f) for f in PLAIN]), 1.0),
    "yarn": ({"factor": 4.0, "original": 2048}, np.array([yarn(i, f) for i, f in enumerate(PLAIN)]),
             1 + 0.1 * math.log(4.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scalings_equal_their_formulas(name, x64):
    options, expected, length = SCALINGS[name]
    got, grown = rope_frequencies(64, 10_000.0, jnp.float64, scaling=name, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert grown == pytest.approx(length)
    others = [values for other, (_, values, _) in SCALINGS.items() if other != name]
    assert all(np.abs(got / values - 1).max() > 0.1 for values in others)
    cos, sin = rotary_table(jnp.arange(5)[None], 64, 10_000.0, jnp.float64, scaling=name, **options)
    np.testing.assert_allclose(cos**2 + sin**2, length**2, rtol=1e-12)
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 3, 5:], 3 * expected[5:], rtol=1e-9)


def test_rope_bounds_move_the_band():
    inner, _ = rope_frequencies(64, 10_000.0, scaling="llama3", factor=8.0, original=8192, bounds=(2.0, 8.0))
    np.testing.assert_allclose(inner, [llama3(f, low=2.0, high=8.0) for f in PLAIN], rtol=1e-5)
    assert np.abs(inner / SCALINGS["llama3"][1] - 1).max() > 0.1


def seen_by_the_last_token(pattern: str) -> list[int]:
    """Positions on which the last of 12 hidden states depends, by gradients."""
    options = TINY | {"positions": "rotary", "rope_local_theta": 50.0, "window": 3, "layer_pattern": pattern}
    model = decoder(**options)
    rng = np.random.default_rng(0)
    params = tree.map_paths(
        lambda path, x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), model.abstract()[0]["params"]
    )
    tokens = jnp.arange(12)[None]  # every position reads a table row of its own

    @jax.jit
    def gradient(table):
        def last(table):
            given = {"params": params | {"embed": {"tokens": table}}}
            return jnp.sum(jnp.sin(model.apply(given, train=True, tokens=tokens).hidden[0, -1]))

        return jax.grad(last)(table)

    rows = np.abs(gradient(params["embed"]["tokens"])[:12]).max(axis=1)
    return list(np.flatnonzero(rows > 0))


def test_windows_add_up_and_one_full_layer_sees_all():
    """Three windows of 3 reach 2 back each; a full layer among them reaches the start."""
    assert seen_by_the_last_token("") == seen_by_the_last_token("l") == list(range(5, 12))
    assert seen_by_the_last_token("llg") == list(range(12))


def test_shared_layers_are_one_set_of_parameters():
    """N times the same layer: as a stack of N equal ones, with the sum of their gradients."""
    shared, stacked = (encoder(**TINY | {"shared_layers": on, "dropout": 0.0}) for on in (True, False))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) * 0.3, shared.abstract()[0]["params"])
    others = {k: v for k, v in params.items() if k != "layer"}
    repeated = others | {"layers": jax.tree.map(lambda x: np.stack([x] * 3), params["layer"])}
    assert tree.count(stacked.abstract()[0]) == tree.count(repeated) > 2 * tree.count(params)
    tokens = np.arange(12)[None] * 3 % 37

    def loss(params, model):
        out = model.apply({"params": params}, train=False, tokens=tokens)
        return jnp.mean(jnp.sin(out.hidden))

    both = [jax.jit(jax.grad(loss), static_argnums=1)(p, m) for p, m in ((params, shared), (repeated, stacked))]
    one, three = tree.flatten(both[0]["layer"]), tree.flatten(both[1]["layers"])
    for path, g in one.items():
        np.testing.assert_allclose(g, three[path].sum(0), atol=1e-6, rtol=1e-4, err_msg=path)
    q = three["attn/v"]
    assert np.abs(q[0] - one["attn/v"]).max() > 1e-3 * np.abs(one["attn/v"]).max()


def test_norm_offset_starts_as_the_plain_norm():
    """1 + w with w = 0 is scale 1: same function at the start, and weight decay pulls towards it."""
    for offset in (0.0, 1.0):
        made = NormParameters(True, offset=offset).init(jax.random.key(0), 4)["params"]
        made = jax.tree.map(lambda box: np.asarray(box.value), made, is_leaf=lambda x: hasattr(x, "value"))
        np.testing.assert_array_equal(made["scale"], np.full(4, 1.0 - offset))
        np.testing.assert_array_equal(made["bias"], np.zeros(4))


@pytest.mark.parametrize(("options", "message"), [
    ({"layer_pattern": "lg"}, "set window"), ({"layer_pattern": "lgx", "window": 3}, "letters l or g"),
    ({"layer_pattern": "lglg", "window": 3}, "up to 3"), ({"rope_scaling": "ntk"}, "yarn"),
    ({"rope_scaling": "llama3"}, "rope_original_length"), ({"rope_bounds": (1.0,)}, "rope_bounds"),
    ({"rope_factor": 0.5}, "at least 1"),
])  # fmt: skip
def test_wrong_options_name_what_would_be_right(options, message):
    with pytest.raises(InputError, match=message):
        decoder(**TINY | options)
