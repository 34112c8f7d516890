"""What a person sees: text that comes in pieces, stop strings across tokens, a conversation in the terminal."""

from __future__ import annotations

import argparse
import signal

import jax
import numpy as np
import pytest

from bigmodel_jax import cli, talk
from bigmodel_jax.data.instructions import PLAIN
from bigmodel_jax.data.tokenizer import Bytes
from bigmodel_jax.errors import InputError
from bigmodel_jax.generate import Continuation, Generator, Sampling
from bigmodel_jax.generate.text import Reader, cut, settled
from bigmodel_jax.models import MODELS


def test_stop_strings_end_at_the_first_of_them():
    assert cut("one two three", ["three", "two"]) == ("one ", True)
    assert cut("one", ["two", ""]) == ("one", False)
    assert settled("one tw", ["two"]) == "one " and settled("one tow", ["two"]) == "one tow"


def test_text_comes_in_pieces_without_half_characters_or_half_stops():
    tokens = list("naïve END of it".encode())  # one token per byte: ï and the stop string span several
    reader, shown = Reader(Bytes(), ["END"]), []
    for size in range(1, len(tokens) + 1):
        shown.append(reader.fresh(tokens[:size], final=size == len(tokens)))
    assert "".join(shown) == "naïve " and "ï" in shown
    assert [reader.ended(tokens[:size]) for size in (8, 9, 10)] == [False, False, True]
    assert [reader.kept(tokens[:size]) for size in (5, 10, 16)] == [5, 10, 10]
    plain = Reader(Bytes())
    assert plain.fresh(tokens[:3], final=False) == "na" and plain.fresh(tokens[:3], final=True) == "\ufffd"


@pytest.fixture(scope="module")
def speaker():
    """A model of bytes that says the same for the same seed and text."""
    model = MODELS["decoder"](
        vocab_size=259, num_layers=1, embed_dim=16, num_heads=2, max_length=17, attention="reference",
        tied_embeddings=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), model.abstract()[0])
    out = talk.Speaker.__new__(talk.Speaker)
    out.args = argparse.Namespace(
        length=9, stop=[], stream=True, interactive=True, seed=0, beams=0, length_penalty=1.0, json=False
    )
    out.tokenizer, out.paired, out.template, out.sampling = Bytes(), False, "", Sampling(top_k=5)
    out.generator = Generator(model, variables, eos=(256,), pad=257)
    return out


ENDED = Continuation([], [], "eos")


def asked(*lines):
    """What the terminal gives: lines, exceptions, then the end."""
    left = list(lines)

    def ask(prompt: str) -> str:
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    return ask


def test_a_conversation_continues_until_the_input_ends(speaker, capsys):
    answers = talk.converse(speaker, asked("ab", KeyboardInterrupt(), "cd"))
    assert capsys.readouterr().out == f"{answers[0]}\n\n{answers[1]}\n\n"
    assert talk.converse(speaker, asked("ab", "cd")) == answers


def test_what_was_said_is_the_next_prompt_and_the_oldest_is_forgotten(speaker):
    memory = talk.Conversation(speaker)
    assert memory.asked("ab") == {"prompts": [[256, *b"ab"]]}
    memory.answered("x", [120])
    assert memory.asked("cd") == {"prompts": [[256, *b"abxcd"]]}
    assert memory.asked("12345")["prompts"] == [list(b"xcd12345")]  # 17 positions, 9 of them for the answer


def test_a_chat_template_frames_every_turn(speaker, monkeypatch):
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    monkeypatch.setattr(speaker.tokenizer, "chat_template", template)
    assert talk.chat_template({"name": "text"}, Bytes()) == ""
    assert talk.chat_template({"name": "instructions", "template": ""}, Bytes()) == PLAIN
    speaker.template = talk.chat_template({"name": "none"}, speaker.tokenizer)
    memory = talk.Conversation(speaker)
    assert bytes(memory.asked("hi")["prompts"][0]) == b"u:hi;a:"
    memory.answered("yo", [1, 2])
    assert bytes(memory.asked("x")["prompts"][0]) == b"u:x;a:"  # with the first turn it would be 16 tokens of 8
    memory.room = 0
    memory.answered("z", [3])
    assert bytes(memory.asked("y")["prompts"][0]) == b"u:x;a:z;u:y;a:"


TURNS = (
    "{% for m in messages %}{{ m.content }};{% endfor %}{% if messages[-1].content == '?' %}"
    "{{ raise_exception('not this') }}{% endif %}"
)


