"""`bigmodel convert`: a published model as a run that the other verbs accept, and back, bitwise."""

from __future__ import annotations

import functools
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from bigmodel_jax import cli, experiment, offline, tree
from bigmodel_jax import convert as converting
from bigmodel_jax.data.instructions import Chat
from bigmodel_jax.data.pieces import Bytes
from bigmodel_jax.data.tokenizer import load_tokenizer
from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import FAMILIES, published
from bigmodel_jax.hf import safetensors as st
from bigmodel_jax.hf.family import class_names, labels, numbered
from bigmodel_jax.hf.tokenizer_json import tokenizer_json
from bigmodel_jax.learn import state as states
from bigmodel_jax.programs import Programs
from bigmodel_jax.train import train
from tests import tiny

SIZES = {"vocab_size": 272, "num_layers": 2, "embed_dim": 32, "num_heads": 2, "max_length": 32}
SECTION = {"name": "decoder", **SIZES}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder of a published GPT-2 with a byte tokenizer, the run made of it, our parameters)."""
    home = tmp_path_factory.mktemp("convert")
    section = published.complete(SECTION)
    rng = np.random.default_rng(0)
    shapes = published.shapes_of(published.build(section))
    ours = {path: (rng.normal(size=x.shape) * 0.1).astype(x.dtype) for path, x in shapes.items()}
    published.write_folder(str(home / "gpt2"), section, ours, shard_bytes=30_000)
    for name, text in tokenizer_json(Bytes()).items():
        (home / "gpt2" / name).write_text(text)
    report = converting.convert(f"hf:{home / 'gpt2'}", str(home / "run"))
    assert report["parameters"] == sum(x.size for x in ours.values()) and report["tokenizer"] == "published"
    return home / "gpt2", home / "run", ours


def test_the_run_holds_the_parameters_wherever_it_is_moved(model, tmp_path):
    _, run, ours = model
    shutil.copytree(run, tmp_path / "moved")
    exp, programs, state, step = offline.open_run(str(tmp_path / "moved"), [])
    assert step == 0 and exp.config["data"]["name"] == "none" and exp.config["model"]["num_layers"] == 2
    held = tree.flatten(state["params"])
    assert held.keys() == ours.keys()
    for path in ours:
        np.testing.assert_array_equal(held[path], ours[path], err_msg=path)
    assert exp.data.tokenizer.encode("hé").tolist() == list("hé".encode())
    assert str(tmp_path) not in (run / "config.json").read_text()


def test_generate_continues_as_the_model_does(model, capsys):
    """Greedy text of the command against the full forward pass, token by token."""
    _, run, ours = model
    exp, _, _, _ = offline.open_run(str(run), [])
    prompt, new = "ab", 3
    capsys.readouterr()
    cli.run(["generate", "--workdir", str(run), "--prompt", prompt, "--length", str(new), "--temperature", "0"])
    text = capsys.readouterr().out.removesuffix("\n")
    ids = exp.data.tokenizer.prompt(prompt)

    @jax.jit
    def logits(tokens):
        out = exp.model.apply({"params": tree.unflatten(ours), "stats": {}}, tokens=tokens, train=False)
        return out.head(out.hidden)[0]

    for _ in range(new):  # what is behind the text does not reach it
        row = np.array([ids + [0] * (8 - len(ids))], np.int32)
        ids.append(int(np.argmax(logits(row)[len(ids) - 1])))
    assert text == prompt + exp.data.tokenizer.decode(ids[2:], continued=True)


def test_there_and_back_is_bitwise(model, tmp_path):
    folder, run, _ = model
    report = converting.convert(str(run), f"hf:{tmp_path / 'out'}", shard_gb=2e-5)
    assert report["model_type"] == "gpt2" and st.INDEX in report["files"] and "tokenizer.json" in report["files"]
    before, after = st.open_tensors(folder), st.open_tensors(tmp_path / "out")
    assert set(before) == set(after)
    for name in before:
        assert before.read(name).tobytes() == after.read(name).tobytes() and before.dtype(name) == after.dtype(name)
    said, says = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out"))
    assert says == said | {"eos_token_id": 256, "pad_token_id": 257}
    assert (folder / "tokenizer.json").read_text() == (tmp_path / "out/tokenizer.json").read_text()
    converting.convert(str(run), f"hf:{tmp_path / 'narrow'}", dtype="bfloat16")
    narrow = st.open_tensors(tmp_path / "narrow")
    assert {narrow.dtype(name) for name in narrow} == {np.dtype(ml_dtypes.bfloat16)}
    converting.convert(f"hf:{tmp_path / 'narrow'}", str(tmp_path / "run"), ["--config.model.param_dtype=float32"])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"]["param_dtype"] == "float32" and config["model"]["dtype"] == "bfloat16"


def test_an_encoder_decoder_begins_with_the_token_of_its_config(tmp_path):
    """T5's answers begin with its padding, not with the end of text that a decoder of ours would begin with."""
    foreign = T5 | {"decoder_start_token_id": 7}
    section = published.complete(FAMILIES["t5"].config(foreign))
    shapes = published.shapes_of(published.build(section))
    leaves = {path: np.full(leaf.shape, 0.1, leaf.dtype) for path, leaf in shapes.items()}
    published.write_folder(str(tmp_path / "t5"), section, leaves, family="t5")
    for start in (7, None):
        config = {k: v for k, v in foreign.items() if start is not None or k != "decoder_start_token_id"}
        (tmp_path / "t5/config.json").write_text(json.dumps(config))
        converting.convert(f"hf:{tmp_path / 't5'}", str(tmp_path / f"run{start}"))
        exp = offline.open_run(str(tmp_path / f"run{start}"), [])[0]
        assert exp.data.decoder_start == (-1 if start is None else start)


