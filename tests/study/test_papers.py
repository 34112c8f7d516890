"""Every study of configs/papers reads; every variant resolves and can be told apart; every full-scale twin lowers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from bigmodel_jax import experiment, schema
from bigmodel_jax.errors import InputError
from bigmodel_jax.programs import Programs
from bigmodel_jax.study import spec

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAPERS = CONFIGS / "papers"
FILES = sorted(PAPERS.glob("*/*.py"))
STUDIES = sorted(path for path in CONFIGS.rglob("*.py") if "def get_study(" in path.read_text())
OTHERS = [path for path in STUDIES if path not in FILES]
LENGTHS = ("isoflop",)
SMALL = ["--config.microbatch=0", "--config.mesh.data=1", "--config.mesh.fsdp=8"]


read = cache(lambda path: spec.read(str(path)))


@pytest.fixture(params=FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def study(request):
    return read(request.param)


def test_there_are_studies():
    folders = {path for path in PAPERS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(FILES) <= set(STUDIES) and {path.parent for path in FILES} == folders and len(FILES) > 10
    assert {path.parent for path in OTHERS} == {CONFIGS, CONFIGS / "ladders"}
    names = [read(path).name for path in STUDIES]
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
        # Comparable by seed: the same examples in the same order, for as many steps unless lengths are the question.
        fixed = {"eval", "batch_size", "seed"} | (set() if study.name in LENGTHS else {"steps"})
        assert not fixed & {leaf.split(".")[0] for leaf in changes}, changes
        assert study.name in LENGTHS or (config["eval"]["every"] and config["steps"] % config["eval"]["every"] == 0)
        length = config["data"].get("length", 0)
        assert f"validation_{length}" != set_name


def test_the_full_scale_twin_is_large_and_of_the_same_kind(study):
    base = experiment.resolve(study.base)
    variants = {experiment.resolve(study.config(name))["model"]["name"] for name in study.variants}
    kinds = variants | ({"encoder_decoder"} if "decoder" in variants else set())
    for full in map(experiment.resolve, study.arms.values()):
        assert full["steps"] * full["batch_size"] > 100 * base["steps"] * base["batch_size"]
        assert full["model"]["name"] in kinds


def lowered(raw, rows, *overrides):
    small = [f"--config.{leaf}={rows}" for leaf in ("batch_size", "eval.batch_size")]
    config = experiment.resolve(raw, [*small, *SMALL, *overrides])
    config["model"] |= {leaf: 300 for leaf in experiment.FROM_DATA if config["model"].get(leaf) == 0}
    text = Programs(experiment.build(config, load=False)).lower_step(rows).as_text()
    assert "stablehlo.dot_general" in text and ("sdy.sharding" in text or "mhlo.sharding" in text)
    return text


def test_the_full_scale_twins_lower_on_eight_devices(study):
    # Rows of a batch: the groups of batch norm at full scale have as many.
    texts = [lowered(raw, 128) for raw in study.arms.values()]
    assert len(set(texts)) == len(texts) > 0, "two arms are the same program"


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_ladders_and_studies_of_no_paper_lower(path):
    study = read(path)
    largest = study.held_out or tuple(study.variants)[-1:]
    for name in (study.baseline, *largest):
        lowered(study.config(name), 16, "--config.init_from.path=")


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
