"""Generation of a batch against each row alone, and of one beam against greedy decoding, for every kind of model."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bigmodel_jax.generate import Generator, Sampling, beam_search
from bigmodel_jax.parallel import rules
from bigmodel_jax.parallel.mesh import make_mesh
from tests.decoders import PAIRS, WINDOW, tiny

KINDS = {
    "learned positions": "gpt2",
    "rotary": "pythia-70m",
    "alibi": "bloom-560m",
    "window": "mistral-7b",
    "experts": "mixtral-8x7b",
    "experts with a capacity": "mixtral, capacity",
    "lstm": "lstm",
    "relative biases": "t5-small",
    "bart": "bart-base",
    "recurrent pair": "recurrent pair",
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [8, 9, 7, 9]]
SOURCES = [[2, 7, 1, 8, 2], [3], [1, 6, 1, 8, 0, 3, 3, 9]]
NEW = 6
GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_one_by_one_and_one_beam_equals_greedy(kind):
    """Tokens, and log-probabilities to 1e-5; prompts and sources of different lengths, one longer than the window."""
    assert len(PROMPTS[0]) > WINDOW
    name = KINDS[kind]
    ready = Generator(*tiny(name))

    def greedy(prompts, sources):
        # Rows alone go on for longer: with one capacity they share a program.
        length = len(PROMPTS[0]) + NEW - max(map(len, prompts))
        given = {"sources": sources} if name in PAIRS else {}
        rows = ready(prompts, length=length, key=jax.random.key(0), sampling=GREEDY, piece=12, **given)
        return [row.tokens[:NEW] for row in rows], np.array([row.logprobs[:NEW] for row in rows])

    tokens, logprobs = greedy(PROMPTS, SOURCES)
    assert np.ptp(logprobs, axis=0).max() > 1e-2  # the prompts matter
    for row, (prompt, source) in enumerate(zip(PROMPTS, SOURCES, strict=True)):
        [alone], [own] = greedy([prompt], [source])
        assert alone == tokens[row]
        np.testing.assert_allclose(own, logprobs[row], rtol=0, atol=1e-5)
    beams = beam_search(ready, PROMPTS, length=NEW, beams=1, sources=SOURCES if name in PAIRS else None)
    assert [beam.tokens for (beam,) in beams] == tokens
    np.testing.assert_allclose([beam.logprobs for (beam,) in beams], logprobs, rtol=0, atol=1e-5)
    # Control: padding that is read as text.
    _, [padded] = greedy([PROMPTS[1] + [0] * 5], SOURCES[1:2])
    assert np.abs(padded - logprobs[1]).max() > 1e-3


def test_a_mesh_with_stages_generates_the_same_tokens():
    model, variables = tiny("gpt2")
    mesh = make_mesh({"stage": 2}, jax.devices()[:2])
    shapes, axes = model.abstract()
    spread = jax.device_put(variables, rules.shardings(axes, shapes, mesh))
    query = spread["params"]["layers"]["attn"]["q"]
    assert query.sharding.shard_shape(query.shape)[0] == 1  # of two layers
    how = {"length": NEW, "key": jax.random.key(0), "sampling": GREEDY}
    found = Generator(model, spread, layout=rules.Layout(mesh))(PROMPTS, **how)
    alone = Generator(model, variables)(PROMPTS, **how)
    assert [row.tokens for row in found] == [row.tokens for row in alone]
    for row, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(row.logprobs, other.logprobs, rtol=0, atol=1e-5)
