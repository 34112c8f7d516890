"""Labelled texts from tables: splits, class counts and duplicates shown before anything is trained on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel_jax.data import packages, sentences, splits, tables
from bigmodel_jax.data.framing import Cut, Frame, frame_texts
from bigmodel_jax.data.loaded import Loaded, Progress, Spec, ramp
from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.data.tables import Table
from bigmodel_jax.data.text import MaskTokens, NextToken, TargetBytes
from bigmodel_jax.data.tokenizer import Bytes, load_tokenizer, train_tokenizer
from bigmodel_jax.errors import InputError

log = logging.getLogger(__name__)
RARE = 0.25  # share of an even split below which a class is called rare


@dataclass(frozen=True)
class Rows:
    """Where rows come from and how they are split; leaves of every data set made from tables.

    train: files as `tables.read` takes them: a path, "package:...", "tfds:NAME:SPLIT", or several, each
      alone or as (label, file). validation, test: files of their own; "" takes them from `train`.
    folds: cut `train` into so many folds and hold out number `fold` as "test"; 0 does not.
    validation_share: share of what is left to hold out as "validation"; 0 holds out none.
    split_seed: of the splits, apart from the run's seed, so that seeds are compared on the same rows.
    group: column whose rows stay together in a split ("" for none).
    drop_duplicates: "none", "exact" or "normalised" (case, punctuation and spacing aside): first occurrences
      stay, and training rows that are in a test or validation file go.
    quotes: see `tables.read`. limit: use the first so many rows of the shuffled training set; 0 uses all.
    """

    train: str | tuple = ""
    validation: str | tuple = ""
    test: str | tuple = ""
    folds: int = 0
    fold: int = 0
    validation_share: float = 0.1
    split_seed: int = 0
    group: str = ""
    drop_duplicates: str = "none"
    quotes: str = "auto"
    limit: int = 0

    def read(self) -> dict[str, Table]:
        """Files as given, by split."""
        if not self.train:
            raise InputError("config leaf 'data.train' must name the training files")
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: tables.read(files, quotes=self.quotes) for name, files in given.items() if files}

    def cut(self, found: dict[str, Table], texts: str, labels: str) -> tuple[dict[str, Table], dict[str, Any]]:
        """(tables by split, report of rows and duplicates). labels: "" does not stratify."""
        report: dict[str, Any] = {"rows_read": {name: len(table) for name, table in found.items()}}
        if texts:
            found, report["duplicates"] = self._deduplicated(found, texts, labels)
        if self.folds and "test" not in found:
            if not 0 <= self.fold < self.folds:
                raise InputError(f"data.fold {self.fold} must lie in 0..{self.folds - 1}")
            n = len(found["train"])
            place = splits.folds(n, self.folds, seed=self.split_seed, **self._by(found["train"], labels))
            out = place == self.fold
            found = _divided(found, "test", np.flatnonzero(~out), np.flatnonzero(out))
        if self.validation_share and "validation" not in found:
            kept, out = splits.held_out(
                len(found["train"]), self.validation_share, seed=self.split_seed + 1, **self._by(found["train"], labels)
            )
            found = _divided(found, "validation", kept, out)
        if self.limit:
            order = splits.shuffled(len(found["train"]), self.split_seed, "limit")
            found["train"] = found["train"].take(np.sort(order[: self.limit]))
        if len(found) == 1:
            raise InputError("nothing is held out: give data.validation or data.test, folds or validation_share")
        if texts:
            report["duplicates"]["after_splitting"] = splits.duplicates(
                {name: table.texts(texts) for name, table in found.items()}
            )["between"]
        self._groups_apart(found)
        return found, report

    def _by(self, table: Table, labels: str) -> dict[str, Any]:
        """Classes and groups that a split must respect."""
        out: dict[str, Any] = {}
        if labels:
            values = table.column(labels)
            names = {label: i for i, label in enumerate(tables.vocabulary(values))}
            out["labels"] = [names[str(value)] for value in values]
        return out | ({"groups": table.column(self.group)} if self.group else {})

    def _deduplicated(self, found: dict[str, Table], texts: str, labels: str) -> tuple[dict[str, Table], dict]:
        columns = {name: table.texts(texts) for name, table in found.items()}
        named = {name: table.column(labels) for name, table in found.items()} if labels else None
        report = splits.duplicates(columns, named)
        dropped, seen = {}, []
        for name in reversed(found):  # test first: what it holds leaves validation and training
            keep = splits.without_duplicates(columns[name], self.drop_duplicates, seen)
            dropped[name] = len(columns[name]) - len(keep)
            found = found | {name: found[name].take(keep)}
            seen = seen + columns[name]
        done = f"{sum(dropped.values())} dropped ({self.drop_duplicates})"
        splits.say_duplicates(report, done if self.drop_duplicates != "none" else "none dropped (data.drop_duplicates)")
        return found, report | {"dropped": dropped}

    def _groups_apart(self, found: dict[str, Table]) -> None:
        if not self.group:
            return
        held = {name: set(map(str, table.column(self.group))) for name, table in found.items()}
        for name in set(found) - {"train"}:
            both = held["train"] & held[name]
            if both:
                log.info("%d groups of '%s' are in train and in %s, first '%s'", len(both), self.group, name, min(both))


def _divided(found: dict[str, Table], name: str, kept: np.ndarray, out: np.ndarray) -> dict[str, Table]:
    table = found["train"]
    rest = {other: value for other, value in found.items() if other != "train"}
    return {"train": table.take(kept), name: table.take(out)} | rest


def class_counts(labels: Mapping[str, np.ndarray], classes: list[str]) -> dict[str, dict[str, int]]:
    """{split: {class: rows}}, also said on the screen, with what always guessing the largest class gives.

    Errors: InputError for a class that the training rows lack.
    """
    counts = {name: np.bincount(ids, minlength=len(classes)) for name, ids in labels.items()}
    for name, count in counts.items():
        shares = ", ".join(f"{c} {100 * k / count.sum():.1f}%" for c, k in list(zip(classes, count, strict=True))[:8])
        more = f", and {len(classes) - 8} more" if len(classes) > 8 else ""
        log.info("%s: %d rows; %s%s; largest class alone %.1f%%", name, count.sum(), shares, more,
                 100 * count.max() / count.sum())  # fmt: skip
    none = [c for c, k in zip(classes, counts["train"], strict=True) if not k]
    if none:
        raise InputError(f"no training row has the label '{none[0]}'")
    rare = [c for c, k in zip(classes, counts["train"], strict=True) if k < RARE * counts["train"].sum() / len(classes)]
    if rare:
        balanced = counts["train"].sum() / (len(classes) * counts["train"])
        log.info("rare classes: %s; balanced objective.class_weights would be %s", ", ".join(rare[:8]),
                 tuple(round(float(w), 3) for w in balanced[:8]))  # fmt: skip
    return {name: dict(zip(classes, count.tolist(), strict=True)) for name, count in counts.items()}


def open_tokenizer(name: str, texts: Sequence[str] = (), vocab_size: int = 0) -> Any:
    """A tokenizer by name: "bytes", a prepared directory, a run, a tokenizer file or folder, or a folder "package:..."
    (packages.py); "bpe" and "unigram" learn one of `vocab_size` ids from `texts`, the same from the same texts."""
    if name in ("bpe", "unigram"):
        return train_tokenizer(texts, kind=name, vocab_size=vocab_size)
    return Bytes() if name == "bytes" else load_tokenizer(packages.locate(name))


@dataclass(frozen=True)
class LabelledText(Rows):
    """Texts (or pairs of texts) with one label each, for the objective "classification".

    text, pair, label: columns; pair "" for single texts. classes: label values in order, () for all found;
    other_labels "drop" leaves out rows with another one, "error" refuses them.
    tokenizer, vocab_size: see `open_tokenizer`; it learns from the training rows alone. length: tokens of a row,
    special ones included; longer texts are cut.
    """

    text: str = "text"
    pair: str = ""
    label: str = "label"
    classes: tuple = ()
    other_labels: str = "error"
    tokenizer: str = "bytes"
    vocab_size: int = 4096
    length: int = 128

    def spec(self) -> Spec:
        row: Any = ((self.length,), "int32")
        fields: Spec = {"tokens": row, "segments": row} | ({"token_types": row} if self.pair else {})
        return fields | {"label": ((), "int32"), "weights": ((), "float32")}

    def tables(self) -> tuple[dict[str, Table], list[str], dict[str, Any]]:
        """(rows by split, class names, report): what a baseline on the same folds reads, too."""
        found = self.read()
        if self.other_labels not in ("error", "drop"):
            raise InputError(f"data.other_labels '{self.other_labels}' should be error or drop")
        names = tables.vocabulary([v for t in found.values() for v in t.column(self.label)], self.classes)
        if self.other_labels == "drop":
            for split, table in found.items():
                keep = [row for row, value in enumerate(table.column(self.label)) if str(value) in names]
                found[split] = table.take(keep)
        if len(names) < 2:
            raise InputError(f"column '{self.label}' has only the label {names}; at least 2 are needed")
        for table in found.values():
            tables.label_ids(table, self.label, names)
        found, report = self.cut(found, self.text, self.label)
        return found, names, report | {"classes": names}

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        found, names, report = self.tables()
        tokenizer = open_tokenizer(self.tokenizer, found["train"].texts(self.text), self.vocab_size)
        labels = {split: tables.label_ids(table, self.label, names) for split, table in found.items()}
        report["counts"] = class_counts(labels, names)
        report["truncation"], sources = {}, {}
        for number, (split, table) in enumerate(found.items()):
            if progress is not None:
                progress(f"tokenize {split}", number, len(found))
            cut = Cut()
            pairs = table.texts(self.pair) if self.pair else None
            rows = frame_texts(tokenizer, table.texts(self.text), pairs, self.length, cut)
            cut.say(self.length, split)
            report["truncation"][split] = cut.report()
            sources[split] = Arrays(rows | {"label": labels[split], "weights": np.ones(len(table), np.float32)})
        about = {split: self.shown(table) for split, table in found.items() if split != "train"}
        return loaded(
            sources, seed, batch_size, eval_batch_size, tokenizer=tokenizer, num_classes=len(names), report=report,
            about=about,
        )  # fmt: skip

    def shown(self, table: Table) -> dict[str, list[Any]]:
        """Columns for evaluation: the text, and the group whose rows are not independent."""
        texts = table.texts(self.text)
        if self.pair:
            texts = [f"{a}\n{b}" for a, b in zip(texts, table.texts(self.pair), strict=True)]
        return {"text": texts} | ({"group": table.column(self.group)} if self.group else {})

    def unlabelled(self, length: int, stream: bool = False) -> tuple[Any, dict[str, Arrays], dict[str, Any]]:
        """(tokenizer, tokens and segments [n, length] by split, report) of the texts alone, the test split left out.

        stream: rows are cut from the texts end to end, each behind its end token, and only the last is padded.
        """
        found, _, report = self.tables()
        tokenizer = open_tokenizer(self.tokenizer, found["train"].texts(self.text), self.vocab_size)
        frame, sources = Frame.of(tokenizer), {}
        for split in found.keys() - {"test"}:
            texts = tokenizer.encode_batch(found[split].texts(self.text))
            if stream:
                whole = np.concatenate([np.append(ids, frame.end) for ids in texts])
                parts = [whole[at : at + length] for at in range(0, len(whole), length)]
            else:
                room = length - 2
                cut = [ids[at : at + room] for ids in texts for at in range(0, max(len(ids), 1), room)]
                parts = [np.array([frame.start, *part, frame.end]) for part in cut]
            tokens = np.full((len(parts), length), frame.pad, np.int32)
            for row, part in enumerate(parts):
                tokens[row, : len(part)] = part
            used = np.array([len(part) for part in parts])
            sources[split] = Arrays(
                {"tokens": tokens, "segments": (np.arange(length) < used[:, None]).astype(np.int32)}
            )
        return tokenizer, sources, report


@dataclass(frozen=True)
class MaskedTable(LabelledText):
    """The training rows of a `labelled_text` data set without their labels, for the objective "masked_lm".

    The same leaves give the same splits and tokenizer, so a model pretrained here has seen no held-out text. Texts
    longer than a row go on in the next. stream: rows are cut from the texts end to end and hold no padding.
    rate, whole_words, static, replace: as in `masked_text`.
    """

    rate: float = 0.15
    whole_words: bool = False
    static: bool = False
    replace: tuple = (0.8, 0.1)
    stream: bool = False

    def slots(self) -> int:
        """Masked positions a row can hold."""
        return int(np.ceil(self.rate * self.length)) + (8 if self.whole_words else 0)

    def spec(self) -> Spec:
        row: Any = ((self.length,), "int32")
        slots: Any = ((self.slots(),), "int32")
        fields: Spec = {"tokens": row, "segments": row, "masked_positions": slots, "masked_targets": slots}
        return fields | {"masked_weights": ((self.slots(),), "float32")}

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        tokenizer, sources, report = self.unlabelled(self.length, self.stream)
        return loaded(
            sources, seed, batch_size, eval_batch_size, (self.masks(tokenizer),), tokenizer=tokenizer, report=report
        )

    def masks(self, tokenizer: Any) -> MaskTokens:
        """Errors: InputError for a tokenizer without a mask token."""
        if tokenizer.mask is None:
            raise InputError(f"masked LM needs a tokenizer with a mask token; '{self.tokenizer}' has none")
        special = tuple(int(i) for i in np.flatnonzero(tokenizer.special()))
        words = tokenizer.starts_word() if self.whole_words else None
        return MaskTokens(
            tokenizer.vocab_size, tokenizer.mask, special, self.rate, self.slots(), words, self.static, self.replace
        )


@dataclass(frozen=True)
class MaskedTablePairs(MaskedTable):
    """As `masked_table`, in rows of two spans, and whether the second follows the first: see `masked_pairs`.

    A row of `length` has two spans of about (length - 3) / 2 tokens, which may begin and end inside of a text.

    Errors: InputError for stream=False.
    """

    stream: bool = True

    def __post_init__(self) -> None:
        if not self.stream:
            raise InputError("data 'masked_table_pairs' cuts texts end to end; stream=False is for 'masked_table'")

    def spec(self) -> Spec:
        return super().spec() | {"token_types": ((self.length,), "int32"), "random": ((), "int32"),
                                 "pair_weights": ((), "float32")}  # fmt: skip

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        tokenizer, sources, report = self.unlabelled(self.length - sentences.EXTRA, stream=True)
        masks, sep, steps = self.masks(tokenizer), Frame.of(tokenizer).end, {}
        for split, rows in sources.items():
            found = rows.gather(np.arange(len(rows)))
            sources[split] = Arrays({"tokens": found["tokens"], "weights": found["segments"].astype(np.float32)})
            steps[split] = (sentences.NextSpan(sources[split], sep, self.static), masks)
        return loaded(sources, seed, batch_size, eval_batch_size, steps, tokenizer=tokenizer, report=report)


@dataclass(frozen=True)
class CausalTable(LabelledText):
    """As `masked_table`, for the objective "causal_lm"."""

    stream: bool = False

    def spec(self) -> Spec:
        row: Any = ((self.length,), "int32")
        return {"tokens": row, "targets": row, "weights": (row[0], "float32"), "bytes": (row[0], "float32")}

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        tokenizer, sources, report = self.unlabelled(self.length + 1, self.stream)
        texts = {split: Arrays({"tokens": source.gather(np.arange(len(source)))["tokens"]})
                 for split, source in sources.items()}  # fmt: skip
        shift = (NextToken(Frame.of(tokenizer).pad), TargetBytes(tokenizer.byte_lengths()))
        return loaded(texts, seed, batch_size, eval_batch_size, shift, tokenizer=tokenizer, report=report)


def loaded(
    sources: dict[str, Any], seed: int, batch_size: int | tuple, eval_batch_size: int,
    transforms: tuple | Mapping[str, tuple] = (), **more: Any,
) -> Loaded:  # fmt: skip
    """Pipelines over in-memory rows: "train" shuffled, every other split read once in order.

    transforms: of all splits, or by split.
    """
    asked = transforms if isinstance(transforms, Mapping) else dict.fromkeys(sources, transforms)
    evals = {
        name: Pipeline(source, eval_batch_size, seed, asked[name], shuffle=False)
        for name, source in sources.items()
        if name != "train"
    }
    tokenizer = more.get("tokenizer")
    vocab_size = tokenizer.vocab_size if tokenizer is not None else 0
    train = Pipeline(sources["train"], ramp(batch_size), seed, asked["train"])
    return Loaded(train, evals, vocab_size=vocab_size, **more)
