"""What a document must look like to be trained on, and the reason for turning one away."""

from __future__ import annotations

import collections
import dataclasses
import unicodedata

from bigmodel_jax.errors import InputError, nearest

NORMALISE = ("none", "nfc")


@dataclasses.dataclass(frozen=True)
class Filters:
    """Limits on one document; the defaults turn away only documents without a visible character.

    min_characters, max_characters: length in code points; 0 means no upper limit.
    min_printable: least share of characters that print, line ends and tabs included.
    min_alphabetic: least share of letters among the characters that are not white space.
    max_line: longest line in characters; 0 means no limit.
    max_repeated_lines: largest share of non-blank lines that repeat an earlier line of the document.
    """

    min_characters: int = 1
    max_characters: int = 0
    min_printable: float = 0.0
    min_alphabetic: float = 0.0
    max_line: int = 0
    max_repeated_lines: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_printable", "min_alphabetic", "max_repeated_lines"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} is a share: {getattr(self, name)} should be between 0 and 1")
        for name in ("min_characters", "max_characters", "max_line"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} should not be negative, it is {getattr(self, name)}")
        if self.max_characters and self.max_characters < self.min_characters:
            raise InputError(
                f"max_characters {self.max_characters} is below min_characters "
                f"{self.min_characters}: nothing would be left"
            )

    def reason(self, text: str) -> str | None:
        """Why `text` is dropped, or None to keep it."""
        if not text or text.isspace():
            return "empty"
        if len(text) < self.min_characters:
            return "too_short"
        if self.max_characters and len(text) > self.max_characters:
            return "too_long"
        if self.min_printable or self.min_alphabetic:
            printable, alphabetic = shares(text)
            if printable < self.min_printable:
                return "not_printable"
            if alphabetic < self.min_alphabetic:
                return "not_alphabetic"
        if self.max_line and max(map(len, text.splitlines())) > self.max_line:
            return "long_line"
        if self.max_repeated_lines < 1.0 and repeated_lines(text) > self.max_repeated_lines:
            return "repeated_lines"
        return None


def shares(text: str) -> tuple[float, float]:
    """(share of characters that print or are white space, share of letters among those that are not white
    space).
    """
    counts = collections.Counter(text)
    solid = sum(n for c, n in counts.items() if not c.isspace())
    letters = sum(n for c, n in counts.items() if c.isalpha())
    visible = sum(n for c, n in counts.items() if c.isprintable() or c in "\n\r\t\f\v")
    return visible / max(len(text), 1), letters / max(solid, 1)


def repeated_lines(text: str) -> float:
    """Share of non-blank lines that repeat an earlier one; white space at both ends is ignored."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return 1.0 - len(set(lines)) / len(lines) if lines else 0.0


def normaliser(name: str):
    """The function text -> text called `name`: "none" or "nfc" (Unicode canonical composition)."""
    if name not in NORMALISE:
        raise InputError(f"normalise '{name}' is unknown; choose from {', '.join(NORMALISE)}{nearest(name, NORMALISE)}")
    return (lambda text: text) if name == "none" else (lambda text: unicodedata.normalize("NFC", text))
