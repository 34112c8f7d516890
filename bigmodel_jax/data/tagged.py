"""Labels per word, aligned to the pieces of a tokenizer: tagging, named entities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel_jax.data import tables
from bigmodel_jax.data.framing import Cut, Frame
from bigmodel_jax.data.labelled import Rows, class_counts, loaded, open_tokenizer
from bigmodel_jax.data.loaded import Loaded, Progress, Spec
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.data.tables import Table
from bigmodel_jax.errors import InputError


def word_of_piece(text: str, spans: np.ndarray, words: list[str]) -> np.ndarray:
    """[n] number of the word that each piece begins in or continues; -1 for pieces of spaces alone.

    Args:
      text: the words with one space between. spans: [n, 2], characters of each piece.
    """
    owner = np.repeat(np.arange(len(words)), [len(word) + 1 for word in words])[: len(text)]
    out = np.full(len(spans), -1, np.int64)
    for piece, (start, stop) in enumerate(spans.tolist()):
        while start < stop and text[start] == " ":
            start += 1
        if start < stop:
            out[piece] = owner[start]
    return out


@dataclass(frozen=True)
class LabelledTokens(Rows):
    """Sentences of words with a label each, for the objective "token_classification".

    words, label: columns; lists in JSONL, or strings with spaces between words and between labels. classes: label
    values in order, () for all found. tokenizer, vocab_size, length: as in `labelled_text`.

    The first piece of a word carries its label (Devlin et al. 2019, section 5.3); later pieces, special tokens and
    words beyond `length` have weight 0, the last counted in the report.
    """

    words: str = "words"
    label: str = "labels"
    classes: tuple = ()
    tokenizer: str = "bytes"
    vocab_size: int = 4096
    length: int = 128

    def spec(self) -> Spec:
        row: Any = ((self.length,), "int32")
        return {"tokens": row, "segments": row, "labels": row, "weights": ((self.length,), "float32")}

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        found = {name: _with_text(table, self.words, self.label) for name, table in self.read().items()}
        found, report = self.cut(found, "text of words", "")
        every = [label for table in found.values() for labels in table.column(self.label) for label in labels]
        names = tables.vocabulary(every, self.classes)
        tokenizer = open_tokenizer(self.tokenizer, found["train"].texts("text of words"), self.vocab_size)
        sources, labels, report["truncation"] = {}, {}, {}
        for split, table in found.items():
            cut = Cut()
            rows = self._rows(tokenizer, table, names, cut)
            cut.say(self.length, split)
            report["truncation"][split] = cut.report()
            labels[split] = rows["labels"][rows["weights"] > 0]
            sources[split] = Arrays(rows)
        report |= {"classes": names, "counts": class_counts(labels, names)}
        about = {split: {"text": t.texts("text of words")} for split, t in found.items() if split != "train"}
        return loaded(
            sources, seed, batch_size, eval_batch_size, tokenizer=tokenizer, num_classes=len(names), report=report,
            about=about,
        )  # fmt: skip

    def _rows(self, tokenizer: Any, table: Table, names: list[str], cut: Cut) -> dict[str, np.ndarray]:
        frame, places = Frame.of(tokenizer), {name: i for i, name in enumerate(names)}
        shape = (len(table), self.length)
        tokens, segments = np.full(shape, frame.pad, np.int32), np.zeros(shape, np.int32)
        labels, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, (text, words) in enumerate(zip(table.texts("text of words"), table.column(self.words), strict=True)):
            ids, spans = tokenizer.encode_offsets(text)
            kept = min(len(ids), self.length - 2)
            cut.add(len(ids), kept)
            tokens[row, : kept + 2] = [frame.start, *ids[:kept], frame.end]
            segments[row, : kept + 2] = 1
            owner = word_of_piece(text, spans, words)[:kept]
            seen = -1
            for piece, word in enumerate(owner.tolist()):
                if word > seen:
                    label = str(table.column(self.label)[row][word])
                    if label not in places:
                        raise InputError(f"{table.where(row)}: label '{label}' is not one of {names[:20]}")
                    labels[row, piece + 1], weights[row, piece + 1], seen = places[label], 1.0, word
        return {"tokens": tokens, "segments": segments, "labels": labels, "weights": weights}


def _with_text(table: Table, words: str, label: str) -> Table:
    """Words and labels as lists of equal length, and the words as one text."""
    columns: dict[str, list[list[str]]] = {}
    for name in (words, label):
        values = table.column(name)
        columns[name] = [v.split() if isinstance(v, str) else [str(x) for x in v] for v in values]
    for row, (a, b) in enumerate(zip(columns[words], columns[label], strict=True)):
        if len(a) != len(b) or not a:
            raise InputError(f"{table.where(row)}: {len(a)} words in '{words}', {len(b)} labels in '{label}'")
        if any(not word or " " in word for word in a):
            raise InputError(f"{table.where(row)}: a word in '{words}' is empty or has a space in it")
    texts = {"text of words": [" ".join(each) for each in columns[words]]}
    return Table(table.columns | columns | texts, table.lines, table.names)
