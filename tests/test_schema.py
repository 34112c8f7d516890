"""Config resolution: every leaf has one home, and every typo one answer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bigmodel_jax import experiment, schema
from bigmodel_jax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(
    f"{path.name}:{arg}" if arg else path.name
    for path in (ROOT / "configs").glob("*.py")
    for arg in ("", *(experiment.arguments(str(path)) or ()))
)


def load(name: str) -> dict:
    return experiment.read(str(ROOT / "configs" / name))


def swapped(word: str) -> str:
    """A likely typo: two letters exchanged, or one doubled."""
    return word[:-2] + word[-1] + word[-2] if len(word) > 3 and word[-1] != word[-2] else word + word[-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_resolve(name):
    config = experiment.resolve(load(name))
    assert experiment.resolve(config) == config, "resolving is idempotent"


@pytest.mark.parametrize(
    "name, says",
    [
        ("gpt2.py:124M", "has no '124M'; did you mean '124m'[?]; it has 124m, 350m, 1.5b"),
        ("finetune_reviews.py:scrath,0", "did you mean 'scratch,0'[?]"),
        ("lm_tiny.py:debug", "takes no argument, and so not 'debug'"),
    ],
)
def test_a_wrong_argument_of_a_file_is_refused(name, says):
    with pytest.raises(InputError, match=says):
        load(name)


def test_every_config_file_says_what_it_takes():
    silent = {path.name for path in (ROOT / "configs").glob("*.py") if experiment.arguments(str(path)) is None}
    assert silent == {"folds_rotten.py"}, "a study takes the names of its variants"
    assert {"llama.py:70b", "resnet_cifar10.py:plain56", "lm_tiny.py"} <= set(CONFIGS)


@pytest.mark.parametrize("name", ["lm_tiny.py", "mlm_tiny.py", "resnet_tiny.py"])
def test_a_typo_in_any_leaf_is_refused_with_the_right_name(name):
    config = experiment.resolve(load(name))
    tried = 0
    for path in schema.flat(config):
        section, _, leaf = path.rpartition(".")
        if path.startswith("optimizer.groups"):
            continue
        wrong = ".".join(filter(None, (section, swapped(leaf))))
        with pytest.raises(InputError) as error:
            experiment.resolve(load(name), [f"--config.{wrong}=1"])
        text = str(error.value)
        assert swapped(leaf) in text and "\n" not in text
        # A short leaf may be closest to another; a long one must find itself, or a leaf it extends.
        if len(leaf) > 5:
            found = re.search(r"did you mean '(\w+)'\?", text)
            assert found and leaf.startswith(found[1]), text
        tried += 1
    assert tried > 60


@pytest.mark.parametrize(
    "override, says",
    [
        ("--config.optimizer.lr=fast", "should be float"),
        ("--config.steps=1.5", "should be int"),
        ("--config.log.norms=1", "should be bool"),
        ("--config.model=decoder", "is a section"),
        ("--config.model.name=decodr", "did you mean 'decoder'?"),
        ("--config.schedule.name=cosin", "did you mean 'cosine'?"),
        ("--config.steps.more=1", "has no leaves below it"),
        ("--config.steps", "should read"),
        ("--config.sched.warmup=1", "did you mean 'schedule'?"),
        ("--config.guard.policy=ignore", "skip or crash"),
        ("--config.model.dtype=float64", "runtime.x64"),
    ],
)
def test_a_wrong_value_is_refused(override, says):
    with pytest.raises(InputError, match=says):
        experiment.build(experiment.resolve(load("lm_tiny.py"), [override]), load=False)


def test_overrides_are_typed():
    overrides = ["--config.optimizer.lr=1", "--config.sample.prompt=class A:", "--config.model.qk_norm=true"]
    overrides.append("--config.model.remat=none")
    config = experiment.resolve(load("lm_tiny.py"), overrides)
    assert config["optimizer"]["lr"] == 1.0 and isinstance(config["optimizer"]["lr"], float)
    assert config["sample"]["prompt"] == "class A:"
    assert config["model"]["qk_norm"] is True and config["model"]["remat"] == "none"


def test_hash_sees_what_matters_and_only_that():
    base = experiment.resolve(load("lm_tiny.py"))
    same = experiment.resolve(load("lm_tiny.py"), ["--config.mesh.fsdp=2", "--config.log.every=3"])
    other = experiment.resolve(load("lm_tiny.py"), ["--config.optimizer.lr=1e-5"])
    assert experiment.config_hash(base) == experiment.config_hash(same)
    assert experiment.config_hash(base) != experiment.config_hash(other)
    assert schema.difference(base, other) == {"optimizer.lr": (base["optimizer"]["lr"], 1e-5)}
