"""Decoding with an open cache equals the full forward pass: every kind of position, window, head and block."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import tree
from bigmodel_jax.models import cache as caches
from bigmodel_jax.models import decoder, encoder_decoder, laid

# The reference attention compiles fastest; the others are held equal to it elsewhere.
TINY = {"vocab_size": 37, "num_layers": 2, "embed_dim": 16, "num_heads": 4, "max_length": 32, "attention": "reference"}
LLAMA = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "bias": False,
         "norm_bias": False, "tied_embeddings": False}  # fmt: skip
TABLE = {
    "gpt2": {},
    "ring": LLAMA | {"num_layers": 1, "window": 5, "qk_norm": True, "attention_softcap": 4.0, "rope_fraction": 0.5},
    "pattern": LLAMA | {"window": 5, "layer_pattern": "lg", "norm_placement": "sandwich", "rope_local_theta": 100.0},
    "alibi": {"num_layers": 1, "positions": "alibi", "embed_norm": True, "window": 6, "residual": "parallel",
              "num_kv_heads": 1},
    "original": {"positions": "sinusoidal", "norm_placement": "post", "shared_layers": True, "final_softcap": 3.0},
    "experts": LLAMA | {"num_layers": 1, "num_experts": 4, "experts_per_token": 2},
}  # fmt: skip
RELATIVE = {"positions": "none", "relative_buckets": 8, "relative_distance": 9, "norm_placement": "pre"}
LENGTHS = np.array([3, 8, 11], np.int32)
STEPS = 12  # beyond the window, and twice around a ring
TOKENS = np.random.default_rng(0).integers(0, 37, (3, 24)).astype(np.int32)


def filled(model):
    """Random variables, biases included."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        return jnp.asarray(path.endswith("scale") + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return tree.map_paths(fill, model.abstract()[0])


def logits(out):
    return out.head(out.hidden)


def decoded(model, variables, off, prompt, later, *, inputs, int8=False, anew=False):
    """Logits [B, STEPS, V] of later tokens [B, STEPS], read one by one behind prompts padded on the right.

    off: added to where the first of them is written.
    """
    empty = model.cache(len(prompt), prompt.shape[1], jnp.float32)
    out = model.apply(variables, train=False, tokens=prompt, cache=empty, **inputs)
    opened = caches.opened(out.cache, LENGTHS, prompt.shape[1] + STEPS, model.windows, int8)
    opened["length"] += off
    if anew:
        variables = laid.lay_out(model, variables)

    def step(cache, token):
        out = model.apply(variables, train=False, tokens=token[:, None], cache=cache)
        return out.cache, logits(out)[:, 0]

    return jnp.swapaxes(jax.lax.scan(step, opened, later.T)[1], 0, 1)


@functools.cache
def program(name, int8=False):
    """(variables, fn(variables, off) -> (logits of one by one, of the full pass) [B, STEPS, V])."""
    model = encoder_decoder(**TINY | RELATIVE) if name == "relative" else decoder(**TINY | TABLE[name])
    anew = name in ("gpt2", "pattern", "original", "relative")
    prompt = np.where(np.arange(11) < LENGTHS[:, None], TOKENS[:, :11], 36)
    at = LENGTHS[:, None] + np.arange(STEPS)
    segments = (np.arange(7) < np.array([7, 4, 5])[:, None]).astype(np.int32)

    @jax.jit
    def both(variables, off):
        given, inputs = {}, {}
        if name == "relative":
            given = {"source": TOKENS[:, :7], "source_segments": segments}
            inputs = {"memory": model.encode(variables, **given), "memory_segments": segments}
        full = logits(model.apply(variables, train=False, tokens=TOKENS, **given))
        later = np.take_along_axis(TOKENS, at, 1)
        got = decoded(model, variables, off, prompt, later, inputs=inputs, int8=int8, anew=anew)
        return got, jnp.take_along_axis(full, at[..., None], 1)

    return filled(model), both


def compared(name, off=0, **options):
    """(largest difference to the full pass, largest logit)."""
    variables, both = program(name, **options)
    got, want = both(variables, jnp.int32(off))
    return float(np.abs(got - want).max()), float(np.abs(want).max())


@pytest.mark.parametrize("name", [*TABLE, "relative"])
def test_one_by_one_equals_the_full_pass(name):
    difference, largest = compared(name)
    assert largest > 0.5
    assert difference <= 1e-5 * max(1.0, largest)


def test_a_slot_too_far_is_seen():
    for name in ("gpt2", "pattern"):
        difference, largest = compared(name, off=1)
        assert difference > 1e-2 * largest


def test_int8_is_off_by_at_most_its_step():
    """Components by half a step of their head's vector; logits by 3% of the largest at this width of 4 a head."""
    x = np.random.default_rng(2).normal(size=(5, 7, 64)).astype(np.float32)
    values, scale = caches.quantised(jnp.asarray(x))
    step = np.abs(x).max(-1) / 127
    assert values.dtype == jnp.int8
    np.testing.assert_allclose(scale, step, rtol=1e-6)
    assert (np.abs(values * scale[..., None] - x) <= 0.5001 * step[..., None]).all()
    difference, largest = compared("pattern", int8=True)
    assert 1e-4 * largest < difference < 3e-2 * largest


def test_layers_keep_rings_of_their_window_and_can_grow():
    model = decoder(**TINY | TABLE["pattern"])
    cache = caches.opened(model.cache(2, 8, jnp.float32), jnp.array([8, 5]), 20, model.windows, int8=True)
    assert [x.shape for x in cache["k"]] == [(2, 2, 5, 4), (2, 2, 20, 4)]
    assert cache["k"][0].dtype == jnp.int8 and cache["v_scale"][1].shape == (2, 2, 20)
    more = caches.grown(cache, 40, model.windows)
    assert [x.shape[2] for x in more["v"]] == [5, 40] and caches.slots(more) == 40


def test_laid_out_weights_multiply_like_einsum():
    rng = np.random.default_rng(3)
    w = rng.normal(size=(6, 3, 7))
    with jax.enable_x64(True):
        into = laid.laid(jnp.asarray(w), 1)
        assert into.array.shape == (21, 6)
        for lead in ((), (1,), (2, 3)):
            x = rng.normal(size=(*lead, 6))
            np.testing.assert_allclose(into(jnp.asarray(x)), np.einsum("...d,dhk->...hk", x, w), rtol=1e-12)
        out, y = w.transpose(1, 2, 0), rng.normal(size=(2, 1, 3, 7))
        back = laid.laid(jnp.asarray(out), 2)(jnp.asarray(y))
        np.testing.assert_allclose(back, np.einsum("blhk,hkd->bld", y, out), rtol=1e-12)
    half = laid.laid(jnp.ones((4, 2), jnp.bfloat16), 1)
    assert half(jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16
    assert half(jnp.ones(4, jnp.bfloat16), wide=True).dtype == jnp.float32
