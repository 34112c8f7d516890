"""Sampling against closed forms, decoding against the full forward pass, beams against every sequence there is."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.generate import Generator, Sampling, beam_search, choose, decoding, filter_logits, generate, generator
from bigmodel_jax.generate.sampling import penalise
from bigmodel_jax.models import MODELS
from bigmodel_jax.parallel import rules
from bigmodel_jax.parallel.mesh import make_mesh
from bigmodel_jax.parallel.rules import Layout

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6], [5, 3, 5]]
KEY = jax.random.key(1)


def nucleus(logits: np.ndarray, p: float) -> set[int]:
    """Smallest set of most likely tokens whose probability reaches p."""
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    reached = np.cumsum(probabilities[order])
    return set(order[: int(np.searchsorted(reached, p)) + 1].tolist())


def test_filters_keep_what_numpy_keeps():
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 2

    def kept(**options):
        return [set(np.flatnonzero(row)) for row in np.asarray(filter_logits(jnp.asarray(logits), **options)) > -1e29]

    for p in (1e-9, 0.5, 0.99):
        assert kept(top_p=p) == [nucleus(row, p) for row in logits]
    assert kept(top_k=7) == [set(np.argsort(-row)[:7]) for row in logits]
    assert kept(top_k=7, top_p=0.5) != kept(top_p=0.5)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    assert kept(min_p=0.1) == [set(np.flatnonzero(row >= 0.1)) for row in share]
    assert kept(min_p=1.0) == [{row.argmax()} for row in logits]
    np.testing.assert_allclose(filter_logits(jnp.asarray(logits), temperature=0.5), logits * 2, rtol=1e-6)


def test_repetition_penalty_makes_seen_tokens_less_likely():
    logits = jnp.asarray([[2.0, -1.0, 0.5, -3.0]])
    seen = jnp.asarray([[True, True, False, False]])
    np.testing.assert_allclose(penalise(logits, seen, 2.0), [[1.0, -2.0, 0.5, -3.0]])
    strong = Sampling(temperature=0.0, repetition_penalty=8.0)
    assert choose(logits, KEY[None], strong, seen).tolist() == [2]


LOGITS, SEEN = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0]), np.array([1, 0, 0, 0, 0, 1, 0, 0], bool)
SAMPLERS = {
    "temperature": (Sampling(temperature=0.5), range(8)),
    "top_k": (Sampling(top_k=3), [0, 1, 2]),
    "top_p": (Sampling(top_p=0.8), [0, 1, 2, 3]),
    "min_p": (Sampling(min_p=0.2), [0, 1, 2, 3]),
    "repetition_penalty": (Sampling(repetition_penalty=4.0), range(8)),
    "all": (Sampling(0.7, 5, 0.9, 0.3, 1.5), [0, 1, 2]),
}


def np_sampled(sampling: Sampling) -> np.ndarray:
    """Probability of each token of LOGITS, filter after filter as the papers have them."""
    penalty = np.where(LOGITS > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    p = np.exp(LOGITS * np.where(SEEN, penalty, 1.0) / sampling.temperature)

    def only(kept: list[int]) -> np.ndarray:
        return np.where(np.isin(np.arange(len(p)), kept), p, 0.0) / p[kept].sum()

    p = only(np.argsort(-p)[: sampling.top_k or len(p)])
    order = np.argsort(-p)
    p = only([token for n, token in enumerate(order) if p[order[:n]].sum() < sampling.top_p])
    return only(np.flatnonzero(p >= sampling.min_p * p.max()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_draws_from_the_distribution_of_numpy(name):
    sampling, support = SAMPLERS[name]
    want, draws = np_sampled(sampling), 4000
    assert np.flatnonzero(want).tolist() == list(support)
    keys, logits = jax.random.split(KEY, draws), jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (draws, 8))
    seen = jnp.broadcast_to(jnp.asarray(SEEN), logits.shape)
    penalised = penalise(logits[:1], seen[:1], sampling.repetition_penalty)
    options = {key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    np.testing.assert_allclose(jax.nn.softmax(filter_logits(penalised, **options))[0], want, atol=1e-6)

    def deviations(sampling):
        """The largest difference between shares drawn and wanted, in standard deviations."""
        share = np.bincount(np.asarray(choose(logits, keys, sampling, seen)), minlength=8) / draws
        return np.max(np.abs(share - want) / np.sqrt(np.maximum(want * (1 - want), 1e-9) / draws))

    assert deviations(sampling) < 4.5
    assert deviations(Sampling()) > 6  # control: nothing done to the logits


@pytest.mark.parametrize("wrong", [{"top_p": 0.0}, {"min_p": 1.5}, {"temperature": -1.0}, {"repetition_penalty": 0.0}])
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.fixture(scope="module")
def decoder():
    """(model, variables, jitted logits of the full pass)."""
    model = MODELS["decoder"](
        vocab_size=16, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, max_length=32, positions="rotary",
        window=6, attention="reference", init_std=1.0,
    )  # fmt: skip
    variables = jax.jit(model.init)(jax.random.key(0))

    @jax.jit
    def logits(tokens):
        out = model.apply(variables, tokens=tokens, train=False)
        return jax.nn.log_softmax(out.head(out.hidden))

    return model, variables, logits


@pytest.fixture(scope="module")
def alone(decoder):
    """Greedy continuations of PROMPTS, 9 tokens each, on one device."""
    model, variables, _ = decoder
    return Generator(model, variables)(PROMPTS, length=9, key=KEY, sampling=GREEDY)


def test_greedy_decoding_is_the_argmax_of_the_full_forward(decoder, alone):
    model, variables, logits = decoder
    whole = np.zeros((4, 16), np.int32)
    for row, prompt, found in zip(whole, PROMPTS, alone, strict=True):
        assert len(found.tokens) == 9 and found.reason == "length"
        row[: len(prompt) + 9] = prompt + found.tokens
    logp = np.asarray(logits(whole))
    for number, (prompt, found) in enumerate(zip(PROMPTS, alone, strict=True)):
        at = np.arange(len(prompt) - 1, len(prompt) + 8)
        assert found.tokens == logp[number, at].argmax(-1).tolist()
        np.testing.assert_allclose(found.logprobs, logp[number, at, found.tokens], atol=1e-5)
    assert len({tuple(found.tokens) for found in alone}) > 1
    one = generate(model, variables, PROMPTS[1:2], length=9, key=KEY, temperature=0.0)
    assert one[0].tolist() == alone[1].tokens


def test_a_mesh_generates_the_same_tokens(decoder, alone):
    model, variables, _ = decoder
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    shapes, axes = model.abstract()
    spread = jax.device_put(variables, rules.shardings(axes, shapes, mesh))
    assert any(len(set(leaf.sharding.shard_shape(leaf.shape)) - set(leaf.shape)) for leaf in jax.tree.leaves(spread))
    found = Generator(model, spread, layout=Layout(mesh))(PROMPTS, length=9, key=KEY, sampling=GREEDY)
    assert [row.tokens for row in found] == [row.tokens for row in alone]
    for row, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(row.logprobs, other.logprobs, atol=1e-5)


def test_a_row_draws_by_its_own_key(decoder):
    """The same for any neighbours, order and size of piece; another key, another text. A cache that grows
    on the way changes nothing."""
    model, variables, _ = decoder
    ready, sampling = Generator(model, variables), Sampling(repetition_penalty=1.2, top_p=0.95)
    keys = jax.random.split(jax.random.key(7), 4)

    def draw(order, keys=keys, **options):
        prompts = [PROMPTS[n] for n in order]
        found = ready(prompts, length=9, key=keys[np.array(order)], sampling=sampling, **options)
        return {n: row.tokens for n, row in zip(order, found, strict=True)}

    first = draw([0, 1, 2, 3])
    assert draw([3, 1, 0, 2]) == first
    assert draw([0, 1, 2, 3], keys=jax.random.split(jax.random.key(8), 4)) != first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "ROOM", 4)
        assert draw([0, 1, 2, 3], piece=3) == first


def test_rows_end_at_eos_or_where_the_caller_says(decoder, alone):
    model, variables, _ = decoder
    end = alone[0].tokens[4]
    ready = Generator(model, variables, eos=(end,), pad=0)
    found = ready(PROMPTS, length=9, key=KEY, sampling=GREEDY, piece=9, ended=lambda row, tokens: row == 1)
    for row, whole in zip(found, alone, strict=True):
        place = whole.tokens.index(end) if end in whole.tokens else 9
        assert row.tokens == whole.tokens[: 1 if row is found[1] else place]
        assert row.reason == ("stop" if row is found[1] else "eos" if place < 9 else "length")


def test_a_row_ends_at_whichever_of_several_tokens_comes_first(decoder):
    """Against the same draws without an end, cut by hand. Control: with one of the two, rows go on to the other."""
    model, variables, _ = decoder
    how = {"length": 9, "key": KEY, "sampling": Sampling(temperature=1.5)}
    drawn = [row.tokens for row in Generator(model, variables)(PROMPTS, **how)]
    first = drawn[0][3]
    second = next(token for token in drawn[1][1:] if token != first)

    def ended(*ends):
        return [row.tokens for row in Generator(model, variables, eos=ends)(PROMPTS, **how)]

    def cut(*ends):
        return [row[: min([n for n, token in enumerate(row) if token in ends], default=9)] for row in drawn]

    assert ended(first, second) == cut(first, second)
    assert cut(first, second) != cut(first) == ended(first)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_does_not_copy_the_cache(decoder, rows):
    """Keys and values are written in place: the compiled loop of steps has no copy in their shape."""
    model, variables, _ = decoder
    how = {"model": model, "sampling": GREEDY, "eos": (), "pad": 0}
    tokens, lengths = np.zeros((rows, 8), np.int32), np.full(rows, 8, np.int32)
    state = jax.eval_shape(
        lambda v: decoding.prefill(v, tokens, lengths, jax.random.split(KEY, rows), {}, capacity=20, int8=False, **how),
        variables,
    )
    text = decoding.steps.lower(variables, state, np.int32(4), most=4, **how).compile().as_text()
    shape = ",".join(map(str, state["cache"]["k"][0].shape))
    assert f"f32[{shape}]" in text
    assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text)


def test_beams_find_the_best_of_all_sequences():
    """With a beam for every prefix the search is exact, for every length penalty."""
    vocab, length = 4, 3
    model = MODELS["decoder"](
        vocab_size=vocab, num_layers=1, embed_dim=8, num_heads=1, max_length=8, attention="reference", init_std=1.0,
        head_bias=True,
    )  # fmt: skip
    variables = jax.jit(model.init)(jax.random.key(3))
    variables["params"]["head"]["bias"] = jnp.zeros(vocab).at[0].set(2.0)
    every = np.array(list(itertools.product(range(vocab), repeat=length)), np.int32)
    tokens = np.concatenate([np.full((len(every), 1), 2, np.int32), every], 1)
    out = jax.jit(lambda t: model.apply(variables, tokens=t, train=False))(tokens)
    logp = np.asarray(jax.nn.log_softmax(out.head(out.hidden)))[:, :-1]
    logp = np.take_along_axis(logp, every[..., None], -1)[..., 0]

    def best(ends, penalty, count):
        scored = {}
        for sequence, parts in zip(every.tolist(), logp, strict=True):
            n = min((n + 1 for n, token in enumerate(sequence) if token in ends), default=length)
            scored[tuple(sequence[:n])] = parts[:n].sum() / n**penalty
        return sorted(scored.items(), key=lambda item: -item[1])[:count]

    for ends, penalty in (((0,), 0.0), ((0,), 2.0), ((0, 3), 2.0)):
        ready = Generator(model, variables, eos=ends)
        (found,) = beam_search(ready, [[2]], length=length, beams=vocab**2, length_penalty=penalty)
        for row, (sequence, score) in zip(found, best(ends, penalty, 8), strict=False):
            assert tuple(row.tokens) == (sequence[:-1] if row.reason == "eos" else sequence)
            assert (row.reason == "eos") == (sequence[-1] in ends) and abs(row.score - score) < 1e-4
    orders = [[sequence for sequence, _ in best(*how, 8)] for how in (((0,), 0.0), ((0,), 2.0), ((0, 3), 2.0))]
    assert orders[0] != orders[1] and orders[1] != orders[2]


def test_a_source_may_fill_all_positions():
    """10 of 12 positions: rounded up to 16 they would not fit. The control is one token too many."""
    model = MODELS["encoder_decoder"](
        vocab_size=16, num_layers=1, embed_dim=16, num_heads=2, max_length=12, positions="learned",
        attention="reference", init_std=1.0,
    )  # fmt: skip
    variables = jax.jit(model.init)(jax.random.key(0))
    sources = [list(range(1, 11)), [5, 4, 3]]
    found = Generator(model, variables)([[0], [0]], length=4, key=KEY, sampling=GREEDY, sources=sources)
    source = np.array([sources[0], sources[1] + [0] * 7], np.int32)
    tokens = np.array([[0, *row.tokens[:-1]] for row in found], np.int32)

    @jax.jit
    def chosen(source, segments, tokens):
        out = model.apply(variables, train=False, source=source, source_segments=segments, tokens=tokens)
        return out.head(out.hidden).argmax(-1)

    assert chosen(source, (source > 0).astype(np.int32), tokens).tolist() == [row.tokens for row in found]
    with pytest.raises(InputError, match="length 13 exceeds max_length=12"):
        Generator(model, variables)([[0]], length=4, key=KEY, sources=[list(range(13))])


def test_what_cannot_generate_says_so(decoder):
    model, variables, _ = decoder
    with pytest.raises(InputError, match="at least one token"):
        generate(model, variables, [[]], length=3, key=KEY)
    encoder = MODELS["encoder"](vocab_size=31, num_layers=1, embed_dim=16, num_heads=2)
    with pytest.raises(InputError, match="needs a decoder"):
        generate(encoder, {}, [[1]], length=3, key=KEY)
    learned = MODELS["decoder"](vocab_size=31, num_layers=1, embed_dim=16, num_heads=2, max_length=8)
    with pytest.raises(InputError, match="ask for at most 5"):
        generate(learned, {}, [[1, 2, 3]], length=6, key=KEY)
