"""What every tokenizer is: a table from ids to the bytes they stand for; and the one that needs no file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bigmodel_jax.errors import InputError

SPACE = "\u2581"
_KANA_HAN = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")  # written without spaces


class Tokenizer:
    """A table of pieces: `table[id]` is the UTF-8 an id stands for, b"" for special ids.

    Attributes: `kind`, `eos`, `pad`, `mask` (None where the vocabulary has no mask id), `fingerprint`
    (sha256); of published ones also `bos`, `cls`, `sep`, `unk` (None where there are none) and
    `chat_template` (Jinja, "" where there is none).
    """

    kind = "bytes"
    lossless = True
    bos: int | None = None
    cls: int | None = None
    sep: int | None = None
    unk: int | None = None
    chat_template = ""

    def __init__(
        self,
        table: Sequence[bytes],
        special: Iterable[int],
        eos: int,
        pad: int,
        mask: int | None,
        fingerprint: str,
    ):
        self.table = list(table)
        self.eos, self.pad, self.mask, self.fingerprint = eos, pad, mask, fingerprint
        self._special = np.zeros(len(self.table), bool)
        self._special[list(special)] = True

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self.table)

    def encode(self, text: str) -> np.ndarray:
        """Return ids [n] int32 of `text`, without eos. A lone surrogate, which UTF-8 cannot write, is an
        InputError.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[np.ndarray]:
        """Return one id array [n_i] int32 per text. `threads` 0 uses every core; the result does not depend
        on it.
        """
        raise TypeError("use Bytes, SentencePiece or load_tokenizer")

    def prompt(self, text: str) -> list[int]:
        """Ids that a decoder continues `text` from, what begins a document included; never empty."""
        return [self.eos, *self.encode(text).tolist()]

    def encode_markup(self, text: str) -> np.ndarray:
        """As encode, but special tokens spelled out in `text` (as chat templates do) become their ids, where
        the tokenizer knows them by name.
        """
        return self.encode(text)

    def encode_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], spans [n, 2]): the characters text[start:stop] that each id covers.

        An id that holds only part of a character covers the whole of it.
        """
        ids = self.encode(text)
        ends = np.cumsum(self.byte_lengths()[ids])
        starts = np.concatenate([[0], ends[:-1]]) if len(ids) else ends
        # Character index of each byte; one more entry for the end.
        sizes = [len(character.encode()) for character in text]
        owner = np.append(np.repeat(np.arange(len(text)), sizes), len(text))
        last = len(owner) - 1
        stops = owner[np.clip(ends - 1, 0, last)] + (ends > starts)
        spans = np.stack([owner[np.clip(starts, 0, last)], np.minimum(stops, len(text))], axis=-1)
        return ids, spans.astype(np.int32).reshape(-1, 2)

    def decode(self, ids: Iterable[int], continued: bool = False) -> str:
        """Return the text of `ids`; special ids are silent, broken UTF-8 (a sampled id sequence) becomes
        U+FFFD. `continued`: the ids follow others, so that a space which begins them is part of the text.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes `ids` stand for. An id outside the vocabulary is an InputError."""
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
        if array.size and not (0 <= array.min() and array.max() < self.vocab_size):
            raise InputError(
                f"token id {array.max() if array.min() >= 0 else array.min()} is outside the "
                f"vocabulary of {self.vocab_size}"
            )
        return b"".join(map(self.table.__getitem__, array.tolist()))

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each piece, [V] int32; 0 for special ids. Over a document's tokens they add up to
        its size.
        """
        return np.array([len(piece) for piece in self.table], np.int32)

    def starts_word(self) -> np.ndarray:
        """[V] bool: the piece begins a word rather than continuing the one before it (for whole-word
        masking).

        A piece continues a word when it begins with a letter, digit, underscore or a byte of a longer
        character; Han, kana and Hangul characters are written without spaces and begin words themselves.
        Special ids are True.
        """
        return np.array(
            [special or _starts_word(piece) for piece, special in zip(self.table, self._special, strict=True)],
            bool,
        )

    def special(self) -> np.ndarray:
        """[V] bool: ids that stand for no text (eos, pad, mask, unknown) and are never produced by encode."""
        return self._special.copy()

    def save(self, directory: str) -> str:
        """Write what load_tokenizer needs into an existing local folder; return what meta.json calls it."""
        return "bytes"


def _starts_word(piece: bytes) -> bool:
    try:
        first = piece.decode("utf-8")[:1]
    except UnicodeDecodeError:
        return False
    return not (first.isalnum() or first == "_") or bool(_KANA_HAN.match(first))


class Bytes(Tokenizer):
    """UTF-8 bytes as ids 0-255, then eos 256, pad 257, mask 258."""

    def __init__(self) -> None:
        table = [bytes([value]) for value in range(256)] + [b""] * 3
        fingerprint = hashlib.sha256(b"bigmodel bytes 1: 0-255, eos 256, pad 257, mask 258").hexdigest()
        super().__init__(table, (256, 257, 258), 256, 257, 258, fingerprint)

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]


def cores() -> int:
    """Cores this process may use, which a batch system can set below those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text holds a lone surrogate at character {error.start}, which UTF-8 cannot write; clean it first"
        ) from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def piece_bytes(processor: Any, index: int) -> bytes:
    if processor.is_control(index) or processor.is_unknown(index):
        return b""
    piece = processor.id_to_piece(index)
    return bytes([int(piece[1:-1], 16)]) if processor.is_byte(index) else piece.replace(SPACE, " ").encode()
