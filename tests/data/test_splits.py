"""Splits are even, grouped where asked, and the same for ever; duplicates are found and counted."""

import json
import logging

import numpy as np
import pytest

from bigmodel_jax.data import images, splits
from bigmodel_jax.data.answers import Spans
from bigmodel_jax.data.datasets import DATASETS
from bigmodel_jax.data.pairs import Pairs
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.data.tagged import LabelledTokens
from bigmodel_jax.errors import InputError


def test_folds_are_even_in_every_class_and_depend_on_the_seed():
    labels = np.repeat([0, 1, 2], [50, 31, 7])
    fold = splits.folds(88, 5, seed=3, labels=labels)
    for label, count in ((0, 50), (1, 31), (2, 7)):
        held = np.bincount(fold[labels == label], minlength=5)
        assert held.sum() == count and held.max() - held.min() <= 1
    sizes = np.bincount(fold)
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(fold, splits.folds(88, 5, seed=3, labels=labels))
    assert (fold != splits.folds(88, 5, seed=4, labels=labels)).mean() > 0.5
    # without labels a rare class may land anywhere: the promise above is not an accident
    spreads = [np.ptp(np.bincount(splits.folds(88, 5, seed=s)[labels == 1], minlength=5)) for s in range(8)]
    assert max(spreads) > 1
    assert splits.folds(7, 3, seed=0).tolist() == [1, 0, 2, 0, 0, 1, 2]  # on every machine


def test_groups_stay_together_and_shares_stay_close():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 900)
    labels = (rng.random(900) < 0.2 + 0.4 * (groups % 2)).astype(int)
    fold = splits.folds(900, 5, seed=1, labels=labels, groups=groups)
    assert all(len(set(fold[groups == g])) == 1 for g in range(60))
    shares = [labels[fold == f].mean() for f in range(5)]
    assert np.ptp(shares) < 0.03 and np.ptp(np.bincount(fold)) < 30
    loose = splits.folds(900, 5, seed=1, labels=labels)
    assert not all(len(set(loose[groups == g])) == 1 for g in range(60))
    with pytest.raises(InputError, match="as many groups; there are 3"):
        splits.folds(9, 5, seed=0, groups=[0, 1, 2] * 3)


def test_a_share_is_held_out():
    kept, out = splits.held_out(200, 0.1, seed=0, labels=np.arange(200) % 2)
    assert len(out) == 20 and (out % 2).sum() == 10
    assert sorted([*kept, *out]) == list(range(200))
    kept, out = splits.held_out(200, 0.75, seed=0)
    assert len(out) == 150
    with pytest.raises(InputError, match="between 0 and 1"):
        splits.held_out(200, 1.0, seed=0)


def test_duplicates_are_found_counted_and_dropped():
    train = ["Good film!", "good  film", "Good film!", "bad", "ＢＡＤ", "..."]
    test = ["bad", "new", "good film?"]
    report = splits.duplicates({"train": train, "test": test}, {"train": [1, 1, 0, 0, 0, 1], "test": [1, 1, 1]})
    assert report["exact"] == {"train": 1, "test": 0}
    assert report["normalised"] == {"train": 3, "test": 0}
    assert report["between"] == {"train/test": {"exact": 1, "normalised": 2}}
    assert report["conflicting"] == 2  # "good film" and "bad"
    assert splits.without_duplicates(train, "none").tolist() == [0, 1, 2, 3, 4, 5]
    assert splits.without_duplicates(train, "exact").tolist() == [0, 1, 3, 4, 5]
    assert splits.without_duplicates(train, "normalised").tolist() == [0, 3, 5]
    assert splits.without_duplicates(train, "normalised", test).tolist() == [5]
    with pytest.raises(InputError, match="should be one of"):
        splits.without_duplicates(train, "fuzzy")


