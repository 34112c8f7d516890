"""Parameters of another run: by name, checked, strict unless told otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import checkpoint
from bigmodel_jax.checkpoint import Checkpointer
from bigmodel_jax.errors import InputError
from bigmodel_jax.inherit import init_from, say
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
    assert np.all(loaded["embed"] == 5) and np.all(loaded["head"] == 7) and same(loaded["block"], params["block"])
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


def test_another_vocabulary_and_more_positions(tmp_path):
    old = {"tokens": jnp.arange(12.0).reshape(4, 3), "bias": jnp.arange(4.0), "places": jnp.arange(6.0).reshape(3, 2)}
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {"params": old})
    axes = {"tokens": ("vocab", "embed"), "bias": ("vocab",), "places": ("positions", "embed")}
    new = {"tokens": jnp.full((6, 3), 7.0), "bias": jnp.full(6, 7.0), "places": jnp.full((5, 2), 7.0)}
    with pytest.raises(InputError, match="3 shape mismatch"):
        init_from(tmp_path, new, axes=axes)
    both = {"vocab": "mean", "positions": "interpolate"}
    found, report = init_from(tmp_path, new, axes=axes, resize=both, strict=True)
    assert report["resized"] == ["bias", "places", "tokens"] and not report["shape_mismatch"]
    np.testing.assert_array_equal(found["tokens"], [*np.arange(12.0).reshape(4, 3), [4.5, 5.5, 6.5], [4.5, 5.5, 6.5]])
    np.testing.assert_array_equal(found["bias"], [0, 1, 2, 3, 1.5, 1.5])
    np.testing.assert_array_equal(found["places"], [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]])
    found, _ = init_from(tmp_path, new, axes=axes, resize={"vocab": "initial", "positions": "initial"})
    np.testing.assert_array_equal(found["bias"], [0, 1, 2, 3, 7, 7])
    np.testing.assert_array_equal(found["places"][3:], np.full((2, 2), 7.0))
    wide = {**new, "tokens": jnp.zeros((6, 4))}  # another width is never a resized vocabulary
    with pytest.raises(InputError, match="1 shape mismatch .tokens"):
        init_from(tmp_path, wide, axes=axes, resize=both)
    with pytest.raises(InputError, match="resize_vocab = 'zeros' should be"):
        init_from(tmp_path, new, axes=axes, resize={"vocab": "zeros"})
    assert "resized 3 (bias, places, tokens)" in say(report, "run")


def test_the_report_comes_before_the_judgement(tmp_path):
    params, told = _trained(tmp_path), []
    with pytest.raises(InputError, match="1 missing .head.; give init_from.rename"):
        init_from(tmp_path, {**params, "head": jnp.zeros(3)}, tell=told.append)
    assert told[0]["missing"] == ["head"] and len(told[0]["loaded"]) == 3
