"""Prefill and decode as two programs over a state that is a value.

state = {"cache", "token" [B] (chosen, not yet read), "logp" [B], "done" [B], "keys" [B], "count" (tokens chosen
so far), and "seen" [B, V] where a repetition penalty needs it}.

A prompt is read in one pass, like a forward pass in training; its keys and values are then laid out for
decoding (models/cache.py). Steps run in a loop on the device that ends when every row has ended. On one
CPU device the weights are laid out anew too (models/laid.py). Row b draws its n-th token with
fold_in(keys[b], n): what its neighbours are, and how many, changes nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel_jax.generate.sampling import Sampling, choose
from bigmodel_jax.models import cache as caches
from bigmodel_jax.models import laid, target
from bigmodel_jax.models.model import Model
from bigmodel_jax.parallel.rules import everywhere


def lay_out(model: Model, variables: Any) -> Any:
    """Variables that one CPU device generates with, see models/laid.py; elsewhere `variables` themselves."""
    return _lay_out(model, variables) if model.blocks and target.platform() == "cpu" else variables


@functools.partial(jax.jit, static_argnums=0)
def _lay_out(model: Model, variables: Any) -> Any:
    return laid.lay_out(model, variables)


def read_prompt(
    model: Model, variables: Any, tokens: jax.Array, lengths: jax.Array, capacity: int, int8: bool, inputs: Any
) -> tuple[jax.Array, Any]:
    """(logits [B, V] of the token after each prompt, the cache) for prompts [B, L] padded on the right.

    Args:
      capacity: tokens that the cache will hold at most.
      inputs: further inputs of the model, such as "memory".
    """
    batch, length = tokens.shape
    dtype = model.module.spec.dtype if model.blocks else jax.tree.leaves(variables["params"])[0].dtype
    cache = model.cache(batch, length if model.blocks else capacity, dtype)
    out = model.apply(variables, tokens=tokens, train=False, cache=cache, **inputs)
    last = jnp.take_along_axis(out.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    if model.blocks:
        cache = caches.opened(out.cache, lengths, capacity, model.windows, int8)
    else:
        cache = out.cache | {"length": lengths}
    return out.head(last), cache


def _chosen(state: dict[str, Any], logits: jax.Array, sampling: Sampling, eos: tuple[int, ...], pad: int) -> dict:
    """The state with the next token of each row, from its logits."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state["keys"], state["count"])
    token = choose(logits, keys, sampling, state.get("seen"))
    token = jnp.where(state["done"], jnp.int32(pad), token)
    logp = jnp.take_along_axis(logits, token[:, None], -1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    done = state["done"]
    for end in eos:
        done = done | (token == end)
    state = state | {"token": token, "logp": logp, "done": done, "count": state["count"] + 1}
    if "seen" in state:
        state["seen"] = state["seen"].at[jnp.arange(token.shape[0]), token].set(True)
    return state


@functools.partial(jax.jit, static_argnames=("model", "capacity", "int8", "sampling", "eos", "pad"))
def prefill(
    variables: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    inputs: Any,
    *,
    model: Model,
    capacity: int,
    int8: bool,
    sampling: Sampling,
    eos: tuple[int, ...],
    pad: int,
) -> dict[str, Any]:
    """The state with the first token of every row chosen. Arguments as in `read_prompt` and `steps`."""
    logits, cache = read_prompt(model, variables, tokens, lengths, capacity, int8, inputs)
    state = {"cache": cache, "done": jnp.zeros(tokens.shape[0], bool), "keys": keys, "count": jnp.int32(0)}
    if sampling.repetition_penalty != 1.0:
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        rows = jnp.arange(tokens.shape[0])[:, None]
        state["seen"] = jnp.zeros(logits.shape, bool).at[rows, tokens].max(real)
    return _readable(_chosen(state, logits, sampling, eos, pad))


def _readable(state: dict[str, Any]) -> dict[str, Any]:
    """The state with its newest tokens where every process can read them."""
    return state | everywhere({name: state[name] for name in ("token", "logp")})


@functools.partial(jax.jit, static_argnames=("model", "most", "sampling", "eos", "pad"), donate_argnames=("state",))
def steps(
    variables: Any,
    state: dict[str, Any],
    limit: jax.Array,
    *,
    model: Model,
    most: int,
    sampling: Sampling,
    eos: tuple[int, ...],
    pad: int,
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """(state, tokens [B, most], log-probabilities [B, most]) after at most min(most, limit) more steps.

    It stops early when every row has ended. Log-probabilities are the model's, before any filter.

    Args:
      variables: of `lay_out`.
      eos: tokens that end a row; it is followed by `pad`.
    """
    rows = state["token"].shape[0]
    out = (jnp.full((rows, most), pad, jnp.int32), jnp.zeros((rows, most), state["logp"].dtype))

    def unfinished(carry: Any) -> jax.Array:
        n, state, _ = carry
        return (n < jnp.minimum(most, limit)) & ~jnp.all(state["done"])

    def step(carry: Any) -> Any:
        n, state, (tokens, logps) = carry
        got = model.apply(variables, tokens=state["token"][:, None], train=False, cache=state["cache"])
        state = _chosen(state | {"cache": got.cache}, got.head(got.hidden[:, 0]), sampling, eos, pad)
        return n + 1, state, (tokens.at[:, n].set(state["token"]), logps.at[:, n].set(state["logp"]))

    _, state, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, out))
    return _readable(state), *everywhere(out)


@functools.partial(jax.jit, static_argnames=("model", "capacity"), donate_argnames=("state",))
def grow(state: dict[str, Any], *, model: Model, capacity: int) -> dict[str, Any]:
    """The state with room for `capacity` tokens."""
    return state | {"cache": caches.grown(state["cache"], capacity, model.windows)}
