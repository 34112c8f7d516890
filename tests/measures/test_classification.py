"""Every measure against scikit-learn or a closed form; what is undefined says so."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics
from sklearn.calibration import calibration_curve

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures.classification import Scores, measure, softmax, weighted_auc


def made(n=300, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    logits = rng.normal(size=(n, classes)).round(1) + 1.2 * np.eye(classes)[labels]
    return softmax(logits), labels


def reference(p, y, w=None):
    """The same names, all by scikit-learn."""
    called, classes = p.argmax(1), p.shape[1]
    out = {"accuracy": metrics.accuracy_score(y, called, sample_weight=w)}
    out["nll"] = metrics.log_loss(y, p, labels=range(classes), sample_weight=w)
    for average in ("micro", "macro"):
        options = {"average": average, "sample_weight": w, "zero_division": np.nan}
        each = metrics.precision_recall_fscore_support(y, called, **options)
        out |= {f"{name}_{average}": value for name, value in zip(("precision", "recall", "f1"), each[:3], strict=True)}
    out["mcc"] = metrics.matthews_corrcoef(y, called, sample_weight=w)
    if classes == 2:
        each = metrics.precision_recall_fscore_support(y, called, average="binary", sample_weight=w)
        out |= dict(zip(("precision", "recall", "f1"), each[:3], strict=True))
        out["auc"] = metrics.roc_auc_score(y, p[:, 1], sample_weight=w)
    else:
        each = [metrics.roc_auc_score(y == c, p[:, c], sample_weight=w) for c in range(classes)]
        out["auc"] = np.mean(each)
    return out


@pytest.mark.parametrize("classes", [2, 4])
def test_values_and_weighted_values_are_those_of_scikit_learn(classes):
    p, y = made(classes=classes)
    scores = Scores(p, y)
    values = scores.report()["values"]
    for name, value in reference(p, y).items():
        assert values[name] == pytest.approx(value, rel=1e-9), name
    weights = np.random.default_rng(1).integers(0, 4, size=(3, len(y))).astype(float)
    drawn = scores.statistics(weights)
    plain = scores.statistics(np.ones((1, len(y))))
    for name in values:
        assert plain[name][0] == pytest.approx(values[name], rel=1e-9), name
    for row, w in enumerate(weights):
        for name, value in reference(p, y, w).items():
            assert drawn[name][row] == pytest.approx(value, rel=1e-9), name
    # Control: weights matter.
    assert abs(drawn["accuracy"][0] - values["accuracy"]) > 1e-3


def test_top_k_and_confusion():
    rng = np.random.default_rng(3)
    y = rng.integers(8, size=300)
    p = softmax(rng.normal(size=(300, 8)) + np.eye(8)[y])
    out = Scores(p, y, names=list("abcdefgh")).report()
    assert out["values"]["top3"] == pytest.approx(metrics.top_k_accuracy_score(y, p, k=3))
    assert out["values"]["top5"] == pytest.approx(metrics.top_k_accuracy_score(y, p, k=5))
    matrix = np.array(out["confusion"])
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(y, p.argmax(1)))
    first = out["confused"][0]
    a, b = "abcdefgh".index(first["label"]), "abcdefgh".index(first["predicted"])
    assert first["count"] == matrix[a, b] == (matrix - np.diag(np.diag(matrix))).max()


def test_calibration_error_in_closed_form_and_its_bins():
    # 100 predictions of confidence 0.9, of which 70 are right; 100 of 0.6, of which 60 are right.
    confidence = np.repeat([0.9, 0.6], 100)
    right = np.concatenate([np.arange(100) < 70, np.arange(100) < 60])
    out = Scores(np.stack([1 - confidence, confidence], 1), right.astype(int)).report()
    assert out["values"]["ece"] == pytest.approx(0.5 * 0.2 + 0.5 * 0.0)
    p, y = made(classes=2, n=500)
    bins = [b for b in Scores(p, y).report()["calibration"] if b["count"]]
    true, mean = calibration_curve(p.argmax(1) == y, p.max(1), n_bins=15)
    np.testing.assert_allclose([b["accuracy"] for b in bins], true)
    np.testing.assert_allclose([b["confidence"] for b in bins], mean)


def test_auc_counts_ties_half():
    scores, y = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert weighted_auc(scores, y, np.ones((1, 4)))[0] == (1 + 1 + 1 + 0.5) / 4
    assert np.isnan(weighted_auc(scores, y, np.array([[1.0, 1.0, 0.0, 0.0]])))[0]


def test_what_is_undefined_is_none_with_a_reason():
    p, _ = made(n=20, classes=2)
    out = measure(p, np.zeros(20, int), resamples=50)
    for name in ("auc", "mcc", "recall"):
        assert out["values"][name] is None and out["notes"][name], name
    assert out["roc"] == [] and out["intervals"]["auc"]["low"] is None
    called_one = np.tile([0.9, 0.1], (20, 1))
    out = measure(called_one, np.arange(20) % 2, resamples=50)
    assert out["values"]["precision"] is None and "never predicted" in out["notes"]["precision"]
    assert out["values"]["mcc"] is None and out["values"]["auc"] == 0.5
    assert out["values"]["f1"] == 0.0  # defined: nothing of class 1 was found
    p, y = made(n=60, classes=3)
    y[y == 2] = 0
    out = measure(p, y, resamples=50)
    assert "averaged without 2" in out["notes"]["recall_macro"]
    recall = metrics.recall_score(y, p.argmax(1), labels=[0, 1], average="macro")
    assert out["values"]["recall_macro"] == pytest.approx(recall)
    broken = p.copy()
    broken[3] = np.nan
    out = measure(broken, y)
    assert set(out["values"].values()) == {None} and "not finite" in out["notes"]["all"]


def test_what_cannot_be_meant_is_refused():
    p, y = made(n=10)
    for bad in ((p[:, :1], y), (p, y[:-1]), (p, y + 4), (p * 2, y), (p[:0], y[:0])):
        with pytest.raises(InputError):
            Scores(*bad)
    with pytest.raises(InputError, match="names"):
        Scores(p, y, names=["a"])
