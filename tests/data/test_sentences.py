"""Pairs of spans: their form, how often they belong together, and the loss of telling."""

import jax
import numpy as np
import pytest

from bigmodel_jax.data.order import RowRng
from bigmodel_jax.data.sentences import EXTRA, NextSpan
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.data.text import MaskTokens
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn.objectives import masked_lm
from bigmodel_jax.models.model import Output

SEP, MASK, ROWS, L = 0, 1, 600, 11


@pytest.fixture(scope="module")
def text():
    """Row r holds the ids 2 + r L to 2 + r L + L - 1: every token says where it is from. The last is half padding."""
    tokens = (2 + np.arange(ROWS * L).reshape(ROWS, L)).astype(np.int32)
    weights = np.ones((ROWS, L), np.float32)
    weights[-1, 7:] = 0
    return Arrays({"tokens": tokens, "weights": weights})


def made(text, first=0, **options):
    rng = RowRng(3, np.arange(first, first + ROWS), np.arange(ROWS))
    return NextSpan(text, SEP, **options)(text.gather(np.arange(ROWS)), rng)


def test_half_of_the_pairs_belong_together(text):
    out, half = made(text), L // 2
    assert out["tokens"].shape == (ROWS, L + EXTRA)
    assert (out["tokens"][:, [0, half + 1, -1]] == SEP).all()
    a, b = (out["tokens"][:, s] - 2 for s in (slice(1, half + 1), slice(half + 2, -1)))
    assert (a // L == np.arange(ROWS)[:, None]).all() and (a % L == np.arange(half)).all()
    assert (b % L == np.arange(half, L)).all() and (b // L == b[:, :1] // L).all()
    assert ((b[:, 0] // L != np.arange(ROWS)) == out["random"]).all()
    assert abs(out["random"].mean() - 0.5) < 5 * 0.5 / ROWS**0.5
    # Every other row is as likely to be drawn: the mean of their numbers is that of all rows.
    strangers = b[out["random"] == 1, 0] // L
    assert abs(strangers.mean() - (ROWS - 1) / 2) < 5 * ROWS / 12**0.5 / len(strangers) ** 0.5
    assert out["token_types"][0].tolist() == [0] * (half + 2) + [1] * (L - half + 1)
    assert (out["segments"][:-1][out["random"][:-1] == 0] == 1).all()
    last = made(text, first=0)["segments"][-1, half + 2 : -1]
    assert last.tolist() in ([1, 1, 0, 0, 0, 0], [1] * 6)


def test_pairs_are_new_each_epoch_unless_static(text):
    for static in (False, True):
        first, later = (made(text, at, static=static)["random"] for at in (0, ROWS))
        assert (first == later).all() == static


def test_a_pair_needs_another_row(text):
    with pytest.raises(InputError, match="at least 2 rows"):
        NextSpan(Arrays(text.gather(np.arange(1))), SEP)


def test_separators_are_never_masked_and_strategies_have_their_shares(text):
    vocab, pairs = 2 + ROWS * L, made(text)
    rng = RowRng(3, np.arange(ROWS), np.arange(ROWS))
    for replace in ((0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.4, 0.0)):
        out = MaskTokens(vocab, MASK, (SEP, MASK), rate=0.4, replace=replace)(pairs, rng)
        used = out["masked_weights"] > 0
        now = np.take_along_axis(out["tokens"], out["masked_positions"], 1)[used]
        was = np.take_along_axis(pairs["tokens"], out["masked_positions"], 1)[used]
        assert (was != SEP).all() and (was == out["masked_targets"][used]).all()
        for share, found in zip(replace, ((now == MASK).mean(), ((now != MASK) & (now != was)).mean()), strict=True):
            assert abs(found - share) <= 5 * (share * (1 - share) / len(now)) ** 0.5 + 4 / len(now)
        assert {"random", "pair_weights", "token_types"} <= set(out)
    with pytest.raises(InputError, match="two shares"):
        MaskTokens(vocab, MASK, (SEP,), replace=(0.9, 0.2))


def test_the_second_term_is_the_loss_of_two_classes():
    rng = np.random.default_rng(0)
    batch = {
        "tokens": np.ones((4, 5), np.int32), "masked_positions": np.ones((4, 2), np.int32),
        "masked_targets": np.ones((4, 2), np.int32), "masked_weights": np.ones((4, 2), np.float32),
        "random": np.array([0, 1, 1, 0], np.int32), "pair_weights": np.array([1, 1, 1, 0], np.float32),
    }  # fmt: skip
    logits = rng.normal(size=(4, 2)).astype(np.float32)
    hidden, head = np.zeros((4, 5, 3), np.float32), jax.tree_util.Partial(lambda x: x)
    objective = masked_lm()
    terms, metrics, _ = objective(lambda *_, **__: Output(hidden, head, extra={"nsp": logits}), {}, batch, None, False)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(p[np.arange(3), batch["random"][:3]]).sum()
    assert float(terms["nsp"]) == pytest.approx(expected, rel=1e-5)
    assert float(objective.weights(batch)["nsp"]) == 3
    right = (p.argmax(1) == batch["random"])[:3].sum()
    assert [float(x) for x in metrics["nsp_accuracy"]] == [right, 3]
    # A model that does not answer is not asked.
    assert "nsp" not in objective(lambda *_, **__: Output(hidden, head), {}, batch, None, False)[0]
