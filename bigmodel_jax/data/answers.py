"""Questions whose answer is a span of a text (SQuAD, Rajpurkar et al. 2016), cut into overlapping windows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bigmodel_jax.data.framing import Frame
from bigmodel_jax.data.labelled import Rows, loaded, open_tokenizer
from bigmodel_jax.data.loaded import Loaded, Progress, Spec
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.data.tables import Table
from bigmodel_jax.errors import InputError

log = logging.getLogger(__name__)


def token_span(spans: np.ndarray, start: int, stop: int) -> tuple[int, int] | None:
    """(first, last) piece that covers the characters [start, stop); None where `spans` do not hold all of them."""
    inside = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < stop))
    if not len(inside) or spans[inside[0], 0] > start or spans[inside[-1], 1] < stop:
        return None
    return int(inside[0]), int(inside[-1])


class Pieces(NamedTuple):
    """Where the tokens of a window stand in its context: token `head` + i at the characters spans[i] ([n, 2])."""

    context: str
    head: int
    spans: np.ndarray

    def text(self, first: int, last: int) -> str:
        """The characters of tokens first ... last of the row, as the context has them; "" outside of it."""
        own = self.spans[max(first - self.head, 0) : max(last + 1 - self.head, 0)]
        return self.context[own[0, 0] : own[-1, 1]] if len(own) else ""


@dataclass(frozen=True)
class Spans(Rows):
    """Rows [cls] question [sep] window of the context [sep] (framing.py), for the objective "spans".

    question, context: columns. answers: column with {"text": [...], "answer_start": [...]} as in SQuAD's JSONL, empty
    lists for none; training uses the first. length: tokens of a row. stride: tokens that two windows of a context
    share. max_question: longer questions are cut. token_types: whether rows have them (1 on the context; RoBERTa: 0).

    A window without the whole answer has start = end = 0, the place that stands for no answer.
    """

    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    tokenizer: str = "bytes"
    vocab_size: int = 4096
    length: int = 384
    stride: int = 128
    max_question: int = 64
    token_types: bool = True

    def spec(self) -> Spec:
        row: Any = ((self.length,), "int32")
        fields: Spec = {"tokens": row, "segments": row} | ({"token_types": row} if self.token_types else {})
        return fields | {"start": ((), "int32"), "end": ((), "int32"), "weights": ((), "float32")}

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        found = {}
        for name, table in self.read().items():
            asked = zip(table.texts(self.question), table.texts(self.context), strict=True)
            texts = {"text of question": ["\n".join(each) for each in asked]}
            found[name] = Table(table.columns | texts, table.lines, table.names)
        found, report = self.cut(found, "text of question", "")
        tokenizer = open_tokenizer(self.tokenizer, found["train"].texts(self.context), self.vocab_size)
        sources, about, report["windows"] = {}, {}, {}
        for split, table in found.items():
            rows, owner, pieces, report["windows"][split] = self._rows(tokenizer, table)
            sources[split] = Arrays(rows)
            if split != "train":
                accepted = [list(answer["text"]) or [""] for answer in table.column(self.answers)]
                texts = table.texts(self.question)
                about[split] = {
                    "text": [texts[i] for i in owner], "references": [accepted[i] for i in owner],
                    "question": owner, "group": owner, "pieces": pieces,
                }  # fmt: skip
            log.info("%s: %s", split, ", ".join(f"{n} {what}" for what, n in report["windows"][split].items()))
        return loaded(sources, seed, batch_size, eval_batch_size, tokenizer=tokenizer, report=report, about=about)

    def _rows(
        self, tokenizer: Any, table: Table
    ) -> tuple[dict[str, np.ndarray], list[int], list[Pieces], dict[str, int]]:
        frame = Frame.of(tokenizer)
        count = {"questions": len(table), "windows": 0, "with_answer": 0, "questions_cut": 0, "answers_never_whole": 0}
        parts: dict[str, list[Any]] = {name: [] for name in ("tokens", "segments", "token_types", "start", "end")}
        owner: list[int] = []
        pieces: list[Pieces] = []
        questions, contexts = table.texts(self.question), table.texts(self.context)
        asked = tokenizer.encode_batch(questions)
        for row, context in enumerate(contexts):
            question = asked[row][: self.max_question]
            count["questions_cut"] += len(asked[row]) > self.max_question
            ahead = [frame.start, *question, *frame.between]
            room = self.length - len(ahead) - 1
            if room <= self.stride:
                raise InputError(
                    f"data.length {self.length} leaves {room} tokens for a window, which must be more than "
                    f"data.stride {self.stride}"
                )
            ids, spans = tokenizer.encode_offsets(context)
            place = self._answer(table, row, context)
            answered = False
            for at in range(0, max(len(ids) - self.stride, 1), room - self.stride):
                window, own = ids[at : at + room], spans[at : at + room]
                head = len(ahead)
                span = token_span(own, *place) if place else None
                answered |= span is not None
                row_tokens = [*ahead, *window, frame.end]
                used = len(row_tokens)
                parts["tokens"].append(row_tokens + [frame.pad] * (self.length - used))
                parts["segments"].append([1] * used + [0] * (self.length - used))
                parts["token_types"].append([0] * head + [frame.second] * (used - head) + [0] * (self.length - used))
                parts["start"].append(head + span[0] if span else 0)
                parts["end"].append(head + span[1] if span else 0)
                owner.append(row)
                pieces.append(Pieces(context, head, own))
                count["with_answer"] += span is not None
            count["answers_never_whole"] += bool(place) and not answered
        count["windows"] = len(owner)
        arrays = {name: np.array(values, np.int32) for name, values in parts.items()}
        if not self.token_types:
            del arrays["token_types"]
        return arrays | {"weights": np.ones(len(owner), np.float32)}, owner, pieces, count

    def _answer(self, table: Table, row: int, context: str) -> tuple[int, int] | None:
        """Characters of the first answer; None where there is none."""
        answer = table.column(self.answers)[row]
        if not isinstance(answer, dict) or not {"text", "answer_start"} <= answer.keys():
            raise InputError(f"{table.where(row)}: '{self.answers}' should be {{'text': [...], 'answer_start': [...]}}")
        if not answer["text"]:
            return None
        text, start = answer["text"][0], answer["answer_start"][0]
        if context[start : start + len(text)] != text:
            raise InputError(
                f"{table.where(row)}: the answer '{text[:40]}' is not at character {start} of the context, "
                f"which reads '{context[start : start + len(text)][:40]}'"
            )
        return start, start + len(text)
