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

from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import losses
from bigmodel_jax.learn.experts import RouterLosses

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
    records: (apply, variables, batch) -> {name: [B, ...]}: one row per example, for measures that are
      not sums (evaluate.py gathers them by example id). Always "loss" [B], the example's nats without
      smoothing, summed; "weight" [B] where it covers several targets (tokens), else it counts as 1.
      Targets too many to keep their logits add "correct" [B] (sum) and "bytes" [B] where known;
      classification adds "logits" [B, C] and "label" [B]; labelled tokens "logits" [B, L, C],
      "labels" and "weights" [B, L]; spans "start_logits", "end_logits" [B, L], "start", "end" [B].
    """

    weights: Callable[[Batch], Terms]
    sums: Callable[..., tuple[Terms, Metrics, Any]]
    coefficients: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"loss": 1.0})
    additive: bool = True
    records: Callable[..., dict[str, jax.Array]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Terms, Metrics, Any]:
        return self.sums(*args, **kwargs)


def _inputs(batch: Batch, *names: str) -> dict[str, jax.Array]:
    return {name: batch[name] for name in names if name in batch}


def _wide_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def causal_lm(
    chunk: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    balance_loss: float = 0.0,
    router_z_loss: float = 0.0,
) -> Objective:
    """Next-token prediction. Batch: tokens, targets, weights [B, L]; optional segments, positions
    [B, L], prefix [B], bytes [B, L] (UTF-8 bytes of each target; adds bits_per_byte).

    Args: as in `losses.cross_entropy`; balance_loss, router_z_loss: coefficients, see learn/experts.py. A
      model with experts adds the metrics balance, router_z and dropped, the share of choices without room.
    """
    router = RouterLosses(balance_loss, router_z_loss)

    def weights(batch: Batch) -> Terms:
        return {"loss": _wide_sum(batch["weights"])} | router.weights(batch, batch["weights"])

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
        routed, more = router.sums(out.extra, w)
        return {"loss": loss} | routed, metrics | more, out.updates

    def records(apply: Callable, variables: Any, batch: Batch) -> dict[str, jax.Array]:
        inputs = _inputs(batch, "tokens", "segments", "positions", "prefix")
        out = apply(variables, train=False, **inputs)
        return token_records(out.hidden, out.head, batch["targets"], batch["weights"], batch.get("bytes"), chunk)

    return Objective(weights, sums, {"loss": 1.0} | router.coefficients, records=records)


def token_records(
    hidden: jax.Array,
    head: losses.Head,
    targets: jax.Array,
    weights: jax.Array,
    sizes: jax.Array | None = None,
    chunk: int = 0,
) -> dict[str, jax.Array]:
    """`Objective.records` of rows of tokens: loss, weight, correct, and bytes (from `sizes`), each [B].

    hidden [B, L, D]; targets, weights, sizes [B, L]; chunk: positions whose logits are held at once.
    """
    nats, correct = losses.token_losses(hidden, head, targets, chunk=chunk)
    w = weights.astype(nats.dtype)
    out = {"loss": jnp.where(w > 0, nats, 0) * w, "weight": w, "correct": w * correct}
    if sizes is not None:
        out["bytes"] = w * sizes
    return {name: jnp.sum(x, axis=-1) for name, x in out.items()}


def _token_metrics(aux: losses.Sums, weight: jax.Array) -> Metrics:
    return {"nll": (aux["nll"], weight), "accuracy": (aux["accuracy"], weight)}


def masked_lm(
    chunk: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    balance_loss: float = 0.0,
    router_z_loss: float = 0.0,
) -> Objective:
    """Masked-token prediction (BERT, Devlin et al. 2019). Batch: tokens [B, L], masked_positions,
    masked_targets, masked_weights [B, P]; optional segments, positions, token_types [B, L].

    Hidden states are gathered at the P masked positions before the head, so that the vocabulary
    matmul runs over 15% of the tokens. Args: as in `causal_lm`.

    A model that answers whether one span follows another (Output.extra["nsp"]) has that as a second term, with
    random [B] (1 where not) and pair_weights [B]; metrics nsp and nsp_accuracy.
    """
    router = RouterLosses(balance_loss, router_z_loss)

    def weights(batch: Batch) -> Terms:
        terms = {"loss": _wide_sum(batch["masked_weights"])} | router.weights(batch, batch["masked_weights"])
        return terms | ({"nsp": _wide_sum(batch["pair_weights"])} if "random" in batch else {})

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
        routed, more = router.sums(out.extra, w)
        terms, metrics = {"loss": loss} | routed, _token_metrics(aux, _wide_sum(w)) | more
        if "random" in batch and "nsp" in out.extra:
            follows, asked = out.extra["nsp"], batch["pair_weights"]
            nats = -jnp.take_along_axis(jax.nn.log_softmax(follows), batch["random"][:, None], axis=1)[:, 0]
            right = jnp.argmax(follows, axis=1) == batch["random"]
            terms["nsp"] = jnp.sum(nats * asked)
            metrics["nsp_accuracy"] = (jnp.sum(right * asked), _wide_sum(asked))
        return terms, metrics, out.updates

    def records(apply: Callable, variables: Any, batch: Batch) -> dict[str, jax.Array]:
        inputs = _inputs(batch, "tokens", "segments", "positions", "token_types")
        out = apply(variables, train=False, **inputs)
        hidden = jnp.take_along_axis(out.hidden, batch["masked_positions"][..., None], axis=1)
        return token_records(hidden, out.head, batch["masked_targets"], batch["masked_weights"], chunk=chunk)

    return Objective(weights, sums, {"loss": 1.0, "nsp": 1.0} | router.coefficients, records=records)


def seq2seq(chunk: int = 0, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """Next target token, given the source (Sutskever et al. 2014). Batch: source [B, S], tokens, targets,
    weights [B, L]; optional source_segments, source_positions [B, S], segments, positions [B, L].

    Args: as in `losses.cross_entropy`.
    """
    names = ("source", "source_segments", "source_positions", "tokens", "segments", "positions")

    def sums(
        apply: Callable, variables: Any, batch: Batch, rngs: Any = None, train: bool = True
    ) -> tuple[Terms, Metrics, Any]:
        out = apply(variables, train=train, rngs=rngs, **_inputs(batch, *names))
        w = batch["weights"]
        loss, aux = losses.cross_entropy(
            out.hidden, out.head, batch["targets"], w,
            chunk=chunk, z_loss=z_loss, label_smoothing=label_smoothing,
        )  # fmt: skip
        return {"loss": loss}, _token_metrics(aux, _wide_sum(w)), out.updates

    def records(apply: Callable, variables: Any, batch: Batch) -> dict[str, jax.Array]:
        out = apply(variables, train=False, **_inputs(batch, *names))
        return token_records(out.hidden, out.head, batch["targets"], batch["weights"], chunk=chunk)

    return Objective(lambda batch: {"loss": _wide_sum(batch["weights"])}, sums, records=records)


def classification(label_smoothing: float = 0.0, class_weights: tuple = ()) -> Objective:
    """One label per example: of images, of token sequences, or of tables. Batch: image [B, H, W, C], or
    tokens [B, L] with optional segments, positions and token_types, or features [B, F]; label [B], weights
    [B]; after mixup (Zhang et al. 2018) also label2 [B] and mix [B], the share of `label`.

    Args:
      class_weights: a factor per class, in the loss and in what it is divided by; () is 1 for all. Metrics
        count every example alike.

    Metrics: nll (without smoothing), accuracy, and top5 where there are more than 5 classes;
    under mixup they count each label by its share.
    """

    def factor(label: jax.Array) -> jax.Array | float:
        return jnp.asarray(class_weights, jnp.float32)[label] if class_weights else 1.0

    def shares(batch: Batch, w: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        if "label2" not in batch:
            return [(batch["label"], w)]
        mix = batch["mix"].astype(w.dtype)
        return [(batch["label"], w * mix), (batch["label2"], w * (1 - mix))]

    def weights(batch: Batch) -> Terms:
        pairs = shares(batch, batch["weights"]) if class_weights else [(0, batch["weights"])]
        return {"loss": sum(_wide_sum(w * factor(label)) for label, w in pairs)}

    def sums(
        apply: Callable, variables: Any, batch: Batch, rngs: Any = None, train: bool = True
    ) -> tuple[Terms, Metrics, Any]:
        inputs = _inputs(batch, "image", "features", "tokens", "segments", "positions", "token_types")
        out = apply(variables, train=train, rngs=rngs, **inputs)
        logits = _wide(out.head(out.hidden))
        if class_weights and len(class_weights) != logits.shape[-1]:
            raise InputError(f"{len(class_weights)} class_weights for {logits.shape[-1]} classes")
        w = batch["weights"].astype(logits.dtype)
        pairs = shares(batch, w)
        log_p = jax.nn.log_softmax(logits)
        picked = [(-w * _pick(log_p, label), factor(label)) for label, w in pairs]
        flat = sum(jnp.sum(-w * factor(label) * jnp.mean(log_p, axis=-1)) for label, w in pairs)
        loss = (1 - label_smoothing) * sum(jnp.sum(nll * f) for nll, f in picked) + label_smoothing * flat
        metrics = {"nll": sum(jnp.sum(nll) for nll, _ in picked)} | _ranks(logits, pairs)
        total = jnp.sum(w)
        return {"loss": loss}, {k: (v, total) for k, v in metrics.items()}, out.updates

    def records(apply: Callable, variables: Any, batch: Batch) -> dict[str, jax.Array]:
        inputs = _inputs(batch, "image", "features", "tokens", "segments", "positions", "token_types")
        out = apply(variables, train=False, **inputs)
        logits = _wide(out.head(out.hidden))
        nats = -_pick(jax.nn.log_softmax(logits), batch["label"])
        return {"loss": nats, "logits": logits, "label": batch["label"]}

    return Objective(weights, sums, records=records)


def token_classification(class_weights: tuple = ()) -> Objective:
    """One label per token, as in tagging. Batch: tokens, segments, labels [B, L], weights [B, L] (0 where a
    token carries no label: special tokens, later pieces of a word, padding); optional positions, token_types.

    class_weights: as in `classification`. Metrics: nll and accuracy per labelled token.
    """

    def weighted(batch: Batch) -> jax.Array:
        w = batch["weights"]
        return w * jnp.asarray(class_weights, jnp.float32)[batch["labels"]] if class_weights else w

    def sums(
        apply: Callable, variables: Any, batch: Batch, rngs: Any = None, train: bool = True
    ) -> tuple[Terms, Metrics, Any]:
        inputs = _inputs(batch, "tokens", "segments", "positions", "token_types")
        out = apply(variables, train=train, rngs=rngs, **inputs)
        logits = _wide(out.head(out.hidden))
        nll = -_pick(jax.nn.log_softmax(logits), batch["labels"])
        w = batch["weights"].astype(logits.dtype)
        metrics = {"nll": jnp.sum(w * nll)} | _ranks(logits, [(batch["labels"], w)])
        return {"loss": jnp.sum(weighted(batch) * nll)}, {k: (v, jnp.sum(w)) for k, v in metrics.items()}, out.updates

    def records(apply: Callable, variables: Any, batch: Batch) -> dict[str, jax.Array]:
        inputs = _inputs(batch, "tokens", "segments", "positions", "token_types")
        out = apply(variables, train=False, **inputs)
        logits = _wide(out.head(out.hidden))
        w = batch["weights"].astype(logits.dtype)
        nats = w * -_pick(jax.nn.log_softmax(logits), batch["labels"])
        sums = {"loss": jnp.sum(nats, axis=-1), "weight": jnp.sum(w, axis=-1)}
        return sums | {"logits": logits, "labels": batch["labels"], "weights": batch["weights"]}

    return Objective(lambda batch: {"loss": _wide_sum(weighted(batch))}, sums, records=records)


def spans() -> Objective:
    """Extractive question answering (Devlin et al. 2019, section 4.2): where an answer starts and ends. Batch:
    tokens, segments [B, L], start, end [B] (both 0 where the row has no answer), weights [B]; optional
    positions, token_types. The head gives two logits per token; padding is never a candidate.

    The loss is the mean of both cross-entropies. Metrics: nll, accuracy (both places right), start, end.
    """

    def sums(
        apply: Callable, variables: Any, batch: Batch, rngs: Any = None, train: bool = True
    ) -> tuple[Terms, Metrics, Any]:
        inputs = _inputs(batch, "tokens", "segments", "positions", "token_types")
        out = apply(variables, train=train, rngs=rngs, **inputs)
        logits = span_logits(out, batch)
        w = batch["weights"].astype(logits.dtype)
        places = jnp.stack([batch["start"], batch["end"]], axis=1)
        nll = -jnp.mean(_pick(jax.nn.log_softmax(logits), places), axis=1)
        right = (jnp.argmax(logits, axis=-1) == places).astype(w.dtype)
        metrics = {"nll": nll, "accuracy": jnp.prod(right, axis=1), "start": right[:, 0], "end": right[:, 1]}
        loss = jnp.sum(w * nll)
        return {"loss": loss}, {k: (jnp.sum(w * v), jnp.sum(w)) for k, v in metrics.items()}, out.updates

    def records(apply: Callable, variables: Any, batch: Batch) -> dict[str, jax.Array]:
        inputs = _inputs(batch, "tokens", "segments", "positions", "token_types")
        logits = span_logits(apply(variables, train=False, **inputs), batch)
        places = jnp.stack([batch["start"], batch["end"]], axis=1)
        nats = -jnp.mean(_pick(jax.nn.log_softmax(logits), places), axis=1)
        given = {name: batch[name] for name in ("start", "end")}
        return {"loss": nats, "start_logits": logits[:, 0], "end_logits": logits[:, 1]} | given

    return Objective(lambda batch: {"loss": _wide_sum(batch["weights"])}, sums, records=records)


def span_logits(out: Any, batch: Batch) -> jax.Array:
    """[B, 2, L]: logits of start and end, lowest where there is only padding."""
    logits = jnp.swapaxes(_wide(out.head(out.hidden)), -1, -2)
    if "segments" not in batch:
        return logits
    return jnp.where(batch["segments"][:, None] > 0, logits, jnp.finfo(logits.dtype).min)


def regression() -> Objective:
    """Least squares. Batch: features [B, F] or any input that `classification` takes, target [B, T], weights [B].

    An example costs the mean of its T squared errors. Metrics: mse (that) and mae, the same of absolute errors.
    """

    def errors(apply: Callable, variables: Any, batch: Batch, **how: Any) -> tuple[jax.Array, Any]:
        inputs = _inputs(batch, "image", "features", "tokens", "segments", "positions", "token_types")
        out = apply(variables, **how, **inputs)
        predicted = _wide(out.head(out.hidden))
        if predicted.shape != batch["target"].shape:
            wanted = batch["target"].shape[1:]
            raise InputError(f"the model predicts {predicted.shape[1:]} numbers, the target has {wanted}")
        return predicted - batch["target"], out

    def sums(
        apply: Callable, variables: Any, batch: Batch, rngs: Any = None, train: bool = True
    ) -> tuple[Terms, Metrics, Any]:
        error, out = errors(apply, variables, batch, train=train, rngs=rngs)
        w = batch["weights"].astype(error.dtype)
        loss, total = jnp.sum(w * jnp.mean(jnp.square(error), -1)), jnp.sum(w)
        metrics = {"mse": (loss, total), "mae": (jnp.sum(w * jnp.mean(jnp.abs(error), -1)), total)}
        return {"loss": loss}, metrics, out.updates

    def records(apply: Callable, variables: Any, batch: Batch) -> dict[str, jax.Array]:
        error, _ = errors(apply, variables, batch, train=False)
        given = {"target": batch["target"], "prediction": error + batch["target"]}
        return {"loss": jnp.mean(jnp.square(error), -1)} | given

    return Objective(lambda batch: {"loss": _wide_sum(batch["weights"])}, sums, records=records)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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
    "seq2seq": seq2seq,
    "classification": classification,
    "token_classification": token_classification,
    "spans": spans,
    "regression": regression,
}
