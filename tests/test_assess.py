"""`bigmodel eval`: measures from records against direct computations; the page stands alone."""

from __future__ import annotations

import io
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from bigmodel_jax import assess, experiment, offline
from bigmodel_jax import train as training
from bigmodel_jax.errors import InputError
from bigmodel_jax.programs import Programs
from tests import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: what offline.open_run gives}, with initial parameters."""
    base = tmp_path_factory.mktemp("assess")
    how = {"optimizer": {"name": "sgd"}, "schedule": {"name": "constant"}}
    digits = how | {"model": {"name": "linear"}, "objective": {"name": "classification"}, "data": {"name": "digits"}}
    # Lines of one group are copies of each other: ten independent ones, not sixty.
    rows = [{"text": f"{'good' if g % 2 else 'bad'} film {g}", "label": g % 2, "film": g} for g in range(10)] * 6
    (base / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    films = how | {
        "model": {"name": "recurrent_classifier", "hidden_dim": 4, "embed_dim": 4},
        "objective": {"name": "classification"},
        "data": {
            "name": "labelled_text", "train": str(base / "films.jsonl"), "validation": str(base / "films.jsonl"),
            "group": "film", "length": 16,
        },
    }  # fmt: skip
    found = {}
    for name, raw in (("digits", digits), ("films", films), ("text", tiny.raw("decoder", base))):
        exp = experiment.build(experiment.resolve(raw | {"eval": {"batch_size": 37}}))
        programs = Programs(exp)
        found[name] = (exp, programs, programs.init(jax.random.key(1)), 5)
    return found


@pytest.fixture
def evaluated(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(offline, "open_run", lambda path, overrides, step: runs[path])

    def run(name, **options):
        given = assess.Options(**({"resamples": 60} | options))
        report = assess.evaluate_run(name, [], out=str(tmp_path / name), options=given)
        assert json.loads((tmp_path / name / "eval.json").read_text())["sets"] == json.loads(json.dumps(report["sets"]))
        return report, tmp_path / name

    return run


def test_a_classifier_is_measured_like_scikit_learn_measures_it(runs, evaluated, capsys):
    report, folder = evaluated("digits")
    result = report["sets"]["validation"]
    exp, _, state, _ = runs["digits"]
    rows = exp.data.evals["validation"].source.gather(np.arange(360))
    batch = exp.data.evals["validation"].transforms[0]({"image": rows["image"], "label": rows["label"]}, None)
    out = exp.model.apply({"params": state["params"], "stats": {}}, train=False, image=batch["image"])
    logits = np.asarray(out.head(out.hidden))
    called = logits.argmax(1)
    assert result["values"]["accuracy"] == pytest.approx(metrics.accuracy_score(rows["label"], called))
    assert result["values"]["f1_macro"] == pytest.approx(
        metrics.f1_score(rows["label"], called, average="macro", zero_division=np.nan)
    )
    np.testing.assert_array_equal(result["details"]["confusion"], metrics.confusion_matrix(rows["label"], called))
    loss = jax.nn.logsumexp(logits, axis=1) - logits[np.arange(360), rows["label"]]
    assert result["worst"][0]["id"] == int(np.argmax(loss))
    assert result["worst"][0]["loss"] == pytest.approx(float(loss.max()), rel=1e-4)
    assert report["eval"]["validation"]["accuracy"] == pytest.approx(result["values"]["accuracy"])
    shown = capsys.readouterr().out
    assert "95% interval" in shown and f"{result['values']['accuracy']:.4g}" in shown

    page = (folder / "index.html").read_text()
    # Nothing outside: every source is data, and there are no links, scripts or imports.
    assert set(re.findall(r'(?:src|href)="([a-z]+):', page)) == {"data"} and "<script" not in page
    assert not re.search(r"https?://|@import|url\(", page) and 'name="viewport"' in page
    files = {path.name for path in folder.iterdir()}
    assert {"validation-roc.png", "validation-confusion.png", "validation-reliability.png"} <= files
    for path in folder.glob("*.png"):
        assert np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L")).std() > 1
    assert f"validation-example-{result['worst'][0]['id']}.png" in files


def test_text_shows_itself_and_groups_widen_the_interval(runs, evaluated, monkeypatch):
    report, folder = evaluated("films")
    result = report["sets"]["validation"]
    assert "resample 10 groups" in result["about"]
    assert re.fullmatch(r"(good|bad) film \d", result["worst"][0]["text"])
    assert result["worst"][0]["text"] in (folder / "index.html").read_text()
    found = result["intervals"]["nll"]
    assert found["units"] == 10
    # Control: without groups the same sixty rows seem to say more.
    monkeypatch.setattr(assess.Examples, "column", lambda self, name: None)
    alone = evaluated("films")[0]["sets"]["validation"]["intervals"]["nll"]
    assert alone["units"] == 60 and alone["high"] - alone["low"] < 0.7 * (found["high"] - found["low"])


def test_documents_are_scored_once_with_the_context_they_were_promised(runs, evaluated):
    exp, _, state, _ = runs["text"]
    source = exp.data.evals["validation"].source
    ends = source.document_ends()[0]
    starts = np.concatenate([[1], ends[:-1]])
    assert (ends - starts).max() > 64  # longer than a window

    @jax.jit
    def forward(tokens):
        out = exp.model.apply({"params": state["params"], "stats": {}}, tokens=tokens, train=False)
        return jax.nn.log_softmax(out.head(out.hidden))

    def direct(context, stride):
        """Mean nats, each token from a forward pass of its own over what its window shows before it."""
        rows, last, wanted = np.zeros((-(-len(documents) // 512) * 512, 32), np.int32), [], []
        for number, (start, place) in enumerate(documents):
            begin = 0 if place < context else stride * (1 + (place - context) // stride)
            row = source.take(0, np.arange(start - 1 + begin, start + place))
            rows[number, : len(row)] = row
            last.append(len(row) - 1)
            wanted.append(source.take(0, np.array([start + place]))[0])
        log_p = np.concatenate([forward(part) for part in np.split(rows, len(rows) // 512)])
        return -log_p[np.arange(len(documents)), last, wanted].astype(np.float64).mean()

    documents = [(a, place) for a, b in zip(starts, ends, strict=True) for place in range(b - a)]
    for stride in (8, 32):
        found = evaluated("text", context=32, stride=stride)[0]["sets"]["validation"]
        assert f"{len(documents):,} tokens" in found["about"]
        assert found["values"]["nll"] == pytest.approx(direct(32, stride), rel=1e-5)
        assert found["intervals"]["nll"]["units"] == len(ends)
    # Control: the two contexts give two numbers.
    assert direct(32, 8) != pytest.approx(direct(32, 32), rel=1e-5)
    with pytest.raises(InputError, match="max_length"):
        evaluated("text", context=64)
    with pytest.raises(InputError, match="causal LM"):
        evaluated("digits", context=8)


def test_a_tuned_model_writes_the_answers_of_held_out_conversations(tmp_path, capsys):
    def talks(name, answers):
        rows = [
            {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]}
            for said in (("hi", "yo", question, answer) for question, answer in answers.items())
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
        return str(tmp_path / name)

    template = "{% for m in messages %}{{ m.content }}{{ '|' if m.role == 'user' else eos_token }}{% endfor %}"
    data = {
        "name": "instructions", "train": talks("train.jsonl", {"left": "one two three four", "right": "five"}),
        "validation": talks("test.jsonl", {"left": "one two three four", "right": "six"}), "length": 48,
        "template": template,
    }  # fmt: skip
    config = experiment.resolve({
        "seed": 1, "steps": 100, "batch_size": 8, "data": data, "objective": {"name": "causal_lm"},
        "model": {"name": "decoder", "num_layers": 1, "embed_dim": 32, "num_heads": 2, "max_length": 48},
        "optimizer": {"name": "adamw", "lr": 1e-2}, "schedule": {"name": "constant"}, "eval": {"batch_size": 8},
        "log": {"tensorboard": False},
    })  # fmt: skip
    training.train(config, str(tmp_path / "run"))

    options = assess.Options(resamples=60, length=18)
    found = assess.evaluate_run(str(tmp_path / "run"), [], options=options)["sets"]["validation-generated"]
    # "right" is answered as in training, "five"; the control is that this is not what the held-out file has.
    assert found["values"]["exact_match"] == 0.5 and found["values"]["rouge_l"] == 0.5
    assert {each["written"] for each in found["worst"]} == {"five"}
    assert found["worst"][0]["references"] == ["six"] and found["worst"][0]["text"].endswith("right|")
    low, high = (found["intervals"]["exact_match"][side] for side in ("low", "high"))
    assert 0 < low < 0.5 < high < 1 and set(found["values"]) == {"exact_match", "f1", "rouge_l", "bleu", "chrf"}
    assert "exact match" in capsys.readouterr().out
