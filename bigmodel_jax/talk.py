"""`bigmodel generate`: continue prompts of a run's model, whole, as a stream, as JSON, or in a conversation."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from bigmodel_jax.data.instructions import Chat
from bigmodel_jax.errors import InputError
from bigmodel_jax.generate import Continuation, Generator, Sampling, beam_search
from bigmodel_jax.generate.text import Reader
from bigmodel_jax.offline import open_run


def chat_template(data: Mapping[str, Any], tokenizer: Any) -> str:
    """What the run's conversations were written in: that of its data, of its tokenizer, or "" for none."""
    if data["name"] == "instructions":
        return Chat(tokenizer, data["template"]).template
    return getattr(tokenizer, "chat_template", "")


class Speaker:
    """A run's model with its tokenizer and the options of one command."""

    def __init__(self, args: argparse.Namespace, overrides: Sequence[str]):
        exp, programs, state, _ = open_run(args.workdir, overrides, args.step)
        if exp.data.tokenizer is None:
            raise InputError(f"'{args.workdir}' is not a language model: it has no tokenizer to generate text with")
        self.args, self.data, self.tokenizer = args, exp.data, exp.data.tokenizer
        self.paired = exp.model.encode is not None
        self.template = chat_template(exp.config["data"], self.tokenizer)
        self.sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
        self.generator = Generator(
            exp.model, programs.eval_variables(state), layout=exp.layout, int8=args.int8_cache,
            eos=exp.data.end_tokens, pad=self.tokenizer.pad,
        )  # fmt: skip

    def inputs(self, texts: Sequence[str]) -> dict[str, Any]:
        """prompts, and the sources of an encoder-decoder."""
        if not self.paired:
            return {"prompts": [self.tokenizer.prompt(text) for text in texts]}
        reader = self.data.source_tokenizer or self.tokenizer
        sources = [[*reader.encode(text).tolist(), reader.eos] for text in texts]
        return {"prompts": [[self.data.first_token]] * len(texts), "sources": sources}

    def stream(
        self, inputs: dict[str, Any], seed: int, continued: bool = True, first: int = 0
    ) -> Iterator[tuple[list[Reader], list[Continuation], bool]]:
        """(a reader of each row, what each has so far, whether that is all). first: number of the first prompt."""
        numbers = first + np.arange(len(inputs["prompts"]))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
        readers = [Reader(self.tokenizer, self.args.stop, continued) for _ in inputs["prompts"]]
        pieces = self.generator.stream(
            **inputs, length=self.args.length, key=keys, sampling=self.sampling,
            ended=(lambda row, tokens: readers[row].ended(tokens)) if self.args.stop else None,
            piece=8 if self.args.stream or self.args.interactive else 32,
        )  # fmt: skip
        for rows in pieces:
            yield readers, rows, all(row.reason for row in rows)

    def whole(self, texts: Sequence[str]) -> list[tuple[str, Continuation]]:
        """(text, tokens) of the continuation of each prompt."""
        inputs = self.inputs(texts)
        continued = [bool(text) and not self.paired for text in texts]
        if self.args.beams:
            found = beam_search(
                self.generator, **inputs, length=self.args.length, beams=self.args.beams,
                length_penalty=self.args.length_penalty,
            )  # fmt: skip
            rows = [beams[0] for beams in found]
        else:
            *_, (_, rows, _) = self.stream(inputs, self.args.seed)
        readers = [Reader(self.tokenizer, self.args.stop, follows) for follows in continued]
        for reader, row in zip(readers, rows, strict=True):
            if reader.ended(row.tokens):
                size = reader.kept(row.tokens)
                row.tokens, row.logprobs, row.reason = row.tokens[:size], row.logprobs[:size], "stop"
        return [(reader.text(row.tokens), row) for reader, row in zip(readers, rows, strict=True)]


