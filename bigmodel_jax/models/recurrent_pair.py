"""Recurrent encoder-decoder (Cho et al. 2014; Sutskever et al. 2014), with attention or without.

Shapes: B batch, S source length, L target length, E encoder outputs, H hidden units, N decoder layers, V vocab.
Parameter paths: encoder/embed/tokens, encoder/layer0/forward/kernel, bridge/h0/kernel, decoder/layer0/...,
decoder/attention/query, decoder/attention/join, head/kernel.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import cells
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.model import Model, Output, encoding
from bigmodel_jax.models.recurrent import (
    HIDDEN,
    CellWeights,
    Embed,
    Head,
    Plan,
    append,
    cell_flops,
    dense,
    empty_cache,
    held_states,
    stack,
    vector,
)
from bigmodel_jax.parallel.rules import constrain

ATTENTIONS = ("none", "additive", "general")
BRIDGES = ("dense", "copy")


@dataclass(frozen=True)
class PairPlan:
    """Both sides and what joins them; documented at `recurrent_seq2seq`."""

    encoder: Plan
    decoder: Plan
    shared: bool
    attention: str
    bridge: str

    def __post_init__(self) -> None:
        ops.one_of("attention", self.attention, ATTENTIONS)
        ops.one_of("bridge", self.bridge, BRIDGES)
        a, b = self.encoder, self.decoder
        if self.bridge == "copy" and (a.num_layers, a.out_dim) != (b.num_layers, b.hidden_dim):
            raise InputError(
                f"bridge='copy' needs as many layers and states on both sides, not {a.num_layers} of {a.out_dim} "
                f"and {b.num_layers} of {b.hidden_dim}; bridge='dense' fits any"
            )


class Side(nn.Module):
    """Embedding and layers of the encoder. Gives (outputs [B, S, E], last states of each layer and direction)."""

    plan: Plan

    @nn.compact
    def __call__(self, tokens, segments, keys, table):
        x, _ = Embed(self.plan, name="embed")(tokens) if table is None else (ops.lookup(table, tokens), None)
        states = [self.plan.zeros(tokens.shape[0])] * self.plan.num_layers
        x, _, lasts = stack(self.plan, x, states, segments, keys)
        return x, lasts


class Bridge(nn.Module):
    """First states of the decoder, [B, N, H] of each kind, from the encoder's last ones."""

    pair: PairPlan

    @nn.compact
    def __call__(self, lasts: list[list[cells.State]]) -> cells.State:
        pair, out = self.pair, []
        for which in range(pair.decoder.kind.states):
            # [layer][direction][which] -> one vector [B, E] per encoder layer
            ends = [jnp.concatenate([state[which] for state in layer], axis=-1) for layer in lasts]
            if pair.bridge == "dense":
                ends = [self._layer(f"{'hc'[which]}{n}", ends[-1]) for n in range(pair.decoder.num_layers)]
            out.append(jnp.stack(ends, axis=1))
        return tuple(out)

    @nn.nowrap
    def _layer(self, name: str, x: jax.Array) -> jax.Array:
        plan = self.pair.decoder
        w = dense(self, f"{name}_kernel", (x.shape[-1], plan.hidden_dim), ("embed", "mlp"), plan)
        y = ops.wide_einsum("...d,dh->...h", x.astype(plan.dtype), w)
        return jnp.tanh(y + vector(self, f"{name}_bias", plan.hidden_dim, "mlp", plan).astype(y.dtype))


class Attention(nn.Module):
    """Scores of states against the memory. "additive": v tanh(W s + U m) (Bahdanau et al. 2015, A.1.2);
    "general": s W m (Luong et al. 2015, eq. 8). Gives two functions, `read` states and `join` context."""

    pair: PairPlan

    @nn.compact
    def __call__(self, memory: jax.Array, segments: jax.Array):
        plan, additive = self.pair.decoder, self.pair.attention == "additive"
        hidden, outputs = plan.hidden_dim, memory.shape[-1]
        size = hidden if additive else outputs
        query = dense(self, "query", (hidden, size), ("embed", "mlp"), plan)
        joined = dense(self, "join", (hidden + outputs, hidden), ("mlp", "embed"), plan)
        keys = memory
        if additive:
            keys = ops.project("bse,ea->bsa", memory, dense(self, "key", (outputs, hidden), ("embed", "mlp"), plan))
            score = dense(self, "score", (hidden, 1), ("mlp", None), plan)[:, 0]
        seen = (segments > 0)[:, None]

        def read(states: jax.Array) -> jax.Array:
            """Context [B, L, E] of states [B, L, H]."""
            q = jnp.einsum("blh,ha->bla", states.astype(plan.dtype), query)
            if additive:
                e = jnp.einsum("blsa,a->bls", jnp.tanh(q[:, :, None] + keys[:, None]), score)
            else:
                e = jnp.einsum("bla,bsa->bls", q, keys)
            e = e.astype(ops.wide(e.dtype))
            p = jax.nn.softmax(jnp.where(seen, e, jnp.finfo(e.dtype).min), axis=-1)
            return jnp.einsum("bls,bse->ble", p.astype(memory.dtype), memory)

        def join(context: jax.Array, y: jax.Array) -> jax.Array:
            """The attentional state tanh(W [context; y]) [B, L, H] (Luong et al. 2015, eq. 5)."""
            both = jnp.concatenate([context.astype(y.dtype), y], axis=-1)
            return constrain(jnp.tanh(ops.project("blh,hd->bld", both, joined)), HIDDEN)

        return read, join


