"""Parameters of another run: by name, checked, strict unless told otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import checkpoint
from bigmodel_jax.checkpoint import Checkpointer, init_from
from bigmodel_jax.errors import InputError
from tests.states import same


def _trained(tmp_path, ema=False):
    params = {"embed": jnp.arange(12.0).reshape(4, 3), "block": {"w": jnp.ones((3, 3)), "b": jnp.zeros(3)}}
    state = {"params": params, "opt": {"mu": params}, "step": jnp.int32(1)}
    if ema:
        state["ema"] = jax.tree.map(lambda x: x + 100, params)
    with Checkpointer(tmp_path / "checkpoints") as saver:
        saver.save(1, state)
    return params


def test_init_from_loads_by_name_and_reads_only_that(tmp_path, monkeypatch):
    params = _trained(tmp_path)
    read = []
    original = checkpoint.load
    monkeypatch.setattr(
        checkpoint, "load", lambda path, leaves, wanted: read.extend(wanted) or original(path, leaves, wanted)
    )
    target = {"embed": jnp.zeros((4, 3), jnp.bfloat16), "layer": {"w": jnp.zeros((3, 3)), "b": jnp.ones(3)}}
    loaded, report = init_from(tmp_path, target, rename=[("^block/", "layer/")])
    assert set(read) == {"params/embed", "params/block/w", "params/block/b"}
    assert same(loaded["layer"], params["block"]) and loaded["embed"].dtype == jnp.bfloat16
    assert sorted(report["loaded"]) == ["embed", "layer/b", "layer/w"]
    assert not (report["missing"] or report["unexpected"] or report["shape_mismatch"])


def test_init_from_prefers_the_average(tmp_path):
    params = _trained(tmp_path, ema=True)
    assert float(init_from(tmp_path, params)[0]["embed"][0, 0]) == 100
    assert float(init_from(tmp_path, params, ema=False)[0]["embed"][0, 0]) == 0


def test_init_from_is_strict_and_never_vacuous(tmp_path):
    params = _trained(tmp_path)
    target = {**params, "embed": jnp.full((9, 3), 5.0), "head": jnp.full((3,), 7.0)}
    with pytest.raises(InputError, match="1 missing .head.*1 shape mismatch .embed"):
        init_from(tmp_path, target)
    loaded, report = init_from(tmp_path, target, strict=False)
    assert report["missing"] == ["head"] and report["shape_mismatch"] == ["embed"]
    assert (
        np.all(loaded["embed"] == 5)
        and np.all(loaded["head"] == 7)
        and same(loaded["block"], params["block"])
    )
    loaded, report = init_from(tmp_path, target, skip=["^head$", "^embed$"])
    assert report["skipped"] == ["embed", "head"] and len(report["loaded"]) == 2
    with pytest.raises(InputError, match="no parameter name matches"):
        init_from(tmp_path, {"other": jnp.zeros(3)}, strict=False)
    with pytest.raises(InputError, match="both to 'x'"):
        init_from(tmp_path, params, rename=[("^.*$", "x")])
    with pytest.raises(InputError, match="not a regex"):
        init_from(tmp_path, params, rename=[("(", "x")])
    with pytest.raises(InputError, match="no checkpoint"):
        init_from(tmp_path / "nowhere", params)
    flip_record = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    flip_record.write_text(flip_record.read_text().replace("[4, 3]", "[3, 4]"))
    with pytest.raises(InputError, match="damaged"):
        init_from(tmp_path, params)