def test_an_import_ends_at_every_token_that_it_names(model, tmp_path, capsys):
    """generation_config.json before config.json, one id or several; the text is cut where the first of them comes."""
    source, run, _ = model
    folder = tmp_path / "gpt2"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())

    def ends(stated, generation=None):
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": stated}))
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        return published.end_tokens(str(folder), json.loads((folder / "config.json").read_text()))

    assert ends(None) == [] and ends(7) == [7] and ends([7, 8]) == [7, 8] and ends([7, 8], 9) == [9]
    with pytest.raises(InputError, match="generation_config.json': eos_token_id '<end>' should be an id"):
        ends(7, "<end>")

    def written(run):
        capsys.readouterr()
        asked = ["--prompt", "ab", "--length", "4", "--seed", "3", "--temperature", "2", "--json"]
        cli.run(["generate", "--workdir", str(run), *asked])
        return json.loads(capsys.readouterr().out)

    whole = written(run)
    assert offline.open_run(str(run), [])[0].data.end_tokens == (256,) and whole["reason"] == "length"
    ends(256, [256, whole["tokens"][2]])
    converting.convert(f"hf:{folder}", str(tmp_path / "run"))
    found = written(tmp_path / "run")
    assert found["reason"] == "eos" and found["tokens"] == whole["tokens"][:2]


@pytest.mark.parametrize("template", ["", "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"])
def test_a_published_folder_has_the_template_that_its_conversations_were_learned_in(template, tmp_path):
    """Read back, it gives the same ids. Control: the template that was beside the files gives others."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for name, text in tokenizer_json(Bytes()).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    chat, before = Chat(Bytes(), template), load_tokenizer(str(tmp_path))
    assert Chat(before).encode(talk)[0].tolist() != chat.encode(talk)[0].tolist()
    converting._save_template(chat, tmp_path)
    after = load_tokenizer(str(tmp_path))
    assert [x.tolist() for x in Chat(after).encode(talk)] == [x.tolist() for x in chat.encode(talk)]
    assert Chat(after).prompt(talk[:1]) == chat.prompt(talk[:1]) and after.eos == before.eos


def test_training_starts_from_it_and_what_was_trained_is_published(model, tmp_path):
    """init_from the converted run; the trained run's export holds its parameters, and opens with its tokenizer."""
    _, run, ours = model
    raw = tiny.raw("decoder", tmp_path) | {"steps": 1, "schedule": {"name": "constant"}}
    raw["model"] = SECTION | {"vocab_size": 272}
    raw |= {"init_from": {"path": str(run)}, "optimizer": {"name": "sgd", "lr": 0.0}}
    train(experiment.resolve(raw), str(tmp_path / "tuned"))
    report = converting.convert(str(tmp_path / "tuned"), f"hf:{tmp_path / 'out'}")
    assert report["model_type"] == "gpt2" and report["step"] == 1
    back = dict(published.open_folder(str(tmp_path / "out")).parameters())
    for path in ours:  # a learning rate of zero
        np.testing.assert_array_equal(back[path], ours[path], err_msg=path)
    text = "naïve <mask>\n"
    assert load_tokenizer(str(tmp_path / "out")).encode(text).tolist() == Bytes().encode(text).tolist()