class Attended(nn.Module):
    """The decoder's first layer when it reads a context before each step. Paths: forward, context."""

    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array, state: cells.State, outputs: int, read: Any):
        plan, gates = self.plan, self.plan.kind.gates
        w = dict(CellWeights(plan, name="forward")(x.shape[-1]))
        init = nn.with_partitioning(ops.initializer("fan_in", 0.0, outputs), (None, "embed", "mlp"))
        w["context"] = self.param("context", init, (gates, outputs, plan.hidden_dim), jnp.dtype(plan.param_dtype))
        cell = cells.attending(plan.kind, lambda h: read(h[:, None])[:, 0])
        start = (*state, jnp.zeros((x.shape[0], outputs), x.dtype))
        every, _ = cells.run(cell, w, x, start, options=plan.options())
        return every[0].astype(x.dtype), every[:-1], every[-1]


class Decoder(nn.Module):
    """Target tokens to hidden states [B, L, H], with the states after each step of each layer."""

    pair: PairPlan

    @nn.compact
    def __call__(self, tokens, states, memory, segments, keys, table):
        pair, plan = self.pair, self.pair.decoder
        x, _ = Embed(plan, name="embed")(tokens) if table is None else (ops.lookup(table, tokens), None)
        if pair.attention == "none":
            x, histories, _ = stack(plan, x, states, None, keys)
            return x, histories
        read, join = Attention(pair, name="attention")(memory, segments)
        if pair.attention == "general":
            x, histories, _ = stack(plan, x, states, None, keys)
            return join(read(x), x), histories
        x = ops.dropout(x, ops.fold(keys, plan.num_layers + 1), plan.dropout)
        x, first, context = Attended(plan, name="attended")(x, states[0], memory.shape[-1], read)
        if plan.num_layers == 1:
            x, more = ops.dropout(x, ops.fold(keys, 0), plan.dropout), []
        else:
            above = dataclasses.replace(plan, num_layers=plan.num_layers - 1, embed_dim=plan.hidden_dim)
            x, more, _ = stack(above, x, states[1:], None, keys)
        return join(context, x), [first, *more]


