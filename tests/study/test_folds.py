"""K-fold cross-validation as a study: paired by seed and fold, corrected for the training rows that folds share."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats

from bigmodel_jax import cli
from bigmodel_jax.errors import InputError
from bigmodel_jax.study import findings, spec, statistics
from bigmodel_jax.study.store import Store
from tests.study import synthetic

FOLDS, ROWS = 2, 36
STUDY = """
def get_study():
    return dict(
        name="folded", title="Rates in folds", source="none", seeds=(0,), folds={{"data.fold": range({folds})}},
        metric="test/loss", mode="min", baseline="slow", variants={{"slow": {{"optimizer.lr": 1e-4}}, "fast": {{}}}},
        claims=(dict(better="fast", worse="slow", text="Fast is better"),),
        base=dict(
            steps=3, batch_size=8, objective=dict(name="classification"), optimizer=dict(name="adamw", lr=1e-2),
            schedule=dict(name="constant"), log=dict(tensorboard=False), eval=dict(batch_size=18),
            checkpoint=dict(every=0),
            model=dict(name="encoder", num_layers=1, embed_dim=16, num_heads=2, max_length=16, head="classes"),
            data=dict(
                name="labelled_text", train={table!r}, folds={folds}, validation_share=0.0, length=16,
            ),
        ),
    )
