"""Sampling filters against numpy, and greedy decoding against the full forward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.generate import Sampling, choose, filter_logits, generate
from bigmodel_jax.models import MODELS


def nucleus(logits: np.ndarray, p: float) -> set[int]:
    """Smallest set of most likely tokens whose probability reaches p."""
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    reached = np.cumsum(probabilities[order])
    return set(order[: int(np.searchsorted(reached, p)) + 1].tolist())


def test_filters_keep_what_numpy_keeps():
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 2
    for p in (0.1, 0.5, 0.9, 0.99):
        kept = np.asarray(filter_logits(jnp.asarray(logits), top_p=p)) > -1e29
        assert [set(np.flatnonzero(row).tolist()) for row in kept] == [nucleus(row, p) for row in logits]
    kept = np.asarray(filter_logits(jnp.asarray(logits), top_k=7)) > -1e29
    assert [set(np.flatnonzero(row)) for row in kept] == [set(np.argsort(-row)[:7]) for row in logits]
    np.testing.assert_allclose(filter_logits(jnp.asarray(logits), temperature=0.5), logits * 2, rtol=1e-6)


def test_sampling_has_the_filtered_distribution():
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda key: choose(logits, key[None], Sampling(1.0, 2))[0])(keys))
    share = 1 / (1 + np.exp(-1.0))
    assert set(drawn.tolist()) == {0, 1}
    assert abs((drawn == 0).mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000)


@pytest.fixture(scope="module")
def decoder():
    model = MODELS["decoder"](vocab_size=31, num_layers=2, embed_dim=16, num_heads=2, max_length=32, positions="rotary")
    variables = model.init(jax.random.key(0))
    # Larger weights than at the start of training, so that the argmax is not one token for all.
    return model, {**variables, "params": jax.tree.map(lambda x: x * 8, variables["params"])}


def test_greedy_decoding_is_the_argmax_of_the_full_forward(decoder):
    model, variables = decoder
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6]]
    rows = generate(model, variables, prompts, length=6, key=jax.random.key(1), temperature=0.0)
    for prompt, new in zip(prompts, rows, strict=True):
        tokens = list(prompt)
        for expected in new:
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(tokens)] = tokens
            out = model.apply(variables, tokens=padded, train=False)
            tokens.append(int(jnp.argmax(out.head(out.hidden[0, len(tokens) - 1]))))
            assert tokens[-1] == expected
    alone = generate(model, variables, prompts[1:2], length=6, key=jax.random.key(1), temperature=0.0)
    np.testing.assert_array_equal(alone[0], rows[1])


def test_seeds_reproduce_and_eos_ends(decoder):
    model, variables = decoder
    draw = lambda seed, **kw: generate(model, variables, [[1, 2]], length=12, key=jax.random.key(seed), **kw)[0]  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert draw(0).tolist() != draw(1).tolist()
    first = draw(0).tolist()
    assert draw(0, eos=first[3]).tolist() == first[: first.index(first[3])]


def test_what_cannot_generate_says_so(decoder):
    model, variables = decoder
    with pytest.raises(InputError, match="at least one token"):
        generate(model, variables, [[]], length=3, key=jax.random.key(0))
    encoder = MODELS["encoder"](vocab_size=31, num_layers=1, embed_dim=16, num_heads=2)
    with pytest.raises(InputError, match="needs a decoder"):
        generate(encoder, {}, [[1]], length=3, key=jax.random.key(0))