class Pair(nn.Module):
    """Source and target so far to the states from which the next token is read. See `recurrent_seq2seq`."""

    pair: PairPlan

    def setup(self) -> None:
        pair = self.pair
        self.encoder, self.bridge = Side(pair.encoder), Bridge(pair)
        self.decoder, self.head = Decoder(pair), Head(pair.decoder, pair.decoder.vocab_size)
        if pair.shared:
            self.embed = Embed(pair.decoder)

    def _table(self) -> jax.Array | None:
        return self.embed(jnp.zeros((1, 1), jnp.int32))[1] if self.pair.shared else None

    def encode(
        self,
        source: jax.Array,
        *,
        train: bool,
        dropout_keys: jax.Array | None = None,
        source_segments: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        keys = ops.fold(dropout_keys if train else None, 0)
        real = jnp.ones_like(source) if source_segments is None else (source_segments > 0).astype(jnp.int32)
        states, lasts = self.encoder(source, real, keys, self._table())
        first = self.bridge(lasts)
        return {"states": states, "real": real} | dict(zip(("h", "c"), first, strict=False))

    def __call__(
        self,
        tokens: jax.Array,
        *,
        train: bool,
        dropout_keys: jax.Array | None = None,
        source: jax.Array | None = None,
        source_segments: jax.Array | None = None,
        memory: dict[str, jax.Array] | None = None,
        memory_segments: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: dict[str, jax.Array] | None = None,
    ) -> Output:
        plan = self.pair.decoder
        if segments is not None:
            raise InputError("a recurrent encoder-decoder takes one pair per row: no segments of the target")
        if source is not None:
            if memory is not None:
                raise InputError("give either source or memory, what `encode` made of it")
            memory = self.encode(source, train=train, dropout_keys=dropout_keys, source_segments=source_segments)
        if memory is None:
            if cache is None or "memory_states" not in cache:
                raise InputError("a decoder needs source, memory, or a cache that was given the memory before")
            memory = {n.removeprefix("memory_"): _swapped(x) for n, x in cache.items() if n.startswith("memory_")}
        elif memory_segments is not None:
            memory = memory | {"real": (memory_segments > 0).astype(jnp.int32)}
        names = ("h", "c")[: plan.kind.states]
        states = [tuple(memory[name][:, n] for name in names) for n in range(plan.num_layers)]
        if cache is not None:
            cache = cache | {f"memory_{name}": _swapped(value) for name, value in memory.items()}
            states = held_states(plan, cache, states)
        keys = ops.fold(dropout_keys if train else None, 1)
        x, histories = self.decoder(tokens, states, memory["states"], memory["real"], keys, self._table())
        cache = None if cache is None else append(plan, cache, histories)
        return Output(x, self.head(x.shape[-1]), cache)


def _swapped(x: jax.Array) -> jax.Array:
    """Between rows first, as a memory has them, and rows second, as all of a cache beyond two dimensions."""
    return jnp.swapaxes(x, 0, 1) if x.ndim > 2 else x


def forward_flops(pair: PairPlan, source: int, target: int) -> float:
    """Forward matmul FLOPs of one example with so many tokens (see flops.py)."""
    a, b = pair.encoder, pair.decoder
    encoder = source * sum(cell_flops(a, width) for width in a.widths())
    decoder = target * (sum(cell_flops(b, width) for width in b.widths()) + 2.0 * b.hidden_dim * b.vocab_size)
    bridge = 2.0 * b.kind.states * b.num_layers * a.out_dim * b.hidden_dim if pair.bridge == "dense" else 0.0
    if pair.attention == "none":
        return encoder + decoder + bridge
    join = target * (a.out_dim + b.hidden_dim) * b.hidden_dim
    if pair.attention == "general":
        products = target * b.hidden_dim * a.out_dim + 2 * target * source * a.out_dim
    else:
        products = (target * b.hidden_dim + source * a.out_dim) * b.hidden_dim
        products += target * (source * (b.hidden_dim + a.out_dim) + b.kind.gates * b.hidden_dim * a.out_dim)
    return encoder + decoder + bridge + 2.0 * (join + products)


def recurrent_seq2seq(
    *,
    vocab_size: int,
    source_vocab_size: int = 0,
    cell: str = "gru",
    num_layers: int = 1,
    decoder_layers: int = 0,
    embed_dim: int = 128,
    hidden_dim: int = 0,
    decoder_dim: int = 0,
    bidirectional: bool = True,
    attention: str = "additive",
    bridge: str = "dense",
    reset_after: bool = True,
    forget_bias: float = 1.0,
    gate_clip: float = 0.0,
    dropout: float = 0.0,
    unroll: int = 1,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Model:
    """Recurrent encoder-decoder; the default is that of Bahdanau et al. 2015, smaller.

    Args are those of `recurrent_lm`, and:
      source_vocab_size: 0 means that source and target share vocabulary and table.
      num_layers, hidden_dim: of the encoder; decoder_layers, decoder_dim of the decoder, 0 means as many
        (decoder_dim with bridge="copy": as wide as both directions together).
      bidirectional: the encoder reads both ways.
      attention: "additive" (Bahdanau: before each step, from the state before), "general" (Luong: after the
        last layer, for all steps at once), "none": the source is in the first state alone.
      bridge: how the encoder's last states become the decoder's first: "dense" (tanh layer), or "copy".

    Inputs of apply: tokens [B, L], the target so far; source [B, S] with optional source_segments (0 is padding);
    or memory = encode(variables, source=, source_segments=), a dict of arrays with B in front, which with a
    cache is given in the first call only. flops(source, target): of one example with so many tokens.

    Raises:
      InputError: options that do not fit together.
    """
    shared = source_vocab_size == 0
    common = dict(
        cell=cell, embed_dim=embed_dim, reset_after=reset_after, peepholes=False, forget_bias=forget_bias,
        gate_clip=gate_clip, dropout=dropout, unroll=unroll, dtype=dtype, param_dtype=param_dtype,
    )  # fmt: skip
    encoder = Plan(
        vocab_size=source_vocab_size or vocab_size, num_layers=num_layers, hidden_dim=hidden_dim or embed_dim,
        bidirectional=bidirectional, **common,
    )  # fmt: skip
    decoder = Plan(
        vocab_size=vocab_size, num_layers=decoder_layers or num_layers, bidirectional=False,
        hidden_dim=decoder_dim or (encoder.out_dim if bridge == "copy" else encoder.hidden_dim), **common,
    )  # fmt: skip
    pair = PairPlan(encoder, decoder, shared, attention, bridge)
    module = Pair(pair)

    def example(batch: int) -> dict[str, np.ndarray]:
        return {name: np.zeros((batch, 1), np.int32) for name in ("source", "tokens")}

    return Model(
        module=module, example=example, encode=encoding(module),
        cache=lambda batch, length, dtype=None: empty_cache(decoder, batch, length),
        flops=lambda source, target: forward_flops(pair, source, target),
    )  # fmt: skip
