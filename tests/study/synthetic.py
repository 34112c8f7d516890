"""A made-up study with known differences, as rows: no training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from bigmodel_jax.study.spec import Claim, Row, Study
from bigmodel_jax.study.tuning import Choice, Tried

LEVELS = {"pre-norm": 1.80, "pre-norm, warm-up": 1.79, "post-norm": 2.4, "post-norm, warm-up": 1.81}
SPREAD = 0.02
STEPS = (50, 100, 150, 200, 250, 300)


def study(**changes) -> Study:
    """Four variants; post-norm without warm-up is far worse and diverges on some seeds."""
    values = dict(
        name="made_up", title="Layer norm before or after, with and without warm-up",
        source="A made-up study in the form of Xiong et al. 2020", base={},
        variants={
            name: {"model.pre_norm": name.startswith("pre"), "schedule.warmup": 30 if "warm" in name else 0}
            for name in LEVELS
        },
        seeds=(0, 1, 2, 3, 4), metric="validation/bits_per_byte", mode="min", baseline="post-norm, warm-up",
        claims=(
            Claim("pre-norm", "post-norm", "Without warm-up, pre-norm trains and post-norm does not"),
            Claim("pre-norm", "post-norm, warm-up", "Pre-norm without warm-up is as good as post-norm with it", -0.05),
            Claim("post-norm, warm-up", "pre-norm, warm-up", "With warm-up, post-norm is the better one"),
            Claim("post-norm", "pre-norm, warm-up", "Warm-up and placement do nothing together", 0.1),
        ),
        published={"pre-norm": 34.1, "post-norm, warm-up": 34.0}, published_metric="BLEU", published_source="nowhere",
        file="configs/papers/made_up/table.py",
    )  # fmt: skip
    return Study(**values | changes)


def rows(made: Study, diverged: int = 0, rng: int = 0) -> list[Row]:
    """A finished row of every variant and seed; the first `diverged` seeds of "post-norm" have no number."""
    random = np.random.default_rng(rng)
    shared = random.normal(0, SPREAD, size=len(made.seeds))
    out = []
    for name, overrides in made.variants.items():
        for place, seed in enumerate(made.seeds):
            value = LEVELS.get(name, 1.8) + shared[place] + random.normal(0, SPREAD)
            lost = name == "post-norm" and place < diverged
            curve = [(s, value + 2.5 * math.exp(-s / 60) + random.normal(0, 0.01)) for s in STEPS[:-1]]
            out.append(
                Row(
                    cell=f"{len(out):016x}", variant=name, seed=seed,
                    values={"parameters": 123456.0} if lost else {made.metric: value, "parameters": 123456.0},
                    data_fingerprint="d" * 16, eval_fingerprint="e" * 16, overrides=overrides,
                    status="diverged" if lost else "done", wall_s=41.0 + place, cpu_s=79.5,
                    command=f"bigmodel train --config configs/papers/made_up/table.py:{name!r} --config.seed={seed} "
                    f"--workdir runs/made_up/{len(out):016x}",
                    commit="0123456789abcdef", curve=curve if lost else [*curve, (STEPS[-1], value)],
                )
            )  # fmt: skip
    return out


def choices(made: Study) -> dict[str, Choice]:
    """Learning rates tried: a bowl whose best value is inside for all variants but "post-norm"."""
    out = {}
    for place, name in enumerate(made.variants):
        tried = []
        for lr in (1e-4, 3e-4, 1e-3, 3e-3):
            best = 1e-4 if name == "post-norm" else 1e-3
            value = min(LEVELS[name], 2.0) + 0.15 * math.log10(lr / best) ** 2 + 0.015 * place
            tried.append(Tried({"optimizer.lr": lr}, [value], value))
        least = min(tried, key=lambda each: each.mean)
        out[name] = Choice(least.overrides, tried, ["optimizer.lr"] if name == "post-norm" else [])
    return out


def grid() -> tuple[Study, list[Row]]:
    """Learning rate by weight decay, five by four; one corner diverges."""
    lrs, decays = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0.0, 0.01, 0.1, 1.0)
    variants = {
        f"lr={lr},weight_decay={wd}": {"optimizer.lr": lr, "optimizer.weight_decay": wd} for lr in lrs for wd in decays
    }
    made = study(
        name="made_up_grid", title="Rate by decay", variants=variants, baseline="lr=0.001,weight_decay=0.1",
        claims=(Claim("lr=0.001,weight_decay=0.1", "lr=0.0001,weight_decay=0.0", "Both matter"),), published={},
    )  # fmt: skip
    found = rows(made)
    out = []
    for row in found:
        lr, wd = row.overrides["optimizer.lr"], row.overrides["optimizer.weight_decay"]
        worse = 0.2 * math.log10(lr / 1e-3) ** 2 + 0.1 * abs(wd - 0.1) ** 0.5
        values = {k: v + worse if "/" in k else v for k, v in row.values.items()}
        gone = lr * wd >= 1e-2
        out.append(Row(**row.__dict__ | {"values": {} if gone else values, "status": "diverged" if gone else "done"}))
    return made, out


def write_all(folder: Path) -> list[Path]:
    """Reports of all made-up studies below a folder, for looking at: the pages."""
    from bigmodel_jax.study import report

    made = study()
    full = report.of_rows(made, rows(made, diverged=2), choices(made), mixed=False, environment=["Python, made up"])
    mixed = rows(made)
    mixed[3] = Row(**mixed[3].__dict__ | {"eval_fingerprint": "f" * 16})
    several = {
        "study": full, "mixed": report.of_rows(made, mixed, {}, mixed=True),
        "grid": report.of_rows(*grid(), {}, mixed=False),
    }  # fmt: skip
    for name, each in several.items():
        report.write(each, folder / name)
    return [folder / name / "index.html" for name in several]
