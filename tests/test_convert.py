"""`bigmodel convert`: a published model as a run that the other verbs accept, and back, bitwise."""

from __future__ import annotations

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from bigmodel_jax import cli, experiment, offline, tree
from bigmodel_jax import convert as converting
from bigmodel_jax.data.pieces import Bytes
from bigmodel_jax.data.tokenizer import load_tokenizer
from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import FAMILIES, published
from bigmodel_jax.hf import safetensors as st
from bigmodel_jax.hf.tokenizer_json import tokenizer_json
from bigmodel_jax.train import train
from tests import tiny

SECTION = {
    "name": "decoder", "vocab_size": 272, "num_layers": 2, "embed_dim": 32, "num_heads": 2, "max_length": 32,
}  # fmt: skip


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
    foreign = {
        "model_type": "t5", "vocab_size": 272, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
        "decoder_start_token_id": 7, "relative_attention_num_buckets": 8,
    }  # fmt: skip
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