def test_a_tuned_classifier_comes_back_with_its_outputs_and_their_names(tmp_path, monkeypatch):
    """Published encoder -> classifier of named classes -> published -> a run again, and its evaluation."""
    monkeypatch.setattr(experiment, "build", functools.partial(experiment.build, devices=jax.devices()[:1]))
    sizes = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "max_length": 24, "vocab_size": 272}
    section = published.complete({"name": "encoder", "head": "none", "pooler": True, "token_types": 2, **sizes})
    rng = np.random.default_rng(0)
    shapes = published.shapes_of(published.build(section))
    ours = {path: (rng.normal(size=x.shape) * 0.3).astype(x.dtype) for path, x in shapes.items()}
    published.write_folder(str(tmp_path / "bert"), section, ours)
    (tmp_path / "bert/tokenizer.json").write_text(tokenizer_json(Bytes())["tokenizer.json"])
    words = ("rotten", "rotten", "rotten", "fresh")
    rows = [{"text": f"{word} film {i}", "label": word} for i, word in enumerate(words * 10)]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    films = {
        "name": "labelled_text", "train": str(tmp_path / "films.jsonl"), "validation": str(tmp_path / "films.jsonl"),
        "tokenizer": str(tmp_path / "bert"), "length": 24,
    }  # fmt: skip
    raw = {
        "steps": 4, "batch_size": 8, "eval": {"batch_size": 40}, "log": {"tensorboard": False},
        "model": {"name": "encoder", "head": "classes", "pooler": True, "token_types": 2, **sizes},
        "objective": {"name": "classification"}, "data": films | {"classes": ("rotten", "fresh")},
        "init_from": {"path": f"hf:{tmp_path / 'bert'}", "skip": ("^head/",)},
        "optimizer": {"name": "adamw", "lr": 0.05}, "schedule": {"name": "constant"},
    }  # fmt: skip
    train(experiment.resolve(raw), str(tmp_path / "tuned"))
    assert converting.convert(str(tmp_path / "tuned"), f"hf:{tmp_path / 'out'}")["model_type"] == "bert"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "rotten", "1": "fresh"} and config["label2id"] == {"rotten": 0, "fresh": 1}
    converting.convert(f"hf:{tmp_path / 'out'}", str(tmp_path / "back"))
    tokens = rng.integers(0, 256, (8, 24)).astype(np.int32)

    def logits(run):
        exp, programs, state, _ = offline.open_run(str(tmp_path / run), [])
        apply = jax.jit(lambda v: exp.model.apply(v, tokens=tokens, segments=np.ones_like(tokens), train=False))
        out = apply(programs.eval_variables(state))
        return np.asarray(out.head(out.hidden)), exp.data.report["classes"]

    (before, names), (after, found) = logits("tuned"), logits("back")
    np.testing.assert_array_equal(before, after)
    assert np.abs(before).max() > 0.01 and names == found == ["rotten", "fresh"]

    def evaluated(run, *data):
        where = ["--out", str(tmp_path / "eval"), "--resamples", "20"]
        cli.run(["eval", "--workdir", str(tmp_path / run), *where, *(f"--config.data.{leaf}" for leaf in data)])
        report = json.loads((tmp_path / "eval/eval.json").read_text())
        shown = report["sets"]["validation"]["details"]["classes"]
        assert shown == ["rotten", "fresh"][:: -1 if len(data) > len(films) else 1]
        return report["eval"]["validation"]["loss"]

    given = [f"{leaf}={value}" for leaf, value in films.items()]
    loss = evaluated("tuned")
    assert evaluated("back", *given) == pytest.approx(loss, rel=1e-6)
    # The control: alphabetical classes are those of other outputs.
    assert abs(evaluated("back", *given, "classes=('fresh','rotten')") - loss) > 0.01
    again = converting.convert(str(tmp_path / "back"), f"hf:{tmp_path / 'again'}")
    assert again["model_type"] == "bert"
    assert json.loads((tmp_path / "again/config.json").read_text())["id2label"] == config["id2label"]


def test_what_stands_in_the_way_of_a_published_form_is_named():
    section = published.complete({"name": "encoder", "head": "classes", "num_classes": 2, **SIZES})
    assert published.express(section | {"pooler": True})[0] == "bert"
    with pytest.raises(InputError, match="no published form.*'bert', has model.pooler=True .here False.$"):
        published.express(section)
    with pytest.raises(
        InputError, match="'bert', has model.pooler=True .here False., model.pooling='first' .here 'mean'"
    ):
        published.express(section | {"pooling": "mean"})
    names = {"id2label": {"0": "a", "1": "b"}}
    assert class_names(names) == ("a", "b") and class_names(labels(numbered(2))) == ()
    for other in (None, ["a", "b"], {"0": "a", "2": "b"}, {"0": "a", "1": "a"}, {"0": "a", "1": None}):
        assert class_names({"id2label": other}) == ()


