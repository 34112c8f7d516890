"""Labels per sequence, per token and per span: sums against numpy, and what must not count."""

from types import SimpleNamespace

import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import objectives

RNG = np.random.default_rng(0)


def apply_giving(logits, seen=None):
    def apply(variables, *, train, rngs, **inputs):
        if seen is not None:
            seen.update(inputs)
        return SimpleNamespace(hidden=logits, head=lambda hidden: hidden, updates={})

    return apply


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_class_weights_weigh_the_loss_and_its_divisor_but_not_the_metrics():
    logits = RNG.normal(size=(5, 3)).astype(np.float32)
    label, weights = np.array([0, 1, 2, 2, 1], np.int32), np.array([1, 1, 1, 1, 0], np.float32)
    batch = {"tokens": np.zeros((5, 2), np.int32), "segments": np.ones((5, 2), np.int32)}
    batch |= {"label": label, "weights": weights}
    factors, seen = (2.0, 0.5, 1.0), {}
    objective = objectives.classification(class_weights=factors)
    terms, metrics, _ = objective(apply_giving(logits, seen), {}, batch, None, True)
    nll = -np.take_along_axis(log_softmax(logits), label[:, None], 1)[:, 0]
    w = weights * np.array(factors)[label]
    np.testing.assert_allclose(terms["loss"], (w * nll).sum(), rtol=1e-5)
    np.testing.assert_allclose(objective.weights(batch)["loss"], w.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"][0], (weights * nll).sum(), rtol=1e-5)
    assert float(metrics["nll"][1]) == 4.0 and set(seen) == {"tokens", "segments"}
    accumulated = {name: value[None] for name, value in batch.items()}
    np.testing.assert_allclose(objective.weights(accumulated)["loss"], w.sum(), rtol=1e-6)
    with pytest.raises(InputError, match="2 class_weights for 3 classes"):
        objectives.classification(class_weights=(1.0, 2.0))(apply_giving(logits), {}, batch, None, True)


def test_only_labelled_tokens_count():
    logits = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    labels = RNG.integers(0, 3, (2, 4)).astype(np.int32)
    weights = np.array([[0, 1, 0, 1], [0, 1, 1, 0]], np.float32)
    batch = {"tokens": labels, "segments": labels * 0 + 1, "labels": labels, "weights": weights}
    objective = objectives.token_classification()
    terms, metrics, _ = objective(apply_giving(logits), {}, batch, None, False)
    nll = -np.take_along_axis(log_softmax(logits), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(terms["loss"], (nll * weights).sum(), rtol=1e-5)
    assert float(objective.weights(batch)["loss"]) == float(metrics["accuracy"][1]) == 4.0
    right = ((logits.argmax(-1) == labels) * weights).sum()
    assert float(metrics["accuracy"][0]) == right
    changed = np.where(weights[..., None] > 0, logits, 9 * logits)  # what has no label has no say
    assert float(objective(apply_giving(changed), {}, batch, None, False)[0]["loss"]) == float(terms["loss"])
    changed = np.where(weights[..., None] > 0, 9 * logits, logits)
    assert float(objective(apply_giving(changed), {}, batch, None, False)[0]["loss"]) != float(terms["loss"])


def test_spans_choose_among_real_tokens():
    logits = RNG.normal(size=(2, 5, 2)).astype(np.float32)
    logits[0, 4] = 50.0  # padding with a huge logit
    segments = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], np.int32)
    batch = {"tokens": segments, "segments": segments, "weights": np.ones(2, np.float32)}
    batch |= {"start": np.array([1, 0], np.int32), "end": np.array([3, 0], np.int32)}
    terms, metrics, _ = objectives.spans()(apply_giving(logits), {}, batch, None, False)
    total = 0.0
    for row, length in ((0, 4), (1, 5)):
        for side, name in enumerate(("start", "end")):
            total -= log_softmax(logits[row, :length, side])[batch[name][row]] / 2
    np.testing.assert_allclose(terms["loss"], total, rtol=1e-5)
    unmasked = {name: value for name, value in batch.items() if name != "segments"}
    assert float(objectives.spans()(apply_giving(logits), {}, unmasked, None, False)[0]["loss"]) > 20
    sharp = np.zeros((2, 5, 2), np.float32)
    sharp[0, 1, 0] = sharp[0, 3, 1] = sharp[1, 0, 0] = sharp[1, 2, 1] = 9.0  # the second end is wrong
    metrics = objectives.spans()(apply_giving(sharp), {}, batch, None, False)[1]
    assert [float(metrics[k][0]) for k in ("accuracy", "start", "end")] == [1.0, 2.0, 1.0]
