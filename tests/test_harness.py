"""The lm-eval harness drives a tiny run on local task files, offline; its numbers are those of a direct computation."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bigmodel_jax import experiment, offline
from bigmodel_jax.programs import Programs
from tests import tiny

CHOICES = [("alpha beta ", ["gamma", "omicron"], 0), ("document 7", ["\n", "zeta"], 1), ("mu nu", [" xi", " pi pi"], 0)]
LONG = "alpha beta gamma delta " * 5


def tasks(folder):
    """Three task files over local JSONL: choices, rolling likelihood, generation."""
    rows = [{"question": q, "choices": c, "answer": a, "text": LONG + q, "wanted": "x"} for q, c, a in CHOICES]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
    bodies = {
        "tiny_choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\ntarget_delimiter: ''\n",
        "tiny_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        "tiny_generate": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{wanted}}'\n"
        "generation_kwargs: {until: ['e'], max_gen_toks: 8, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    }
    for name, body in bodies.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{body}")
    return list(bodies)


def log_probabilities(model):
    """Full forward pass of one row, alone: tokens -> log p [L, V]. Padded to one length, for one compilation."""

    @jax.jit
    def forward(tokens):
        out = model.exp.model.apply(model.variables, tokens=tokens, train=False)
        return jax.nn.log_softmax(out.head(out.hidden)[0])

    return lambda row: np.asarray(forward(np.array([row + [0] * (32 - len(row))])), np.float64)[: len(row)]


def test_tasks_agree_with_a_direct_computation(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # read when the harness is imported
    from bigmodel_jax import harness

    exp = experiment.build(experiment.resolve(tiny.raw("decoder", tmp_path)))
    programs = Programs(exp)
    state = programs.init(jax.random.key(0))
    state["params"] = jax.tree.map(lambda leaf: leaf * 1.5, state["params"])  # untrained, and less uniform
    monkeypatch.setattr(offline, "open_run", lambda *_: (exp, programs, state, 0))
    model = harness.Bigmodel("run")
    log_p = log_probabilities(model)
    monkeypatch.setattr(harness, "Bigmodel", lambda *_, **__: model)
    names = tasks(tmp_path)
    report = harness.evaluate_tasks("run", [], tasks=names, include=str(tmp_path), out=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/tasks.json").read_text())["results"].keys() == set(names)
    assert "torch" not in sys.modules

    eos, encode = model.tokenizer.eos, lambda text: model.tokenizer.encode(text).tolist()
    right = []
    for question, choices, answer in CHOICES:
        sums = []
        for choice in choices:
            row = [eos, *encode(question + choice)]
            size = len(encode(choice))
            sums.append(log_p(row[:-1])[-size:][np.arange(size), row[-size:]].sum())
        right.append(int(np.argmax(sums)) == answer)
        found = model._loglikelihood_tokens([(None, [eos, *encode(question)], encode(c)) for c in choices])
        assert [value for value, _ in found] == pytest.approx(sums, rel=1e-4)
        # Control: without the beginning of the document it is another number.
        bare = model._loglikelihood_tokens([(None, encode(question), encode(c)) for c in choices])
        assert [value for value, _ in bare] != pytest.approx(sums, rel=1e-4)
    assert report["results"]["tiny_choice"]["acc,none"] == pytest.approx(np.mean(right))

    nats = size = 0.0
    for question, _, _ in CHOICES:  # disjoint windows of max_length 32, the first after end-of-text
        row = [eos, *encode(LONG + question)]
        size += len((LONG + question).encode())
        for start in range(0, len(row) - 1, 32):
            new = min(32, len(row) - 1 - start)
            inputs = row[start + new - 32 : start + new]  # the last window is full: it reaches back
            nats -= log_p(inputs)[-new:][np.arange(new), row[start + 1 : start + 1 + new]].sum()
    assert report["results"]["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(nats / size / np.log(2), rel=1e-4)

    asked, wanted = [], []
    for question, _, _ in CHOICES:
        row = [eos, *encode(question)]
        for _ in range(8):
            row.append(int(log_p(row)[-1].argmax()))
        wanted.append(model.tokenizer.decode(row[1 + len(encode(question)) :]).split("e")[0])
        asked.append(SimpleNamespace(args=(question, {"until": ["e"], "max_gen_toks": 8})))
    assert model.generate_until(asked) == wanted
