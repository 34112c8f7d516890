"""Encoder-decoder Transformers: Vaswani et al. 2017, BART (Lewis et al. 2020), T5 (Raffel et al. 2020).

Shapes: B batch, S source length, L target length, M keys, D model, H heads, G groups, K head dim, V
vocab, N layers. Both sides are stacked from the block of the other Transformers; the decoder's also
attends to the memory [B, S, D], the encoder's last states. Parameters are "encoder/...",
"decoder/...", and "embed/tokens" where both sides share the table.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import flops
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import cache as caches
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.block import Context, norm, weight
from bigmodel_jax.models.heads import Head
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.model import Model, Output, encoding
from bigmodel_jax.models.positions import relative_buckets
from bigmodel_jax.models.spec import Spec, taking
from bigmodel_jax.models.transformer import Embed, ropes, run_layers, stores_zigzag
from bigmodel_jax.parallel.context import natural, reordered
from bigmodel_jax.parallel.rules import constrain


@dataclass(frozen=True, kw_only=True)
class PairSpec(Spec):
    """Options of `encoder_decoder`, those of Spec; the defaults are the base model of Vaswani et al. 2017.

    num_layers, mlp_dim: of the encoder. decoder_layers, decoder_mlp_dim: 0 means the same.
    vocab_size: of the target. source_vocab_size: 0 means that source and target share vocabulary and table.
    embed_scale: 0 means sqrt(embed_dim).
    relative_buckets: T5's position biases, one table per side for all its layers (Raffel et al. 2020,
      section 2.1), with positions="none"; 0 for none. relative_distance: from where on all are one bucket.
    head_scale: factor of the last hidden states; T5 v1.0 has embed_dim ** -0.5.
    """

    vocab_size: int
    source_vocab_size: int = 0
    num_layers: int = 6
    decoder_layers: int = 0
    decoder_mlp_dim: int = 0
    embed_dim: int = 512
    num_heads: int = 8
    max_length: int = 512
    positions: str = "sinusoidal"
    relative_buckets: int = 0
    relative_distance: int = 128
    norm_placement: str = "post"
    activation: str = "relu"
    embed_scale: float = 0.0
    head_scale: float = 1.0
    dropout: float = 0.1
    embed_dropout: float = 0.1
    init: str = "fan_in"
    depth_scaled_init: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fill("decoder_layers", self.num_layers)
        self._fill("decoder_mlp_dim", self.mlp_dim)
        self._fill("embed_scale", (self.mup_width or self.embed_dim) ** 0.5)
        if self.head not in ("lm", "none"):
            raise InputError(f"head='{self.head}': an encoder-decoder has the heads lm and none")
        if self.num_experts or self.shared_layers or self.layer_pattern:
            raise InputError("num_experts, shared_layers and layer_pattern are options of decoder and encoder alone")
        if self.token_dim != self.embed_dim:
            raise InputError(f"token_dim={self.token_dim}: an encoder-decoder's table is as wide as embed_dim")
        if self.residual == "parallel":
            raise InputError("residual='parallel' has no form with cross-attention; residual: sequential")
        if self.relative_buckets and (self.positions != "none" or self.relative_buckets < 4):
            raise InputError("relative_buckets needs positions='none' and at least 4 buckets")


class EncoderSide(PairSpec):
    """The encoder's options."""

    causal: ClassVar[bool] = False


class DecoderSide(PairSpec):
    """The decoder's options."""

    cross: ClassVar[bool] = True


class Table(nn.Module):
    """The table of tokens [V, D] that both sides share."""

    spec: Spec

    @nn.compact
    def __call__(self) -> jax.Array:
        dim = self.spec.embed_dim
        return weight(self, "tokens", (self.spec.vocab_size, dim), ("vocab", "embed"), dim, self.spec)


class Relative(nn.Module):
    """T5's biases of scores, [B or 1, H, L, M]: a number per head and bucket of distances."""

    spec: PairSpec

    @nn.compact
    def __call__(self, mask: Mask, length: int, memory: int) -> jax.Array:
        spec = self.spec
        shape = (spec.relative_buckets, spec.num_heads)
        table = weight(self, "table", shape, (None, "heads"), spec.num_heads, spec)
        gap = mask.distance(0, length, 0, memory)
        bucket = relative_buckets(gap, not spec.causal, spec.relative_buckets, spec.relative_distance)
        return jnp.transpose(ops.lookup(table, bucket), (0, 3, 1, 2))


