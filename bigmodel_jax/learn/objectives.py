"""What is minimised: sums over examples, and the weights that turn sums into means.

An objective never divides. The train step divides each term's sum by the term's weight of the
*whole* step's batch, so that masks, accumulation and any number of devices give one and the same
number; a mean of microbatch means would not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel_jax.learn import losses

Batch = Mapping[str, jax.Array]
Terms = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """loss = sum over terms of coefficients[t] * sums[t] / weights[t].

    weights: batch -> {term: scalar}; any number of leading batch dimensions.
    sums: (apply, variables, microbatch, rngs, train) -> ({term: sum}, {metric: (sum, weight)},
      updates of the model's statistics).
    additive: the sums are sums over examples; False -> the step refuses accumulation.
    """

    weights: Callable[[Batch], Terms]
    sums: Callable[..., tuple[Terms, Metrics, Any]]
    coefficients: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"loss": 1.0})
    additive: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Terms, Metrics, Any]:
        return self.sums(*args, **kwargs)


def _inputs(batch: Batch, *names: str) -> dict[str, jax.Array]:
    return {name: batch[name] for name in names if name in batch}


def _wide_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def causal_lm(
    chunk: int = 0, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> Objective:
    """Next-token prediction. Batch: tokens, targets, weights [B, L]; optional segments, positions
    [B, L], prefix [B], bytes [B, L] (UTF-8 bytes of each target; adds bits_per_byte).

    Args: as in `losses.cross_entropy`.
    """

    def weights(batch: Batch) -> Terms:
        return {"loss": _wide_sum(batch["weights"])}

    def sums(
        apply: Callable, variables: Any, batch: Batch, rngs: Any = None, train: bool = True
    ) -> tuple[Terms, Metrics, Any]:
        inputs = _inputs(batch, "tokens", "segments", "positions", "prefix")
        out = apply(variables, train=train, rngs=rngs, **inputs)
        w = batch["weights"]
        loss, aux = losses.cross_entropy(
            out.hidden, out.head, batch["targets"], w,
            chunk=chunk, z_loss=z_loss, label_smoothing=label_smoothing,
        )  # fmt: skip
        metrics = _token_metrics(aux, _wide_sum(w))
        if "bytes" in batch:
            metrics["bits_per_byte"] = (aux["nll"] / math.log(2), _wide_sum(w * batch["bytes"]))
        return {"loss": loss}, metrics, out.updates

    return Objective(weights, sums)


def _token_metrics(aux: losses.Sums, weight: jax.Array) -> Metrics:
    return {"nll": (aux["nll"], weight), "accuracy": (aux["accuracy"], weight)}


def masked_lm(chunk: int = 0, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """Masked-token prediction (BERT, Devlin et al. 2019). Batch: tokens [B, L], masked_positions,
    masked_targets, masked_weights [B, P]; optional segments, positions, token_types [B, L].

    Hidden states are gathered at the P masked positions before the head, so that the vocabulary
    matmul runs over 15% of the tokens.
    """

    def weights(batch: Batch) -> Terms:
        return {"loss": _wide_sum(batch["masked_weights"])}

    def sums(
        apply: Callable, variables: Any, batch: Batch, rngs: Any = None, train: bool = True
    ) -> tuple[Terms, Metrics, Any]:
        inputs = _inputs(batch, "tokens", "segments", "positions", "token_types")
        out = apply(variables, train=train, rngs=rngs, **inputs)
        hidden = jnp.take_along_axis(out.hidden, batch["masked_positions"][..., None], axis=1)
        w = batch["masked_weights"]
        loss, aux = losses.cross_entropy(
            hidden, out.head, batch["masked_targets"], w,
            chunk=chunk, z_loss=z_loss, label_smoothing=label_smoothing,
        )  # fmt: skip
        return {"loss": loss}, _token_metrics(aux, _wide_sum(w)), out.updates

    return Objective(weights, sums)


def classification(label_smoothing: float = 0.0) -> Objective:
    """Image classification. Batch: image [B, H, W, C], label [B], weights [B]; after mixup
    (Zhang et al. 2018) also label2 [B] and mix [B], the share of `label`.

    Metrics: nll (without smoothing), accuracy, and top5 where there are more than 5 classes;
    under mixup they count each label by its share.
    """

    def weights(batch: Batch) -> Terms:
        return {"loss": _wide_sum(batch["weights"])}

    def sums(
        apply: Callable, variables: Any, batch: Batch, rngs: Any = None, train: bool = True
    ) -> tuple[Terms, Metrics, Any]:
        out = apply(variables, train=train, rngs=rngs, **_inputs(batch, "image"))
        logits = out.head(out.hidden)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        w = batch["weights"].astype(logits.dtype)
        shares = [(batch["label"], w)]
        if "label2" in batch:
            mix = batch["mix"].astype(logits.dtype)
            shares = [(batch["label"], w * mix), (batch["label2"], w * (1 - mix))]
        log_p = jax.nn.log_softmax(logits)
        nll = sum(jnp.sum(-w * _pick(log_p, label)) for label, w in shares)
        flat = jnp.sum(-w * jnp.mean(log_p, axis=-1))
        loss = (1 - label_smoothing) * nll + label_smoothing * flat
        metrics = {"nll": nll} | _ranks(logits, shares)
        total = jnp.sum(w)
        return {"loss": loss}, {k: (v, total) for k, v in metrics.items()}, out.updates

    return Objective(weights, sums)


def _pick(x: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, label[..., None], axis=-1, mode="clip")[..., 0]


def _ranks(logits: jax.Array, shares: list[tuple[jax.Array, jax.Array]]) -> Terms:
    """accuracy and top5 sums; among equal logits the lower class ranks first."""
    classes = jnp.arange(logits.shape[-1])
    counts = {"accuracy": 1} | ({"top5": 5} if logits.shape[-1] > 5 else {})
    out = {name: jnp.zeros((), logits.dtype) for name in counts}
    for label, w in shares:
        own = _pick(logits, label)[..., None]
        ahead = (logits > own) | ((logits == own) & (classes < label[..., None]))
        rank = jnp.sum(ahead, axis=-1)
        for name, k in counts.items():
            out[name] += jnp.sum(w * (rank < k))
    return out


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "classification": classification,
}
