"""What a model's features know before any fine-tuning: logistic regression on them, with all rows or a few per class.

Features are the pooled hidden states of the frozen model, each dimension scaled to deviation 1 on the training rows;
the penalty is chosen by cross-validation on them (Kornblith et al. 2019, section 3; Radford et al. 2021, appendix A).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import experiment as experiments
from bigmodel_jax import sections
from bigmodel_jax.data.order import RowRng
from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.errors import InputError
from bigmodel_jax.evaluate import collect, spec
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.learn import state as states
from bigmodel_jax.parallel import rules
from bigmodel_jax.programs import Programs, compiler_options, set_up_process
from bigmodel_jax.screen import Screen

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)
FOLDS = 3


def features(exp: Experiment, programs: Programs, state: Any, pipeline: Pipeline) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, D] f32, labels [n]) of every row, once, in order."""
    names = ("image", "features", "tokens", "segments", "positions", "token_types")

    def record(state: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        inputs = {name: batch[name] for name in names if name in batch}
        with rules.use(exp.layout):
            hidden = exp.model.apply(states.variables(state), train=False, **inputs).hidden.astype(jnp.float32)
        if hidden.ndim == 3:  # no pooled state: the mean over real tokens
            real = (batch["segments"] > 0)[..., None] if "segments" in batch else jnp.ones(hidden.shape[:2] + (1,))
            hidden = (hidden * real).sum(1) / jnp.maximum(real.sum(1), 1)
        return {"features": hidden, "label": batch["label"]}

    step = programs.lower_rows(record, exp.eval_rows, spec(pipeline)).compile(compiler_options())
    found = collect(step, state, pipeline, programs.eval_sharding, exp.eval_rows)
    return found["features"], found["label"]


def few(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of `shots` examples of each class, a pure function of the seed; all rows for 0.

    Errors: InputError for a class with fewer.
    """
    if not shots:
        return np.arange(len(labels))
    order = np.argsort(RowRng(seed, np.arange(len(labels))).bits(salt="few"), kind="stable")
    rows = []
    for label in np.unique(labels):
        own = order[labels[order] == label]
        if len(own) < shots:
            raise InputError(f"probe: {shots} examples per class, but class {label} has {len(own)}")
        rows.append(own[:shots])
    return np.sort(np.concatenate(rows))


def fit(train: np.ndarray, labels: np.ndarray) -> Any:
    """Scaled logistic regression; the penalty by cross-validation where each class has enough rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    if np.unique(labels, return_counts=True)[1].min() >= FOLDS:
        model = GridSearchCV(model, {"logisticregression__C": list(PENALTIES)}, cv=FOLDS)
    return model.fit(train, labels)


def probe(
    train: tuple[np.ndarray, np.ndarray], tests: Mapping[str, tuple[np.ndarray, np.ndarray]], shots: Sequence[int],
    repeats: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """{"all" or shots: {set: {"accuracy", "sd", "draws"}}}: percent, and its deviation over draws of the few."""
    out: dict[str, Any] = {}
    for count in shots:
        right: dict[str, list[float]] = {name: [] for name in tests}
        for seed in range(repeats if count else 1):
            rows = few(train[1], count, seed)
            model = fit(train[0][rows], train[1][rows])
            for name, (x, y) in tests.items():
                right[name].append(100.0 * float((model.predict(x) == y).mean()))
        out[str(count or "all")] = {
            name: {
                "accuracy": float(np.mean(v)), "sd": float(np.std(v, ddof=1)) if len(v) > 1 else None, "draws": len(v)
            }
            for name, v in right.items()
        }  # fmt: skip
    return out


def probe_config(config: Mapping[str, Any], shots: Sequence[int], repeats: int = 5) -> dict[str, Any]:
    """Probe the model that a fine-tuning config starts from, on its data; prints a table, returns the numbers.

    Args:
      config: resolved, with `init_from` (without it, the features are those of random weights).
      shots: examples per class; 0 means all.

    Raises:
      InputError: data without labels, or a start that does not fit.
    """
    set_up_process(sections.Runtime(**config["runtime"]))
    screen = Screen()
    with screen:
        exp = experiments.build(config, progress=screen.preparing)
        if "label" not in exp.spec:
            raise InputError("a probe needs examples with one label each: labelled texts, images or tables")
        programs = Programs(exp)
        state = programs.init(jax.random.key(exp.run.seed))
        settings = exp.section("init_from")
        line = "random weights: no init_from"
        if settings.path:
            state, line = programs.initial_from(state, settings)
        screen.say(line)
        plain = next(iter(exp.data.evals.values())).transforms
        train = Pipeline(exp.data.train.source, exp.eval_rows, exp.run.seed, plain, shuffle=False)
        sets = {name: features(exp, programs, state, each) for name, each in {"train": train, **exp.data.evals}.items()}
        known = sets.pop("train")
        out = probe(known, sets, shots, repeats)
    print(f"{'per class':>9}  {'set':<12} accuracy")
    for count, each in out.items():
        for name, found in each.items():
            spread = f" +- {found['sd']:.2f} over {found['draws']} draws" if found["sd"] is not None else ""
            print(f"{count:>9}  {name:<12} {found['accuracy']:6.2f}{spread}")
    return {"features": int(known[0].shape[1]), "rows": len(known[1]), "accuracy": out}


def probe_to_file(config: Mapping[str, Any], shots: Sequence[int], repeats: int, out: str) -> None:
    """As `probe_config`; writes JSON to `out` where one is given."""
    found = probe_config(config, shots, repeats)
    if out:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1, sort_keys=True)
