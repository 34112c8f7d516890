"""Recurrent cells as plain functions, and the scan that runs one over time.

Gates are stacked on axis 0 in the order of the ONNX standard (operators RNN, LSTM, GRU):
  rnn   h' = tanh(a)
  lstm  i, o, f, c (Hochreiter & Schmidhuber 1997; peepholes: Gers & Schmidhuber 2000):
        c' = s(f) c + s(i) tanh(c~), h' = s(o) tanh(c')
  gru   z, r, h (Cho et al. 2014): h' = (1 - s(z)) tanh(h~) + s(z) h
with a = x W + h R + b. Weights of a cell, by name:
  kernel [A, D, H], recurrent [A, H, H], bias [A, H] (input and recurrent bias in one),
  recurrent_bias [H] (gru with reset_after: the candidate's own, inside the reset),
  peephole [3, H] (lstm: of i, o, f).

Shapes: A gates, B batch, L length, D inputs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigmodel_jax.models.layers import project, wide

State = tuple[jax.Array, ...]
Weights = dict[str, jax.Array]


class Options(NamedTuple):
    """reset_after: the gru multiplies the reset gate after the matrix (ONNX linear_before_reset,
    torch, cuDNN), not before as in Cho et al. clip: bound of every gate before its activation, 0
    for none (ONNX clip). unroll: steps of time per iteration of the loop."""

    reset_after: bool = True
    clip: float = 0.0
    unroll: int = 1


PLAIN = Options()


class Cell(NamedTuple):
    """gates: A. states: arrays carried over time, h first. step(x [B, A, H], state, weights, options)
    -> state; x is the input's share of the gates, bias included."""

    gates: int
    states: int
    step: Callable[[jax.Array, State, Weights, Options], State]


def _clipped(x: jax.Array, options: Options) -> jax.Array:
    return jnp.clip(x, -options.clip, options.clip) if options.clip else x


def _times(h: jax.Array, recurrent: jax.Array, dtype: Any) -> jax.Array:
    """h [B, H] times recurrent [H, A H], in `dtype`, as [B, A, H] in at least float32."""
    y = jnp.einsum("bh,hz->bz", h.astype(dtype), recurrent, preferred_element_type=wide(dtype))
    return y.reshape(h.shape[0], -1, h.shape[-1])


def rnn_step(x: jax.Array, state: State, w: Weights, options: Options) -> State:
    """Elman 1990 with tanh."""
    a = x.astype(wide(x.dtype)) + _times(state[0], w["recurrent"], x.dtype)
    return (jnp.tanh(_clipped(a[:, 0], options)),)


def lstm_step(x: jax.Array, state: State, w: Weights, options: Options) -> State:
    h, c = state
    a = x.astype(wide(x.dtype)) + _times(h, w["recurrent"], x.dtype)
    i, o, f, new = (a[:, gate] for gate in range(4))
    p = w.get("peephole")
    if p is not None:
        i, f = i + p[0] * c, f + p[2] * c
    i, f, new = (_clipped(gate, options) for gate in (i, f, new))
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(new)
    if p is not None:
        o = o + p[1] * c
    return jax.nn.sigmoid(_clipped(o, options)) * jnp.tanh(c), c


def gru_step(x: jax.Array, state: State, w: Weights, options: Options) -> State:
    (h,), size, dtype = state, x.shape[-1], x.dtype
    x = x.astype(wide(dtype))
    if options.reset_after:
        a = _times(h, w["recurrent"], dtype)
        z, r = (jax.nn.sigmoid(_clipped(x[:, g] + a[:, g], options)) for g in (0, 1))
        inner = r * (a[:, 2] + w["recurrent_bias"] if "recurrent_bias" in w else a[:, 2])
    else:
        a = _times(h, w["recurrent"][:, : 2 * size], dtype)
        z, r = (jax.nn.sigmoid(_clipped(x[:, g] + a[:, g], options)) for g in (0, 1))
        inner = _times(r * h, w["recurrent"][:, 2 * size :], dtype)[:, 0]
    new = jnp.tanh(_clipped(x[:, 2] + inner, options))
    return ((1 - z) * new + z * h,)


CELLS: dict[str, Cell] = {
    "rnn": Cell(1, 1, rnn_step),
    "lstm": Cell(4, 2, lstm_step),
    "gru": Cell(3, 1, gru_step),
}


