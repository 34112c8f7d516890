"""Wrong input, through the command itself: one line, its exit code, and nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bigmodel_jax import cli, experiment
from bigmodel_jax.data.prepare import prepare
from bigmodel_jax.train import train
from tests import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def shards(home):
    """Prepared byte shards of the tiny corpus."""
    folder = str(home / "shards")
    prepare(tiny.corpus(home / "corpus"), folder, tokenizer="bytes", validation_fraction=0.2)
    return Path(folder)


@pytest.fixture(scope="module")
def trained(home):
    """Directory of a finished two-step decoder run."""
    config = experiment.resolve(tiny.raw("decoder", home) | {"steps": 4, "schedule": {"name": "constant"}})
    train(config, str(home / "trained"))
    return home / "trained"


def config_file(home: Path, kind: str = "decoder", **changes) -> str:
    path = home / f"config_{abs(hash(json.dumps(changes, sort_keys=True)))}_{kind}.py"
    path.write_text(f"def get_config():\n    return {tiny.raw(kind, home) | changes!r}\n")
    return str(path)


def answer(argv, monkeypatch, capsys) -> tuple[int, str]:
    """(exit code, the line on stderr) of a command run in this process."""
    codes = []

    class Left(Exception):
        pass

    def leave(code):
        codes.append(code)
        raise Left

    monkeypatch.setattr(cli.os, "_exit", leave)
    try:
        cli.main(argv)
    except Left:
        pass
    lines = capsys.readouterr().err.strip().splitlines()
    return (codes[0] if codes else 0), (lines[-1] if lines else "")


def folder(home: Path, name: str, **files: bytes) -> str:
    path = home / name
    path.mkdir(exist_ok=True)
    for file, content in files.items():
        (path / file.replace("__", ".")).write_bytes(content)
    return str(path)


def truncated(shards: Path, home: Path) -> str:
    copy = home / "truncated"
    shutil.copytree(shards, copy, dirs_exist_ok=True)
    shard = copy / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-6])
    return str(copy)


def text(home: Path, **changes) -> dict:
    return {"data": tiny.raw("decoder", home)["data"] | changes}


# name: (raw config changes, overrides, words that the line must hold)
CASES = {
    "missing corpus": (lambda h, s: text(h, corpus=str(h / "nowhere")), [], ["nowhere"]),
    "empty corpus": (lambda h, s: text(h, corpus=folder(h, "empty")), [], ["empty"]),
    "undecodable corpus": (
        lambda h, s: text(h, corpus=folder(h, "latin", a__txt=b"\xff\xfe\xe9", b__txt=b"\xe9\xe8")), [],
        ["2 undecodable"],
    ),
    "missing shards": (lambda h, s: text(h, shards=str(h / "none")), [], ["bigmodel prepare"]),
    "truncated shard": (lambda h, s: text(h, shards=truncated(s, h)), [], ["train-00000.bin", "truncated"]),
    "batch over mesh": (lambda h, s: {"batch_size": 12}, [], ["12", "multiples of 8"]),
    "microbatch": (lambda h, s: {}, ["--config.microbatch=3"], ["microbatch 3", "legal sizes"]),
    "eval batch": (lambda h, s: {}, ["--config.eval.batch_size=0"], ["eval.batch_size", "at least 1"]),
    "mesh too large": (lambda h, s: {}, ["--config.mesh.data=16"], ["16", "8 devices"]),
    "vocabulary": (lambda h, s: {}, ["--config.model.vocab_size=100"], ["100", "259"]),
    "length": (lambda h, s: {}, ["--config.data.length=64"], ["64", "max_length 32"]),
    "heads": (lambda h, s: {}, ["--config.model.num_heads=3"], ["head"]),
    "group": (lambda h, s: {}, ["--config.optimizer.groups=(('embed',{}),)"], ["layers/attn"]),
    "optimizer": (lambda h, s: {}, ["--config.optimizer.name=adamm"], ["adamw"]),
    "typo": (lambda h, s: {}, ["--config.optimizer.weight_dcay=1"], ["did you mean 'weight_decay'?"]),
    "batch norm groups": (
        lambda h, s: tiny.raw("resnet", h), ["--config.model.bn_group=3"], ["bn_group 3", "legal: [1, 2, 4, 8]"],
    ),
    "batch norm and accumulation": (
        lambda h, s: tiny.raw("resnet", h) | {"batch_size": 16, "microbatch": 8},
        ["--config.model.bn_group=0"], ["bn_group", "microbatch to 0"],
    ),
    "init_from nothing": (lambda h, s: {}, ["--config.init_from.path=/nonexistent"], ["/nonexistent"]),
    "unknown device": (lambda h, s: {}, ["--config.runtime.platform=tpu"], ["tpu", "cpu"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, home, shards, monkeypatch, capsys):
    changes, overrides, words = CASES[name]
    workdir = home / f"run {name}"
    argv = ["train", "--config", config_file(home, **changes(home, shards)), "--workdir", str(workdir), *overrides]
    code, line = answer(argv, monkeypatch, capsys)
    assert code == 2, line
    assert line.startswith("bigmodel: ") and all(word in line for word in words), line
    assert not (workdir / "result.json").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["trian"], ["did you mean 'train'?"]),
        (["train", "--workdir", "x"], ["--config"]),
        (["train", "--config", "configs/lm_tny.py", "--workdir", "x"], ["did you mean 'configs/lm_tiny.py'?"]),
        (["eval", "--workdir", "nowhere"], ["nowhere", "not a run"]),
        (["generate", "--workdir", "nowhere"], ["nowhere", "not a run"]),
        (["prepare", "--source", "nowhere.txt", "--out", "x"], ["nowhere.txt"]),
        (["status", "x", "--config.steps=1"], ["status", "no config", "--config.steps=1"]),
        (["compare", "a", "b", "--config.steps=1"], ["compare", "no config", "--config.steps=1"]),
        (["study", "run", "s.py", "--workdir", "x", "--config.steps=1"], ["study", "in its file"]),
        (["scaling", "fit", "s.py", "--workdir", "x", "--config.steps=1"], ["scaling", "in its file"]),
        (["train", "--config", "x", "--workdir", "x", "--seeds", "0", "--lanes", "x"], ["--lanes", "not allowed"]),
    ],
)
def test_bad_commands(argv, words, monkeypatch, capsys, tmp_path):
    root = Path(__file__).resolve().parent.parent
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(root / "configs")
    code, line = answer(argv, monkeypatch, capsys)
    assert code == 2 and all(word in line for word in words), line
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["configs"]


def test_config_file_that_does_not_load(home, monkeypatch, capsys):
    broken = home / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    code, line = answer(["train", "--config", str(broken), "--workdir", str(home / "x")], monkeypatch, capsys)
    assert code == 2 and "ZeroDivisionError" in line and "broken.py" in line


def test_workdir_that_cannot_be_written(home, monkeypatch, capsys):
    (home / "a file").write_text("")
    argv = ["train", "--config", config_file(home), "--workdir", str(home / "a file" / "run")]
    code, line = answer(argv, monkeypatch, capsys)
    assert code == 2 and "cannot be written" in line


def test_full_disk(home, monkeypatch, capsys):
    """A work directory with room for the start and not for a checkpoint."""
    small = home / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        # Without the right to mount: a file system that says it is full.
        from bigmodel_jax import checkpoint

        monkeypatch.setattr(checkpoint, "_free_bytes", lambda directory: 1000)
    try:
        argv = ["train", "--config", config_file(home), "--workdir", str(small / "run")]
        code, line = answer(argv, monkeypatch, capsys)
    finally:
        subprocess.run(["umount", str(small)], capture_output=True)
    assert code in (1, 2) and ("disk full" in line.lower() or "free" in line.lower() or "space" in line.lower()), line


def test_checkpoint_of_another_model(home, trained, monkeypatch, capsys):
    before = (trained / "result.json").read_text()
    argv = [
        "train", "--config", config_file(home, steps=4, schedule={"name": "constant"}), "--workdir", str(trained),
        "--allow-config-change", "--config.model.embed_dim=16",
    ]  # fmt: skip
    code, line = answer(argv, monkeypatch, capsys)
    assert code == 2 and "embed/tokens" in line or "shape" in line, line
    assert (trained / "result.json").read_text() == before
    again = experiment.resolve(tiny.raw("decoder", home) | {"steps": 4, "schedule": {"name": "constant"}})
    assert train(again, str(trained), allow_config_change=True)["state_hash"] == json.loads(before)["state_hash"]


def test_two_runs_in_one_directory(home, monkeypatch, capsys):
    import fcntl

    workdir = home / "shared"
    workdir.mkdir()
    with open(workdir / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, line = answer(["train", "--config", config_file(home), "--workdir", str(workdir)], monkeypatch, capsys)
    assert code == 2 and "another run" in line


def test_the_installed_command_exits_with_the_code():
    done = subprocess.run(
        [sys.executable, "-m", "bigmodel_jax.cli", "train", "--config", "nowhere.py", "--workdir", "x"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr == "bigmodel: no config file 'nowhere.py'\n"
