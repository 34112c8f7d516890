"""Language models and classifiers from recurrent cells (cells.py), stacked and in one or two directions.

Shapes: B batch, L length, D embedding, H hidden units, N layers, V vocab, S slots of a cache.
Parameter paths: embed/tokens, layer0/forward/kernel, layer0/backward/recurrent, ..., head/kernel.
Segments keep documents apart as they do in attention: no state crosses a border or touches padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import cells
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.models.spec import DTYPES
from bigmodel_jax.parallel.rules import constrain

HIDDEN = ("batch", "length", "embed_act")


@dataclass(frozen=True)
class Plan:
    """Options that every recurrent model shares, checked; documented at `recurrent_lm`."""

    cell: str
    vocab_size: int
    num_layers: int
    embed_dim: int
    hidden_dim: int
    bidirectional: bool
    reset_after: bool
    peepholes: bool
    forget_bias: float
    gate_clip: float
    dropout: float
    unroll: int
    dtype: str
    param_dtype: str

    def __post_init__(self) -> None:
        ops.one_of("cell", self.cell, tuple(cells.CELLS))
        for option in ("dtype", "param_dtype"):
            ops.one_of(option, getattr(self, option), DTYPES)
        for option in ("vocab_size", "num_layers", "embed_dim", "hidden_dim", "unroll"):
            if getattr(self, option) < 1:
                raise InputError(f"{option}={getattr(self, option)} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout={self.dropout} must be in [0, 1)")
        if self.peepholes and self.cell != "lstm":
            raise InputError(f"peepholes belong to cell='lstm', not '{self.cell}'")

    @property
    def out_dim(self) -> int:
        return self.hidden_dim * (2 if self.bidirectional else 1)

    @property
    def kind(self) -> cells.Cell:
        return cells.CELLS[self.cell]

    def options(self) -> cells.Options:
        return cells.Options(self.reset_after, self.gate_clip, self.unroll)

    def widths(self) -> list[int]:
        """Inputs of each layer."""
        return [self.embed_dim] + [self.out_dim] * (self.num_layers - 1)

    def zeros(self, batch: int) -> cells.State:
        return cells.zero_state(self.kind, batch, self.hidden_dim, self.dtype)


def dense(module: nn.Module, name: str, shape: tuple[int, int], axes: tuple, plan: Any) -> jax.Array:
    """A matrix with LeCun's initialisation, in the compute dtype."""
    init = nn.with_partitioning(ops.initializer("fan_in", 0.0, shape[0]), axes)
    return module.param(name, init, shape, jnp.dtype(plan.param_dtype)).astype(plan.dtype)


def vector(module: nn.Module, name: str, size: int, axis: str | None, plan: Any) -> jax.Array:
    init = nn.with_partitioning(nn.initializers.zeros, (axis,))
    return module.param(name, init, (size,), jnp.dtype(plan.param_dtype)).astype(plan.dtype)