def asked(question, answer="Trier"):
    text = "The old town of Trier lies there."
    return {
        "question": question, "context": text, "answers": {"text": [answer], "answer_start": [text.index(answer)]}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "rows", "planted"),
    [
        (lambda **files: Spans(**files, length=64, stride=8), [asked("Where?"), asked("Which town?")], asked("where")),
        (
            lambda train, validation: Pairs(files=train, validation=validation),
            [{"source": "one dog", "target": "ein Hund"}, {"source": "a cat", "target": "eine Katze"}],
            {"source": "One dog!", "target": "1 Hund"},
        ),
        (
            lambda **files: LabelledTokens(**files, length=16),
            [{"words": "in Rome", "labels": "O LOC"}, {"words": "to Bonn", "labels": "O LOC"}],
            {"words": "In Rome", "labels": "O LOC"},
        ),
    ],
)
def test_a_row_that_was_planted_in_both_files_is_reported(make, rows, planted, tmp_path, caplog):
    """Control: before it was planted there is nothing to report."""

    def report(held_out):
        for name, some in (("train", rows), ("validation", held_out)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="bigmodel_jax"):
            found = make(**files).load(seed=0, batch_size=1, eval_batch_size=1).report["duplicates"]
        return found, "1 are in two files" in " ".join(caplog.messages)

    other = json.loads(json.dumps(rows[1]).replace("own", "onk").replace("cat", "cow").replace("Bonn", "Hof"))
    clean, said = report([other])
    assert clean["between"] == {"train/validation": {"exact": 0, "normalised": 0}} and not said
    found, said = report([other, planted])
    assert found["between"] == {"train/validation": {"exact": 0, "normalised": 1}} and said
    assert found.keys() == clean.keys() and found["normalised"] == {"train": 0, "validation": 0}
    again, _ = report([other, rows[0], rows[0]])
    assert again["between"]["train/validation"]["exact"] == 2 and again["exact"]["validation"] == 1


def test_images_in_both_sets_are_found_by_their_pixels(monkeypatch, caplog):
    """One planted, one of another label; control: one pixel makes it another image."""
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)
    held = image[:3].copy()
    held[2, 4, 4, 0] ^= 1
    parts = {"train": Arrays({"image": image, "label": np.arange(6, dtype=np.int32)}),
             "validation": Arrays({"image": held, "label": np.array([0, 5, 2], np.int32)})}  # fmt: skip
    monkeypatch.setattr(DATASETS["digits"], "sources", lambda _: (*parts.values(), list("abcdef")))
    with caplog.at_level(logging.INFO, logger="bigmodel_jax"):
        report = DATASETS["digits"]().load(seed=0, batch_size=2, eval_batch_size=2).report["duplicates"]
    assert report["between"] == {"train/validation": {"exact": 2, "normalised": 2}} and report["conflicting"] == 1
    assert report["exact"] == {"train": 0, "validation": 0} and "2 are in two files" in " ".join(caplog.messages)
    monkeypatch.setattr(images, "COMPARED", 100)
    assert DATASETS["digits"]().load(seed=0, batch_size=2, eval_batch_size=2).report == {"classes": list("abcdef")}


def test_what_was_read_from_files_to_compare_images_is_read_once(monkeypatch, tmp_path):
    class Files:
        """Images that are not in memory; gather(one row) says only how large they are."""

        fingerprint, reads = "some files", 0

        def __len__(self):
            return 3

        def gather(self, index):
            Files.reads += len(index) > 1
            return {"image": np.zeros((len(index), 2, 2, 1), np.uint8), "label": np.zeros(len(index), np.int32)}

    monkeypatch.setattr(images, "cache_root", lambda: str(tmp_path))
    found = images.duplicates({"train": Files()})
    assert found["exact"] == {"train": 2} and Files.reads == 1
    assert images.duplicates({"train": Files()}) == found and Files.reads == 1
    Files.fingerprint = "others"
    assert images.duplicates({"train": Files()}) == found and Files.reads == 2
