"""A study's file is refused in one line that names what is wrong and what would be right."""

from __future__ import annotations

import pytest

from bigmodel_jax import experiment
from bigmodel_jax.errors import InputError
from bigmodel_jax.study import spec
from bigmodel_jax.variants import grid

BASE = dict(
    model=dict(name="linear"), objective=dict(name="classification"), optimizer=dict(name="sgd"),
    schedule=dict(name="constant"), data=dict(name="digits"),
)  # fmt: skip
GOOD = dict(
    name="s", title="t", source="s", base=BASE, variants={"low": {"optimizer.lr": 0.1}, "high": {"optimizer.lr": 1.0}},
    seeds=(0, 1), metric="validation/loss", mode="min", baseline="low",
    claims=(dict(better="low", worse="high", text="lower is better"),),
)  # fmt: skip


def read(tmp_path, **changes) -> spec.Study:
    file = tmp_path / "s.py"
    file.write_text(f"def get_study():\n    return {GOOD | changes!r}\n")
    return spec.read(str(file))


def test_variants_and_grids(tmp_path):
    study = read(tmp_path)
    assert study.claims == (spec.Claim("low", "high", "lower is better"),)
    assert study.config("high", **{"optimizer.clip": 2.0})["optimizer"] == {"name": "sgd", "lr": 1.0, "clip": 2.0}
    assert experiment.read(f"{study.file}:high")["optimizer"]["lr"] == 1.0
    points = grid({"optimizer.lr": (1, 2), "model.name": ("a", "b")})
    assert list(points) == ["lr=1,name=a", "lr=1,name=b", "lr=2,name=a", "lr=2,name=b"]
    assert list(grid({"a.lr": (1,), "b.lr": (2,)})) == ["a.lr=1,b.lr=2"]
    both = read(tmp_path, grid={"optimizer.clip": (0.5, 1.0)}, baseline="low,clip=1.0", claims=())
    assert both.variants["high,clip=0.5"] == {"optimizer.lr": 1.0, "optimizer.clip": 0.5}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(variants={"low": {"optimizer.lrr": 1}, "high": {}}), "variant 'low'.*did you mean 'lr'"),
        (dict(baseline="lo"), "baseline: there is no variant 'lo'; did you mean 'low'"),
        (dict(claims=(dict(better="low", worse="hihg", text="x"),)), "claim 'x'.*did you mean 'high'"),
        (dict(claims=(dict(better="low", worse="high"),)), "claim lacks text"),
        (dict(published={"hi": 1.0}), "published number: there is no variant 'hi'"),
        (dict(published={"low": 1.0}), "need published_metric"),
        (dict(seeds=()), "no seeds"),
        (dict(seeds=(1, 1)), "different integers"),
        (dict(seed=(1,)), "no field 'seed'; did you mean 'seeds'"),
        (dict(mode="least"), "min or max"),
        (dict(metric="loss"), "SET/METRIC"),
        (dict(metric="long/loss - loss"), "SET/METRIC"),
        (dict(name="a b"), "names a file"),
        (dict(variants={"low": {"seed": 1}, "high": {}}), "sets 'seed'"),
        (dict(variants={"low": {}, "high": {}}), "'low' and 'high' are the same experiment"),
        (dict(tune={"optimizer.lr": (1, 2)}), "tune_seeds come together"),
        (dict(tune={"optimizer.lr": (1, 2)}, tune_seeds=(1, 7)), r"\[1\] are among tune_seeds"),
        (dict(tune={"optimizer.rate": (1, 2)}, tune_seeds=(7,)), "tune of variant 'low'.*'optimizer.rate'"),
        (dict(search=dict(method="halvin", leaves={"a": [1]}), tune_seeds=(7,)), "did you mean 'halving'"),
        (dict(search=dict(method="random", leaves={"optimizer.lr": {"low": 2, "high": 1}}, trials=3), tune_seeds=(7,)),
         "low < high"),
        (dict(search=dict(method="random", leaves={"optimizer.lr": [1]}), tune_seeds=(7,)), "lacks trials"),
        (dict(full=BASE | {"model": {"name": "lin"}}), "full-scale twin"),
    ],
)  # fmt: skip
def test_one_line_errors(tmp_path, changes, says):
    with pytest.raises(InputError, match=says) as error:
        read(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_get_config_must_agree(tmp_path):
    read(tmp_path)
    with open(tmp_path / "s.py", "a") as file:
        file.write("\ndef get_config(arg):\n    return {**get_study()['base'], 'steps': 7}\n")
    with pytest.raises(InputError, match="gives another config, in "):
        spec.read(str(tmp_path / "s.py"))
