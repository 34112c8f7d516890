"""Every study of configs/papers reads; every variant resolves and can be told apart; every full-scale twin lowers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from bigmodel_jax import experiment, schema
from bigmodel_jax.errors import InputError
from bigmodel_jax.programs import Programs
from bigmodel_jax.study import spec

PAPERS = Path(__file__).resolve().parents[2] / "configs" / "papers"
FILES = sorted(PAPERS.glob("*/*.py"))


read = cache(lambda path: spec.read(str(path)))


@pytest.fixture(params=FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def study(request):
    return read(request.param)


def test_there_are_studies():
    assert {path.parent.name for path in FILES} >= {
        "he2016", "xiong2020", "shazeer2020", "press2022", "loshchilov2019", "wu2018", "optimizers"
    }  # fmt: skip
    names = [read(path).name for path in FILES]
    assert len(set(names)) == len(names), "results/studies has one file per name"


def test_a_study_can_be_judged_by_its_seeds(study):
    assert len(study.seeds) >= 5 and study.claims and study.budget_minutes <= 90
    # What decides is the last evaluation, held out, in a unit that all variants share.
    set_name, _, metric = study.terms[0].removeprefix("best/").partition("/")
    assert set_name.startswith("validation") and metric in ("bits_per_byte", "accuracy", "loss")
    assert study.terms[1:] in ((), (f"validation/{metric}",))
    for name in study.variants:
        config = experiment.resolve(study.config(name))
        changes = schema.difference(experiment.resolve(study.config(study.baseline)), config)
        assert bool(changes) == (name != study.baseline)
        # Comparable by seed: the same examples in the same order for as many steps.
        assert not any(leaf.split(".")[0] in ("eval", "steps", "batch_size", "seed") for leaf in changes), changes
        assert config["eval"]["every"] and config["steps"] % config["eval"]["every"] == 0
        length = config["data"].get("length", 0)
        assert f"validation_{length}" != set_name


def test_the_full_scale_twin_is_large_and_of_the_same_kind(study):
    full, base = experiment.resolve(study.full), experiment.resolve(study.base)
    assert full["steps"] * full["batch_size"] > 100 * base["steps"] * base["batch_size"]
    small_ones = {"decoder": {"decoder", "encoder_decoder"}, "resnet": {"resnet"}}
    assert full["model"]["name"] in small_ones.get(base["model"]["name"], {base["model"]["name"]})


def test_the_full_scale_twin_lowers_on_eight_devices(study):
    rows = 128  # of a batch: the groups of batch norm at full scale have as many
    small = [f"--config.{leaf}={rows}" for leaf in ("batch_size", "eval.batch_size")]
    layout = ["--config.microbatch=0", "--config.mesh.data=1", "--config.mesh.fsdp=8"]
    programs = Programs(experiment.build(experiment.resolve(study.full, [*small, *layout]), load=False))
    text = programs.lower_step(rows).as_text()
    assert "stablehlo.dot_general" in text and ("sdy.sharding" in text or "mhlo.sharding" in text)


def test_a_published_number_says_where_it_is_printed(study):
    if study.published:
        assert study.published_metric and any(c.isdigit() for c in study.published_source)
    else:
        assert study.published_metric == study.published_source == ""


def test_a_variant_of_a_study_is_a_config_by_itself():
    config = experiment.read(str(PAPERS / "xiong2020" / "prenorm_warmup.py") + ":pre-norm")
    assert config["schedule"]["warmup"] == 0 and config["model"]["norm_placement"] == "pre"
    with pytest.raises(InputError, match="pre-nrm"):
        experiment.read(str(PAPERS / "xiong2020" / "prenorm_warmup.py") + ":pre-nrm")