"""


def written(folder) -> str:
    rows = [f"{'good' if n % 2 else 'bad'} number {n},{'yes' if n % 2 else 'no'}" for n in range(ROWS)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    file = folder / "configs" / "folded.py"
    file.parent.mkdir()
    file.write_text(STUDY.format(folds=FOLDS, table=str(folder / "texts.csv")))
    return str(file)


def test_a_study_of_folds_goes_on_and_is_judged_fold_by_fold(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # runs on one device
    file, workdir = written(tmp_path), tmp_path / "w"
    words = ["study", "run", file, "--workdir", str(workdir)]
    cli.run([*words, "--only", "slow"])
    before = {path: path.read_bytes() for path in workdir.glob("cells/*/row.json")}
    assert len(before) == FOLDS
    cli.run(words)
    said = capsys.readouterr().out
    assert "data.fold=1: test/loss" in said and f"fast: {FOLDS} of {FOLDS} runs" in said
    assert {path: path.read_bytes() for path in before} == before and len(list(workdir.glob("cells/*"))) == 2 * FOLDS

    cli.run(["study", "report", file, "--workdir", str(workdir)])
    found = json.loads((workdir / "report" / "report.json").read_text())
    results = [json.loads(path.read_text()) for path in workdir.glob("cells/*/result.json")]
    assert all(r["rows"] == {"train": ROWS / 2, "test": ROWS / 2} for r in results)
    losses = {(c["variant"], c["fold"]): c["value"] for c in found["cells"]}
    gains = np.array([losses["slow", fold] - losses["fast", fold] for fold in range(FOLDS)])
    # Nadeau & Bengio 2003, section 3.2, with n_test / n_train = 18 / 18.
    error = math.sqrt((1 / FOLDS + 1) * gains.var(ddof=1))
    [claim] = found["claims"]
    assert claim["n"] == FOLDS and claim["mean"] == pytest.approx(gains.mean())
    assert claim["p"] == pytest.approx(2 * scipy.stats.t.sf(abs(gains.mean()) / error, FOLDS - 1))
    assert claim["p"] > 1.2 * scipy.stats.ttest_1samp(gains, 0).pvalue  # control: the plain test
    half = scipy.stats.t.ppf(0.975, FOLDS - 1) * error
    assert (claim["student"]["low"], claim["student"]["high"]) == pytest.approx(
        (gains.mean() - half, gains.mean() + half)
    )
    text = (workdir / "report" / "report.md").read_text()
    assert "Nadeau and Bengio 2003" in text and "n_test/n_train is 1 here" in text and "| 0, fold 1 |" in text
    assert "2 common folds" in text and "Intervals are of seeds" not in text

    # Controls: another held-out set in a fold of one variant; the same one in every fold.
    rows = Store(spec.read(file), workdir)
    rows = rows.rows(rows.cells())
    study = spec.read(file)
    spec.check_comparable(study, rows)
    other = [dataclasses.replace(row, eval_fingerprint="x") if row is rows[-1] else row for row in rows]
    with pytest.raises(InputError, match="'slow' seed 0 data.fold=1 .*'fast' seed 0 data.fold=1 .*evaluation finger"):
        spec.check_comparable(study, other)
    other = [dataclasses.replace(row, data_fingerprint="x") if row is rows[-1] else row for row in rows]
    with pytest.raises(InputError, match="data fingerprint"):
        spec.check_comparable(study, other)
    same = [dataclasses.replace(row, eval_fingerprint="x") for row in rows]
    with pytest.raises(InputError, match="data.fold=0 .*data.fold=1 .*evaluated on the same examples"):
        spec.check_comparable(study, same)


def made(seeds=(0, 1), folds=5):
    """(a made-up study of two variants in folds, its rows)."""
    study = synthetic.study(
        variants={"a": {}, "b": {"optimizer.lr": 1.0}}, baseline="a", seeds=seeds, folds={"data.fold": range(folds)},
        claims=(spec.Claim("b", "a", "B is better"),), published={},
    )  # fmt: skip
    rng, rows = np.random.default_rng(0), []
    template = synthetic.rows(synthetic.study())[0]
    for name in study.variants:
        for seed, fold in study.repeats:
            value = 1.8 - 0.05 * (name == "b") + 0.1 * fold["data.fold"] + rng.normal(0, 0.02)
            rows.append(
                dataclasses.replace(
                    template, variant=name, seed=seed, overrides=study.variants[name] | fold, cell=f"{len(rows):016x}",
                    values={study.metric: value, "rows/train": 800.0, "rows/validation": 200.0},
                    eval_fingerprint=f"e{fold}", data_fingerprint=f"d{fold}", curve=[(10, value)],
                )
            )  # fmt: skip
    return study, rows


def test_seeds_of_a_fold_are_averaged_before_folds_are_counted():
    study, rows = made()
    found = findings.find(study, rows)
    table = {(r.variant, r.seed, r.overrides["data.fold"]): r.values[study.metric] for r in rows}
    gains = [np.mean([table["a", s, k] - table["b", s, k] for s in study.seeds]) for k in range(5)]
    claim = found["claims"][0]
    assert list(claim["gains"].values()) == pytest.approx(gains) and claim["n"] == 5
    t = np.mean(gains) / math.sqrt((1 / 5 + 1 / 4) * np.var(gains, ddof=1))
    assert claim["p"] == pytest.approx(2 * scipy.stats.t.sf(abs(t), 4))
    assert claim["p_flips"] is claim["p_ranks"] is claim["seeds_needed"] is claim["bootstrap"]["low"] is None
    assert found["variants"][0]["n"] == 10 and found["warnings"] == []
    assert found["variants"][0]["student"]["low"] < found["variants"][0]["mean"] - scipy.stats.t.ppf(0.975, 4) * (
        np.std([np.mean([table["a", s, k] for s in study.seeds]) for k in range(5)], ddof=1) / math.sqrt(5)
    )
    # A pair that lacks one of its runs is left out of its fold, and a fold with a diverged run is tested by ranks.
    short = findings.find(study, rows[:-1])
    assert "not run yet, of 10 runs each: b 1" in short["warnings"][0]
    last = list(short["claims"][0]["gains"].values())[-1]
    assert last == pytest.approx(table["a", 0, 4] - table["b", 0, 4])
    lost = [dataclasses.replace(rows[0], status="diverged", values={}), *rows[1:]]
    claim = findings.find(study, lost)["claims"][0]
    assert claim["test"] == "ranks" and claim["diverged"] == (0, 1) and claim["gains"][0] == math.inf


def test_the_corrected_interval_covers_where_the_plain_one_does_not():
    """Results of n folds with the correlation that the correction assumes, n_test / (n_train + n_test)."""
    n, share, trials = 5, 0.2, 4000
    rng = np.random.default_rng(0)
    x = math.sqrt(share) * rng.normal(size=(trials, 1)) + math.sqrt(1 - share) * rng.normal(size=(trials, n))
    assert np.mean(x.mean(1) ** 2) == pytest.approx(1 / n * (1 - share) + share, rel=0.1)
    covered = np.mean([not statistics.student(row, overlap=share / (1 - share)).excludes(0.0) for row in x])
    plain = np.mean([not statistics.student(row).excludes(0.0) for row in x])
    assert 0.94 < covered < 0.96 and plain < 0.88


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(folds={"data.fold": (1,)}), "at least two values"),
        (dict(folds={"data.fold": (0, 1, 1)}), "each once"),
        (dict(folds={"data.fold": (0, 1), "data.limit": (1, 2)}), "one leaf decides"),
        (dict(folds={"data.fould": (0, 1)}), "variant 'a' in fold 0.*did you mean 'fold'"),
        (dict(variants={"a": {}, "b": {"data.fold": 1}}), "variant 'b' sets 'data.fold'; folds are the study's"),
        (dict(tune={"optimizer.lr": (1, 2)}, tune_seeds=(7,)), "would choose by rows that are held out"),
        (dict(first={"c": {"data": dict(name="digits")}}), "first run 'c' in fold 0"),
    ],
)
def test_what_is_no_study_of_folds(changes, says):
    base = dict(
        model=dict(name="encoder"), objective=dict(name="classification"), optimizer=dict(name="sgd"),
        schedule=dict(name="constant"), data=dict(name="labelled_text", train="t.csv", folds=5),
    )  # fmt: skip
    study = made()[0]
    spec.check(dataclasses.replace(study, base=base, file=""))
    with pytest.raises(InputError, match=says):
        spec.check(dataclasses.replace(study, **dict(base=base, file="") | changes))


def test_first_runs_are_of_the_fold_of_what_starts_from_them(tmp_path):
    base = dict(
        model=dict(name="encoder"), objective=dict(name="classification"), optimizer=dict(name="sgd"),
        schedule=dict(name="constant"), data=dict(name="labelled_text", train="t.csv", folds=5),
    )  # fmt: skip
    study = dataclasses.replace(
        made(seeds=(0,), folds=2)[0], base=base, first={"p": {"steps": 3}}, file=str(tmp_path / "configs" / "s.py"),
        variants={"a": {"init_from.path": "first:p"}, "b": {"init_from.path": "first:p", "optimizer.lr": 1.0}},
    )  # fmt: skip
    store = Store(study, tmp_path / "w")
    starts = store.starts(store.cells())
    assert [(cell.seed, cell.config["data"]["fold"]) for cell in starts] == [(0, 0), (0, 1)]
    by_fold = {cell.extra["data.fold"]: cell.id for cell in starts}
    assert all(cell.start == by_fold[cell.extra["data.fold"]] for cell in store.cells())
