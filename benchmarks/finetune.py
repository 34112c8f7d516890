"""Fine-tuning on real data against baselines on the same rows: Rotten Tomatoes, Chinese reviews, images.

    python benchmarks/finetune.py rotten [--folds 0,1,2,3,4] [--runs runs]     MiniLM against TF-IDF + LinearSVC
    python benchmarks/finetune.py reviews [--folds 0]                          pretrained against from scratch
    python benchmarks/finetune.py digits                                       transfer against from scratch
    python benchmarks/finetune.py rotten --smoke                               a few steps of one fold

Resumable: a run that has its result.json is not repeated, one that was killed goes on. Every part is a
`bigmodel train` of a config in configs/. Predictions on the held-out rows are compared example by
example; intervals are paired bootstraps over groups (films) or examples. results/finetune.json has an entry per task.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bigmodel_jax import experiment  # noqa: E402
from bigmodel_jax.data.datasets import DATASETS  # noqa: E402
from bigmodel_jax.data.tables import Table, label_ids  # noqa: E402
from bigmodel_jax.measures.intervals import bootstrap, difference, ratio  # noqa: E402

RESULTS = ROOT / "results" / "finetune.json"
SMOKE = ("--config.steps=4", "--config.schedule.warmup=0")


def train(config: str, workdir: Path, *overrides: str) -> dict[str, Any]:
    """result.json of a run, started or continued as a process of its own."""
    done = workdir / "result.json"
    if not done.exists():
        command = [sys.executable, "-m", "bigmodel_jax.cli", "train", "--config", str(ROOT / "configs" / config)]
        began = time.time()
        subprocess.run([*command, "--workdir", str(workdir), *overrides], check=True, cwd=ROOT)
        print(f"{workdir}: {time.time() - began:.0f} s", flush=True)
    return json.loads(done.read_text())


def predictions(workdir: Path, name: str) -> dict[str, np.ndarray]:
    """{"label", "logits"} of evaluation set `name`, in the order of its rows; from the best checkpoint where kept."""
    kept = workdir / f"predictions-{name}.npz"
    if not kept.exists():
        from bigmodel_jax import offline
        from bigmodel_jax.evaluate import collect, spec

        step = "best" if (workdir / "best").exists() else None
        exp, programs, state, _ = offline.open_run(str(workdir), (), step)
        pipeline = exp.data.evals[name]
        step = programs.records(exp.eval_rows, spec(pipeline))
        found = collect(step, state, pipeline, programs.eval_sharding, exp.eval_rows)
        np.savez(kept, **{key: found[key] for key in ("id", "label", "logits")})
    with np.load(kept) as found:
        return dict(found)


def rows_of(config: str) -> tuple[dict[str, Table], list[str], Any]:
    """(tables by split, class names, data set) of a config's data section, without its tokenizer."""
    section = dict(experiment.read(str(ROOT / "configs" / config))["data"])
    data = DATASETS[section.pop("name")](**section)
    found, names, _ = data.tables()
    return found, names, data


