"""Decoder and encoder Transformers from one block (Vaswani et al. 2017).

Shapes: B batch, L length, M memory length, D model, H heads, G key-value groups, K head dim, F ffn,
V vocab, N layers. Layers are stacked: their parameters are "layers/..." with a leading axis N.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import flops
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import cache as caches
from bigmodel_jax.models import laid, moe, ring
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.block import Block, Context, bias, norm, weight
from bigmodel_jax.models.heads import Head, head_flops, read_out
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.models.positions import rotary_table, sinusoidal
from bigmodel_jax.models.spec import REMAT, EncoderSpec, Spec, taking
from bigmodel_jax.parallel import pipeline
from bigmodel_jax.parallel.context import natural, reordered
from bigmodel_jax.parallel.rings import own_tokens
from bigmodel_jax.parallel.rules import constrain


def _read(tokens: jax.Array, table: jax.Array) -> jax.Array:
    # Read in slices over fsdp, the rows would come out cut by feature, not by batch.
    return ops.lookup(constrain(table, ("vocab_act", "embed_act")), tokens)


class Embed(nn.Module):
    """Tokens, absolute positions and token types to x [B, L, D]; also returns the token table (own or shared)."""

    spec: Spec

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        plain: bool,
        token_types: jax.Array | None,
        table: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        spec, dim = self.spec, self.spec.token_dim
        if table is None:
            table = weight(self, "tokens", (spec.vocab_size, dim), ("vocab", "embed"), dim, spec)
        x = own_tokens(_read, tokens, table)
        x = constrain(x, ("rows", "length", "embed_act"))
        if spec.embed_scale != 1.0:
            x = x * jnp.asarray(spec.embed_scale, x.dtype)
        if dim != spec.embed_dim and spec.causal:
            x, dim = self._projected(x), spec.embed_dim
        if spec.positions == "learned":
            first, rows = spec.position_offset, spec.position_offset + spec.max_length
            where = weight(self, "positions", (rows, dim), ("positions", "embed"), dim, spec)
            x = x + (where[first : first + tokens.shape[1]] if plain else ops.lookup(where, positions + first))
        elif spec.positions == "sinusoidal":
            x = x + sinusoidal(positions, dim, ops.wide(x.dtype)).astype(x.dtype)
        if spec.token_types:
            types = weight(self, "types", (spec.token_types, dim), (None, "embed"), dim, spec)
            x = x + (types[0] if token_types is None else ops.lookup(types, token_types))
        if spec.embed_norm:
            x = norm(spec, "norm", x)
        if dim != spec.embed_dim:
            x = ops.add_bias(self._projected(x), bias(self, "project_bias", (spec.embed_dim,), ("norm",), spec))
        return x, table

    @nn.nowrap
    def _projected(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        shape = (spec.token_dim, spec.embed_dim)
        return ops.project("ble,ed->bld", x, weight(self, "project", shape, (None, "embed"), spec.token_dim, spec))


class Transformer(nn.Module):
    """Embedding, N scanned layers, final norm, head."""

    spec: Spec

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
        prefix: jax.Array | None = None,
        token_types: jax.Array | None = None,
        blocks: Any = None,
    ) -> Output:
        spec = self.spec
        _check_inputs(spec, tokens, cache, segments, prefix, token_types)
        keys = dropout_keys if train else None
        length = caches.held(cache, tokens)
        plain = positions is None and length is None  # 0, 1, 2, ... in every row
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None] + (0 if length is None else length[:, None])
        window = spec.window if any(spec.local) else 0
        mask = Mask(causal=spec.causal, window=window, segments_q=segments, prefix=prefix, offset=length)
        if cache is None and stores_zigzag(spec, mask, tokens):
            plain, mask = False, dataclasses.replace(mask, zigzag=True, segments_q=reordered(segments))
            tokens, positions, token_types = (reordered(each) for each in (tokens, positions, token_types))
        x, table = Embed(spec, name="embed")(tokens, positions, plain, token_types)
        x = ops.dropout(x, ops.fold(keys, spec.num_layers), spec.embed_dropout, mask.zigzag)
        x = constrain(x, ("rows", "length", "embed_act"))
        rope, local_rope = ropes(spec, positions, ops.wide(x.dtype))
        context = Context(mask, rope, keys, length, local_rope=local_rope)
        (x, held), routed = run_layers(self, spec, x, cache, context, blocks)
        if spec.norm_placement != "post":
            x = norm(spec, "norm_final", x)
        x = natural(x, "rows") if mask.zigzag else x
        if cache is not None:
            held = held | {"length": cache["length"] + tokens.shape[1]}
        x, extra = read_out(spec, x, segments, keys)
        return Output(x, Head(spec, name="head")(table), held, extra=extra | moe.extra(routed))


def stores_zigzag(spec: Spec, mask: Mask, tokens: jax.Array) -> bool:
    """Whether the layers hold the length of tokens [B, L] in zigzag order (parallel/context.py).

    Who calls reorders tokens and positions before the embedding and the states after the last layer: one exchange
    of them in all, where each layer would have to exchange queries, keys, values and results.
    """
    if spec.mixed:  # the layers that see all decide
        mask = dataclasses.replace(mask, window=0)
    return ring.balances(mask, tokens.shape[1], spec.attention)


def ropes(spec: Spec, positions: jax.Array, dtype: jnp.dtype):
    """Rotary tables of the layers, and of those with a window where they differ; else None."""
    if spec.positions != "rotary":
        return None, None
    scaling = {"scaling": spec.rope_scaling, "factor": spec.rope_factor, "original": spec.rope_original_length,
               "bounds": spec.rope_bounds}  # fmt: skip
    local = spec.rope_local_theta
    return (
        rotary_table(positions, spec.rotary_dim, spec.rope_theta, dtype, **scaling),
        rotary_table(positions, spec.rotary_dim, local, dtype) if local else None,
    )


def run_layers(module: nn.Module, spec: Spec, x: jax.Array, cache: Any, context: Context, blocks: Any = None):
    """((x, cache), what each layer's router says) after all layers, whose parameters `module` declares.

    As one scan, or as a pipeline where the layout has stages; but one layer after the other with `blocks`,
    their variables laid out for decoding, or with an open cache, where each layer has its own arrays.
    With a cache a layout with stages scans too, and gathers each layer's weights from their stage.
    """
    if blocks is None and not caches.is_open(cache):
        plan = _pipelined(module, spec, x, cache)
        if plan is None:
            return stack(spec)((x, cache), jnp.arange(spec.num_layers), context)
        return _pipeline(module, spec, x, context, plan)
    if blocks is None:
        blocks = laid.blocks(module.variables, spec.num_layers, "layer" if spec.shared_layers else "layers")
    routed = []
    for number, variables in enumerate(blocks):
        block = Block(spec, moe.Moe if spec.num_experts else None, parent=None)
        (x, cache), said = block.apply(variables, (x, cache), number, context)
        routed.append(said)
    return (x, cache), jax.tree.map(lambda *each: jnp.stack(each), *routed)


def _pipelined(module: nn.Module, spec: Spec, x: jax.Array, cache: Any) -> pipeline.Schedule | None:
    """The schedule in which the stages of the active layout take turns; None: no stages, or no use for them."""
    if cache is not None or spec.shared_layers or module.is_initializing():
        return None
    return pipeline.planned(spec.num_layers, x.shape[0], spec.expert_group if spec.num_experts else 1)


def _pipeline(module: nn.Module, spec: Spec, x: jax.Array, context: Context, plan: pipeline.Schedule):
    """The stack by stages. What layers put into "updates" is the mean over microbatches, as in accumulation."""

    def layer(leaves: Any, x: jax.Array, context: Context) -> tuple[jax.Array, Any, Any]:
        block = Block(spec, moe.Moe if spec.num_experts else None, parent=None)
        variables, number = leaves
        ((x, _), routed), said = block.apply(variables, (x, None), number, context, mutable=["updates"])
        return x, routed, said.get("updates", {})

    if spec.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[spec.remat], prevent_cse=False)
    own = {name: tree["layers"] for name, tree in module.variables.items() if "layers" in tree}
    numbers = jnp.arange(spec.num_layers)
    x, routed, updates = pipeline.run(layer, (own, numbers), x, context, plan, spec.unroll)
    if updates:
        module.put_variable("updates", "layers", updates)
    return (x, None), routed


def stack(spec: Spec) -> nn.Module:
    """N layers as one scan: ((x, cache), numbers, context) -> ((x, cache), what each layer's router says)."""
    block, experts = Block, moe.Moe if spec.num_experts else None
    if spec.remat != "none":
        # Inside a scan the loop already keeps XLA from merging both computations.
        block = nn.remat(Block, policy=REMAT[spec.remat], prevent_cse=False)
    if spec.shared_layers:
        return nn.scan(
            block, length=spec.num_layers, variable_broadcast="params", split_rngs={"params": False},
            in_axes=(0, nn.broadcast), unroll=min(spec.unroll, spec.num_layers),
        )(spec, experts, name="layer")  # fmt: skip
    return nn.scan(
        block,
        length=spec.num_layers,
        variable_axes={"params": 0, "stats": 0, "updates": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        unroll=min(spec.unroll, spec.num_layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(spec, experts, name="layers")


def _check_inputs(spec: Spec, tokens, cache, segments, prefix, token_types) -> None:
    if not spec.causal and (cache is not None or prefix is not None):
        raise InputError("an encoder takes neither a cache nor a prefix: it sees every token at once")
    if cache is not None and segments is not None:
        raise InputError("a cache holds one document per row: segments cannot be given with it")
    if token_types is not None and not spec.token_types:
        raise InputError("token_types given, but the model has none; set token_types=2")
    longest = tokens.shape[1] if cache is None else caches.slots(cache)
    if spec.positions == "learned" and longest > spec.max_length:
        raise InputError(f"length {longest} exceeds max_length={spec.max_length} of learned positions")


def forward_flops(spec: Spec, length: int) -> float:
    """Forward matmul FLOPs per token at a length (see flops.py), heads included."""
    weights = flops.transformer_forward(
        layers=spec.num_layers, width=spec.embed_dim, heads=spec.num_heads, head_dim=spec.head_dim,
        mlp=moe.active_dim(spec), vocab=spec.vocab_size, length=0, kv_heads=spec.num_kv_heads,
        gated=ops.ACTIVATIONS[spec.activation][1], head_share=0.0,
    )  # fmt: skip
    if spec.token_dim != spec.embed_dim:
        weights += 2.0 * spec.token_dim * spec.embed_dim
    seen = min(length, spec.window if spec.causal else 2 * spec.window - 1)
    compared = sum(seen if local else length for local in spec.local)
    weights += 2.0 * spec.num_layers * spec.embed_dim * spec.num_experts
    return weights + 4.0 * compared * spec.num_heads * spec.head_dim + head_flops(spec, length)


def _model(spec: Spec) -> Model:
    def example(batch: int) -> dict[str, np.ndarray]:
        return {"tokens": np.zeros((batch, 1), np.int32)}

    def cache(batch: int, length: int, dtype: Any = None) -> dict[str, jax.Array]:
        shape = (spec.num_layers, batch, length, spec.num_kv_heads, spec.head_dim)
        empty = jnp.zeros(shape, spec.dtype if dtype is None else dtype)
        return {"k": empty, "v": empty, "length": jnp.zeros((batch,), jnp.int32)}

    return Model(
        module=Transformer(spec),
        example=example,
        flops=lambda length: forward_flops(spec, length),
        cache=cache if spec.causal else None,
        blocks="layer" if spec.shared_layers else "layers",
        windows=tuple(spec.window if local else 0 for local in spec.local),
        merge=moe.merging(spec),
        ratio=spec.ratio,
    )


@taking(Spec)
def decoder(**options: Any) -> Model:
    """Causal Transformer. Its options, their meanings and defaults are those of `Spec`.

    Inputs of apply: tokens [B, L]; optional segments [B, L], positions [B, L], token_types [B, L],
    prefix [B].
    """
    return _model(Spec(**options))


@taking(EncoderSpec)
def encoder(**options: Any) -> Model:
    """Bidirectional Transformer. Its options are those of `Spec`, with the defaults of `EncoderSpec`.

    Inputs of apply: tokens [B, L]; optional segments [B, L] (0 is padding; tokens see only their own
    segment), positions [B, L], token_types [B, L].
    """
    return _model(EncoderSpec(**options))
