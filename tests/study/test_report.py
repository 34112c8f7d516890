"""Reports of made-up studies: numbers against direct computation, all three forms, refusals, plots."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

from bigmodel_jax import cli
from bigmodel_jax.errors import InputError
from bigmodel_jax.measures import look
from bigmodel_jax.study import findings, plots, report, spec, tables
from bigmodel_jax.study.store import Store
from tests.study import synthetic


@pytest.fixture(scope="module")
def made():
    study = synthetic.study()
    return study, synthetic.rows(study)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    study, _ = made
    found = report.of_rows(study, synthetic.rows(study, diverged=2), synthetic.choices(study), mixed=False,
                           environment=["jax 1 & more"])  # fmt: skip
    out = tmp_path_factory.mktemp("report")
    report.write(found, out)
    return out, found


def of(found, name):
    return next(v for v in found["variants"] if v["name"] == name)


def test_every_number_is_that_of_a_direct_computation(made):
    study, rows = made
    found = findings.find(study, rows)
    values = {n: np.array([r.values[study.metric] for r in rows if r.variant == n]) for n in study.variants}
    base = values[study.baseline]
    p = {}
    for name, x in values.items():
        v = of(found, name)
        assert (v["n"], v["mean"], v["sd"]) == (5, pytest.approx(x.mean()), pytest.approx(x.std(ddof=1)))
        low, high = scipy.stats.ttest_1samp(x, 0).confidence_interval()
        assert (v["student"]["low"], v["student"]["high"]) == pytest.approx((low, high))
        if name != study.baseline:
            a = v["against"]
            assert a["mean"] == pytest.approx((base - x).mean())  # less is better
            p[name] = scipy.stats.ttest_rel(x, base).pvalue
            assert a["p"] == pytest.approx(p[name])
    order = sorted(p, key=p.get)
    worst = 0.0
    for rank, name in enumerate(order):
        worst = max(worst, min(1.0, p[name] * (3 - rank)))
        assert of(found, name)["against"]["holm"] == pytest.approx(worst)
    assert [c["verdict"] for c in found["claims"]] == ["supported", "supported", "undecided", "contradicted"]
    assert of(found, study.baseline)["against"] is None and found["warnings"] == []
    assert of(found, "pre-norm")["published"] == 34.1 and found["cost"]["cells"] == 20


def test_a_verdict_says_what_it_rests_on(made, folder):
    study, rows = made
    first, _, third, last = findings.find(study, rows)["claims"]
    wanted = (
        r"mean gain \+0\.\d+ in validation/bits_per_byte, \d\S*% interval \+0\.\d+ to \+0\.\d+ "
        r"\(all of it above 0\), Holm-corrected p (= \d|< 0.0001)"
    )
    assert re.search(wanted, first["sentence"])
    assert "which contains 0" in third["sentence"]
    assert f"{third['seeds_needed']} seeds would settle" in third["sentence"]
    assert "all of it below the margin of 0.1" in last["sentence"]
    sentence = folder[1]["claims"][0]["sentence"]
    assert "0 of pre-norm, 2 of post-norm" in sentence and "ahead in 100% of all pairs" in sentence
    assert findings.probability(3e-6) == "< 0.0001" and findings.probability(None) == "–"


def test_nothing_is_left_out_in_silence(made):
    study, rows = made
    rows = synthetic.rows(study, diverged=2)
    rows = [dataclasses.replace(r, status="failed", values={}) if r.cell.endswith("01") else r for r in rows[:-1]]
    found = findings.find(study, rows, {"post-norm": dataclasses.asdict(synthetic.choices(study)["post-norm"])})
    said = "\n".join(found["warnings"])
    assert "not run yet, of 5 seeds each: post-norm, warm-up 1" in said
    assert "left out), of 5 seeds each: pre-norm 1" in said and "finished), of 5 seeds each: post-norm 2" in said
    assert "post-norm: the best optimizer.lr = 0.0001 is the outermost value tried" in said
    assert (of(found, "post-norm")["n"], of(found, "post-norm")["diverged"]) == (3, 2)
    assert of(found, "pre-norm")["against"]["n"] == 3  # seeds that both have
    with pytest.raises(InputError, match="no finished runs"):
        findings.find(study, [])


def test_runs_of_several_versions_of_the_code_are_told(made):
    study, rows = made
    other = [dataclasses.replace(rows[0], commit="f00-dirty"), *rows[1:]]
    said = findings.find(study, other)["warnings"]
    assert any("2 versions of the code" in line and "f00-dirty" in line for line in said)
    assert any(line.startswith("1 runs are of code with changes") for line in said)
    text = tables.markdown(findings.find(study, other), [])
    assert "f00-dirty |" in text and "| pre-norm | " in text.split("## Setup")[1]


@pytest.mark.parametrize("what", ["data", "eval"])
def test_rows_of_other_data_are_refused_or_shown_with_a_warning(made, what):
    study, rows = made
    mixed = [*rows[:-1], dataclasses.replace(rows[-1], **{f"{what}_fingerprint": "f" * 16})]
    with pytest.raises(InputError) as error:
        findings.find(study, mixed)
    line = str(error.value)
    assert "'pre-norm' seed 0" in line and "'post-norm, warm-up' seed 4" in line and "\n" not in line
    found = findings.find(study, mixed, mixed=True)
    assert found["warnings"][0].startswith("NOT COMPARABLE") and "ffff" in found["warnings"][0]
    assert "NOT COMPARABLE" in tables.markdown(found, [])


def test_markdown_latex_and_json_hold_the_same_table(folder):
    out, found = folder
    heads, body = tables.rows(found)
    text = (out / "report.md").read_text()
    block = re.search(r"(\| variant.*?)\n\n", text, re.S)[1].splitlines()
    assert [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block[2:]] == body
    assert len(block[0].split(" | ")) == len(heads)
    for file in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (out / file).stat().st_size > 1000
    assert all(cell["command"] in text for cell in found["cells"]) and "eeee" in text and "jax 1 & more" in text

    latex = (out / "report.tex").read_text()
    assert all(latex.count(rf"\{rule}") == 1 for rule in ("toprule", "midrule", "bottomrule"))
    lines = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + len(body) and {line.replace(r"\&", "").count("&") for line in lines} == {len(heads) - 1}
    assert latex.count("{") - latex.count(r"\{") == latex.count("}") - latex.count(r"\}")
    assert r"validation/bits\_per\_byte" in latex and re.search(r"\$-\$0\.\d+ to \+", latex)
    assert not re.search(r"(?<!\\)[_%#^]", re.sub(r"^% .*$|\\label\{.*?\}", "", latex, flags=re.M))
    assert tables.tex("50% of a_b & c~1 < -2") == r"50\% of a\_b \& c\textasciitilde{}1 $<$ $-$2"

    # Infinite gains and missing numbers are written in a way every JSON reader takes.
    back = json.loads((out / "report.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert of(back, "post-norm")["against"]["gains"]["0"] == "-Infinity"


def test_the_page_stands_alone_and_escapes_what_it_shows(made, folder):
    out, found = folder
    page = (out / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="([a-z]+):', page)) == {"data"} and 'lang="en"' in page
    assert not re.search(r"https?://|@import|url\(", re.sub(r'src="data:[^"]*"', "", page))
    assert page.count("<img alt=") == page.count("<img") == 4 and 'name="viewport"' in page
    assert page.count("<script>") == 1 and page.count("data-value") > 40
    assert "✓ supported" in page and "✗ contradicted" in page and "? undecided" in page
    study, rows = made
    nasty = dataclasses.replace(study, title="<script>alert(1)</script>")
    shown = look.document("x", [look.table(("a",), [["<b>"]])]) + report.page.render(
        report.of_rows(nasty, rows, {}, mixed=False), {}
    )
    assert "alert(1)</script>" not in shown and "<b>" not in shown.split("<body>")[1].split("<script>")[0]
    assert "&lt;script&gt;alert(1)" in shown


def test_figures_show_the_runs(made, folder):
    study, rows = made
    found = folder[1]
    axis = Figure().add_subplot()
    plots.seeds(found["variants"], "loss", "min", axis)
    for place, v in enumerate(found["variants"]):
        fine = sorted(x for x in v["values"].values() if np.isfinite(x))
        drawn = [c.get_offsets() for c in axis.collections if len(c.get_offsets()) == len(fine)]
        assert any(np.allclose(sorted(d[:, 0]), fine) and (d[:, 1] == place).all() for d in drawn)
    assert "2 diverged" in {text.get_text() for text in axis.texts}
    axis = Figure().add_subplot()
    plots.seeds([{**found["variants"][0], "values": {0: 0.5, 1: 0.5, 2: 0.6}}], "accuracy", "max", axis)
    drawn = next(c.get_offsets() for c in axis.collections if len(c.get_offsets()) == 3)
    assert len({tuple(point) for point in drawn.tolist()}) == 3 and np.allclose(drawn[:, 1].mean(), 0)

    curves = {row.seed: row.curve for row in rows if row.variant == "pre-norm"}
    steps, mean, low, high = plots.band(curves)
    last = np.array([curve[-1][1] for curve in curves.values()])
    assert steps.tolist() == list(synthetic.STEPS) and mean[-1] == pytest.approx(last.mean())
    assert (low[-1], high[-1]) == pytest.approx(scipy.stats.ttest_1samp(last, 0).confidence_interval())
    # Two variants never look the same without their colour.
    looks = [plots.style(i) for i in range(32)]
    assert len({(x["marker"], str(x["linestyle"])) for x in looks}) == 32

    tuned = folder[1]["tuned"]["optimizer.lr"]
    chosen = {name: [p["value"] for p in tried if p["chosen"]] for name, tried in tuned.items()}
    assert chosen["pre-norm"] == [1e-3] and chosen["post-norm"] == [1e-4]
    axis = Figure().add_subplot()
    plots.tuned(tuned, "optimizer.lr", "loss", list(study.variants), "min", axis)
    assert [text.get_text() for text in axis.texts] == ["edge"]  # of the one whose best is the outermost value
    low, high = axis.get_ylim()
    assert all(low < p["metric"] < high for tried in tuned.values() for p in tried if p["chosen"])


def test_a_grid_of_two_leaves_is_a_heat_map():
    study, rows = synthetic.grid()
    found = findings.find(study, rows)
    [grid] = found["grids"]
    assert (grid["x"], grid["y"]) == ("optimizer.lr", "optimizer.weight_decay")
    assert grid["xs"] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2] and grid["ys"] == [0.0, 0.01, 0.1, 1.0]
    for i, wd in enumerate(grid["ys"]):
        for j, lr in enumerate(grid["xs"]):
            v = of(found, f"lr={lr},weight_decay={wd}")
            assert grid["z"][i][j] == v["mean"] if v["n"] else np.isnan(grid["z"][i][j])
    axis = Figure().add_subplot()
    plots.heat(grid, "min", axis)
    cells = [text.get_text() for text in axis.texts]
    assert len(cells) == 20 and cells.count("×") == 1
    fine = [x for row in grid["z"] for x in row if np.isfinite(x)]
    [frame] = axis.lines
    i, j = np.argwhere(np.array(grid["z"]) == min(fine))[0]
    assert (np.mean(frame.get_xdata()[:4]), np.mean(frame.get_ydata()[:4])) == pytest.approx((j, i))
    assert len(plots.shown_curves(found["variants"], study.baseline, "min")) == plots.CURVES
    # Two optimizers over the same two leaves are two maps; one leaf alone is none.
    points = [({"optimizer.name": n, "a": a, "b": b}, a + b) for n in ("x", "y") for a in (1, 2) for b in (1, 2)]
    assert [g["title"] for g in findings._grid("t", points)] == ["name='x'", "name='y'"]
    assert findings._grid("t", [({"a": a}, a) for a in (1, 2)]) == []


STUDY = """
def get_study():
    base = dict(
        steps=20, model=dict(name="linear"), objective=dict(name="classification"), optimizer=dict(name="sgd", lr=0.1),
        schedule=dict(name="constant"), data=dict(name="digits"),
    )
    return dict(
        name="tiny", title="Rates", source="none", base=base, seeds=(0, 1, 2), metric="validation/loss", mode="min",
        variants={"slow": {"optimizer.lr": 0.01}, "fast": {}}, baseline="slow",
        claims=(dict(better="fast", worse="slow", text="Fast is better"),),
    )
