"""Text from a decoder: one prefill, then a scanned decode over a cache that is a value.

The whole loop is one program per (batch, prompt length, number of new tokens); nothing is fetched
until it ends. Prompts of different lengths are padded on the right: the cache carries each row's
own length, so padding is never attended to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.models.model import Model

NEVER = -1e30


def filter_logits(
    logits: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Logits [B, V] with everything outside top-k and the nucleus at -1e30, after temperature.

    top_k: keep the k largest (Fan et al. 2018); 0 keeps all. top_p: keep the smallest set of
    tokens whose probability reaches p (Holtzman et al. 2020); the most likely token always stays.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < threshold, NEVER, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        threshold = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, NEVER, logits)
    return logits


def choose(logits: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """Next tokens [B] from logits [B, V]; temperature 0 is greedy."""
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "new", "temperature", "top_k", "top_p", "eos"))
def decode(
    variables: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    *,
    model: Model,
    new: int,
    temperature: float,
    top_k: int,
    top_p: float,
    eos: int,
) -> tuple[jax.Array, jax.Array]:
    """(tokens [B, new], their log-probabilities [B, new] under the unfiltered model).

    Args:
      tokens: prompts [B, L], padded on the right.
      lengths: prompt lengths [B], at least 1.
      eos: rows repeat it after they have produced it; negative for no end.
    """
    batch, length = tokens.shape
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    cache = model.cache(batch, length + new, dtype)
    out = model.apply(variables, tokens=tokens, train=False, cache=cache)
    last = jnp.take_along_axis(out.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    cache = {**out.cache, "length": lengths.astype(jnp.int32)}

    def step(carry: Any, key: jax.Array) -> Any:
        logits, cache, done = carry
        token = choose(logits, key, temperature, top_k, top_p)
        token = jnp.where(done, jnp.int32(max(eos, 0)), token)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=-1)[:, 0]
        out = model.apply(variables, tokens=token[:, None], train=False, cache=cache)
        return (out.head(out.hidden[:, 0]), out.cache, done | (token == eos)), (token, logp)

    start = (out.head(last), cache, jnp.zeros(batch, bool))
    _, (new_tokens, logps) = jax.lax.scan(step, start, jax.random.split(key, new))
    return new_tokens.T, logps.T


def generate(
    model: Model,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    key: jax.Array,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    eos: int = -1,
    pad: int = 0,
) -> list[np.ndarray]:
    """Continuations of `prompts`, each at most `length` tokens, cut before `eos`.

    Raises:
      InputError: the model has no cache (not a decoder), or a prompt is empty.
    """
    if model.cache is None:
        raise InputError("generation needs a decoder; this model keeps no key-value cache")
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise InputError("generation needs at least one token of prompt, for example the eos token")
    widest = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), widest), pad, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    new, _ = decode(
        variables, tokens, lengths, key, model=model, new=length,
        temperature=temperature, top_k=top_k, top_p=top_p, eos=eos,
    )  # fmt: skip
    rows = np.asarray(new)
    ends = [np.flatnonzero(row == eos) for row in rows]
    return [row[: end[0]] if len(end) else row for row, end in zip(rows, ends, strict=True)]
