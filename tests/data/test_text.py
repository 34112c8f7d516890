"""Text transforms against their definitions, rates against binomial bounds."""

import numpy as np
import pytest

from bigmodel_jax.data.datasets import MaskedText, Text
from bigmodel_jax.data.order import RowRng
from bigmodel_jax.data.text import Documents, MaskTokens, NextToken, TargetBytes
from bigmodel_jax.errors import InputError
from tests import tiny

V, EOS, PAD, MASK = 500, 0, 1, 2
SPECIAL = (EOS, PAD, MASK)


def rng(n, first=0):
    return RowRng(3, np.arange(first, first + n), np.arange(n))


def rows(n, length, seed=0, pad=0):
    tokens = np.random.default_rng(seed).integers(3, V, (n, length)).astype(np.int32)
    weights = np.ones((n, length), np.float32)
    if pad:
        tokens[:, -pad:], weights[:, -pad:] = PAD, 0
    return {"tokens": tokens, "weights": weights, "targets": tokens.copy()}


def test_next_token():
    batch = NextToken(pad=PAD)({"tokens": np.array([[5, 6, 7, PAD], [8, 9, 3, 4]], np.uint16)}, rng(2))
    assert batch["tokens"].tolist() == [[5, 6, 7], [8, 9, 3]] and batch["targets"].tolist() == [
        [6, 7, 1],
        [9, 3, 4],
    ]
    assert batch["weights"].tolist() == [[1, 1, 0], [1, 1, 1]] and batch["tokens"].dtype == np.int32


def test_documents_restart_at_end_of_text():
    tokens = np.array([[5, 6, EOS, 7, EOS, EOS, 8, 9], [EOS, 4, 4, 4, EOS, 4, PAD, PAD]], np.int32)
    weights = np.ones(tokens.shape, np.float32)
    weights[1, 6:] = 0
    batch = Documents(EOS)({"tokens": tokens, "weights": weights}, rng(2))
    assert batch["segments"].tolist() == [[1, 1, 2, 2, 3, 4, 4, 4], [1, 1, 1, 1, 2, 2, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 0]]
    assert batch["segments"].dtype == batch["positions"].dtype == np.int32
    assert tokens[0].tolist() == [5, 6, 0, 7, 0, 0, 8, 9], "inputs are not written to"


def test_target_bytes():
    table = np.arange(V)
    batch = TargetBytes(table)({"targets": np.array([[5, 7]]), "weights": np.array([[1.0, 0.0]], np.float32)}, rng(1))
    assert batch["bytes"].tolist() == [[5, 0]] and batch["bytes"].dtype == np.float32


def restored(batch):
    """Tokens with the masked ones put back."""
    tokens = batch["tokens"].copy()
    for r in range(len(tokens)):
        used = batch["masked_weights"][r] > 0
        tokens[r, batch["masked_positions"][r][used]] = batch["masked_targets"][r][used]
    return tokens


def chosen(batch):
    at = np.zeros(batch["tokens"].shape, bool)
    for r in range(len(at)):
        at[r, batch["masked_positions"][r][batch["masked_weights"][r] > 0]] = True
    return at


def within(count, n, p):
    """Five standard deviations of a binomial."""
    return abs(count - n * p) < 5 * np.sqrt(n * p * (1 - p))


def test_masking_follows_the_recipe():
    batch = rows(400, 128, pad=20)
    batch["tokens"][:, 0] = EOS
    out = MaskTokens(V, MASK, SPECIAL)(batch, rng(400))
    at, before, after = chosen(out), batch["tokens"], out["tokens"]
    assert out["masked_positions"].shape == (400, 20) and "targets" not in out and "weights" not in out
    assert (at.sum(1) == round(0.15 * 107)).all()
    assert np.array_equal(restored(out), before) and np.array_equal(before[~at], after[~at])
    assert not at[:, 0].any() and not at[:, -20:].any()
    assert (out["segments"] == (batch["weights"] > 0)).all()
    n = at.sum()
    assert within((after[at] == MASK).sum(), n, 0.8)
    # One in ten is drawn again, and hits itself once in V - 3.
    assert within((after[at] == before[at]).sum(), n, 0.1 + 0.1 / (V - 3))
    drawn = after[at][(after[at] != MASK) & (after[at] != before[at])]
    assert not np.isin(drawn, SPECIAL).any()
    assert within((drawn < 250).sum(), len(drawn), 247 / (V - 3))
    # Every place is as likely as any other.
    per_place = at[:, 1:108].sum(0)
    p = 16 / 107
    assert abs(per_place - 400 * p).max() < 5 * np.sqrt(400 * p * (1 - p))
    unused = out["masked_weights"] == 0
    assert (out["masked_positions"][unused] == 0).all() and (out["masked_targets"][unused] == 0).all()
    positions = np.where(unused, 999, out["masked_positions"])
    assert (np.diff(positions, axis=1) >= 0).all()
    assert out["masked_positions"].dtype == out["masked_targets"].dtype == out["tokens"].dtype == np.int32


def test_masking_is_new_each_epoch_unless_static():
    batch = rows(8, 64)
    for static in (False, True):
        fn = MaskTokens(V, MASK, SPECIAL, static=static)
        first, later = fn(batch, rng(8)), fn(batch, rng(8, first=8))
        same = all(np.array_equal(first[k], later[k]) for k in first)
        assert same == static
        again = fn(batch, rng(8))
        assert all(np.array_equal(first[k], again[k]) for k in first)


