"""Spans and generated text against published examples, the libraries themselves and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures import generated, spans

PREDICTED = ["the cat sat on the mat", "a quick brown fox jumps", "hello there world", "nothing in common"] * 5
WANTED = [
    ["the cat sat on a mat", "a cat was sitting on the mat"], ["the quick brown fox jumps high"],
    ["hello there world"], ["utterly different words here"],
] * 5  # fmt: skip


def test_squad_normalisation_and_overlap():
    assert spans.normalise("The  Eiffel-Tower, (a) tower!") == "eiffeltower tower"
    assert spans.exact("the Denver Broncos.", ["Denver Broncos", "Carolina"]) == 1.0
    assert spans.exact("Denver", ["Denver Broncos"]) == 0.0
    # 2 shared words of 2 predicted and 3 wanted: precision 1, recall 2/3, F1 0.8.
    assert spans.overlap("Denver Broncos", ["Denver Broncos team", "Carolina"]) == pytest.approx(0.8)
    assert spans.overlap("", []) == spans.exact("", []) == 1.0 and spans.overlap("x", []) == 0.0
    out = spans.measure(["Denver", "x"], [["Denver"], ["y"]], resamples=50)
    assert out["values"] == {"exact_match": 0.5, "f1": 0.5}
    with pytest.raises(InputError):
        spans.measure(["a"], ["a"])


def test_best_span_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=(6, 9)), rng.normal(size=(6, 9))
    for longest in (1, 3, 20):
        first, last, score = spans.best_span(start, end, longest)
        for row in range(6):
            legal = [(start[row, i] + end[row, j], i, j) for i in range(9) for j in range(i, min(i + longest, 9))]
            assert (score[row], first[row], last[row]) == max(legal)
    # Control: without the order of start and end another pair would win.
    assert (start.max(1) + end.max(1) > spans.best_span(start, end, 20)[2]).any()


def test_generated_text_by_the_libraries_own_scores():
    out = generated.measure(PREDICTED, WANTED, resamples=200)
    streams = generated.streams(WANTED)
    assert out["values"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTED, streams).score)
    assert out["values"]["chrf"] == pytest.approx(sacrebleu.corpus_chrf(PREDICTED, streams).score)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    each = [scorer.score_multi(w, p)["rougeL"].fmeasure for p, w in zip(PREDICTED, WANTED, strict=True)]
    assert out["values"]["rouge_l"] == pytest.approx(np.mean(each))
    assert out["values"]["exact_match"] == 0.25
    assert "version" in out["signatures"]["bleu"]
    # Control: corpus BLEU is no mean of sentence scores.
    sentences = [sacrebleu.sentence_bleu(p, w).score for p, w in zip(PREDICTED, WANTED, strict=True)]
    assert abs(out["values"]["bleu"] - np.mean(sentences)) > 0.5


def test_bleu_interval_is_that_of_resampled_corpora():
    out = generated.measure(PREDICTED, WANTED, resamples=600, method="percentile")["intervals"]["bleu"]
    rng, scores = np.random.default_rng(9), []
    for _ in range(600):
        pick = rng.integers(len(PREDICTED), size=len(PREDICTED))
        texts = [PREDICTED[i] for i in pick]
        scores.append(sacrebleu.corpus_bleu(texts, generated.streams([WANTED[i] for i in pick])).score)
    low, high = np.quantile(scores, [0.025, 0.975])
    assert out["low"] == pytest.approx(low, abs=0.08 * (high - low))
    assert out["high"] == pytest.approx(high, abs=0.08 * (high - low))


def test_what_rouge_cannot_count_is_not_a_zero():
    out = generated.measure(["你好"] * 3, [["你好"]] * 3, resamples=50, tokenize="zh")
    assert out["values"]["rouge_l"] is None and "a-z" in out["notes"]["rouge_l"]
    assert out["values"]["exact_match"] == 1.0 and out["values"]["chrf"] == pytest.approx(100.0)
    empty = generated.measure(["", ""], [["a b"], ["c"]], resamples=50)
    assert empty["values"]["chrf"] == 0.0 and "empty" in empty["notes"]["all"]
    assert empty["values"]["bleu"] is None and "four words" in empty["notes"]["bleu"]
    wrong = generated.measure(["a b c d", "e f g h"], [["x y z u"], ["v w"]], resamples=50)
    assert wrong["values"]["bleu"] == 0.0 and wrong["notes"] == {}