def zero_state(cell: Cell, batch: int, hidden: int, dtype: Any) -> State:
    """`cell.states` zeros [B, H], in at least float32: a sum over time loses digits in bfloat16."""
    return tuple(jnp.zeros((batch, hidden), wide(dtype)) for _ in range(cell.states))


def prepare(w: Weights, dtype: Any) -> Weights:
    """Weights as a step wants them: matrices [.., A H] in `dtype`, biases in at least float32."""

    def ready(value: jax.Array) -> jax.Array:
        if value.ndim < 3:
            return value.astype(wide(dtype))
        return jnp.moveaxis(value, 0, 1).reshape(value.shape[1], -1).astype(dtype)

    return {name: ready(value) for name, value in w.items()}


def gates_of(x: jax.Array, w: Weights) -> jax.Array:
    """The input's share of the gates, x [B, L, D] -> [B, L, A H], for all steps in one product."""
    y = project("bld,dg->blg", x, w["kernel"])
    return y + w["bias"].reshape(-1).astype(y.dtype) if "bias" in w else y


def run(
    cell: Cell,
    weights: Weights,
    x: jax.Array,
    state: State,
    *,
    valid: jax.Array | None = None,
    fresh: jax.Array | None = None,
    reverse: bool = False,
    options: Options = PLAIN,
) -> tuple[State, State]:
    """A cell over time.

    Args:
      x: [B, L, D], in the dtype of the matrix products.
      state: before the first step (the last one, if reverse), `cell.states` arrays [B, H].
      valid: [B, L] bool; elsewhere the state stays as it is and the output is 0.
      fresh: [B, L] bool; the state is 0 before these steps.
      reverse: from the last step to the first; padding on the right is then passed first, unchanged.

    Returns:
      (states after each step, `cell.states` arrays [B, L, H], 0 where not valid, and the last state
      [B, H]), in at least float32.
    """
    w = prepare(weights, x.dtype)
    gates = gates_of(x, w)
    batch, length = x.shape[:2]
    flags = {"valid": valid, "fresh": fresh}
    steps = {name: jnp.moveaxis(flag, 1, 0)[..., None] for name, flag in flags.items() if flag is not None}

    def step(carry: State, inputs: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[State, State]:
        a, flag = inputs
        before = carry
        if "fresh" in flag:
            before = tuple(jnp.where(flag["fresh"], 0, s) for s in before)
        after = cell.step(a.reshape(batch, cell.gates, -1), before, w, options)
        if "valid" not in flag:
            return after, after
        kept = tuple(jnp.where(flag["valid"], new, old) for new, old in zip(after, carry, strict=True))
        return kept, tuple(jnp.where(flag["valid"], new, 0) for new in after)

    time_major = jnp.moveaxis(gates, 1, 0)
    unroll = max(1, min(options.unroll, length))
    last, every = jax.lax.scan(step, state, (time_major, steps), reverse=reverse, unroll=unroll)
    return tuple(jnp.moveaxis(s, 0, 1) for s in every), last


def attending(cell: Cell, read: Callable[[jax.Array], jax.Array]) -> Cell:
    """The cell with a context that it reads before each step (Bahdanau et al. 2015, appendix A.2).

    The context read(h) [B, E] enters all gates through the weight "context" [A, E, H]; it is the last of
    the states, so that it comes out with them, and is never read back.
    """

    def step(x: jax.Array, state: State, w: Weights, options: Options) -> State:
        context = read(state[0])
        share = jnp.einsum("be,ez->bz", context.astype(x.dtype), w["context"]).reshape(x.shape)
        return (*cell.step(x + share, state[:-1], w, options), context)

    return Cell(cell.gates, cell.states + 1, step)


def segment_flags(segments: jax.Array | None, reverse: bool = False) -> dict[str, jax.Array]:
    """valid and fresh of `run` for segments [B, L] (0 is padding): no state crosses a border.

    The first step of a row is not fresh: it continues the state that was given.
    """
    if segments is None:
        return {}
    changed = segments[:, 1:] != segments[:, :-1]
    edge = jnp.zeros((segments.shape[0], 1), bool)
    fresh = jnp.concatenate([changed, edge] if reverse else [edge, changed], axis=1)
    return {"valid": segments > 0, "fresh": fresh}
