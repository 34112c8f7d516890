"""Objectives against numpy: sums, weights and metrics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.learn import objectives

RNG = np.random.default_rng(0)
IDENTITY = jax.tree_util.Partial(lambda hidden: hidden)


class Out(NamedTuple):
    hidden: Any
    head: Any = IDENTITY
    cache: Any = None
    updates: Any = {}
    extra: Any = {}


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def pick(x, index):
    return np.take_along_axis(x, index[..., None], -1)[..., 0]


def test_causal_lm_counts_bytes_and_passes_optional_inputs(x64):
    logits = RNG.normal(size=(2, 5, 7))
    batch = {
        "tokens": RNG.integers(0, 7, (2, 5)), "targets": RNG.integers(0, 7, (2, 5)),
        "weights": (RNG.random((2, 5)) < 0.6) * 1.0, "bytes": RNG.integers(1, 9, (2, 5)) * 1.0,
        "segments": np.ones((2, 5), int),
    }  # fmt: skip
    seen = {}

    def apply(variables, *, train, rngs, **inputs):
        seen.update(inputs)
        return Out(logits)

    objective = objectives.causal_lm()
    terms, metrics, _ = objective(apply, {}, jax.tree.map(jnp.asarray, batch), None, False)
    assert set(seen) == {"tokens", "segments"}
    w = batch["weights"]
    nll = (-pick(log_softmax(logits), batch["targets"]) * w).sum()
    assert terms["loss"] == pytest.approx(nll)
    assert objective.weights(batch)["loss"] == w.sum()
    bits, size = metrics["bits_per_byte"]
    assert bits / size == pytest.approx(nll / np.log(2) / (w * batch["bytes"]).sum())
    assert size != batch["bytes"].sum(), "bytes of masked targets must not count"


def test_masked_lm_sees_only_the_masked_positions(x64):
    logits = RNG.normal(size=(3, 6, 7))
    batch = {
        "tokens": np.zeros((3, 6), int), "masked_positions": np.array([[1, 4], [0, 5], [3, 0]]),
        "masked_targets": RNG.integers(0, 7, (3, 2)), "masked_weights": np.array([[1, 1], [1, 1], [1, 0.0]]),
    }  # fmt: skip
    apply = lambda variables, **_: Out(jnp.asarray(logits))  # noqa: E731
    batch = jax.tree.map(jnp.asarray, batch)
    terms, metrics, _ = objectives.masked_lm()(apply, {}, batch, None, True)
    log_p = log_softmax(logits)
    places = [(0, 1, 0, 0), (0, 4, 0, 1), (1, 0, 1, 0), (1, 5, 1, 1), (2, 3, 2, 0)]
    nll = -sum(log_p[b, i, batch["masked_targets"][r, p]] for b, i, r, p in places)
    assert terms["loss"] == pytest.approx(nll)
    assert metrics["accuracy"][1] == 5


@pytest.mark.parametrize("classes", [4, 9])
def test_classification_with_mixup_and_smoothing(classes, x64):
    logits = RNG.normal(size=(12, classes))
    labels = RNG.integers(0, classes, (2, 12))
    w, mix = (RNG.random(12) < 0.8) * 1.0, RNG.random(12)
    apply = lambda variables, **_: Out(jnp.asarray(logits))  # noqa: E731
    batch = {"image": np.zeros((12, 1, 1, 1)), "label": labels[0], "weights": w}
    batch |= {"label2": labels[1], "mix": mix}
    batch = jax.tree.map(jnp.asarray, batch)
    terms, metrics, _ = objectives.classification(0.1)(apply, {}, batch, None, True)
    q = mix[:, None] * np.eye(classes)[labels[0]] + (1 - mix)[:, None] * np.eye(classes)[labels[1]]
    q = 0.9 * q + 0.1 / classes
    assert terms["loss"] == pytest.approx(-(w * (q * log_softmax(logits)).sum(-1)).sum())
    order = np.argsort(-logits, axis=-1)
    hits = [(order[:, :5] == label[:, None]).any(-1) for label in labels]
    best = [order[:, 0] == label for label in labels]
    share = lambda h: (w * (mix * h[0] + (1 - mix) * h[1])).sum()  # noqa: E731
    assert metrics["accuracy"][0] == pytest.approx(share(best))
    assert ("top5" in metrics) == (classes > 5)
    if classes > 5:
        assert metrics["top5"][0] == pytest.approx(share(hits))
        assert share(hits) > share(best)
