"""Cached decoding equals the full forward pass for every family that generates."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.generate import decoding
from bigmodel_jax.models import cache as caches
from bigmodel_jax.models import laid
from tests.decoders import FAMILIES, PAIRS, VOCAB, tiny

LENGTHS = np.array([3, 8, 11], np.int32)  # shorter and longer than the window of 5
STEPS = 12  # twice around a ring
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 24)).astype(np.int32)
SEGMENTS = (np.arange(7) < np.array([7, 4, 5])[:, None]).astype(np.int32)
SOURCE = {"source": TOKENS[:, 7:14], "source_segments": SEGMENTS}
# What int8 keys and values of width 4 to 6 a head change, as a share of the logits (root mean squares). A mixture
# may differ by more where two experts are nearly as likely; in these rows no choice turns.
INT8 = 0.02
# Caches that begin with half of the room: a ring beside a layer that sees all, and beside a memory.
GROWN = ("gemma-2-2b", "t5-small", "bart-base", "original")


def logits(out):
    return out.head(out.hidden)


def read(model, ready, memory):
    """(logits [B, V] of the last token, the cache) of prompts padded on the right."""
    prompt = np.where(np.arange(11) < LENGTHS[:, None], TOKENS[:, :11], VOCAB - 1)
    empty = model.cache(3, 11 if model.blocks else 11 + STEPS, jnp.float32)
    out = model.apply(ready, train=False, tokens=prompt, cache=empty, **memory)
    return jnp.take_along_axis(logits(out), LENGTHS[:, None, None] - 1, 1)[:, 0], out.cache


def continued(model, ready, cache, capacities):
    """Logits [STEPS, B, V] of later tokens, read one by one; capacities: room, one after the other."""
    later = np.take_along_axis(TOKENS, LENGTHS[:, None] + np.arange(STEPS), 1)

    def step(cache, token):
        out = model.apply(ready, train=False, tokens=token[:, None], cache=cache)
        return out.cache, logits(out)[:, 0]

    found = []
    for number, part in enumerate(np.split(later, len(capacities), axis=1)):
        if number:
            cache = caches.grown(cache, capacities[number], model.windows)
        cache, some = jax.lax.scan(step, cache, part.T)
        found.append(some)
    return jnp.concatenate(found)


@functools.cache
def program(name):
    """fn(off [B]) -> logits [STEPS + 1, B, V]: of the full pass, one by one, one by one from int8 (or None).

    off: added to the number of tokens that the cache says it holds.
    """
    model, variables = tiny(name)
    capacities = (11 + STEPS // 2, 11 + STEPS) if name in GROWN else (11 + STEPS,)

    @jax.jit
    def every(variables, off):
        given, memory = {}, {}
        if name in PAIRS:
            given = SOURCE
            memory = {"memory": model.encode(variables, **SOURCE), "memory_segments": SEGMENTS}
        full = logits(model.apply(variables, train=False, tokens=TOKENS, **given))
        ready = decoding.lay_out(model, variables)
        first, cache = read(model, ready, memory)

        def later(int8, capacities):
            own = cache
            if model.blocks:
                own = caches.opened(cache, LENGTHS, capacities[0], model.windows, int8)
            return continued(model, ready, own | {"length": LENGTHS + off}, capacities)

        got = jnp.concatenate([first[None], later(False, capacities)])
        want = jnp.take_along_axis(full, LENGTHS[:, None, None] + np.arange(-1, STEPS)[:, None], 1)
        return jnp.swapaxes(want, 0, 1), got, later(True, capacities[-1:]) if model.blocks else None

    return functools.partial(every, variables)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_by_one_equals_the_full_pass(name):
    """To 1e-5, of logits of order one; from int8 to a share of INT8, and not by keeping floats."""
    want, got, small = program(name)(0 * LENGTHS)
    assert 0.5 < np.abs(want).max() < 8.0
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    if small is not None:
        share = np.sqrt(np.mean(np.square(small - want[1:])) / np.mean(np.square(want)))
        assert 3e-4 < share < INT8
    # Control: what comes behind a cache that says it holds another number of tokens.
    wrong = np.abs(program(name)(-LENGTHS if small is None else np.ones_like(LENGTHS))[1] - want)
    assert wrong[1:].max() > 1e-2 and wrong[0].max() <= 1e-5


def test_int8_is_off_by_at_most_half_a_step():
    x = np.random.default_rng(2).normal(size=(5, 7, 64)).astype(np.float32)
    values, scale = caches.quantised(jnp.asarray(x))
    step = np.abs(x).max(-1) / 127
    assert values.dtype == jnp.int8
    np.testing.assert_allclose(scale, step, rtol=1e-6)
    assert (np.abs(values * scale[..., None] - x) <= 0.5001 * step[..., None]).all()


def test_layers_keep_rings_of_their_window_and_can_grow():
    model, _ = tiny("gemma-3-1b")
    cache = caches.opened(model.cache(2, 8, jnp.float32), jnp.array([8, 5]), 20, model.windows, int8=True)
    assert [x.shape for x in cache["k"]] == [(2, 2, 5, 6), (2, 2, 20, 6)]
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