def test_a_line_that_cannot_be_answered_is_not_kept(speaker, capsys, monkeypatch):
    """17 positions, 9 of them for the answer. Control: a line that fits is kept, and forgets the first."""
    monkeypatch.setattr(speaker, "template", TURNS)
    said = []
    monkeypatch.setattr(talk, "say", lambda speaker, inputs, *_, **__: said.append(inputs["prompts"][0]) or ("x", [1]))
    assert talk.converse(speaker, asked("ab", "123456789", "?", "cd", "1234567")) == ["x"] * 3
    assert [bytes(prompt) for prompt in said] == [b"ab;", b"ab;x;cd;", b"1234567;"]
    long, refused = capsys.readouterr().out.strip().splitlines()
    assert "a message of 10 tokens with its frame is longer than the 8 " in long and "not kept: go on" in long
    assert "not this" in refused and "not kept: go on" in refused
    monkeypatch.setattr(speaker.args, "length", 17)
    with pytest.raises(InputError, match="--length 17 leaves no room for a message in the model's 17 positions"):
        talk.converse(speaker, asked("ab"))


def test_a_prompt_draws_the_same_alone_as_among_others(speaker):
    among = speaker.whole(["ab", "ab", "cd"])
    assert among[0][0] != among[1][0]
    *_, (_, (row,), _) = speaker.stream(speaker.inputs(["ab"]), 0, first=1)
    assert row.tokens == among[1][1].tokens


def test_a_stream_says_what_the_whole_batch_says(speaker, capsys, monkeypatch):
    """Prompt by prompt in pieces of 8, and a batch in such pieces, as in one batch."""
    monkeypatch.setattr(talk, "Speaker", lambda args, overrides: speaker)
    texts = ["ab", "cdefg", "ab"]

    def said(seed, stream):
        args = vars(speaker.args) | {"prompt": texts, "seed": seed, "stream": stream, "interactive": False}
        monkeypatch.setattr(speaker, "args", argparse.Namespace(**args))
        answers = talk.generate_from_run(speaker.args, [])
        shown = "".join(f"{text}{answer}\n" for text, answer in zip(texts, answers, strict=True))
        assert capsys.readouterr().out == shown
        return answers

    whole = said(3, stream=False)
    assert said(3, stream=True) == whole and len(set(whole)) == 3
    assert said(4, stream=True) != whole
    shown = ["", "", ""]
    for readers, rows, final in speaker.stream(speaker.inputs(texts), 3):
        shown = [text + reader.fresh(row.tokens, final) for text, reader, row in zip(shown, readers, rows, strict=True)]
    assert shown == whole


def test_flags_reach_the_sampler(monkeypatch):
    exp = argparse.Namespace(
        data=argparse.Namespace(tokenizer=Bytes(), end_tokens=(0,)), model=argparse.Namespace(encode=None), layout=None,
        config={"data": {"name": "text"}},
    )  # fmt: skip
    programs, found = argparse.Namespace(eval_variables=lambda state: {}), []
    monkeypatch.setattr(talk, "open_run", lambda *_: (exp, programs, None, None))
    monkeypatch.setattr(talk, "Generator", lambda *args, **options: None)
    monkeypatch.setattr(talk.Speaker, "whole", lambda self, texts: found.append(self.sampling) or [("", ENDED)])
    flags = "--temperature 0.7 --top-k 40 --top-p 0.9 --min-p 0.05 --repetition-penalty 1.2".split()
    for number in range(0, len(flags) + 1, 2):
        cli.run(["generate", "--workdir", "x", *flags[:number]])
    plain = Sampling(temperature=0.8, top_p=0.95)
    assert found[0] == plain and found[-1] == Sampling(0.7, 40, 0.9, 0.05, 1.2)
    assert len(set(found)) == 6


def test_ctrl_c_ends_the_answer_only(speaker, capsys, monkeypatch):
    whole = talk.converse(speaker, asked("ab"))[0]
    pieces = speaker.generator.stream

    def interrupted(*args, **options):
        for rows in pieces(*args, **options):
            signal.raise_signal(signal.SIGINT)
            yield rows

    monkeypatch.setattr(speaker.generator, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    answers = talk.converse(speaker, asked("ab", "cd"))
    assert len(answers) == 2 and whole.startswith(answers[0]) and len(answers[0]) < len(whole)
    assert signal.getsignal(signal.SIGINT) is before
