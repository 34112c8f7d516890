"""Beam search: the most likely continuations, by width.

Shapes: B prompts, W beams, V vocab, T new tokens at most.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.generate import decoding
from bigmodel_jax.generate.generator import Continuation, Generator
from bigmodel_jax.generate.sampling import NEVER
from bigmodel_jax.models import cache as caches
from bigmodel_jax.models.model import Model
from bigmodel_jax.parallel import rules


def beam_search(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    beams: int,
    length_penalty: float = 1.0,
    sources: Sequence[Sequence[int]] | None = None,
) -> list[list[Continuation]]:
    """For each prompt up to `beams` continuations, best first.

    A finished one scores (sum of log-probabilities) / n ** length_penalty, n its tokens with eos; one that
    reaches `length` counts as finished. The search ends when no unfinished one can still
    enter the best `beams`. One beam is greedy decoding.
    """
    if beams < 1 or length < 1:
        raise InputError(f"beams {beams} and length {length} should be at least 1")
    with rules.use(generator.layout):
        tokens, lengths, inputs = generator.prepare(prompts, length, sources)
        start, cache = _prefill(
            generator.laid(), tokens, lengths, inputs,
            model=generator.model, beams=beams, capacity=int(lengths.max()) + length, int8=generator.int8,
        )  # fmt: skip
        found = _search(
            generator.laid(), start, cache, np.float32(length_penalty),
            model=generator.model, beams=beams, length=length, eos=generator.eos,
        )  # fmt: skip
    return _rows(*map(np.asarray, found))


def _rows(tokens, logps, sizes, scores, ended) -> list[list[Continuation]]:
    out = []
    for row in range(len(tokens)):
        some = []
        for beam in range(tokens.shape[1]):
            size, score = int(sizes[row, beam]), float(scores[row, beam])
            if score <= NEVER / 2:
                continue
            kept = size - int(ended[row, beam])
            reason = "eos" if ended[row, beam] else "length"
            new, logp = (x[row, beam, :kept].tolist() for x in (tokens, logps))
            some.append(Continuation(new, logp, reason, score))
        out.append(some)
    return out


@functools.partial(jax.jit, static_argnames=("model", "beams", "capacity", "int8"))
def _prefill(variables, tokens, lengths, inputs, *, model: Model, beams: int, capacity: int, int8: bool):
    """(log-probabilities [B, V] after each prompt, the cache with every row `beams` times)."""
    logits, cache = decoding.read_prompt(model, variables, tokens, lengths, capacity, int8, inputs)
    rows = jnp.repeat(jnp.arange(tokens.shape[0]), beams)
    return jax.nn.log_softmax(logits, axis=-1), caches.taken(cache, rows, stacked=not caches.is_open(cache))


def _worth(score: jax.Array, n: Any, penalty: jax.Array) -> jax.Array:
    return score / (jnp.asarray(n, score.dtype) ** penalty).astype(score.dtype)


@functools.partial(jax.jit, static_argnames=("model", "beams", "length", "eos"))
def _search(variables, start, cache, penalty, *, model: Model, beams: int, length: int, eos: tuple[int, ...]):
    """(tokens, their log-probabilities [B, W, T]; sizes, scores, whether eos ended it [B, W]), best first."""
    batch, vocab = start.shape
    ends = jnp.zeros((vocab,), bool).at[np.array(eos, np.int32)].set(True) if eos else jnp.zeros((vocab,), bool)
    empty = {
        "tokens": jnp.zeros((batch, beams, length), jnp.int32), "logps": jnp.zeros((batch, beams, length), start.dtype),
        "score": jnp.full((batch, beams), NEVER, start.dtype), "size": jnp.zeros((batch, beams), jnp.int32),
        "ended": jnp.zeros((batch, beams), bool),
    }  # fmt: skip
    live = empty | {"score": empty["score"].at[:, 0].set(0.0)}

    def pick(tree: dict, which: jax.Array) -> dict:
        return jax.tree.map(lambda x: jnp.take_along_axis(x, which.reshape(*which.shape, *[1] * (x.ndim - 2)), 1), tree)

    def extend(n, live, done, logp):
        """Beams one token longer, and the best finished ones; logp [B, W, V] of token n."""
        total = (live["score"][..., None] + logp).reshape(batch, -1)
        # Of 2 W candidates at least W go on, when each beam has one way to end.
        score, where = jax.lax.top_k(total, min((len(eos) + 1) * beams, beams * vocab))
        parent, token = where // vocab, (where % vocab).astype(jnp.int32)
        wide = pick(live, parent)
        own = jnp.take_along_axis(logp.reshape(batch, -1), where, 1)
        wide["tokens"] = wide["tokens"].at[:, :, n].set(token)
        wide["logps"] = wide["logps"].at[:, :, n].set(own)
        wide |= {"score": score, "size": jnp.full_like(parent, n + 1), "ended": ends[token]}
        last = wide["ended"] | (n + 1 == length)
        closed = wide | {"score": jnp.where(last & (score > NEVER / 2), _worth(score, n + 1, penalty), NEVER)}
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), done, closed)
        done = pick(both, jax.lax.top_k(both["score"], beams)[1])
        order = jax.lax.top_k(jnp.where(last, NEVER, score), beams)[1]
        kept = pick(wide | {"score": jnp.where(last, NEVER, score)}, order)
        return kept, done, jnp.take_along_axis(parent, order, 1)

    def promising(n, live, done):
        """Whether some beam can still enter the best: its score only falls, its length counts at best."""
        best = _worth(jnp.max(live["score"], 1), jnp.where(penalty > 0, length, n), penalty)
        return jnp.any((best > jnp.min(done["score"], 1)) & (jnp.max(live["score"], 1) > NEVER / 2))

    def step(carry):
        n, live, done, cache = carry
        token = live["tokens"][:, :, n - 1].reshape(-1, 1)
        out = model.apply(variables, tokens=token, train=False, cache=cache)
        logp = jax.nn.log_softmax(out.head(out.hidden[:, 0]), axis=-1).reshape(batch, beams, vocab)
        live, done, parent = extend(n, live, done, logp)
        rows = (parent + beams * jnp.arange(batch)[:, None]).reshape(-1)
        return n + 1, live, done, caches.taken(out.cache, rows, stacked=not caches.is_open(cache))

    def unfinished(carry):
        n, live, done, _ = carry
        return (n < length) & promising(n, live, done)

    live, done, _ = extend(0, live, empty, jnp.broadcast_to(start[:, None], (batch, beams, vocab)))
    _, _, done, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(1), live, done, cache))
    return rules.everywhere((done["tokens"], done["logps"], done["size"], done["score"], done["ended"]))
