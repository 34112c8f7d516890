"""Conversations for instruction tuning: a chat template makes the text, and only answers are learned.

A template is Jinja (what published tokenizers carry), run in a sandbox: it can format messages and nothing else. Where
answers begin and end is found by rendering the conversation up to each answer, so any template works whose text
of a conversation begins with the text of its beginning.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel_jax.data.framing import Cut
from bigmodel_jax.data.labelled import Rows, loaded, open_tokenizer
from bigmodel_jax.data.loaded import Loaded, Progress, Spec
from bigmodel_jax.data.packing import best_fit
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.data.tables import Table
from bigmodel_jax.errors import InputError

ROLES = ("system", "user", "assistant")
PLAIN = (
    "{% for m in messages %}### {{ m.role | capitalize }}\n{{ m.content }}\n"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
"""Template of a tokenizer that has none. Its end-of-text token after an answer is what stops generation."""
# Stand for special tokens in the text of a template, and become their ids. Unicode has no such characters.
_MARKS = {"eos": "\ufdd0", "bos": "\ufdd1", "pad": "\ufdd2", "unk": "\ufdd3"}


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template is not Jinja: {error}") from error


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    prompt: bool = False,
    tokens: Mapping[str, str] | None = None,
) -> str:
    """Text of a conversation. prompt: end with what an answer begins after. tokens: {"eos_token": ..., ...}.

    Errors: InputError for a template that fails on these messages, or that reaches for more than them.
    """
    import jinja2

    try:
        return _compiled(template).render(
            messages=[dict(m) for m in messages], add_generation_prompt=prompt, **(tokens or {})
        )
    except (jinja2.TemplateError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise InputError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from error


def parts(
    template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str] | None = None
) -> list[tuple[str, bool]]:
    """The text of a conversation as (piece, whether it is an answer), one piece for each answer; joined they are the
    rendered text.

    Errors: InputError for a template whose text of a beginning is not the beginning of its text.
    """
    out: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(template, messages[:index], prompt=True, tokens=tokens)
        after = render(template, messages[: index + 1], tokens=tokens)
        if not before.startswith(done) or not after.startswith(before):
            raise InputError("the chat template rewrites what came before, so answers cannot be told apart in its text")
        out += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    whole = render(template, messages, tokens=tokens)
    if not whole.startswith(done):
        raise InputError("the chat template rewrites what came before, so answers cannot be told apart in its text")
    return [*out, (whole[len(done) :], False)]


class Chat:
    """A tokenizer with its chat template.

    template: "" takes the tokenizer's own, or PLAIN where it has none.
    """

    def __init__(self, tokenizer: Any, template: str = ""):
        self.tokenizer = tokenizer
        self.template = template or getattr(tokenizer, "chat_template", "") or PLAIN
        ids = {role: getattr(tokenizer, role, None) for role in _MARKS}
        self._ids_of = {_MARKS[role]: index for role, index in ids.items() if index is not None}
        self.tokens = {f"{role}_token": "" if index is None else _MARKS[role] for role, index in ids.items()}

    @property
    def published(self) -> str:
        """The template that gives the ids of `encode` elsewhere, where no token is put before a conversation."""
        return "{{ eos_token }}" + PLAIN if self.template == PLAIN else self.template

    def pieces(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[list[int], bool]]:
        """The ids of a conversation in pieces (ids, whether they are an answer), one piece for each answer."""
        if any(mark in message["content"] for message in messages for mark in _MARKS.values()):
            raise InputError("a message holds a character of U+FDD0 to U+FDD3, which no text may have")
        begin = [([self.tokenizer.eos], False)] if self.template == PLAIN else []
        return begin + [(self._ids(text), learned) for text, learned in parts(self.template, messages, self.tokens)]

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n] int32, answer [n] bool) of a conversation."""
        pieces = self.pieces(messages)
        ids = [index for found, _ in pieces for index in found]
        answer = [learned for found, learned in pieces for _ in found]
        return np.array(ids, np.int32), np.array(answer, bool)

    def ends(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Tokens that end an answer: the end of text, and the special one that the template has last in an answer."""
        said = [ids for ids, learned in self.pieces(messages) if learned][-1]
        special = self.tokenizer.special()
        return tuple(dict.fromkeys([self.tokenizer.eos, *[index for index in said if special[index]][-1:]]))

    def question(self, messages: Sequence[Mapping[str, str]], length: int) -> tuple[list[int], str, int]:
        """(ids before an answer, its text, its tokens with its end): the last answer with a token before `length`."""
        answers = iter([m["content"] for m in messages if m["role"] == "assistant"])
        before: list[int] = []
        found: tuple[list[int], str, int] = [], "", 0
        for ids, learned in self.pieces(messages):
            if learned:
                text = next(answers)
                if len(before) < length or not found[0]:
                    found = list(before), text, len(ids)
            before += ids
        return found

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids that the next answer is generated after."""
        start = [self.tokenizer.eos] if self.template == PLAIN else []
        return start + self._ids(render(self.template, messages, prompt=True, tokens=self.tokens))

    def _ids(self, text: str) -> list[int]:
        out: list[int] = []
        for piece in re.split(f"([{''.join(_MARKS.values())}])", text):
            if piece in self._ids_of:
                out.append(self._ids_of[piece])
            elif piece:
                out += self.tokenizer.encode_markup(piece).tolist()
        return out


@dataclass(frozen=True)
class Instructions(Rows):
    """Conversations for the objective "causal_lm": weights are 1 on answers alone.

    messages: column of [{"role": "system" | "user" | "assistant", "content": text}, ...]; or prompt and response: two
    columns of text, taken where `messages` is "". template: Jinja, "" for the tokenizer's. length: tokens of a row;
    longer conversations are cut. Rows of training are packed with whole conversations, rows of evaluation hold one:
    `bigmodel eval` also has its last answer written, and held against the one that is there. tokenizer, vocab_size: as
    in `labelled_text`.
    """

    messages: str = "messages"
    prompt: str = "prompt"
    response: str = "response"
    template: str = ""
    tokenizer: str = "bytes"
    vocab_size: int = 4096
    length: int = 512

    def spec(self) -> Spec:
        row: Any = ((self.length,), "int32")
        fields: Spec = {"tokens": row, "targets": row, "segments": row, "positions": row}
        return fields | {"weights": ((self.length,), "float32")}

    def conversations(self, table: Table) -> list[list[dict[str, str]]]:
        """Messages of every row. Errors: InputError for a row of another form, with its line."""
        if not self.messages:
            pairs = zip(table.texts(self.prompt), table.texts(self.response), strict=True)
            return [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
        out = []
        for row, messages in enumerate(table.column(self.messages)):
            good = isinstance(messages, list) and all(
                isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages
            )
            if not good or not any(m["role"] == "assistant" for m in messages):
                raise InputError(
                    f"{table.where(row)}: '{self.messages}' should be a list of {{role, content}} with roles "
                    f"{', '.join(ROLES)} and at least one answer"
                )
            out.append(messages)
        return out

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        found = self.read()
        for name, table in found.items():
            talks = self.conversations(table)
            texts = {"text of talk": ["\n".join(m["content"] for m in talk) for talk in talks], "talk": talks}
            found[name] = Table(table.columns | texts, table.lines, table.names)
        found, report = self.cut(found, "text of talk", "")
        tokenizer = open_tokenizer(self.tokenizer, found["train"].texts("text of talk"), self.vocab_size)
        chat = Chat(tokenizer, self.template)
        sources, about, report["truncation"] = {}, {}, {}
        for split, table in found.items():
            cut = Cut()
            kept, talks = self._talks(chat, table, cut)
            cut.say(self.length, split)
            rows = self._rows(talks, tokenizer.pad, packed=split == "train")
            sources[split] = Arrays(rows)
            if split != "train":
                about[split] = self._about(chat, table.take(kept))
            learned = {"packed_rows": len(sources[split]), "answer_tokens": int(rows["weights"].sum())}
            report["truncation"][split] = cut.report() | learned
        return loaded(
            sources, seed, batch_size, eval_batch_size, tokenizer=tokenizer, report=report, about=about,
            ends=chat.ends(found["train"].column("talk")[0]),
        )  # fmt: skip

    def _about(self, chat: Chat, table: Table) -> dict[str, list[Any]]:
        """Columns for evaluation: the question, the answer it should have, and whose rows are not independent."""
        prompts, answers, sizes = zip(*(chat.question(m, self.length) for m in table.column("talk")), strict=True)
        out = {
            "text": table.texts("text of talk"), "prompt": list(prompts), "references": [[text] for text in answers],
            "new_tokens": list(sizes),
        }  # fmt: skip
        return out | ({"group": table.column(self.group)} if self.group else {})

    def _talks(self, chat: Chat, table: Table, cut: Cut) -> tuple[list[int], list[tuple[np.ndarray, np.ndarray]]]:
        """(rows of the table with something to learn, ids and answer of each, cut to the length)."""
        rows, talks = [], []
        for row, messages in enumerate(table.column("talk")):
            try:
                ids, answer = chat.encode(messages)
            except InputError as error:
                raise InputError(f"{table.where(row)}: {error}") from error
            kept = min(len(ids), self.length + 1)
            cut.add(len(ids), kept)
            if answer[1:kept].any():  # otherwise nothing of it would be learned
                rows.append(row)
                talks.append((ids[:kept], answer[:kept]))
        if not talks:
            raise InputError(f"no conversation has an answer within data.length {self.length}")
        return rows, talks

    def _rows(self, talks: Sequence[tuple[np.ndarray, np.ndarray]], pad: int, packed: bool) -> dict[str, np.ndarray]:
        sizes = np.array([len(ids) - 1 for ids, _ in talks])
        place = best_fit(sizes, self.length) if packed else np.arange(len(talks))
        shape = (int(place.max()) + 1, self.length)
        out = {name: np.zeros(shape, np.int32) for name in ("targets", "segments", "positions")}
        out |= {"tokens": np.full(shape, pad, np.int32), "weights": np.zeros(shape, np.float32)}
        used, number = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
        for (ids, answer), row in zip(talks, place.tolist(), strict=True):
            n = len(ids) - 1
            where = (row, slice(used[row], used[row] + n))
            number[row] += 1
            out["tokens"][where], out["targets"][where] = ids[:-1], ids[1:]
            out["weights"][where], out["segments"][where] = answer[1:], number[row]
            out["positions"][where] = np.arange(n)
            used[row] += n
        return out