"""


def test_the_verb_reports_what_is_in_the_store(tmp_path, capsys):
    file = tmp_path / "configs" / "tiny.py"
    file.parent.mkdir()
    file.write_text(STUDY)
    study = spec.read(str(file))
    store = Store(study, tmp_path / "w")
    for cell in store.cells()[:-1]:
        value = {"slow": 1.0, "fast": 0.5}[cell.variant] + 0.01 * cell.seed**2
        row = dataclasses.replace(
            synthetic.rows(synthetic.study())[0], cell=cell.id, variant=cell.variant, seed=cell.seed,
            values={"validation/loss": value}, command=store.command(cell),
        )  # fmt: skip
        store.folder(cell).mkdir(parents=True)
        (store.folder(cell) / "row.json").write_text(json.dumps(dataclasses.asdict(row)))
    start = {"python": "3.11.7", "versions": {"jax": "0.10"}, "devices": 1, "device_kind": "cpu", "cpus": 2}
    (store.folder(store.cells()[0]) / "env.json").write_text(json.dumps({"starts": [start]}))
    verb = ["study", "report", str(file), "--workdir", str(tmp_path / "w")]
    cli.run(verb)
    said = capsys.readouterr().out
    assert "! runs not run yet, of 3 seeds each: fast 1" in said and "+0.5" in said and "undecided: Fast" in said
    out = tmp_path / "w" / "report"
    found = json.loads((out / "report.json").read_text())
    assert of(found, "slow")["mean"] == pytest.approx(1.0 + 0.05 / 3) and of(found, "fast")["n"] == 2
    page = (out / "index.html").read_text()
    assert store.command(store.cells()[0]).replace("'", "&#x27;") in page and "jax 0.10" in page
    assert {p.name for p in out.iterdir()} >= {"report.md", "report.tex", "seeds.png", "seeds.pdf", "gains.png"}

    row = store.folder(store.cells()[0]) / "row.json"
    row.write_text(row.read_text().replace("e" * 16, "0" * 16))
    with pytest.raises(InputError, match="evaluation fingerprint.*--mixed"):
        cli.run(verb)
    cli.run([*verb, "--mixed", "--out", str(tmp_path / "elsewhere")])
    assert "! NOT COMPARABLE" in capsys.readouterr().out
    assert "NOT COMPARABLE" in (tmp_path / "elsewhere" / "index.html").read_text()
