"""From logits to the next token: pure functions of one row each, so that neighbours never matter.

Shapes: B rows, V vocab.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bigmodel_jax.errors import InputError

NEVER = -1e30


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters apply in the order of the fields.

    repetition_penalty: logits of tokens that the row holds already are divided by it where positive and
      multiplied where negative (Keskar et al. 2019); 1 for none.
    temperature: the logits are divided by it; 0 is greedy.
    top_k: keep the k most likely tokens (Fan et al. 2018); 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020).
    min_p: keep tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024).

    The most likely token always stays; tokens as likely as the last one kept stay too.

    Raises:
      InputError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, right, legal in (
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
        ):
            if not right:
                raise InputError(f"{name} {getattr(self, name)} should be {legal}")


def penalise(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Logits [B, V] with the repetition penalty on tokens where `seen` [B, V]."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(
    logits: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> jax.Array:
    """Logits [B, V] after temperature, with every token that the filters drop at -1e30. See `Sampling`."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < threshold, NEVER, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        # The first token has nothing before it, whatever rounding makes of the sum.
        inside = (before < top_p).at[..., 0].set(True)
        threshold = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, NEVER, logits)
    if min_p > 0.0:
        logits = jnp.where(logits < jnp.max(logits, -1, keepdims=True) + math.log(min_p), NEVER, logits)
    return logits


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling, seen: jax.Array | None = None) -> jax.Array:
    """Next tokens [B] from logits [B, V], each row by its own key of `keys` [B].

    Args:
      seen: tokens that a row holds already, bool [B, V]; for the repetition penalty only.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = filter_logits(
        logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
    )
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
