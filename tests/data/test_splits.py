"""Splits are even, grouped where asked, and the same for ever; duplicates are found and counted."""

import numpy as np
import pytest

from bigmodel_jax.data import splits
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
