"""Texts to rows of ids: special tokens around them, cut to the length, padded; and what was cut, counted.

    one text   [cls] a [sep]            two texts   [cls] a [sep] b [sep]      RoBERTa's   <s> a </s> </s> b </s>

What stands around and between texts is what a published tokenizer puts there (Published.pair), else its classification
tokens. One without these (byte and SentencePiece ones of our own) has its end-of-text token stand for both, as in
pretraining, where it separates documents.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel_jax.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """Special ids of a tokenizer: before a text, after a text, padding, and between two texts; and the token type of
    the second text."""

    start: int
    end: int
    pad: int
    between: tuple[int, ...]
    second: int

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        start, end, eos = getattr(tokenizer, "cls", None), getattr(tokenizer, "sep", None), tokenizer.eos
        start, end = (eos if start is None else start), (eos if end is None else end)
        start, between, end, second = getattr(tokenizer, "pair", None) or (start, (end,), end, 1)
        if start is None or end is None:
            raise InputError("the tokenizer has neither classification tokens nor an end-of-text token")
        pad = tokenizer.pad if tokenizer.pad is not None else end
        return cls(int(start), int(end), int(pad), tuple(between), int(second))


@dataclass
class Cut:
    """How much did not fit."""

    rows: int = 0
    cut: int = 0
    tokens: int = 0
    lost: int = 0

    def add(self, before: int, after: int) -> None:
        self.rows += 1
        self.tokens += before
        self.cut += before > after
        self.lost += before - after

    def report(self) -> dict[str, Any]:
        return {"rows": self.rows, "truncated": self.cut, "tokens": self.tokens, "tokens_lost": self.lost}

    def say(self, length: int, what: str) -> None:
        if self.cut:
            log.info(
                "%s: %d of %d rows (%.1f%%) are longer than data.length %d and were cut: %.1f%% of the tokens",
                what, self.cut, self.rows, 100 * self.cut / self.rows, length, 100 * self.lost / max(self.tokens, 1),
            )  # fmt: skip


def fit_pair(a: int, b: int, room: int) -> tuple[int, int]:
    """Lengths after the longer of two was cut, token by token, until both fit `room`."""
    if a + b <= room:
        return a, b
    half = room // 2
    if a <= half:
        return a, room - a
    if b <= room - half:
        return room - b, b
    # Both are longer than half; one at a time from the longer leaves them equal, the first one less.
    return half, room - half


def frame_texts(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, length: int, cut: Cut
) -> dict[str, np.ndarray]:
    """{"tokens", "segments" [n, L] int32, with pairs also "token_types" [n, L] int32}.

    Segments are 1, and 0 on padding; token types are 1 on the second text and its end (0 where the tokenizer says so).

    Errors: InputError when `length` leaves no room for text.
    """
    frame = Frame.of(tokenizer)
    special = 2 if pairs is None else 2 + len(frame.between)
    if length <= special:
        raise InputError(f"data.length {length} leaves no room beside {special} special tokens")
    first = tokenizer.encode_batch(list(texts))
    second = None if pairs is None else tokenizer.encode_batch(list(pairs))
    tokens = np.full((len(first), length), frame.pad, np.int32)
    segments, types = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, a in enumerate(first):
        b = a[:0] if second is None else second[row]
        n, m = fit_pair(len(a), len(b), length - special)
        cut.add(len(a) + len(b), n + m)
        own = [frame.start, *a[:n]]
        if second is not None:
            own += [*frame.between, *b[:m]]
            types[row, len(own) - m : len(own) + 1] = frame.second
        used = len(own) + 1
        tokens[row, :used] = [*own, frame.end]
        segments[row, :used] = 1
    out = {"tokens": tokens, "segments": segments}
    return out if second is None else out | {"token_types": types}
