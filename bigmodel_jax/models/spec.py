"""The options of a Transformer, checked once, and the named remat policies."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.attention import BACKENDS

POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "none")
PLACEMENTS = ("pre", "post", "sandwich")
RESIDUALS = ("sequential", "parallel")
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
}


@dataclass(frozen=True)
class Spec:
    """Options of `decoder` and `encoder`, checked; documented there."""

    causal: bool
    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int
    positions: str
    rope_theta: float
    rope_fraction: float
    norm: str
    norm_eps: float
    norm_bias: bool
    norm_placement: str
    embed_norm: bool
    activation: str
    bias: bool
    residual: str
    qk_norm: bool
    window: int
    attention_softcap: float
    final_softcap: float
    tied_embeddings: bool
    head_bias: bool
    embed_scale: float
    token_types: int
    mlm_head: bool
    dropout: float
    attention_dropout: float
    embed_dropout: float
    init: str
    init_std: float
    depth_scaled_init: bool
    attention: str
    unroll: int
    remat: str
    dtype: str
    param_dtype: str

    def __post_init__(self) -> None:
        for option, legal in (
            ("positions", POSITIONS), ("norm", tuple(ops.NORMS)), ("norm_placement", PLACEMENTS),
            ("activation", tuple(ops.ACTIVATIONS)), ("residual", RESIDUALS), ("init", ops.INITS),
            ("attention", ("auto", *BACKENDS)), ("remat", tuple(REMAT)),
            ("dtype", DTYPES), ("param_dtype", DTYPES),
        ):  # fmt: skip
            ops.one_of(option, getattr(self, option), legal)
        for option in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_length", "unroll"):
            if getattr(self, option) < 1:
                raise InputError(f"{option}={getattr(self, option)} must be at least 1")
        for option in ("dropout", "attention_dropout", "embed_dropout"):
            if not 0.0 <= getattr(self, option) < 1.0:
                raise InputError(f"{option}={getattr(self, option)} must be in [0, 1)")
        if self.num_heads % self.num_kv_heads:
            legal = [d for d in range(1, self.num_heads + 1) if self.num_heads % d == 0]
            raise InputError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; legal: {legal}"
            )
        if self.norm_placement == "post" and self.residual == "parallel":
            raise InputError("residual='parallel' has no post-norm form; norm_placement: pre or sandwich")
        if self.positions == "rotary" and self.rotary_dim < 2:
            raise InputError(f"rotary positions need head_dim * rope_fraction >= 2, not {self.rotary_dim}")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_fraction) // 2 * 2