class Side(nn.Module):
    """Encoder or decoder: embedding, scanned layers, final norm. Returns (states, table, cache)."""

    spec: PairSpec

    @nn.compact
    def __call__(
        self, tokens, table, segments, positions, keys, cache=None, memory=None, memory_mask=Mask(), blocks=None
    ):  # fmt: skip
        spec = self.spec
        length = caches.held(cache, tokens)
        plain = positions is None and length is None
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None] + (0 if length is None else length[:, None])
        window = spec.window if any(spec.local) else 0
        mask = Mask(causal=spec.causal, window=window, segments_q=segments, offset=length)
        if cache is None and not spec.relative_buckets and stores_zigzag(spec, mask, tokens):
            plain, mask = False, dataclasses.replace(mask, zigzag=True, segments_q=reordered(segments))
            memory_mask = dataclasses.replace(memory_mask, segments_q=reordered(memory_mask.segments_q))
            tokens, positions = reordered(tokens), reordered(positions)
        x, table = Embed(spec, name="embed")(tokens, positions, plain, None, table)
        x = ops.dropout(x, ops.fold(keys, spec.num_layers), spec.embed_dropout, mask.zigzag)
        x = constrain(x, ("rows", "length", "embed_act"))
        bias = None
        rope, local_rope = ropes(spec, positions, ops.wide(x.dtype))
        if spec.relative_buckets:
            keys_seen = tokens.shape[1] if cache is None else caches.slots(cache)
            bias = Relative(spec, name="relative")(mask, tokens.shape[1], keys_seen)
        context = Context(mask, rope, keys, length, bias, memory, memory_mask, local_rope)
        (x, held), _ = run_layers(self, spec, x, cache, context, blocks)
        if spec.norm_placement != "post":
            x = norm(spec, "norm_final", x)
        return natural(x, "rows") if mask.zigzag else x, table, held


class EncoderDecoder(nn.Module):
    """Source to memory, memory and target so far to the states from which the next token is read."""

    spec: PairSpec

    def setup(self) -> None:
        spec = self.spec
        options = dataclasses.asdict(spec)
        source = spec.source_vocab_size or spec.vocab_size
        self.encoder = Side(EncoderSide(**options | {"vocab_size": source, "head": "none"}))
        decoder = DecoderSide(**options | {"num_layers": spec.decoder_layers, "mlp_dim": spec.decoder_mlp_dim})
        self.decoder = Side(decoder)
        self.head = Head(decoder)
        if not spec.source_vocab_size:
            self.embed = Table(spec)

    def encode(
        self,
        source: jax.Array,
        *,
        train: bool,
        dropout_keys: jax.Array | None = None,
        source_segments: jax.Array | None = None,
        source_positions: jax.Array | None = None,
    ) -> jax.Array:
        _check_length(self.spec, source.shape[1])
        table = None if self.spec.source_vocab_size else self.embed()
        keys = ops.fold(dropout_keys if train else None, 0)
        return self.encoder(source, table, source_segments, source_positions, keys)[0]

    def __call__(
        self,
        tokens: jax.Array,
        *,
        train: bool,
        dropout_keys: jax.Array | None = None,
        source: jax.Array | None = None,
        source_segments: jax.Array | None = None,
        source_positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_segments: jax.Array | None = None,
        cache: dict[str, jax.Array] | None = None,
        blocks: Any = None,
    ) -> Output:
        spec = self.spec
        if source is not None:
            if memory is not None:
                raise InputError("give either source or memory, the encoder's states of it")
            memory = self.encode(
                source, train=train, dropout_keys=dropout_keys, source_segments=source_segments,
                source_positions=source_positions,
            )  # fmt: skip
            memory_segments = source_segments
        _check_length(spec, tokens.shape[1] if cache is None else caches.slots(cache))
        cache = _with_memory(spec, cache, memory, memory_segments)
        if cache is not None:
            memory_segments = cache["memory_segments"]
        table = None if spec.source_vocab_size else self.embed()
        keys = ops.fold(dropout_keys if train else None, 1)
        seen = _memory_mask(tokens, segments, memory_segments)
        x, table, held = self.decoder(tokens, table, segments, positions, keys, cache, memory, seen, blocks)
        if held is not None:
            held = cache | held | {"length": cache["length"] + tokens.shape[1]}
        if spec.head_scale != 1.0:
            x = x * jnp.asarray(spec.head_scale, x.dtype)
        return Output(x, self.head(table), held)