def write(text: str) -> None:
    """Text to the terminal, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def generate_from_run(args: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """Carry out the command; returns the continuations."""
    if args.beams and (args.stream or args.interactive):
        raise InputError("beam search knows its answer only at the end; leave out --stream and --interactive")
    speaker = Speaker(args, overrides)
    if args.interactive:
        return converse(speaker, input)
    prompts = args.prompt or [""]
    if args.stream:
        return [
            say(speaker, speaker.inputs([text]), args.seed, "" if speaker.paired else text, first=number)[0]
            for number, text in enumerate(prompts)
        ]
    texts = []
    for prompt, (text, row) in zip(prompts, speaker.whole(prompts), strict=True):
        if args.json:
            print(json.dumps({"prompt": prompt, "text": text, **asdict(row)}))
        else:
            print(text if speaker.paired else prompt + text)
        texts.append(text)
    return texts


def say(
    speaker: Speaker, inputs: dict[str, Any], seed: int, before: str = "", stopped: Callable[[], bool] = lambda: False,
    first: int = 0,
) -> tuple[str, list[int]]:  # fmt: skip
    """Show one answer as it comes, behind `before`; returns its text and tokens, as far as they came.

    stopped: asked between pieces; True ends the answer.
    """
    write(before)
    shown = ""
    for (reader,), (row,), final in speaker.stream(inputs, seed, continued=bool(before), first=first):
        final = final or stopped()
        new = reader.fresh(row.tokens, final)
        write(new)
        shown += new
        if final:
            break
    write("\n")
    return shown, list(row.tokens)


def converse(speaker: Speaker, ask: Callable[[str], str]) -> list[str]:
    """Questions and answers until the input ends. Returns the answers.

    With the chat template of the run's conversations or of its tokenizer, where it has one; else each line continues
    the text so far. What no longer fits into the model's positions is forgotten, the oldest first. A line that cannot
    be answered, such as one longer than the model, is said to be so and forgotten, and the conversation goes on.
    """
    memory = Conversation(speaker)
    answers: list[str] = []
    while True:
        try:
            line = ask("> ")
        except EOFError:
            write("\n")
            return answers
        except KeyboardInterrupt:
            write("\n")
            continue
        try:
            with _interrupts() as stopped:
                text, tokens = say(speaker, memory.asked(line), speaker.args.seed + len(answers), stopped=stopped)
        except InputError as error:
            memory.refused()
            write(f"{error}. This message is not kept: go on with another, or leave with Ctrl-D\n")
            continue
        memory.answered(text, tokens)
        answers.append(text)


class Conversation:
    """What was said so far, as the model's next input."""

    def __init__(self, speaker: Speaker):
        self.speaker = speaker
        chats = speaker.template and not speaker.paired
        self.chat = Chat(speaker.tokenizer, speaker.template) if chats else None
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []
        self._before: tuple[list[dict[str, str]], list[int]] = [], []
        longest, length = speaker.generator.longest(), speaker.args.length
        if longest and length >= longest:
            raise InputError(f"--length {length} leaves no room for a message in the model's {longest} positions")
        self.room = longest - length if longest else 0

    def asked(self, line: str) -> dict[str, Any]:
        """Inputs for the answer to one more line. Errors: InputError for one that the model has no room for."""
        tokenizer = self.speaker.tokenizer
        self._before = list(self.messages), list(self.ids)
        if self.speaker.paired:
            return self.speaker.inputs([line])
        if self.chat is None:
            self.ids += tokenizer.encode(line).tolist() if self.ids else tokenizer.prompt(line)
            return {"prompts": [self.ids[-self.room :]]}
        self.messages.append({"role": "user", "content": line})
        prompt = self.chat.prompt(self.messages)
        while self.room and len(self.messages) > 1 and len(prompt) > self.room:
            del self.messages[:2]
            prompt = self.chat.prompt(self.messages)
        if self.room and len(prompt) > self.room:
            raise InputError(
                f"a message of {len(prompt)} tokens with its frame is longer than the {self.room} that an answer of "
                f"--length {self.speaker.args.length} leaves of the model's positions; shorten one of them"
            )
        return {"prompts": [prompt]}

    def refused(self) -> None:
        """Forget the line that was asked last, and no other."""
        self.messages, self.ids = self._before

    def answered(self, text: str, tokens: Sequence[int]) -> None:
        """Keep an answer."""
        self.messages.append({"role": "assistant", "content": text})
        self.ids += tokens


class _interrupts:
    """While active, Ctrl-C sets a flag instead of breaking off a program that runs on the device."""

    def __enter__(self) -> Callable[[], bool]:
        flag = threading.Event()
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, lambda *_: flag.set())
        return flag.is_set

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