def svm(found: dict[str, Table], names: list[str], data: Any, **vectorizer: Any) -> np.ndarray:
    """Classes that TF-IDF + LinearSVC gives the test rows; its C is the best of three on a held-out tenth."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    texts, labels = found["train"].texts(data.text), label_ids(found["train"], data.label, names)
    held = np.random.default_rng(0).random(len(texts)) < 0.1
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True, **vectorizer), LinearSVC())
    search = GridSearchCV(model, {"linearsvc__C": [0.1, 0.3, 1.0]}, cv=PredefinedSplit(np.where(held, 0, -1)))
    return search.fit(texts, labels).predict(found["test"].texts(data.text))


def compare(right: dict[str, np.ndarray], groups: np.ndarray | None, baseline: str) -> dict[str, Any]:
    """Accuracy of each with its interval, and each less the baseline, paired. right: {name: [n] 0 or 1}, percent."""
    count = len(next(iter(right.values())))
    scaled = {name: ratio(100.0 * value) for name, value in right.items()}
    alone = bootstrap(lambda w: {n: s(w) for n, s in scaled.items()}, count, groups=groups, resamples=4000)
    out: dict[str, Any] = {"examples": count, "accuracy": {name: each.json() for name, each in alone.items()}}
    for name in right:
        if name != baseline:
            pair = difference(
                lambda w, n=name: {"accuracy": scaled[n](w)}, lambda w: {"accuracy": scaled[baseline](w)}, count,
                groups=groups, resamples=4000,
            )  # fmt: skip
            out[f"{name} - {baseline}"] = pair["accuracy"].json()
    return out


def show(title: str, result: dict[str, Any]) -> None:
    def interval(each: dict[str, Any]) -> str:
        return f"[{each['low']:+.2f}, {each['high']:+.2f}]" if each["low"] is not None else each.get("note", "")

    print(f"\n{title}: {result['examples']:,} held-out examples")
    for name, each in result["accuracy"].items():
        print(f"  {name:<28} {each['estimate']:6.2f}   {interval(each)}")
    for name, each in result.items():
        if " - " in name:
            print(f"  {name:<28} {each['estimate']:+6.2f}   {interval(each)}  paired")


def record(task: str, entry: dict[str, Any]) -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found[task] = entry | {"recorded": time.strftime("%Y-%m-%d", time.gmtime())}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def rotten(folds: list[int], runs: Path, smoke: bool) -> dict[str, Any]:
    """MiniLM on movie-grouped folds; all test rows pooled, films resampled."""
    short = (*SMOKE, "--config.eval.every=0") if smoke else ()
    right: dict[str, list[np.ndarray]] = {"MiniLM": [], "TF-IDF + LinearSVC": []}
    groups, per_fold, seconds = [], [], []
    for fold in folds:
        config, workdir = f"finetune_rotten.py:{fold}", runs / "rotten" / str(fold)
        result = train(config, workdir, *short)
        found, names, data = rows_of(config)
        label = label_ids(found["test"], data.label, names)
        ours = predictions(workdir, "test")
        assert (ours["label"] == label).all(), "rows of the baseline are not those of the run"
        right["MiniLM"].append(ours["logits"].argmax(-1) == label)
        right["TF-IDF + LinearSVC"].append(svm(found, names, data, ngram_range=(1, 2), min_df=2) == label)
        groups += found["test"].column(data.group)
        per_fold.append({name: round(100 * float(each[-1].mean()), 2) for name, each in right.items()})
        seconds.append(round(result["time"]["wall_s"]))
        print(fold, per_fold[-1], flush=True)
    entry = compare({n: np.concatenate(v) for n, v in right.items()}, np.array(groups), "TF-IDF + LinearSVC")
    return entry | {"folds": dict(zip(map(str, folds), per_fold, strict=True)), "seconds": seconds}


def reviews(folds: list[int], runs: Path, smoke: bool) -> dict[str, Any]:
    """Pretrained on the training texts, and from scratch, the best checkpoint of each by validation; the SVM."""
    short = (*SMOKE, "--config.eval.every=2") if smoke else ()
    names = ("pretrained", "from scratch", "SVM on characters")
    right: dict[str, list[np.ndarray]] = {name: [] for name in names}
    per_fold, seconds = [], []
    for fold in folds:
        home = runs / "reviews" / str(fold)
        first = train(f"finetune_reviews.py:pretrain,{fold}", home / "pretrain", *short[:2])
        start = f"--config.init_from.path={home / 'pretrain'}"
        tuned = train(f"finetune_reviews.py:finetune,{fold}", home / "finetune", start, *short)
        fresh = train(f"finetune_reviews.py:scratch,{fold}", home / "scratch", *short)
        found, classes, data = rows_of(f"finetune_reviews.py:scratch,{fold}")
        label = label_ids(found["test"], data.label, classes)
        for name, part in zip(names, ("finetune", "scratch"), strict=False):
            right[name].append(predictions(home / part, "test")["logits"].argmax(-1) == label)
        right[names[2]].append(svm(found, classes, data, analyzer="char", ngram_range=(1, 3), min_df=3) == label)
        per_fold.append({name: round(100 * float(each[-1].mean()), 2) for name, each in right.items()})
        seconds.append([round(r["time"]["wall_s"]) for r in (first, tuned, fresh)])
        print(fold, per_fold[-1], flush=True)
    right = {name: np.concatenate(value) for name, value in right.items()}
    entry = compare(right, None, "from scratch") | {"folds": dict(zip(map(str, folds), per_fold, strict=True))}
    against = compare({n: right[n] for n in (names[0], names[2])}, None, names[2])
    return entry | {key: value for key, value in against.items() if " - " in key} | {"seconds": seconds}


def digits(folds: list[int], runs: Path, smoke: bool) -> dict[str, Any]:
    """MNIST-5k with few training images, from 8x8 digits and from scratch."""
    home, short = runs / "digits", SMOKE if smoke else ()
    train("finetune_digits.py:source", home / "source", *short)
    entry: dict[str, Any] = {}
    for count in (50, 200, 1000, 4000)[: 1 if smoke else 4]:
        right = {}
        for part in ("transfer", "scratch"):
            more = [f"--config.init_from.path={home / 'source'}"] if part == "transfer" else []
            workdir = home / f"{part}-{count}"
            train(f"finetune_digits.py:{part}", workdir, f"--config.data.limit={count}", *more, *short)
            found = predictions(workdir, "validation")
            right[part] = found["logits"].argmax(-1) == found["label"]
        entry[str(count)] = compare(right, None, "scratch")
        show(f"digits, {count} training images", entry[str(count)])
    return entry


TASKS = {"rotten": rotten, "reviews": reviews, "digits": digits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--folds", default="", help="numbers with commas; default all five, of the reviews the first")
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--smoke", action="store_true", help="a few steps; nothing is recorded")
    args = parser.parse_args()
    default = "0" if args.smoke or args.task != "rotten" else "0,1,2,3,4"
    folds = [int(fold) for fold in (args.folds or default).split(",")]
    runs = Path(args.runs).resolve() / ("smoke" if args.smoke else "")
    entry = TASKS[args.task](folds, runs, args.smoke)
    if "accuracy" in entry:
        show(args.task, entry)
    if not args.smoke:
        record(args.task, entry)


if __name__ == "__main__":
    main()