def _memory_mask(tokens: jax.Array, segments: jax.Array | None, memory_segments: jax.Array | None) -> Mask:
    """Targets see the source of their own segment; without segments of theirs, all that is not padding."""
    if memory_segments is None:
        return Mask()
    if segments is None:
        return Mask(segments_q=jnp.ones(tokens.shape, jnp.int32), segments_kv=(memory_segments > 0).astype(jnp.int32))
    return Mask(segments_q=segments, segments_kv=memory_segments)


def _with_memory(spec: PairSpec, cache: Any, memory: jax.Array | None, memory_segments: jax.Array | None) -> Any:
    """The cache with room for what cross-attention reads, made when the memory is given."""
    if memory is None and (cache is None or "cross_k" not in cache):
        raise InputError("a decoder needs source, memory, or a cache that was given the memory before")
    if cache is None or memory is None:
        return cache
    if memory_segments is None:
        memory_segments = jnp.ones(memory.shape[:2], jnp.int32)
    shape = (spec.decoder_layers, *memory.shape[:2], spec.num_kv_heads, spec.head_dim)
    empty = jnp.zeros(shape, cache["k"].dtype)
    return {**cache, "cross_k": empty, "cross_v": empty, "memory_segments": memory_segments}


def _check_length(spec: PairSpec, length: int) -> None:
    if spec.positions == "learned" and length > spec.max_length:
        raise InputError(f"length {length} exceeds max_length={spec.max_length} of learned positions")


def forward_flops(spec: PairSpec, source: int, target: int) -> float:
    """Forward matmul FLOPs of one example (see flops.py): encoder, decoder, cross-attention and head."""
    side = functools.partial(
        flops.transformer_forward, width=spec.embed_dim, heads=spec.num_heads, head_dim=spec.head_dim,
        kv_heads=spec.num_kv_heads, gated=ops.ACTIVATIONS[spec.activation][1],
        vocab=spec.vocab_size,
    )  # fmt: skip
    encoder = source * side(layers=spec.num_layers, mlp=spec.mlp_dim, length=source, head_share=0.0)
    share, mlp = float(spec.head == "lm"), spec.decoder_mlp_dim
    decoder = target * side(layers=spec.decoder_layers, mlp=mlp, length=target, head_share=share)
    width, kv = spec.embed_dim * spec.head_dim, 2 * spec.num_kv_heads
    products = target * 2 * spec.num_heads * width + source * kv * width
    scores = 2 * target * source * spec.num_heads * spec.head_dim
    return encoder + decoder + 2.0 * spec.decoder_layers * (products + scores)


@taking(PairSpec)
def encoder_decoder(**options: Any) -> Model:
    """Encoder-decoder Transformer. Its options are those of `PairSpec`.

    Inputs of apply: tokens [B, L], the target so far; source [B, S] with optional source_segments (0 is
    padding) and source_positions [B, S]; optional segments, positions [B, L] of the target.
    Instead of source: memory = encode(variables, train=, rngs=, source=, source_segments=) [B, S, D]
    and memory_segments [B, S]. With a cache, memory is given in the first call only: its keys and
    values are computed there and kept in the cache, beside memory_segments.

    flops(source, target): of one example with so many tokens.
    """
    spec = PairSpec(**options)
    module = EncoderDecoder(spec)

    def example(batch: int) -> dict[str, np.ndarray]:
        return {name: np.zeros((batch, 1), np.int32) for name in ("source", "tokens")}

    def cache(batch: int, length: int, dtype: Any = None) -> dict[str, jax.Array]:
        shape = (spec.decoder_layers, batch, length, spec.num_kv_heads, spec.head_dim)
        empty = jnp.zeros(shape, spec.dtype if dtype is None else dtype)
        return {"k": empty, "v": empty, "length": jnp.zeros((batch,), jnp.int32)}

    return Model(
        module=module, example=example, cache=cache, encode=encoding(module),
        blocks="decoder/layer" if spec.shared_layers else "decoder/layers", windows=(0,) * spec.decoder_layers,
        flops=lambda source, target: forward_flops(spec, source, target), ratio=spec.ratio,
    )  # fmt: skip