T5 = {
    "model_type": "t5", "vocab_size": 272, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    "relative_attention_num_buckets": 8,
}  # fmt: skip


def paired(folder, monkeypatch, section, **data):
    """The directory of a run on pairs of texts with initial parameters: what `convert` opens there."""
    (folder / "pairs.tsv").write_text("source\ttarget\n" + "".join(f"ab{i}\txy{i}\n" for i in range(9)))
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text("{}")
    raw = {
        "steps": 1, "batch_size": 4, "model": section, "objective": {"name": "seq2seq"},
        "optimizer": {"name": "sgd"}, "schedule": {"name": "constant"},
        "data": {"name": "pairs", "files": str(folder / "pairs.tsv"), "source_tokenizer": "bytes", **data},
    }  # fmt: skip
    exp = experiment.build(experiment.resolve(raw), devices=jax.devices()[:1])
    programs = Programs(exp)
    state = programs.init(jax.random.key(0))
    monkeypatch.setattr(offline, "open_run", lambda *_: (exp, programs, state, 0))
    return str(folder / "run")


def test_a_run_with_two_tokenizers_is_not_published_with_one(tmp_path, monkeypatch):
    run = paired(tmp_path, monkeypatch, FAMILIES["t5"].config(T5), target_tokenizer="characters")
    with pytest.raises(InputError, match="one for both; train with data.target_tokenizer=''"):
        converting.convert(run, f"hf:{tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


BART = {
    "model_type": "bart", "vocab_size": 272, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip


@pytest.mark.parametrize("foreign", [T5, BART], ids=["t5", "bart"])
def test_a_published_pair_has_the_ids_of_its_tokenizer(tmp_path, monkeypatch, foreign):
    """Bytes end with 256 and are padded with 257, answers begin with 5; not the usual 1, 0, 0 of T5."""
    run = paired(tmp_path, monkeypatch, FAMILIES[foreign["model_type"]].config(foreign), start=5)
    converting.convert(run, f"hf:{tmp_path / 'out'}")
    said = json.loads((tmp_path / "out/config.json").read_text())
    ids = {name: value for name, value in said.items() if name.endswith("_token_id")}
    assert said["model_type"] == foreign["model_type"] and ids == {
        "eos_token_id": 256, "pad_token_id": 257, "decoder_start_token_id": 5, "forced_eos_token_id": None,
    }  # fmt: skip
    assert load_tokenizer(str(tmp_path / "out")).eos == 256
    converting.convert(f"hf:{tmp_path / 'out'}", str(tmp_path / "back"))
    data = json.loads((tmp_path / "back/config.json").read_text())["data"]
    assert data["decoder_start"] == 5
    said |= {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}  # the control: what was written before
    (tmp_path / "out/config.json").write_text(json.dumps(said))
    converting.convert(f"hf:{tmp_path / 'out'}", str(tmp_path / "other"))
    assert json.loads((tmp_path / "other/config.json").read_text())["data"]["decoder_start"] == 0


def test_low_rank_updates_are_published_and_generated_with_as_one_model(model, tmp_path, monkeypatch, capsys):
    """W + scale A B in numpy against the exported tensors, the forward pass of the factors and greedy text."""
    monkeypatch.setattr(experiment, "build", functools.partial(experiment.build, devices=jax.devices()[:1]))
    folder, _, ours = model
    raw = tiny.raw("decoder", tmp_path) | {"steps": 3, "schedule": {"name": "constant"}, "model": SECTION}
    raw |= {"init_from": {"path": f"hf:{folder}"}, "optimizer": {"name": "adamw", "lr": 0.1}}
    raw |= {"lora": {"rank": 2, "alpha": 8.0, "targets": (r"attn/(q|out)$", "mlp/in$")}}
    run = str(tmp_path / "run")
    train(experiment.resolve(raw), run)
    cli.run(["convert", "--from", run, "--to", f"hf:{tmp_path / 'out'}"])
    exp, _, state, _ = offline.open_run(run, [])
    halves = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(state["params"]).items()}
    # Our q is [N, D, H, K], out [N, H, K, D] and in [N, D, F]; GPT-2 keeps [inputs, outputs], q first of three.
    rules = {"attn/q": "ndr,nrhk->ndhk", "attn/out": "nhkr,nrd->nhkd", "mlp/in": "ndr,nrf->ndf"}
    names = {"attn/q": "attn.c_attn", "attn/out": "attn.c_proj", "mlp/in": "mlp.c_fc"}
    assert len(halves) == 2 * len(rules)
    merged, tensors = dict(ours), st.open_tensors(tmp_path / "out")
    for name, rule in rules.items():
        path = next(path for path in ours if path.startswith("layers/") and path.removesuffix("/kernel").endswith(name))
        change = 8.0 / 2 * np.einsum(rule, halves[f"lora/{path}/a"], halves[f"lora/{path}/b"])
        assert np.abs(change).max() > 0.05  # the control: the base alone is another model
        merged[path] = (ours[path] + change).astype(np.float32)
        for layer in range(2):
            stored = tensors.read(f"transformer.h.{layer}.{names[name]}.weight")
            want = merged[path][layer].reshape((-1, 32) if name == "attn/out" else (32, -1))
            np.testing.assert_allclose(stored[:, : want.shape[1]], want, atol=1e-6)
    tokens = np.random.default_rng(1).integers(0, 256, (2, 16)).astype(np.int32)
    opened = published.open_folder(str(tmp_path / "out"))

    @functools.partial(jax.jit, static_argnums=0)
    def logits(apply, variables, tokens):
        out = apply(variables, tokens=tokens, train=False)
        return out.head(out.hidden)

    def plain(parameters):
        return {"params": tree.unflatten(parameters), "stats": {}}

    whole = logits(opened.model.apply, plain(dict(opened.parameters())), tokens)
    np.testing.assert_allclose(whole, logits(exp.model.apply, states.variables(state), tokens), atol=1e-4)
    assert np.abs(whole - logits(opened.model.apply, plain(ours), tokens)).max() > 0.1

    capsys.readouterr()
    cli.run(["generate", "--workdir", run, "--prompt", "ab", "--length", "6", "--temperature", "0", "--json"])
    said = json.loads(capsys.readouterr().out)["tokens"]

    def greedy(parameters):
        ids = exp.data.tokenizer.prompt("ab")
        for _ in range(6):
            row = np.array([ids + [0] * (16 - len(ids))] * 2, np.int32)
            ids.append(int(np.argmax(logits(opened.model.apply, plain(parameters), row)[0, len(ids) - 1])))
        return ids[3:]

    assert said == greedy(merged)[: len(said)] and said != greedy(ours)[: len(said)] and len(said) > 1


def test_parameters_are_laid_over_the_mesh(model, tmp_path):
    folder, _, ours = model
    converting.convert(f"hf:{folder}", str(tmp_path / "run"), ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"])
    _, _, state, _ = offline.open_run(str(tmp_path / "run"), [])
    q = state["params"]["layers"]["attn"]["q"]
    assert len(q.sharding.device_set) == jax.device_count() and not q.sharding.is_fully_replicated
    np.testing.assert_array_equal(q, ours["layers/attn/q"])


def test_what_convert_refuses(model, tmp_path):
    folder, run, _ = model
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"\x80\x04.")
    new = str(tmp_path / "new")
    for source, target, words in (
        ("a", "b", "convert goes from"),
        ("hf:a", "hf:b", "convert goes from"),
        (f"hf:{tmp_path}/nowhere", new, "no folder"),
        (f"hf:{tmp_path}/empty", new, "config.json"),
        (f"hf:{tmp_path}/pickled", new, "pickle.*never opened"),
        (f"hf:{folder}", str(run), "already holds a run"),
        (str(run), f"hf:{folder}", "already holds a model"),
        (str(tmp_path / "empty"), f"hf:{new}", "not a run"),
    ):
        with pytest.raises(InputError, match=words):
            converting.convert(source, target)
    for options, words in (({"family": "lama"}, "did you mean 'llama'"), ({"dtype": "float8"}, "float8")):
        with pytest.raises(InputError, match=words):
            converting.convert(str(run), f"hf:{new}", **options)
    with pytest.raises(InputError, match="'llama'"):
        converting.convert(str(run), f"hf:{new}", family="llama")
    with pytest.raises(InputError, match="nothing to train on"):
        train(experiment.resolve(tiny.raw("decoder", tmp_path) | {"data": {"name": "none"}, "model": SECTION}), new)
