"""`bigmodel scaling` from plan to target, on a ladder whose runs are stand-ins that obey a known law."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from bigmodel_jax import cli, experiment
from bigmodel_jax.errors import InputError
from bigmodel_jax.study import ladder, law, law_plots, runner, spec
from bigmodel_jax.study.law import Law

LAW = Law(0.9, 12.0, 30.0, 0.28, 0.3)
SIZES = {"a": 1, "b": 2, "c": 3, "d": 6}  # heads of 4
STEPS = {"short": 20, "mid": 60, "long": 180}
TRAINER = """
import json, os, sys
folder = sys.argv[sys.argv.index("--workdir") + 1]
file, _, variant = sys.argv[sys.argv.index("--config") + 1].partition(":")
said = json.load(open(os.path.join(os.path.dirname(file), "losses.json")))[variant]
open(folder + "/metrics.jsonl", "w").write("")
result = {"eval": {"validation": {"loss": said[1]}}, "examples": {"train": "t", "validation": "v"}}
result["parameters"] = said[0]
open(folder + "/result.json", "w").write(json.dumps(result))
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(folder of a ladder, its points)."""
    folder = tmp_path_factory.mktemp("ladder")
    model = dict(name="decoder", vocab_size=32, num_layers=1, embed_dim=4, num_heads=1, positions="rotary")
    study = dict(
        name="rungs", title="t", source="s", seeds=(0,), metric="validation/loss", mode="min", baseline="a short",
        held_out=("d long",), base=dict(
            steps=6, batch_size=4, model=model, objective=dict(name="causal_lm"), optimizer=dict(name="adamw"),
            schedule=dict(name="constant"), data=dict(name="text", length=8),
        ),
        variants={
            f"{size} {length}": {"model.num_heads": heads, "model.embed_dim": 4 * heads, "steps": steps}
            for size, heads in SIZES.items() for length, steps in STEPS.items() if size != "d" or length == "long"
        },
    )  # fmt: skip
    (folder / "configs").mkdir()
    (folder / "configs" / "rungs.py").write_text(f"def get_study():\n    return {study!r}\n")
    (folder / "trainer.py").write_text(TRAINER)
    points = ladder.points(spec.read(str(folder / "configs" / "rungs.py")))
    losses = {p.variant: [p.parameters, float(LAW(p.parameters, p.tokens))] for p in points}
    (folder / "configs" / "losses.json").write_text(json.dumps(losses))
    return folder, points


def scaling(folder, monkeypatch, action, *more):
    monkeypatch.setattr(runner, "TRAIN", (sys.executable, str(folder / "trainer.py")))
    cli.run(["scaling", action, str(folder / "configs" / "rungs.py"), "--workdir", str(folder / "work"), *more])


def test_sizes_and_lengths_are_counted(planned, monkeypatch, capsys):
    folder, points = planned
    by_name = {p.variant: p for p in points}
    # Tied table 32 D, four attention matrices and two of the mlp 12 D^2, their biases 9 D, three norms 6 D.
    assert by_name["b mid"].parameters == 32 * 8 + 12 * 64 + 9 * 8 + 6 * 8
    assert by_name["b mid"].tokens == 60 * 4 * 8
    scaling(folder, monkeypatch, "plan")
    assert "d long" in capsys.readouterr().out.splitlines()[9]
    scaling(folder, monkeypatch, "plan", "--tokens-per-parameter", "5", "--flops", "2e7,1e9")
    lines = [eval(f"{{{line}}}") for line in capsys.readouterr().out.splitlines()]  # noqa: S307
    for line in lines:
        ((name, leaves),) = line.items()
        size = next(size for size, heads in SIZES.items() if heads == leaves["model.num_heads"])
        count = by_name[f"{size} long"].parameters
        wanted = 5 * count if "per parameter" in name else float(name.split(", ")[1].split()[0]) / 6 / count
        assert abs(leaves["steps"] * 32 - wanted) <= 16
    assert len(lines) == 12
    base = spec.read(str(folder / "configs" / "rungs.py")).base
    assert ladder.tokens(base | {"batch_size": ((0, 4), (2, 8)), "steps": 5}) == 8 * (2 * 4 + 3 * 8)


def test_the_prediction_comes_first(planned, monkeypatch, capsys):
    folder, points = planned
    prediction = folder / "results" / "rungs_prediction.json"
    with pytest.raises(InputError, match="'rungs' has no finished run in .*work: run it first; --record"):
        scaling(folder, monkeypatch, "fit")
    with pytest.raises(InputError, match="no prediction of d long"):
        scaling(folder, monkeypatch, "run", "--held-out")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    with pytest.raises(InputError, match="'d long' is to be predicted first"):
        cli.run(["study", "run", str(folder / "configs" / "rungs.py"), "--workdir", str(folder / "work")])
    scaling(folder, monkeypatch, "run", "--processes", "2")
    written = prediction.read_text()
    said = json.loads(written)
    truth = float(LAW(points[-1].parameters, points[-1].tokens))
    assert said["predicted"]["d long"]["loss"] == pytest.approx(truth, rel=1e-3)
    assert said["law"]["alpha"][0] == pytest.approx(LAW.alpha, rel=1e-2) and len(said["fitted_to"]) == 9
    with pytest.raises(InputError, match="commit .*rungs_prediction.json first"):
        scaling(folder, monkeypatch, "run", "--held-out")
    (folder / ".gitignore").write_text("results\n")
    with pytest.raises(InputError, match="commit .*rungs_prediction.json first"):
        scaling(folder, monkeypatch, "run", "--held-out")
    (folder / ".gitignore").unlink()
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "results"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "prediction"], check=True)
    capsys.readouterr()
    scaling(folder, monkeypatch, "run", "--held-out")
    assert "d long: predicted" in (out := capsys.readouterr().out) and "off by" in out
    assert (folder / "work" / "law.png").read_bytes().startswith(b"\x89PNG")
    # The held-out run is there now: the same prediction stands, another is refused.
    scaling(folder, monkeypatch, "run")
    assert prediction.read_text() == written
    prediction.write_text(written.replace('"level": 0.95', '"level": 0.5'))
    with pytest.raises(InputError, match="'d long' has been started already"):
        scaling(folder, monkeypatch, "run")

    scaling(folder, monkeypatch, "target", "--flops", "1e11")
    raw = experiment.read(str(folder / "rungs_target.py"))
    assert 6 * ladder.parameters(raw) * ladder.tokens(raw) == pytest.approx(1e11, rel=0.02)
    assert ladder.parameters(raw) == pytest.approx(LAW.best(1e11)[0], rel=0.5)
    assert raw["model"]["embed_dim"] == 4 * raw["model"]["num_heads"]


def test_plots_have_every_run_the_law_and_the_prediction_beside_what_was_measured():
    sizes, lengths = (1e4, 3e4, 1e5), (1e6, 3e6, 1e7)
    made = [ladder.Point(f"{n} {d}", int(n), int(d), 0, float(LAW(n, d))) for n in sizes for d in lengths]
    held = [ladder.Point("big", 10**6, 3 * 10**7)]
    fitted = law.fit_with_intervals(*zip(*[(p.parameters, p.tokens, p.loss) for p in made], strict=True), resamples=20)
    axis = Figure().add_subplot()
    law_plots.lengths(fitted, made, held, {"big": dataclasses.replace(held[0], loss=1.5)}, "loss", axis)
    lines = [np.array(line.get_xydata(), float) for line in axis.lines]
    dots = np.concatenate([xy for line, xy in zip(axis.lines, lines, strict=True) if line.get_linestyle() == "None"])
    assert {(p.tokens, p.loss) for p in made} <= set(map(tuple, dots)) and (3e7, 1.5) in set(map(tuple, dots))
    curves = [xy for xy in lines if len(xy) == 100]
    np.testing.assert_allclose([xy[-1, 1] for xy in curves], LAW([*sizes, 1e6], curves[0][-1, 0]), rtol=1e-3)
    assert "measured: 1.5" in [text.get_text() for text in axis.get_legend().get_texts()]

    n = np.array([1e4, 2e4, 4e4])
    runs = [ladder.Point("", int(x), int(c / 6 / x), 0, float(LAW(x, c / 6 / x))) for c in (3e11, 3e12) for x in n]
    valleys, _ = law.isoflop(*zip(*[(p.flops, p.parameters, p.loss) for p in runs], strict=True))
    axis = Figure().add_subplot()
    law_plots.budgets(valleys, runs, "loss", axis)
    [bottoms] = [line for line in axis.lines if line.get_label() == "best sizes"]
    assert list(bottoms.get_xdata()) == [v.parameters for v in valleys]
    assert sum(len(line.get_xdata()) for line in axis.lines if line.get_linestyle() == "None") == len(runs)
