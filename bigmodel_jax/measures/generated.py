"""Measures of generated text against references: exact match, BLEU and chrF (sacrebleu), ROUGE-L (rouge-score).

BLEU and chrF are functions of counts added up over the corpus, so their intervals come from resampled
counts, never from a mean of sentence scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigmodel_jax.measures.intervals import bootstrap, ratio
from bigmodel_jax.measures.spans import check_pairs, overlap

TOKENIZERS = ("13a", "intl", "char", "zh", "none")


def measure(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    groups: Any = None,
    tokenize: str = "13a",
    **options: Any,
) -> dict[str, Any]:
    """{"values", "intervals", "notes", "signatures", "per_example"}: exact_match (any reference, outer
    whitespace aside), f1 (words, SQuAD) and rouge_l in 0..1, bleu and chrf in 0..100.

    Args:
      references: accepted texts of each prediction, at least one, not all the same number.
      tokenize: sacrebleu's tokenizer for BLEU: 13a, intl, char, zh, none.
      groups, options: as in intervals.bootstrap.
    """
    check_pairs(predictions, references)
    pairs = list(zip(predictions, references, strict=True))
    each = {
        "exact_match": [float(p.strip() in [r.strip() for r in refs]) for p, refs in pairs],
        "f1": [overlap(p, refs) for p, refs in pairs],
    }
    notes: dict[str, str] = {}
    if not any(p.strip() for p in predictions):
        notes["all"] = "every prediction is empty"
    rouge, kept = _rouge(pairs, notes)
    statistics: dict[str, Callable[[np.ndarray], np.ndarray]] = {k: ratio(np.array(v)) for k, v in each.items()}
    statistics["rouge_l"] = ratio(rouge, kept) if kept.any() else _undefined
    signatures = {}
    for name, metric in _corpus_metrics(tokenize).items():
        statistics[name], counts = _from_counts(metric, pairs)
        if name == "bleu" and not counts[:, -1].any():
            statistics[name], notes[name] = _undefined, "no prediction has four words, and BLEU counts runs of four"
        signatures[name] = str(metric.get_signature())
    found = bootstrap(lambda w: {name: fn(w) for name, fn in statistics.items()}, len(pairs), groups=groups, **options)
    each["rouge_l"] = [float(x) if k else None for x, k in zip(rouge, kept, strict=True)]
    return {
        "examples": len(pairs),
        "values": {name: interval.estimate for name, interval in found.items()},
        "intervals": {name: interval.json() for name, interval in found.items()},
        "notes": notes,
        "signatures": signatures,
        "per_example": each,
    }


def _undefined(weights: np.ndarray) -> np.ndarray:
    return np.full(len(weights), np.nan)


def _corpus_metrics(tokenize: str) -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU(tokenize=tokenize, force=True), "chrf": CHRF()}


def streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: one list per reference number, None where there are fewer."""
    most = max(len(texts) for texts in references)
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]


def _from_counts(
    metric: Any, pairs: list[tuple[str, Sequence[str]]]
) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """(the statistic of a sacrebleu metric: its counts per segment, weighted, added up, scored; the counts)."""
    predictions, references = zip(*pairs, strict=True)
    counts = np.array(metric._extract_corpus_statistics(predictions, streams(references)), np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        totals = np.rint(weights @ counts).astype(np.int64)
        return np.array([metric._compute_score_from_stats(row.tolist()).score for row in totals])

    return statistic, counts


def _rouge(pairs: list[tuple[str, Sequence[str]]], notes: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """(best ROUGE-L F of each pair [n], whether it is defined [n]); Lin 2004, without stemming."""
    from rouge_score import rouge_scorer, tokenizers

    tokenizer = tokenizers.DefaultTokenizer(use_stemmer=False)
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=tokenizer)
    values, kept = np.zeros(len(pairs)), np.zeros(len(pairs), bool)
    for i, (prediction, references) in enumerate(pairs):
        known = [text for text in references if tokenizer.tokenize(text)]
        if known:
            kept[i] = True
            values[i] = scorer.score_multi(known, prediction)["rougeL"].fmeasure
    if not kept.all():
        lost = f"{(~kept).sum()} of {len(pairs)} references have no word in a-z and 0-9, all that ROUGE-L counts"
        notes["rouge_l"] = lost if not kept.any() else f"{lost}; averaged over the others"
    return values, kept