def test_masking_of_a_row_ignores_the_other_rows():
    batch, fn = rows(8, 64), MaskTokens(V, MASK, SPECIAL)
    whole, alone = fn(batch, rng(8)), fn({k: v[5:6] for k, v in batch.items()}, rng(1, first=5))
    assert all(np.array_equal(whole[k][5:6], alone[k]) for k in whole)


def test_slots_bound_the_count_and_short_rows_get_one():
    few = MaskTokens(V, MASK, SPECIAL, slots=3)(rows(10, 64), rng(10))
    assert (few["masked_weights"].sum(1) == 3).all() and few["masked_positions"].shape == (10, 3)
    short = MaskTokens(V, MASK, SPECIAL, slots=9)(rows(10, 3), rng(10))
    assert (short["masked_weights"].sum(1) == 1).all() and short["masked_positions"].shape == (10, 3)
    nothing = rows(2, 16)
    nothing["tokens"][:] = EOS
    for fn in (MaskTokens(V, MASK, SPECIAL), MaskTokens(V, MASK, SPECIAL, word_start=np.ones(V, bool))):
        out = fn(nothing, rng(2))
        assert out["masked_weights"].sum() == 0 and (out["tokens"] == EOS).all()


def words_of(tokens, segments, starts):
    """Word number of every token, special tokens -1."""
    word, out = -1, np.full(len(tokens), -1)
    for i, token in enumerate(tokens):
        if token in SPECIAL or segments[i] == 0:
            continue
        new = starts[token] or i == 0 or tokens[i - 1] in SPECIAL or segments[i - 1] != segments[i]
        word += new
        out[i] = word
    return out


def test_whole_words_are_masked_whole_at_the_right_rate():
    starts = np.random.default_rng(5).random(V) < 0.4
    batch = rows(600, 96, seed=1, pad=6)
    batch["tokens"][:, [0, 40]] = EOS
    segments = np.ones((600, 96), np.int32)
    segments[:, 40:], segments[:, 90:] = 2, 0
    batch["segments"] = segments
    plain = MaskTokens(V, MASK, SPECIAL)(batch, rng(600))
    out = MaskTokens(V, MASK, SPECIAL, word_start=starts)(batch, rng(600))
    split = 0
    for r in range(600):
        words = words_of(batch["tokens"][r], segments[r], starts)
        got, single = chosen(out)[r], chosen(plain)[r]
        for word in range(words.max() + 1):
            assert len(set(got[words == word])) == 1, "a word is masked whole or not at all"
            split += len(set(single[words == word])) == 2
        assert not got[words == -1].any()
    assert split > 1000, "masking single tokens does split words"
    assert np.array_equal(restored(out), batch["tokens"]) and np.array_equal(out["segments"], segments)
    counts, want = chosen(out).sum(1), round(0.15 * 88)
    # The expected count is exact; a word adds or lacks a few tokens.
    assert abs(counts.mean() - want) < 5 * counts.std() / np.sqrt(600) and counts.std() < 3
    assert out["masked_positions"].shape == (600, 15 + 8)
    assert within((out["tokens"][chosen(out)] == MASK).sum(), chosen(out).sum(), 0.8)


def test_whole_words_never_overflow_the_slots():
    starts = np.arange(V) % 7 == 0
    out = MaskTokens(V, MASK, SPECIAL, slots=5, word_start=starts)(rows(300, 96, seed=2), rng(300))
    counts = out["masked_weights"].sum(1)
    assert counts.max() == 5 and counts.mean() > 2
    # Words longer than the slots are left out of the draw instead of ending it.
    assert (counts == 0).mean() < 0.2


@pytest.mark.parametrize("kwargs", [
    dict(rate=0.0), dict(rate=1.0), dict(mask=V), dict(special=(V + 1,)), dict(slots=-1),
    dict(word_start=np.ones(3, bool)), dict(vocab_size=3),
])  # fmt: skip
def test_impossible_masking_is_refused(kwargs):
    with pytest.raises(InputError, match="masking"):
        MaskTokens(**{"vocab_size": V, "mask": MASK, "special": SPECIAL, **kwargs})


def test_held_out_text_in_rows_of_several_lengths(tmp_path):
    recipe = {
        "corpus": tiny.corpus(tmp_path / "corpus"), "tokenizer": "bytes", "validation_fraction": 0.2,
        "cache": str(tmp_path / "cache"), "length": 16,
    }  # fmt: skip
    evals = Text(**recipe, eval_lengths=(64, 100)).load(seed=0, batch_size=4, eval_batch_size=1000).evals
    assert list(evals) == ["validation", "validation_64", "validation_100"]
    batches = {name: pipeline.batch(0) for name, pipeline in evals.items()}
    assert [batch["tokens"].shape[1] for batch in batches.values()] == [16, 64, 100]
    # The same targets, each once, in longer and longer rows.
    targets = [b["targets"][b["weights"] > 0].tolist() for b in batches.values()]
    assert targets[0] == targets[1] == targets[2] and len(targets[0]) > 500
    assert len({b["bytes"][b["weights"] > 0].sum() for b in batches.values()}) == 1
    with pytest.raises(InputError, match="eval_lengths"):
        MaskedText(**recipe, eval_lengths=(64,)).load(seed=0, batch_size=4, eval_batch_size=4)
