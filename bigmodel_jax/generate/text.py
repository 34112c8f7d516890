"""Tokens to text while they come: stop strings across token borders, characters in several tokens."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(text up to the first stop string, whether there is one)."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def settled(text: str, stops: Sequence[str]) -> str:
    """The part of `text` that later tokens cannot change: no unfinished character, no beginning of a stop string."""
    text = text.rstrip(UNFINISHED)
    held = max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
    )  # fmt: skip
    return text[: len(text) - held]


class Reader:
    """The text of one row of growing tokens."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), continued: bool = True):
        self.tokenizer, self.stops, self.continued = tokenizer, tuple(stops), continued
        self.shown = 0

    def text(self, tokens: Sequence[int]) -> str:
        """All of it, up to a stop string."""
        return cut(self.tokenizer.decode(list(tokens), continued=self.continued), self.stops)[0]

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string has come."""
        return cut(self.tokenizer.decode(list(tokens), continued=self.continued), self.stops)[1]

    def kept(self, tokens: Sequence[int]) -> int:
        """How many tokens the text up to a stop string takes, those of the stop string included; all without one."""
        return bisect.bisect_left(range(len(tokens)), True, key=lambda n: self.ended(tokens[:n]))

    def fresh(self, tokens: Sequence[int], final: bool) -> str:
        """What can be shown now and was not shown before."""
        text = self.text(tokens)
        if not final and not self.ended(tokens):
            text = settled(text, self.stops)
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new
