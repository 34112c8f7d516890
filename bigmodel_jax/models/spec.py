"""The options of a Transformer: documented, defaulted and checked once; and the named remat policies.

`Spec` is the config reference of the decoder, `EncoderSpec` that of the encoder: `taking` gives the
functions that build them these fields as their signature.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.attention import BACKENDS
from bigmodel_jax.models.routing import Routing
from bigmodel_jax.mup import Ratio

POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "none")
PLACEMENTS = ("pre", "post", "sandwich")
RESIDUALS = ("sequential", "parallel")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
HEADS = ("lm", "classes", "tokens", "spans", "none")
POOLINGS = ("first", "mean", "last")
DTYPES = ("float32", "bfloat16", "float16", "float64")

_SAVE = jax.checkpoint_policies
# What the backward pass finds stored instead of recomputing, from most memory to least. "minimal" is
# the default: what it recomputes (norms, activations) costs less than storing and reading it back;
# on two CPU cores a step takes a quarter less CPU time than with "none".
REMAT = {
    "none": None,  # no rematerialisation: every intermediate that a derivative needs
    "dots": _SAVE.dots_saveable,  # results of all matmuls, attention scores included
    "minimal": _SAVE.save_from_both_policies(  # results of weight matmuls, and attention's
        _SAVE.dots_with_no_batch_dims_saveable,
        _SAVE.save_only_these_names("attention", "attention_lse"),
    ),
    "attention": _SAVE.save_only_these_names("attention", "attention_lse"),  # attention's alone
    "full": _SAVE.nothing_saveable,  # each layer's input alone
    "offload": _SAVE.save_and_offload_only_these_names(  # that too, in the host's memory until it is needed
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input"],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spec(Routing):
    """Options of `decoder`; the defaults are GPT-2 small (Radford et al. 2019).

    num_kv_heads: 0 means num_heads; 1 is multi-query, between is grouped-query attention.
    head_dim: 0 means embed_dim / num_heads.
    mlp_dim: 0 means 4 * embed_dim.
    max_length: length of the learned position table; other positions have no limit.
    positions: learned, sinusoidal, rotary, alibi or none.
    position_offset: rows of the learned table before that of position 0.
    rope_fraction: share of each head's features that is rotated.
    rope_scaling, rope_factor, rope_original_length, rope_bounds: see `positions.rope_frequencies`.
    rope_local_theta: theta of the windowed layers of a layer_pattern, unscaled; 0 means as the others.
    norm_offset: added to the scale of every norm, whose parameter then starts at 1 - norm_offset.
    norm_placement: pre; post (as in 2017: no final norm); sandwich (before and after).
    bias: of all projections; qkv_bias: of queries, keys and values, None means as bias.
    activation: gelu (tanh), gelu_exact, relu, swish; gated by a second matrix: swiglu, geglu, reglu, glu, bilinear.
    residual: sequential, or parallel (attention and feed-forward read the same input).
    window: a query sees itself and window - 1 tokens before it (in an encoder, and behind it); 0 sees all.
    layer_pattern: one letter per layer, repeated as needed: "l" has the window, "g" sees all (Gemma 2:
      "lg"); "" means every layer has the window.
    shared_layers: all layers have one set of parameters, "layer/..." (ALBERT, Lan et al. 2020).
    attention_scale: factor of the scores; 0 means 1 / sqrt(head_dim).
    attention_softcap, final_softcap: cap * tanh(x / cap) of scores and logits; 0 for none.
    embed_scale: factor of the token embeddings, e.g. sqrt(embed_dim).
    token_dim: width of the token table; 0 means embed_dim. An encoder projects the sum of all embeddings
      to embed_dim (ALBERT), a decoder that of the tokens, and back before tied logits (OPT 350M).
    token_types: rows of the token type table; 0 for none.
    head: what the model puts out for each hidden state.
      lm: logits over the vocabulary (an encoder first has a dense layer, activation and norm);
      classes: num_classes logits of the pooled text; Output.hidden is then pooled, [B, D];
      tokens: num_classes logits of each token; spans: start and end logits of each token;
      none: the hidden states themselves.
    num_classes: 0 takes it from the data.
    pooling: first, mean or last (of the tokens whose segment is not 0), where a text is pooled.
    pooler: dense layer and tanh on the pooled state, as in BERT; with another head than classes its
      result is Output.extra["pooled"].
    nsp: next-sentence logits [B, 2] as Output.extra["nsp"]; needs the pooler.
    tied_embeddings, head_bias: the first is of the vocabulary's output matrix, the second of any head.
    head_dropout: of what the heads classes and tokens read.
    init: normal, truncated or fan_in; init_std is the deviation of the first two.
    depth_scaled_init: output projections start smaller by sqrt(2 num_layers).
    mup_width, mup_depth, mup_head_dim: embed_dim, num_layers and head_dim of the base model whose hyper-parameters
      this one takes over (see mup.py); 0: the standard parametrisation in width or depth, and head_dim itself.
      Everything else that grows with the width does so in proportion; a model of the base's sizes is the standard one.
    attention: backend, see models/attention.py.
    unroll: layers per step of the scan over layers; the parameters stay the same.
    remat: what the backward pass keeps: none, dots, minimal, attention, full or offload (see REMAT).
    dtype, param_dtype: of computation and of parameters.
    num_experts and what follows it: see `routing.Routing`.

    Raises:
      InputError: options that do not fit together.
    """

    causal: ClassVar[bool] = True
    cross: ClassVar[bool] = False  # whether each layer also attends to a memory

    vocab_size: int
    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int = 0
    head_dim: int = 0
    mlp_dim: int = 0
    max_length: int = 1024
    positions: str = "learned"
    position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_length: int = 0
    rope_bounds: tuple = ()
    rope_local_theta: float = 0.0
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_offset: float = 0.0
    norm_placement: str = "pre"
    embed_norm: bool = False
    activation: str = "gelu"
    bias: bool = True
    qkv_bias: bool | None = None
    residual: str = "sequential"
    qk_norm: bool = False
    window: int = 0
    layer_pattern: str = ""
    shared_layers: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    embed_scale: float = 1.0
    token_dim: int = 0
    token_types: int = 0
    head: str = "lm"
    num_classes: int = 0
    pooling: str = "last"
    pooler: bool = False
    nsp: bool = False
    tied_embeddings: bool = True
    head_bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embed_dropout: float = 0.0
    head_dropout: float = 0.0
    init: str = "normal"
    init_std: float = 0.02
    depth_scaled_init: bool = True
    mup_width: int = 0
    mup_depth: int = 0
    mup_head_dim: int = 0
    attention: str = "auto"
    unroll: int = 1
    remat: str = "minimal"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        self._fill("num_kv_heads", self.num_heads)
        self._fill("mlp_dim", 4 * self.embed_dim)
        self._fill("token_dim", self.embed_dim)
        if not self.head_dim and (self.num_heads < 1 or self.embed_dim % self.num_heads):
            raise InputError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; set head_dim")
        self._fill("head_dim", self.embed_dim // max(self.num_heads, 1))
        for option, legal in (
            ("positions", POSITIONS), ("norm", tuple(ops.NORMS)), ("norm_placement", PLACEMENTS),
            ("activation", tuple(ops.ACTIVATIONS)), ("residual", RESIDUALS), ("init", ops.INITS),
            ("attention", ("auto", *BACKENDS)), ("remat", tuple(REMAT)), ("head", HEADS),
            ("pooling", POOLINGS), ("rope_scaling", ROPE_SCALINGS), ("dtype", DTYPES), ("param_dtype", DTYPES),
        ):  # fmt: skip
            ops.one_of(option, getattr(self, option), legal)
        for option in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_length", "unroll"):
            if getattr(self, option) < 1:
                raise InputError(f"{option}={getattr(self, option)} must be at least 1")
        for option in ("dropout", "attention_dropout", "embed_dropout", "head_dropout"):
            if not 0.0 <= getattr(self, option) < 1.0:
                raise InputError(f"{option}={getattr(self, option)} must be in [0, 1)")
        self._check_attention()
        self.check_routing()
        self._check_head()
        self._check_mup()

    def _fill(self, option: str, size: int) -> None:
        """A size left at 0 follows from others."""
        object.__setattr__(self, option, getattr(self, option) or size)

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            legal = [d for d in range(1, self.num_heads + 1) if self.num_heads % d == 0]
            raise InputError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; legal: {legal}"
            )
        if self.norm_placement == "post" and self.residual == "parallel":
            raise InputError("residual='parallel' has no post-norm form; norm_placement: pre or sandwich")
        if self.positions == "rotary" and self.rotary_dim < 2:
            raise InputError(f"rotary positions need head_dim * rope_fraction >= 2, not {self.rotary_dim}")
        if self.rope_scaling in ("llama3", "yarn") and self.rope_original_length < 1:
            raise InputError(f"rope_scaling='{self.rope_scaling}' needs rope_original_length")
        if min(self.rope_theta, self.rope_local_theta or 2.0) <= 1.0:
            raise InputError(f"rope_theta={self.rope_theta} and rope_local_theta={self.rope_local_theta} are above 1")
        if self.rope_factor < 1.0 or len(self.rope_bounds) not in (0, 2):
            raise InputError("rope_factor is at least 1 and rope_bounds () or (low, high)")
        if set(self.layer_pattern) - {"l", "g"} or len(self.layer_pattern) > self.num_layers:
            raise InputError(f"layer_pattern='{self.layer_pattern}' is up to {self.num_layers} letters l or g")
        if "l" in self.layer_pattern and self.window < 1:
            raise InputError("layer_pattern has windowed layers: set window")

    def _check_head(self) -> None:
        if self.head in ("classes", "tokens") and self.num_classes < 1:
            raise InputError(f"head='{self.head}' needs num_classes, at least 1")
        if self.nsp and not (self.pooler and self.head == "lm"):
            raise InputError("nsp=True needs pooler=True and head='lm'")

    def _check_mup(self) -> None:
        for option in ("mup_width", "mup_depth", "mup_head_dim"):
            if getattr(self, option) < 0:
                raise InputError(f"{option}={getattr(self, option)} is a size, or 0")
        if self.mup_width and self.token_dim != self.embed_dim:
            raise InputError("mup_width needs a token table as wide as embed_dim: token_dim=0")
        if self.mup_depth and self.norm_placement == "post":
            raise InputError("mup_depth scales residual branches, which a post-norm undoes: norm_placement='pre'")

    @property
    def ratio(self) -> Ratio:
        """Width and depth over those of the base model."""
        width, depth = self.mup_width or self.embed_dim, self.mup_depth or self.num_layers
        return Ratio(self.embed_dim / width, self.num_layers / depth)

    @property
    def score_scale(self) -> float:
        """Factor of attention's scores: falls as 1 / head_dim from the base's on."""
        base = self.mup_head_dim or self.head_dim
        return (self.attention_scale or base**-0.5) * base / self.head_dim

    @property
    def local(self) -> tuple[bool, ...]:
        """Whether each layer has the window."""
        letters = self.layer_pattern or ("l" if self.window else "g")
        return tuple(letters[n % len(letters)] == "l" for n in range(self.num_layers))

    @property
    def mixed(self) -> bool:
        """Whether some layers have the window and others see all."""
        return len(set(self.local)) == 2

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_fraction) // 2 * 2

    @property
    def mlm_transform(self) -> bool:
        """Whether a dense layer, activation and norm come before the vocabulary (BERT, section A)."""
        return self.head == "lm" and not self.causal


@dataclass(frozen=True, kw_only=True)
class EncoderSpec(Spec):
    """Options of `encoder`, those of Spec; the defaults are BERT base (Devlin et al. 2019)."""

    causal: ClassVar[bool] = False

    max_length: int = 512
    norm_eps: float = 1e-12
    norm_placement: str = "post"
    embed_norm: bool = True
    activation: str = "gelu_exact"
    token_types: int = 2
    pooling: str = "first"
    head_bias: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1
    embed_dropout: float = 0.1
    head_dropout: float = 0.1
    init: str = "truncated"
    depth_scaled_init: bool = False


def taking(spec: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function shows the fields of `spec` as its keywords, types and defaults."""

    def dress(fn: Callable[..., Any]) -> Callable[..., Any]:
        fn.__signature__ = inspect.signature(spec)
        fn.__annotations__ = typing.get_type_hints(spec.__init__)
        return fn

    return dress
