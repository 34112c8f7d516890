"""Which inputs a generation task asks, what counts as right, and that batching changes no answer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from bigmodel_jax import answers, assess
from bigmodel_jax.data.answers import Pieces
from bigmodel_jax.data.datasets import DATASETS
from bigmodel_jax.measures import generated


@pytest.fixture
def exp(tmp_path):
    """Seven words, one with three targets, behind an encoder-decoder that is not asked to compute."""
    rows = [(word, word.upper()) for word in ("ab", "c", "abc", "ba", "cab", "b", "ca")]
    rows += [("c", "CEE"), ("c", "SEE"), ("c", "C")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in rows))
    dataset = DATASETS["pairs"](files=str(file), validation=str(file), source_length=8, length=8)
    data = dataset.load(seed=0, batch_size=4, eval_batch_size=3)
    model = SimpleNamespace(encode=True, cache=True)
    return SimpleNamespace(data=data, model=model, spec=dataset.spec(), layout=None)


def upper(exp):
    """A Generator that writes its source in capitals."""
    tokenizer = exp.data.tokenizer

    class Stand:
        def __init__(self, *_, **__):
            self.sizes = set()

        def longest(self):
            return 0

        def __call__(self, prompts, *, length, key, sampling, sources):
            assert sampling.temperature == 0.0 and all(prompt == [exp.data.decoder_start] for prompt in prompts)
            self.sizes.add(len(prompts))
            assert len(self.sizes) == 1  # one size, one program
            texts = [tokenizer.decode(np.array(source)).upper() for source in sources]
            return [SimpleNamespace(tokens=tokenizer.encode(text).tolist()) for text in texts]

    return Stand


def test_each_source_is_asked_once_and_every_listed_target_counts(exp, monkeypatch):
    pipeline = exp.data.evals["validation"]
    assert len(pipeline) == 10
    task = answers.task(exp, "validation", pipeline)
    assert task.texts == ["ab", "c", "abc", "ba", "cab", "b", "ca"]
    assert task.references[1] == ["C", "CEE", "SEE"] and task.references[0] == ["AB"]
    assert task.length == 4  # the longest target and its end
    monkeypatch.setattr(answers, "Generator", upper(exp))
    for rows in (1, 3, 7, 50):
        assert answers.predict(exp, None, task, rows) == [text.upper() for text in task.texts]
    assert answers.task(exp, "validation", pipeline, batches=1).texts == ["ab", "c", "abc"]


def test_answers_are_measured_by_input_not_by_row(exp):
    task = answers.task(exp, "validation", exp.data.evals["validation"])
    written = [text.upper() for text in task.texts]
    written[1], written[0] = "SEE", "wrong"
    found = assess._generated(task, written, {}, assess.Options(resamples=50))
    assert found.result["values"]["exact_match"] == pytest.approx(6 / 7)
    assert [each["id"] for each in found.result["worst"]] == [0]
    assert found.result["worst"][0]["written"] == "wrong" and found.result["worst"][0]["references"] == ["AB"]
    # Control: row by row, each with its one target, a word of several pronunciations counts several times.
    pairs = [(text, [target]) for text, targets in zip(written, task.references, strict=True) for target in targets]
    rows = generated.measure(*zip(*pairs, strict=True), resamples=50)
    assert rows["values"]["exact_match"] == pytest.approx(6 / 9)


def test_a_decoder_is_asked_where_the_data_gives_prompts_and_references():
    tokenizer = SimpleNamespace(prompt=lambda text: [0, *map(ord, text)])
    columns = {"prompt": ["1+1=", "2+2="], "references": [["2"], ["4", "four"]]}
    data = SimpleNamespace(about={"test": columns}, tokenizer=tokenizer)
    exp = SimpleNamespace(data=data, model=SimpleNamespace(encode=None, cache=True), spec={"tokens": None})
    pipeline = SimpleNamespace(size=lambda _: 1)
    task = answers.task(exp, "test", pipeline)
    assert task.prompts[1] == [0, 50, 43, 50, 61] and task.references == [["2"], ["4", "four"]] and task.sources is None
    assert answers.task(exp, "test", pipeline, batches=1).texts == ["1+1="]
    assert answers.task(exp, "validation", pipeline) is None


def test_a_prompt_gets_the_positions_that_are_left(monkeypatch):
    calls = []

    class Stand:
        def __init__(self, *_, **__):
            pass

        def longest(self):
            return 10

        def __call__(self, prompts, *, length, **_):
            calls.append((len(prompts), length))
            assert all(len(prompt) + length <= 10 for prompt in prompts)
            return [SimpleNamespace(tokens=[length] * length) for _ in prompts]

    monkeypatch.setattr(answers, "Generator", Stand)
    tokenizer = SimpleNamespace(eos=0, pad=0, decode=lambda ids, continued: "x" * len(ids))
    exp = SimpleNamespace(data=SimpleNamespace(tokenizer=tokenizer, end_tokens=(0,)), model=None, layout=None)
    sizes = [3, 7, 10, 4, 12, 2]
    task = answers.Task(np.arange(6), [[1] * n for n in sizes], None, [["x"]] * 6, [""] * 6, 6)
    for rows in (1, 2, 3, 6):
        assert [len(text) for text in answers.predict(exp, None, task, rows)] == [6, 3, 0, 6, 0, 6]
    calls.clear()
    answers.predict(exp, None, task, 3)
    assert calls == [(1, 3), (3, 6)]  # those with room for all of it stay together


def test_a_question_is_answered_from_the_best_of_its_windows():
    """Question 0 has two windows, 1 one, 2 has no answer; bytes are tokens, the context starts at place 3."""
    words = ["??|red fox.", "??|big dog.", "??|old cat.", "??|no owl.."]
    tokens = np.array([list(word.encode()) for word in words])
    start, end = np.full((2, 4, 11), -5.0)
    for row, (a, b, score) in enumerate([(3, 5, 1.0), (7, 9, 4.0), (3, 5, 2.0), (6, 8, 1.0)]):
        start[row, a], end[row, b] = score, score
    start[:, 0] = end[:, 0] = [3.0, 0.0, 0.0, 6.0]  # the first window and the last prefer "no answer"
    start[0, 1] = end[0, 1] = 9.0  # the question itself is no candidate
    rows = {"tokens": tokens, "token_types": np.tile(np.arange(11) >= 3, (4, 1)).astype(int)}
    columns = {
        "question": [0, 0, 1, 2], "group": [0, 0, 1, 2], "text": ["q0", "q0", "q1", "q2"],
        "references": [["Dog", "the big dog"]] * 2 + [["old cat"], [""]],
    }  # fmt: skip
    tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids.tolist()).decode())
    examples = SimpleNamespace(
        ids=np.arange(4), rows=lambda places: rows, column=columns.get, text=lambda place: columns["text"][place],
        exp=SimpleNamespace(data=SimpleNamespace(tokenizer=tokenizer)),
        records={"start_logits": start, "end_logits": end, "loss": np.array([1.0, 2.0, 5.0, 0.5])},
    )  # fmt: skip
    found = assess._spans(examples, assess.Options(resamples=50)).result
    assert found["about"].startswith("3 questions in 4 windows")
    assert [each["predicted"] for each in found["worst"]] == ["old", "dog", ""]
    assert found["values"] == pytest.approx({"exact_match": 2 / 3, "f1": (1 + 2 / 3 + 1) / 3})
    # Where the context is known, it is cut from there: here its words have other letters than the tokens.
    own = np.stack([np.arange(8), np.arange(1, 9)], 1)
    columns["pieces"] = [Pieces(text, 3, own) for text in ("RED FOX.", "BIG DOG.", "OLD CAT.", "NO OWL..")]
    found = assess._spans(examples, assess.Options(resamples=50)).result
    assert [each["predicted"] for each in found["worst"]] == ["OLD", "DOG", ""]


def test_short_texts_are_among_the_largest_losses():
    records = {"id": np.arange(3), "loss": np.array([30.0, 9.0, 2.0]), "weight": np.array([20.0, 3.0, 2.0])}
    examples = SimpleNamespace(
        records=records, ids=records["id"], column=lambda name: None, text="text {}".format, target=lambda place: {},
        pipeline=SimpleNamespace(source=None),
    )  # fmt: skip
    found = assess._tokens(examples, assess.Options(resamples=50)).result
    assert [(each["id"], each["loss"]) for each in found["worst"]] == [(1, 3.0), (0, 1.5), (2, 1.0)]
    assert found["worst"][0]["text"] == "text 1" and found["values"]["nll"] == pytest.approx(41 / 25)
