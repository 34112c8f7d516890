"""Two runs compared, from files written by hand: what differs, from which step, and what cannot be said."""

from __future__ import annotations

import json
import math

import pytest

from bigmodel_jax import cli, metrics
from bigmodel_jax.errors import InputError
from bigmodel_jax.study import compare as comparing
from bigmodel_jax.study.compare import compare, lines

CONFIG = {"seed": 0, "steps": 40, "optimizer": {"name": "adamw", "lr": 1e-3}, "model": {"taps": [1, 2]}}


def written(folder, *, steps=40, loss=lambda step: 4.0 / step, ids=lambda step: [step, step + 1],
            content=lambda step: f"h{step}", every=1, ledger=True, config=CONFIG, finished=True):  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    log = metrics.Log(folder, tensorboard=False)
    for step in range(1, steps + 1):
        if ledger:
            log.event(step, "batch", {"ids": ids(step), "hash": content(step)})
        if step % every == 0:
            log.write(step, {"loss": loss(step), "grad_norm": 1.0, "lr": 1e-3})
    log.event(steps, "eval", {"loss": loss(steps), "accuracy": 0.5}, name="validation")
    log.close()
    if finished:
        (folder / "result.json").write_text(json.dumps({"data": "d", "state_hash": f"{loss(steps)}"}))
        start = {"commit": "abc", "python": "3.11", "versions": {"jax": "1"}, "command": ["x"], "host": "here"}
        (folder / "env.json").write_text(json.dumps({"starts": [start]}))
    return str(folder)


@pytest.fixture
def first(tmp_path):
    return written(tmp_path / "a")


def said(found, start):
    [line] = [line for line in lines(found) if line.startswith(start)]
    return line


def test_equal_runs_are_bitwise_the_same(first, tmp_path):
    found = compare(first, written(tmp_path / "b"))
    assert lines(found) == [
        "config: the same", "batches: the same ids and contents at all 40 steps",
        *(f"{name}: bitwise the same at all 40 common steps" for name in ("loss", "grad_norm", "lr")),
        "final state: the same bits",
    ]  # fmt: skip


def test_the_step_at_which_losses_part(first, tmp_path):
    # One unit in the last place from step 11 on, beyond a thousandth from step 30 on.
    def loss(step):
        value = 4.0 / step
        return value * 1.01 if step >= 30 else math.nextafter(value, 9) if step >= 11 else value

    found = compare(first, written(tmp_path / "b", loss=loss))
    assert found["parted"]["loss"]["bitwise"] == [11, 4.0 / 11, math.nextafter(4.0 / 11, 9)]
    assert found["parted"]["loss"]["beyond"][0] == 30
    assert said(found, "loss").startswith("loss: first differs at step 11 (")
    assert said(found, "loss").endswith("by more than 0.001 from step 30")
    assert said(found, "final") == "final state: other bits" and found["parted"]["lr"]["bitwise"] is None
    wide = compare(first, str(tmp_path / "b"), tolerance=0.05)
    assert "never by more than 0.05 (at most 0.0099" in said(wide, "loss")
    # NaN in both is no difference, NaN in one is one at any tolerance.
    nan = [written(tmp_path / n, loss=lambda s: math.nan if s > 7 else 1.0) for n in ("c", "d")]
    assert compare(*nan)["parted"]["loss"]["bitwise"] is None
    lost = compare(nan[0], written(tmp_path / "e", loss=lambda s: 1.0), tolerance=10.0)
    assert lost["parted"]["loss"]["beyond"][0] == 8


def test_the_step_at_which_batches_part(first, tmp_path):
    other = compare(first, written(tmp_path / "b", ids=lambda s: [s, s + 1] if s < 20 else [s, 99],
                                   content=lambda s: f"h{s}" if s < 20 else "x"))  # fmt: skip
    assert said(other, "batches") == "batches: other example ids from step 20 (1 of them differ there)"
    content = compare(first, written(tmp_path / "c", content=lambda s: f"h{s}" if s < 5 else "x"))
    assert said(content, "batches").startswith("batches: the same ids, but other contents from step 5 ")
    larger = compare(first, written(tmp_path / "d", ids=lambda s: [s, s + 1, s + 2]))
    assert "from step 1 (0 of them differ there, 2 and 3 rows)" in said(larger, "batches")


def test_what_is_missing_or_shorter_is_said_in_one_line(first, tmp_path, capsys):
    short = written(tmp_path / "b", steps=25, ledger=False, finished=False, every=5)
    found = compare(first, short)
    out = lines(found)
    assert out[:2] == ["b has no env.json", "b has no result.json"]
    assert "a ends at step 40, b at 25; compared where both have rows" in out
    assert said(found, "batches").startswith("batches: no ledger in b;")
    assert said(found, "loss") == "loss: bitwise the same at all 5 common steps"
    assert not any(line.startswith("final") for line in out)
    apart = written(tmp_path / "c", ledger=False, every=50)  # no row of training
    assert said(compare(first, apart), "loss") == "loss: no step is logged by both"
    (tmp_path / "other").mkdir()
    assert compare(first, written(tmp_path / "other" / "a"))["runs"] == [first, str(tmp_path / "other" / "a")]
    with pytest.raises(InputError, match="is not a run"):
        compare(first, str(tmp_path))


def test_the_verb_prints_differences_and_writes_a_page(first, tmp_path, capsys):
    config = {**CONFIG, "optimizer": {"name": "sgd", "lr": 1e-3, "nesterov": True}}
    other = written(tmp_path / "<b>", config=config, loss=lambda s: 5.0 / s)
    cli.run(["compare", first, other, "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert 'optimizer.name: "adamw" -> "sgd"' in out and 'optimizer.nesterov: "(absent)" -> true' in out
    assert "model.taps" not in out and "validation/loss at step 40: 0.1 -> 0.125" in out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page and "optimizer.nesterov" in page and page.count("<img") == 1
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["evals"][1] == {"set": "validation", "step": 40, "metric": "loss", "values": [0.1, 0.125]}
    from matplotlib.figure import Figure

    axis = Figure().add_subplot()
    comparing.curves(found, axis)
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert drawn["a"] == [4.0 / s for s in range(1, 41)] and drawn["<b>, validation"] == [0.125]
