"""Text to ids and back, without losing a byte: SentencePiece (BPE, unigram) or plain UTF-8 bytes.

decode(encode(x)) == x for every string that UTF-8 can write. SentencePiece (Kudo and Richardson, 2018) gets
there with identity normalisation, byte fallback, no dummy prefix and no whitespace trimming; the one
character it cannot hold is its own space sign U+2581, which is written here as its three byte pieces. Ids
are turned back into text by a table of bytes, so the length of a piece in `byte_lengths` is by construction
what decoding adds.

Newlines are ordinary characters, not symbols of their own: pieces such as "):\\n" and "\\n\\n\\n" are
learned, which on Python source is worth 6% fewer tokens. Runs of spaces are pieces too.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bigmodel_jax import atomic
from bigmodel_jax.data.corpus import read_bytes
from bigmodel_jax.data.pieces import SPACE, Bytes, Tokenizer, cores, one_line, piece_bytes, utf8
from bigmodel_jax.data.published import FOLDER, open_published
from bigmodel_jax.data.storage import size_of
from bigmodel_jax.errors import InputError, nearest

MODEL_FILE = "tokenizer.model"
KINDS = ("bpe", "unigram", "bytes")
PIECES = {  # what a piece may run across -> SentencePiece switches
    "script": {"split_by_unicode_script": True, "split_by_whitespace": True, "max_sentencepiece_length": 16},
    "word": {"split_by_unicode_script": False, "split_by_whitespace": True, "max_sentencepiece_length": 16},
    "phrase": {
        "split_by_unicode_script": False,
        "split_by_whitespace": False,
        "max_sentencepiece_length": 32,
    },
}
SAMPLE_BYTES = {
    "bpe": 32 << 20,
    "unigram": 4 << 20,
    "bytes": 0,
}  # text to learn from; unigram takes 10 s per 4 MB
_CHUNK = 4000  # characters of text per training sentence
_SEGMENT = 1 << 18  # longest text given to SentencePiece at once: its memory is about 100 bytes per character
_COVERAGE = 0.9999
_RESERVED = 4 + 3 + 256  # special pieces, tab runs, bytes


class SentencePiece(Tokenizer):
    """A SentencePiece model given as the bytes of its file. A model that loses text is refused with an
    InputError.
    """

    def __init__(self, model: bytes, name: str = MODEL_FILE):
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"{name} is not a SentencePiece model: {one_line(error)}") from None
        self.model, self.processor = model, processor
        size = processor.get_piece_size()
        special = [i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)]
        table = [piece_bytes(processor, i) for i in range(size)]
        eos = processor.eos_id()
        if eos < 0:
            raise InputError(f"{name} has no end-of-sequence piece; train it with one (eos_id)")
        pad = processor.pad_id() if processor.pad_id() >= 0 else eos
        mask = processor.piece_to_id("<mask>")
        super().__init__(
            table,
            special,
            eos,
            pad,
            mask if processor.is_control(mask) else None,
            hashlib.sha256(model).hexdigest(),
        )
        self.kind = "sentencepiece"
        lookup = {table[i]: i for i in range(size) if processor.is_byte(i)}
        if len(lookup) != 256:
            raise InputError(
                f"{name} has {len(lookup)} of the 256 byte pieces and would lose text; train it with byte_fallback"
            )
        self._space_sign = [lookup[bytes([value])] for value in SPACE.encode()]
        probe = "  a \tb\r\n\n\u212b  "
        if self.decode(self.encode(probe)) != probe:
            raise InputError(
                f"{name} changes text (normalisation, dummy prefix or trimmed spaces), so "
                "decode(encode(x)) != x; train one here"
            )

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[np.ndarray]:
        parts: list[str] = []
        owners: list[list[int]] = []  # per text: positions in `parts`, -1 for the space sign
        for text in texts:
            owner = []
            for number, piece in enumerate(text.split(SPACE)):
                owner += [-1] if number else []
                for segment in _segments(piece, _SEGMENT):
                    owner.append(len(parts))
                    parts.append(segment)
            owners.append(owner)
        for part in parts:
            utf8(part)
        encoded = self.processor.encode(parts, num_threads=threads or cores()) if parts else []
        result = []
        for owner in owners:
            if len(owner) == 1 and owner[0] >= 0:
                result.append(np.array(encoded[owner[0]], np.int32))
            else:
                ids = [
                    value for position in owner for value in (self._space_sign if position < 0 else encoded[position])
                ]
                result.append(np.array(ids, np.int32))
        return result

    def save(self, directory: str) -> str:
        atomic.write(os.path.join(directory, MODEL_FILE), self.model)
        return MODEL_FILE


def _segments(text: str, size: int) -> Iterator[str]:
    """Cut after the last newline that fits into `size` characters, or at `size` where there is none."""
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start, start + size) + 1 or start + size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def check_settings(kind: str, vocab_size: int, pieces: str) -> None:
    """Raise InputError for what train_tokenizer would refuse before it has seen any text."""
    for what, value, known in (("kind", kind, KINDS), ("pieces", pieces, PIECES)):
        if value not in known:
            raise InputError(
                f"tokenizer {what} '{value}' is unknown; choose from {', '.join(known)}{nearest(value, known)}"
            )
    if kind != "bytes" and vocab_size < _RESERVED + 64:
        raise InputError(
            f"vocab_size {vocab_size} is too small for {kind}; at least {_RESERVED + 64}, or use the bytes tokenizer"
        )


def train_tokenizer(
    texts: Iterable[str], *, kind: str = "bpe", vocab_size: int = 4096, pieces: str = "word"
) -> Tokenizer:
    """Learn a tokenizer. Deterministic: the same texts in the same order give the same fingerprint.

    kind: "bpe" (about 2 s for 11 MB), "unigram" (slower), "bytes" (nothing to learn, vocab_size is ignored).
    vocab_size: ids in all, special ones included; more than the texts can fill is an InputError.
    pieces: "script" (letters and punctuation apart), "word" (a piece never runs past a space: ").join(") or
    "phrase" ("for i in range("): fewer tokens each, at the same vocabulary; use "
    ""word" where whole words are masked.
    """
    check_settings(kind, vocab_size, pieces)
    if kind == "bytes":
        return Bytes()
    sentences = [s for text in texts for part in text.split(SPACE) for s in _segments(part, _CHUNK)]
    return SentencePiece(_train(sentences, kind, vocab_size, pieces))


def _within(sentences: list[str], limit: int) -> tuple[list[str], float]:
    """(sentences, share of their characters to get a piece of their own), for at most `limit` characters.

    SentencePiece takes no share below 0.98: where that is needed, sentences are cut at the rarest characters.
    """
    counts: collections.Counter[str] = collections.Counter()
    for sentence in sentences:
        counts.update(sentence)
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    total = max(sum(counts.values()), 1)
    share = sum(counts[character] for character in ordered[:limit]) / total
    if share >= 0.98 or not sentences:
        return sentences, min(_COVERAGE, share)
    rare = re.compile(f"[{re.escape(''.join(ordered[limit:]))}]+")
    return [part for sentence in sentences for part in rare.split(sentence) if part], 1.0


def _train(sentences: list[str], kind: str, vocab_size: int, pieces: str) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentences, coverage = _within(sentences, (vocab_size - _RESERVED) // 2)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type=kind, vocab_size=vocab_size,
            character_coverage=coverage, byte_fallback=True,
            required_chars=SPACE,  # without a piece a space would become the bytes of the space sign
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, max_sentence_length=1 << 20,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, control_symbols=["<mask>"],
            # SentencePiece never learns a piece with a tab in it
            user_defined_symbols=["\t", "\t\t", "\t\t\t\t"],
            num_threads=2, seed_sentencepiece_size=100_000, minloglevel=2, **PIECES[pieces],
        )  # fmt: skip
    except RuntimeError as error:
        fits = re.search(r"value <= (\d+)", str(error))
        if fits or not sentences:
            most = f"at most {fits.group(1)}" if fits else "no piece"
            raise InputError(
                f"vocab_size {vocab_size} is more than this text can fill ({most}); give more "
                "text, a smaller vocab_size or tokenizer='bytes'"
            ) from None
        raise InputError(f"training a {kind} tokenizer of {vocab_size} pieces failed: {one_line(error)}") from None
    return model.getvalue()


def load_tokenizer(path: str) -> Tokenizer:
    """Open the tokenizer of a prepared directory (local or URL), of a converted run, of a folder with a
    published one (see published.py), or a SentencePiece file that loses no text.

    A directory whose meta.json names another fingerprint than the file has is an InputError.
    """
    path = os.fspath(path).rstrip("/")
    if path.endswith(".model"):
        return SentencePiece(read_bytes(path), path)
    found = None if _exists(f"{path}/meta.json") else of_model(path)
    if found is not None:
        return found
    try:
        meta = json.loads(read_bytes(f"{path}/meta.json"))
        name, expected = meta["tokenizer"], meta["tokenizer_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}/meta.json is damaged ({one_line(error)}); prepare the directory again") from None
    if name not in ("bytes", MODEL_FILE, FOLDER):
        raise InputError(f"{path}/meta.json names the tokenizer {name!r}; expected 'bytes' or '{MODEL_FILE}'")
    tokenizer = Bytes() if name == "bytes" else of_model(f"{path}/{FOLDER}" if name == FOLDER else path)
    if tokenizer is None:
        raise InputError(f"{path} lost its {name}; prepare the directory again")
    if tokenizer.fingerprint != expected:
        raise InputError(
            f"{path}/{name} has fingerprint {tokenizer.fingerprint[:12]}, meta.json says "
            f"{str(expected)[:12]}; prepare the directory again"
        )
    return tokenizer


def _exists(path: str) -> bool:
    try:
        return size_of(path) >= 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def of_model(path: str) -> Tokenizer | None:
    """The tokenizer of a run's folder or of a published model, ours where it is one of ours."""
    if _exists(f"{path}/{MODEL_FILE}") and not _exists(f"{path}/tokenizer.json"):
        with contextlib.suppress(InputError):  # one that loses text is read as its model reads it
            return SentencePiece(read_bytes(f"{path}/{MODEL_FILE}"), f"{path}/{MODEL_FILE}")
    return open_published(path) or (None if path.endswith(f"/{FOLDER}") else of_model(f"{path}/{FOLDER}"))
