"""Planted duplicates of known similarity are found and nothing else is, by brute-force Jaccard on sets."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bigmodel_jax.data import dedup
from bigmodel_jax.errors import InputError

WORDS = [f"word{i}" for i in range(4000)]


def shingle_set(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """What MinHash.shingles hashes, as plain Python sets."""
    words = re.findall(r"[^\W]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


@pytest.fixture(scope="module")
def corpus():
    """240 texts: 120 originals, then one edited copy of each with 0 to 30 words replaced of 200."""
    random = np.random.default_rng(0)
    originals = [list(random.choice(WORDS, 200)) for _ in range(120)]
    copies = []
    for number, words in enumerate(originals):
        edited = list(words)
        for place in random.choice(200, number % 31, replace=False):
            edited[place] = random.choice(WORDS)
        copies.append(edited)
    return [" ".join(words) for words in originals + copies]


@pytest.fixture(scope="module")
def signatures(corpus):
    settings = dedup.MinHash()
    return np.stack([settings.signature(text) for text in corpus])


@pytest.fixture(scope="module")
def exact(corpus):
    """Jaccard similarity of every pair [n, n], by brute force."""
    sets = [shingle_set(text) for text in corpus]
    return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def greedy(exact: np.ndarray, threshold: float) -> np.ndarray:
    """[n] bool: dropped where the exact similarity to a kept earlier text reaches the threshold."""
    kept: list[int] = []
    dropped = []
    for position in range(len(exact)):
        repeats = any(exact[position, kept] >= threshold)
        dropped.append(repeats)
        if not repeats:
            kept.append(position)
    return np.array(dropped)


def test_shingles_are_the_sets_they_stand_for():
    settings = dedup.MinHash(ngram=3)
    text = "The cat, the_cat & the CAT sat. It sat; \u00c9t\u00e9 \u6df1\u5ea6 x1"
    other = "the cat sat. it sat; \u00e9t\u00e9"
    ours, theirs = set(settings.shingles(text).tolist()), set(settings.shingles(other).tolist())
    assert len(ours) == len(shingle_set(text, 3)) and len(theirs) == len(shingle_set(other, 3))
    assert len(ours & theirs) == len(shingle_set(text, 3) & shingle_set(other, 3)) > 0
    assert len(settings.shingles("one two")) == 1 and len(settings.shingles(" ...\n")) == 0
    assert len(dedup.MinHash(ngram=3, characters=True).shingles("abcabc")) == 3
    assert settings.shingles("ab c").tolist() != settings.shingles("a bc").tolist(), "where words end matters"


def test_signatures_estimate_jaccard_without_bias(exact, signatures):
    true = np.diagonal(exact, 120)
    estimate = np.array([dedup.similarity(signatures[i], signatures[i + 120]) for i in range(120)])
    deviation = (estimate - true) / np.sqrt(np.maximum(true * (1 - true), 1e-3) / 128)
    assert abs(deviation.mean()) < 0.3 and 0.7 < deviation[true < 1].std() < 1.3
    unrelated = [dedup.similarity(signatures[i], signatures[i + 1]) for i in range(119)]
    assert max(unrelated) < 0.05


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_precision_and_recall_on_planted_copies(exact, signatures, threshold):
    found = dedup.near_duplicates(signatures, dedup.MinHash(threshold=threshold)) >= 0
    truth = greedy(exact, threshold)
    similarity = np.append(np.zeros(120), np.diagonal(exact, 120))
    assert not truth[:120].any() and not found[:120].any(), "originals stay"
    precision, recall = (found & truth).sum() / found.sum(), (found & truth).sum() / truth.sum()
    assert precision > 0.85 and recall > 0.85, (precision, recall)
    clear = np.abs(similarity - threshold) > 0.09  # two standard deviations of the estimate
    np.testing.assert_array_equal(found[clear], truth[clear])
    assert 15 < truth.sum() < 110


def test_a_poor_layout_misses_what_the_default_finds(exact, signatures):
    """The control: one band of 128 rows finds only what is identical."""
    strict = dedup.near_duplicates(signatures, dedup.MinHash(threshold=0.5, bands=1)) >= 0
    truth = greedy(exact, 0.5)
    assert (strict & truth).sum() / truth.sum() < 0.3
    assert strict[[120, 151, 182, 213]].all(), "copies without edits are still found"


def test_layout_meets_its_promise():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
        bands, rows = dedup.MinHash(threshold=threshold).layout
        assert bands * rows <= 128 and (1 - threshold**rows) ** bands < 0.01
    assert dedup.MinHash(bands=16).layout == (16, 8)


def test_bounded_memory_gives_the_same_answer(signatures, tmp_path):
    settings = dedup.MinHash(threshold=0.5)
    whole = dedup.near_duplicates(signatures, settings)
    stored = np.memmap(tmp_path / "signatures", "<u4", "w+", shape=signatures.shape)
    stored[:] = signatures
    np.testing.assert_array_equal(dedup.near_duplicates(stored, settings, memory=1000), whole)


def test_similarity_is_not_passed_on_through_chains():
    """a ~ b ~ c but not a ~ c: b repeats a, and c stays because b is gone."""
    settings = dedup.MinHash(threshold=0.8)
    base = np.arange(1, 129, dtype=np.uint32)
    a, b, c = base.copy(), base.copy(), base.copy()
    b[:20] += 1000
    c[:40] += 1000
    assert dedup.similarity(a, b) >= 0.8 <= dedup.similarity(b, c) and dedup.similarity(a, c) < 0.8
    assert dedup.near_duplicates(np.stack([a, b, c]), settings).tolist() == [-1, 0, -1]
    assert dedup.near_duplicates(np.stack([b, a, c]), settings).tolist() == [-1, 0, 0]


def test_documents_without_words_never_repeat_each_other():
    settings = dedup.MinHash()
    signatures = np.stack([settings.signature(text) for text in ("", "...", "  ", "a b", "a b")])
    assert dedup.near_duplicates(signatures, settings).tolist() == [-1, -1, -1, -1, 3]
    assert dedup.near_duplicates(signatures[:0], settings).tolist() == []


def test_exact_duplicates_against_a_dictionary():
    random = np.random.default_rng(1)
    texts = [f"text {i}" for i in random.integers(0, 60, 300)]
    first: dict[str, int] = {}
    expected = [first[text] if text in first else (first.setdefault(text, i), -1)[1] for i, text in enumerate(texts)]
    digests = np.stack([dedup.digest(text) for text in texts])
    assert dedup.exact_duplicates(digests).tolist() == expected
    assert dedup.exact_duplicates(np.zeros((0, 2), np.uint64)).tolist() == []
    assert (dedup.exact_duplicates(np.stack([dedup.digest(f"{i}") for i in range(300)])) == -1).all()


def test_settings_that_mean_nothing():
    for settings in (
        {"threshold": 0.0},
        {"threshold": 1.5},
        {"ngram": 0},
        {"bands": 200},
        {"permutations": 0},
    ):
        with pytest.raises(InputError):
            dedup.MinHash(**settings)