class CellWeights(nn.Module):
    """Declares the weights of one cell; see cells.py for their names and shapes."""

    plan: Plan

    @nn.compact
    def __call__(self, inputs: int) -> cells.Weights:
        plan, gates, hidden = self.plan, self.plan.kind.gates, self.plan.hidden_dim
        dtype, axes = jnp.dtype(plan.param_dtype), (None, "embed", "mlp")
        # Orthogonal recurrence keeps the norm of what it carries (Saxe et al. 2014).
        orthogonal = nn.initializers.orthogonal()

        def recurrent(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jnp.stack([orthogonal(k, shape[1:], dtype) for k in jax.random.split(key, shape[0])])

        def biases(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            # Jozefowicz et al. 2015, section 2.2: an LSTM that starts by remembering.
            value = jnp.zeros(shape, dtype)
            return value.at[2].set(plan.forget_bias) if plan.cell == "lstm" else value

        box = nn.with_partitioning
        inward = box(ops.initializer("fan_in", 0.0, inputs), axes)
        w = {
            "kernel": self.param("kernel", inward, (gates, inputs, hidden), dtype),
            "recurrent": self.param("recurrent", box(recurrent, axes), (gates, hidden, hidden), dtype),
            "bias": self.param("bias", box(biases, (None, "mlp")), (gates, hidden), dtype),
        }
        zeros = nn.initializers.zeros
        if plan.cell == "gru" and plan.reset_after:
            w["recurrent_bias"] = self.param("recurrent_bias", box(zeros, ("mlp",)), (hidden,), dtype)
        if plan.peepholes:
            w["peephole"] = self.param("peephole", box(zeros, (None, "mlp")), (3, hidden), dtype)
        return w


class Layer(nn.Module):
    """x [B, L, D] -> (outputs [B, L, H or 2 H], states after each step of the forward direction,
    last states of each direction). Paths: forward, backward."""

    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array, state: cells.State, segments: jax.Array | None):
        plan, outputs, lasts, forward = self.plan, [], [], None
        for reverse in (False, True) if plan.bidirectional else (False,):
            w = CellWeights(plan, name="backward" if reverse else "forward")(x.shape[-1])
            start = plan.zeros(x.shape[0]) if reverse else state
            every, last = cells.run(
                plan.kind, w, x, start, reverse=reverse, options=plan.options(),
                **cells.segment_flags(segments, reverse),
            )  # fmt: skip
            outputs.append(every[0].astype(x.dtype))
            lasts.append(last)
            forward = every if forward is None else forward
        y = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
        return constrain(y, HIDDEN), forward, lasts


def stack(plan: Plan, x: jax.Array, states: list[cells.State], segments: jax.Array | None, keys: jax.Array | None):
    """Layers layer0, layer1, ... of the calling module, with dropout before each and after the last
    (Zaremba et al. 2014: never on the recurrence).

    Args:
      states: of each layer, before the first step.

    Returns:
      (outputs of the last layer, [states after each step of each layer], [last states per direction]).
    """
    histories, lasts = [], []
    for n in range(plan.num_layers):
        x = ops.dropout(x, ops.fold(keys, n), plan.dropout)
        x, history, last = Layer(plan, name=f"layer{n}")(x, states[n], segments)
        histories.append(history)
        lasts.append(last)
    return ops.dropout(x, ops.fold(keys, plan.num_layers), plan.dropout), histories, lasts


class Embed(nn.Module):
    """tokens [B, L] -> ([B, L, D], table [V, D])."""

    plan: Plan

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        plan = self.plan
        init = nn.with_partitioning(ops.initializer("fan_in", 0.0, plan.embed_dim), ("vocab", "embed"))
        shape = (plan.vocab_size, plan.embed_dim)
        table = self.param("tokens", init, shape, jnp.dtype(plan.param_dtype)).astype(plan.dtype)
        # Read in slices over fsdp, the rows would come out cut by feature, not by batch.
        return constrain(ops.lookup(constrain(table, ("vocab_act", "embed_act")), tokens), HIDDEN), table


@dataclass(frozen=True)
class Logits:
    """hidden [..., D] -> logits [..., V] in at least float32, given kernel [D, V] (or the table [V, D]) and bias."""

    tied: bool = False

    def __call__(self, arrays: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
        kernel = arrays["kernel"]
        letters = "...d,vd->...v" if self.tied else "...d,dv->...v"
        logits = ops.wide_einsum(letters, hidden.astype(kernel.dtype), kernel)
        return logits + arrays["bias"].astype(logits.dtype)


class Head(nn.Module):
    """The output layer as a value. Parameters: kernel [D, V] unless tied, bias [V]."""

    plan: Any
    outputs: int
    axis: str = "vocab"

    @nn.compact
    def __call__(self, dim: int, table: jax.Array | None = None) -> jax.tree_util.Partial:
        kernel = table
        if table is None:
            kernel = dense(self, "kernel", (dim, self.outputs), ("embed", self.axis), self.plan)
        bias = vector(self, "bias", self.outputs, self.axis, self.plan)
        return jax.tree_util.Partial(Logits(table is not None), {"kernel": kernel, "bias": bias})


def empty_cache(plan: Plan, batch: int, length: int) -> dict[str, jax.Array]:
    """The states of every layer after each token: "h" (and "c") [N, B, S, H], slot s after s + 1 tokens.

    Kept per token, not only the last: then "length" alone decides where a row continues, and prompts
    padded on the right work as they do with keys and values.
    """
    shape = (plan.num_layers, batch, length, plan.hidden_dim)
    empty = {name: jnp.zeros(shape, ops.wide(plan.dtype)) for name in ("h", "c")[: plan.kind.states]}
    return empty | {"length": jnp.zeros((batch,), jnp.int32)}


def held_states(plan: Plan, cache: dict[str, jax.Array], first: list[cells.State] | None = None) -> list[cells.State]:
    """States of each layer after cache["length"] tokens; `first` (zeros) before any token."""
    length, rows = cache["length"], jnp.arange(cache["length"].shape[0])
    started = (length > 0)[:, None]
    names = ("h", "c")[: plan.kind.states]

    def state(n: int) -> cells.State:
        before = plan.zeros(len(rows)) if first is None else first[n]
        held = [cache[name][n, rows, jnp.maximum(length - 1, 0)] for name in names]
        return tuple(jnp.where(started, h, b) for h, b in zip(held, before, strict=True))

    return [state(n) for n in range(plan.num_layers)]


def append(plan: Plan, cache: dict[str, jax.Array], histories: list[cells.State]) -> dict[str, jax.Array]:
    """The cache with the states after each new token, behind those it holds."""
    length = cache["length"]
    new = histories[0][0].shape[1]
    rows, slots = jnp.arange(length.shape[0])[:, None], length[:, None] + jnp.arange(new)
    out = dict(cache)
    for which, name in enumerate(("h", "c")[: plan.kind.states]):
        value = jnp.stack([history[which] for history in histories])
        out[name] = cache[name].at[:, rows, slots].set(value.astype(cache[name].dtype), mode="drop")
    return out | {"length": length + new}


class RecurrentLM(nn.Module):
    """tokens [B, L] -> Output(hidden [B, L, H or D], head, cache). See `recurrent_lm`."""

    plan: Plan
    tied: bool

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        train: bool,
        dropout_keys: jax.Array | None = None,
        cache: dict[str, jax.Array] | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> Output:
        del positions  # the order of the tokens is the position
        plan = self.plan
        if cache is not None and segments is not None:
            raise InputError("a cache holds one document per row: segments cannot be given with it")
        keys = dropout_keys if train else None
        x, table = Embed(plan, name="embed")(tokens)
        batch = tokens.shape[0]
        states = [plan.zeros(batch)] * plan.num_layers if cache is None else held_states(plan, cache)
        x, histories, _ = stack(plan, x, states, segments, keys)
        if self.tied and plan.out_dim != plan.embed_dim:
            w = dense(self, "project", (plan.out_dim, plan.embed_dim), ("mlp", "embed"), plan)
            x = constrain(ops.project("blh,hd->bld", x, w), HIDDEN)
        cache = None if cache is None else append(plan, cache, histories)
        head = Head(plan, plan.vocab_size, name="head")(x.shape[-1], table if self.tied else None)
        return Output(x, head, cache)


class RecurrentClassifier(nn.Module):
    """tokens [B, L] -> Output(pooled hidden [B, H or 2 H], head). See `recurrent_classifier`."""

    plan: Plan
    num_classes: int
    pooling: str

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        train: bool,
        dropout_keys: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> Output:
        del positions, token_types
        plan = self.plan
        real = jnp.ones_like(tokens) if segments is None else (segments > 0).astype(jnp.int32)
        x, _ = Embed(plan, name="embed")(tokens)
        states = [plan.zeros(tokens.shape[0])] * plan.num_layers
        x, _, lasts = stack(plan, x, states, real, dropout_keys if train else None)
        if self.pooling == "last":
            # Both ends: the forward state after the last real token, the backward one at the first.
            hidden = jnp.concatenate([state[0] for state in lasts[-1]], axis=-1).astype(x.dtype)
        else:
            w = real.astype(ops.wide(x.dtype))
            total = jnp.einsum("bl,bld->bd", w, x.astype(w.dtype))
            hidden = (total / jnp.maximum(w.sum(1), 1)[:, None]).astype(x.dtype)
        return Output(hidden, Head(plan, self.num_classes, "classes", name="head")(hidden.shape[-1]))


def cell_flops(plan: Plan, inputs: int) -> float:
    """Forward matmul FLOPs of one layer per token."""
    one = 2.0 * plan.kind.gates * plan.hidden_dim * (inputs + plan.hidden_dim)
    return one * (2 if plan.bidirectional else 1)


def _plan(**options: Any) -> Plan:
    options["hidden_dim"] = options["hidden_dim"] or options["embed_dim"]
    return Plan(**options)


def _example(batch: int) -> dict[str, np.ndarray]:
    return {"tokens": np.zeros((batch, 1), np.int32)}


def recurrent_lm(
    *,
    vocab_size: int,
    cell: str = "lstm",
    num_layers: int = 2,
    embed_dim: int = 256,
    hidden_dim: int = 0,
    reset_after: bool = True,
    peepholes: bool = False,
    forget_bias: float = 1.0,
    gate_clip: float = 0.0,
    tied_embeddings: bool = False,
    dropout: float = 0.0,
    unroll: int = 1,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """Causal language model (Mikolov et al. 2010; LSTM: Zaremba et al. 2014).

    Args:
      cell: rnn, lstm or gru.
      hidden_dim: 0 means embed_dim.
      reset_after: form of the gru; see cells.Options.
      peepholes: gates of the lstm see the cell state.
      forget_bias: initial bias of the lstm's forget gate.
      gate_clip: bound of every gate before its activation; 0 for none.
      tied_embeddings: the output matrix is the token table, behind a projection where sizes differ.
      dropout: between layers, not over time.
      unroll: steps of time per iteration of the loop.

    Inputs of apply: tokens [B, L]; optional segments [B, L] (0 is padding). Its cache, see `empty_cache`,
    works wherever one of keys and values does.

    Raises:
      InputError: options that do not fit together.
    """
    plan = _plan(
        cell=cell, vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, hidden_dim=hidden_dim,
        bidirectional=False, reset_after=reset_after, peepholes=peepholes, forget_bias=forget_bias,
        gate_clip=gate_clip, dropout=dropout, unroll=unroll, dtype=dtype, param_dtype=param_dtype,
    )  # fmt: skip

    def forward_flops(length: int) -> float:
        del length
        last = plan.embed_dim if tied_embeddings else plan.out_dim
        between = 2.0 * plan.out_dim * plan.embed_dim if tied_embeddings and plan.out_dim != plan.embed_dim else 0.0
        return sum(cell_flops(plan, width) for width in plan.widths()) + between + 2.0 * last * plan.vocab_size

    return Model(
        module=RecurrentLM(plan, tied_embeddings),
        example=_example,
        flops=forward_flops,
        cache=lambda batch, length, dtype=None: empty_cache(plan, batch, length),
    )


def recurrent_classifier(
    *,
    vocab_size: int,
    num_classes: int,
    cell: str = "lstm",
    num_layers: int = 1,
    embed_dim: int = 256,
    hidden_dim: int = 0,
    bidirectional: bool = True,
    pooling: str = "last",
    reset_after: bool = True,
    peepholes: bool = False,
    forget_bias: float = 1.0,
    gate_clip: float = 0.0,
    dropout: float = 0.0,
    unroll: int = 1,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """Text classifier; both directions are those of Schuster & Paliwal 1997.

    Args are those of `recurrent_lm`, and:
      pooling: "last": each direction's last state; "mean" of the outputs of real tokens.

    Inputs of apply: tokens [B, L]; optional segments [B, L] (0 is padding, the rest one text).

    Raises:
      InputError: options that do not fit together.
    """
    ops.one_of("pooling", pooling, ("last", "mean"))
    plan = _plan(
        cell=cell, vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, hidden_dim=hidden_dim,
        bidirectional=bidirectional, reset_after=reset_after, peepholes=peepholes, forget_bias=forget_bias,
        gate_clip=gate_clip, dropout=dropout, unroll=unroll, dtype=dtype, param_dtype=param_dtype,
    )  # fmt: skip

    def forward_flops(length: int) -> float:
        return sum(cell_flops(plan, width) for width in plan.widths()) + 2.0 * plan.out_dim * num_classes / length

    return Model(module=RecurrentClassifier(plan, num_classes, pooling), example=_example, flops=forward_flops)
