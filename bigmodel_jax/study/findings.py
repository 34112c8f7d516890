"""What a study found, as one plain value that Markdown, LaTeX and the page are written from.

`find(study, rows, choices)` puts together the rows of a study with the statistics of statistics.py. Nothing is left
out in silence: cells that failed, diverged or are missing, tuned values at the edge of what was tried, and rows that
should not be compared are among its warnings.
"""

from __future__ import annotations

import math
import statistics as plain_statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigmodel_jax.errors import InputError
from bigmodel_jax.measures.intervals import Interval
from bigmodel_jax.measures.look import number
from bigmodel_jax.study import statistics
from bigmodel_jax.study.spec import Claim, Row, Study, check_comparable
from bigmodel_jax.study.statistics import Paired, Verdict

ALPHA = 1 - statistics.LEVEL
RULE = (
    "Two variants are compared by their differences on common seeds (a gain is positive where the first is better). "
    "A claim is supported where a two-sided paired t test that the mean gain equals its margin (0 unless stated), "
    "corrected by Holm over all claims of the study, has p at most 0.05 and the gains lie above the margin; it is "
    "contradicted where they lie below; else it is undecided. Where a run diverged, it counts as worse than any that "
    "finished, and the exact rank-sum test takes the place of the t test. Seeds needed: pairs after which a gain "
    "and spread as observed would be settled with a probability of 80%; from few seeds this is a rough number. Exact "
    "p-values by sign flips and signed ranks stand beside as a check that assumes no normal distribution; with n pairs "
    "they cannot be below 2 / 2^n. Bootstrap intervals are expanded percentile intervals (Hesterberg 2015), which "
    "cover about 93% with 5 seeds."
)
SEEDED = "Intervals are of seeds: the held-out examples are the same for all of them."
FOLDED = (
    "This study is of {count} folds ({leaf}): runs are compared on the same seed and fold, and what counts of a fold "
    "is the mean of its seeds, which are no further evidence on other data. Folds share training rows, so their "
    "results are not independent and a plain t interval is too narrow. Intervals and p are those of the corrected "
    "resampled t test (Nadeau and Bengio 2003), which takes s^2 (1/n + n_test/n_train) for the variance of a mean, "
    "not s^2/n; n_test/n_train is {overlap:.3g} here. More folds of the same rows share more of them: how many would "
    "settle a claim is not said, nor are bootstrap intervals and exact p-values given, which would need independent "
    "folds, as the rank-sum test of runs that diverged does."
)
SHOWN = ("model", "objective", "optimizer", "schedule", "data")


def find(
    study: Study, rows: Sequence[Row], choices: Mapping[str, Mapping[str, Any]] | None = None, *, mixed: bool = False
) -> dict[str, Any]:
    """The report as plain values.

    Args:
      rows: of the seeds, as far as they are there.
      choices: {variant: {"overrides", "tried": [{"overrides", "values", "mean"}], "edge"}} of a tuned study.
      mixed: go on, with a warning, where rows have different data or evaluation fingerprints.

    Raises:
      InputError: no rows, or rows that cannot be compared.
    """
    if not rows:
        raise InputError(f"study '{study.name}' has no finished runs to report")
    choices, overlap = choices or {}, _overlap(study, rows)
    warnings = _comparable(study, rows, mixed)
    by_variant = {name: [row for row in rows if row.variant == name] for name in study.variants}
    values = {
        name: {_run(study, row): _value(row, study.metric) for row in found if row.status in ("done", "diverged")}
        for name, found in by_variant.items()
    }
    against = _comparisons(study, values, overlap)
    variants = [
        _variant(study, name, by_variant[name], values[name], choices.get(name), overlap)
        | {"against": against.get(name)}
        for name in study.variants
    ]
    commits = sorted({row.commit for row in rows})
    warnings += _missing(study, variants) + _versions(rows, commits)
    for name, choice in choices.items():
        if choice["edge"]:
            shown = ", ".join(f"{leaf} = {choice['overrides'][leaf]:g}" for leaf in choice["edge"])
            warnings.append(f"{name}: the best {shown} is the outermost value tried; a better one may lie beyond")
    return {
        "name": study.name, "title": study.title, "source": study.source, "file": study.file, "metric": study.metric,
        "setup": _setup(study.base),
        "mode": study.mode, "baseline": study.baseline, "seeds": list(study.seeds), "level": statistics.LEVEL,
        "folds": {leaf: list(folds) for leaf, folds in study.folds.items()}, "overlap": overlap,
        "rule": _rule(study, overlap), "warnings": warnings, "variants": variants,
        "claims": _claims(study, values, overlap),
        "published": {"metric": study.published_metric, "source": study.published_source},
        "tuned": _tuned(choices, study.mode), "grids": _grids(study, variants, choices),
        "cells": [_cell(row, study) for row in rows],
        "fingerprints": {
            "training data": sorted({r.data_fingerprint for r in rows if r.data_fingerprint}),
            "evaluation": sorted({r.eval_fingerprint for r in rows if r.eval_fingerprint}),
        },
        "commits": commits,
        "cost": {"wall_s": sum(r.wall_s for r in rows), "cpu_s": sum(r.cpu_s for r in rows), "cells": len(rows)},
    }  # fmt: skip


def _overlap(study: Study, rows: Sequence[Row]) -> float | None:
    """n_test / n_train of the folds, the largest of all runs; None in a study without folds."""
    if not study.folds:
        return None
    sets = [term.removeprefix("best/").partition("/")[0] for term in study.terms]
    done = [row.values for row in rows if row.status == "done"]
    return max((of[f"rows/{name}"] / of["rows/train"] for of in done for name in sets), default=0.0)


def _rule(study: Study, overlap: float | None) -> str:
    folded = [FOLDED.format(count=len(folds), leaf=leaf, overlap=overlap) for leaf, folds in study.folds.items()]
    return " ".join([RULE, *(folded or [SEEDED])])


Run = tuple[int, Any]
"""(seed, fold) of a row; the fold is None in a study without them."""


def _run(study: Study, row: Row) -> Run:
    return row.seed, study.fold(row.overrides)


def _unit(run: Run) -> Any:
    """What counts once: a seed, or a fold whatever its seeds."""
    seed, fold = run
    return seed if fold is None else fold


def _units(values: Mapping[Run, float], runs: Iterable[Run]) -> dict[Any, float]:
    """{seed: value}, or {fold: mean over its seeds} where there are folds; of these runs."""
    found: dict[Any, list[float]] = {}
    for run in runs:
        found.setdefault(_unit(run), []).append(values[run])
    return {unit: sum(each) / len(each) for unit, each in found.items()}


def _paired(
    study: Study, first: Mapping[Run, float], second: Mapping[Run, float], overlap: float | None, margin: float = 0.0
) -> Paired:
    common = [run for run in first if run in second]
    return statistics.paired(_units(first, common), _units(second, common), study.mode, margin, overlap=overlap)


def _comparable(study: Study, rows: Sequence[Row], mixed: bool) -> list[str]:
    try:
        check_comparable(study, rows)
    except InputError as error:
        if not mixed:
            raise InputError(f"{error}; --mixed reports them all the same, and says so") from None
        return [f"NOT COMPARABLE, shown because it was asked for: {error}"]
    return []


def _setup(base: Mapping[str, Any]) -> list[str]:
    """The study's config before its variants, a line a section."""
    sections = {"": {leaf: base[leaf] for leaf in ("steps", "batch_size") if leaf in base}}
    sections |= {f"{name}: ": base[name] for name in SHOWN if base.get(name)}
    return [
        head + ", ".join(f"{leaf}={value}" for leaf, value in leaves.items())
        for head, leaves in sections.items()
        if leaves
    ]


def _versions(rows: Sequence[Row], commits: Sequence[str]) -> list[str]:
    """What the commits of the rows leave in doubt: the code is not part of a cell."""
    changed = sum(row.commit.endswith("-dirty") for row in rows)
    out = [f"the runs are of {len(commits)} versions of the code: {', '.join(commits)}"] if len(commits) > 1 else []
    return out + ([f"{changed} runs are of code with changes that no commit has"] if changed else [])


def _value(row: Row, metric: str) -> float:
    return row.values.get(metric, math.nan) if row.status == "done" else math.nan


def _variant(
    study: Study, name: str, rows: Sequence[Row], values: Mapping[Run, float], choice: Mapping[str, Any] | None,
    overlap: float | None,
) -> dict[str, Any]:  # fmt: skip
    failed = sum(row.status == "failed" for row in rows)
    summary = statistics.summarise(list(_units(values, values).values()), study.mode, failed, overlap=overlap)
    finished = sum(map(math.isfinite, values.values()))
    return {
        "name": name, "overrides": study.variants[name], "tuned": dict(choice["overrides"]) if choice else {},
        "edge": list(choice["edge"]) if choice else [], "n": finished, "diverged": len(values) - finished,
        "failed": failed, "missing": len(study.repeats) - len(values) - failed, "mean": summary.mean, "sd": summary.sd,
        "median": summary.median, "student": summary.student.json(), "bootstrap": summary.bootstrap.json(),
        "values": {_shown(run): value for run, value in values.items()}, "published": study.published.get(name),
        "parameters": next((int(r.values["parameters"]) for r in rows if "parameters" in r.values), None),
        "wall_s": _median([row.wall_s for row in rows]), "cpu_s": _median([row.cpu_s for row in rows]),
        "curves": _curves(study, [row for row in rows if row.status == "done"]),
    }  # fmt: skip


def _shown(run: Run) -> Any:
    seed, fold = run
    return seed if fold is None else f"seed {seed}, fold {fold}"


def _curves(study: Study, rows: Sequence[Row]) -> dict[Any, list[list[float]]]:
    """{seed, or fold: its curve, the mean over seeds at the steps that all have}."""
    found: dict[Any, list[dict[int, float]]] = {}
    for row in rows:
        found.setdefault(_unit(_run(study, row)), []).append(dict(row.curve))
    return {
        unit: [[step, sum(c[step] for c in each) / len(each)] for step in each[0] if all(step in c for c in each)]
        for unit, each in found.items()
    }


def _median(values: Sequence[float]) -> float | None:
    return plain_statistics.median(values) if values else None


def _against(pair: Paired) -> dict[str, Any]:
    return {
        "n": pair.n, "mean": pair.mean, "sd": pair.sd, "g": pair.g, "p": pair.p, "p_flips": pair.p_flips,
        "p_ranks": pair.p_ranks, "test": pair.test, "student": pair.student.json(), "note": pair.note,
        "diverged": pair.diverged, "ahead": pair.ahead,
        "bootstrap": pair.bootstrap.json(), "gains": dict(zip(pair.seeds, pair.gains, strict=True)),
    }  # fmt: skip


def _comparisons(
    study: Study, values: Mapping[str, Mapping[Run, float]], overlap: float | None
) -> dict[str, dict[str, Any]]:
    """{variant: its comparison with the baseline}, Holm-corrected over all of them."""
    pairs = {
        name: _paired(study, found, values[study.baseline], overlap)
        for name, found in values.items() if name != study.baseline and found
    }  # fmt: skip
    words = {"supported": "better", "contradicted": "worse", "undecided": "undecided"}
    return {
        name: _against(pair) | {"holm": verdict.p, "is": words[verdict.kind], "seeds_needed": verdict.seeds_needed}
        for (name, pair), verdict in zip(pairs.items(), statistics.judge(list(pairs.values()), ALPHA), strict=True)
    }


def _claims(study: Study, values: Mapping[str, Mapping[Run, float]], overlap: float | None) -> list[dict[str, Any]]:
    pairs = [_paired(study, values[c.better], values[c.worse], overlap, c.margin) for c in study.claims]
    return [
        {
            "text": claim.text, "better": claim.better, "worse": claim.worse, "margin": claim.margin,
            "verdict": verdict.kind, "sentence": sentence(claim, pair, verdict, study.metric), "p": verdict.p,
            "level": verdict.level, "interval": verdict.interval.json(), "seeds_needed": verdict.seeds_needed,
            "detectable": verdict.detectable, **_against(pair),
        }
        for claim, pair, verdict in zip(study.claims, pairs, statistics.judge(pairs, ALPHA), strict=True)
    ]  # fmt: skip


def sentence(claim: Claim, pair: Paired, verdict: Verdict, metric: str) -> str:
    """The verdict in words, with everything it rests on."""
    margin = f"the margin of {number(claim.margin)}" if claim.margin else "0"
    units = "seeds" if pair.overlap is None else "folds"
    over = f"{claim.better} against {claim.worse}, {pair.n} common {units}: "
    if verdict.p is None:
        return f"{over}{pair.note}; nothing can be said."
    if pair.test == "ranks":
        runs = ", ".join(f"{k} of {name}" for k, name in zip(pair.diverged, (claim.better, claim.worse), strict=True))
        out = (
            f"{over}runs diverged ({runs}), so tested by ranks: {claim.better} is ahead in {pair.ahead:.0%} of "
            f"all pairs of runs, Holm-corrected {equation(verdict.p)}"
        )
    else:
        side = {"supported": "all of it above", "contradicted": "all of it below", "undecided": "which contains"}
        out = (
            f"{over}mean gain {signed(pair.mean)} in {metric}, {_span(verdict.interval)} ({side[verdict.kind]} "
            f"{margin}), Holm-corrected {equation(verdict.p)}"
        )
    if verdict.kind == "undecided":
        return f"{out}. {_needed(pair, verdict)}"
    return f"{out}."


def _needed(pair: Paired, verdict: Verdict) -> str:
    if pair.overlap is not None:
        seen = "" if verdict.detectable is None else f"; these could have settled {number(verdict.detectable, 2)}"
        return f"More folds of the same rows share more of them, so how many would settle it is not said{seen}."
    if pair.test == "ranks":
        if verdict.seeds_needed:
            return f"{verdict.seeds_needed} seeds would settle it if every run stays better than every other."
        return "Runs of both are mixed, so the seeds needed cannot be told."
    seen = "" if verdict.detectable is None else f"; {pair.n} seeds could have settled {number(verdict.detectable, 2)}"
    if verdict.seeds_needed is None:
        return f"More than {statistics.MOST_SEEDS} seeds would be needed for a gain as small as this{seen}."
    return f"{verdict.seeds_needed} seeds would settle a gain and spread like these{seen}."


def _span(interval: Interval) -> str:
    return f"{100 * interval.level:.4g}% interval {signed(interval.low)} to {signed(interval.high)}"


def signed(value: float | None, digits: int = 3) -> str:
    """A gain with its sign."""
    if value is None:
        return "–"
    return number(value, digits) if value <= 0 or math.isnan(value) else f"+{number(value, digits)}"


def probability(value: float | None) -> str:
    """A p-value as people write it."""
    if value is None:
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def equation(p: float) -> str:
    """A p-value with its name: "p = 0.03", or "p < 0.0001"."""
    text = probability(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _missing(study: Study, variants: Sequence[Mapping[str, Any]]) -> list[str]:
    out = []
    for kind, says in (
        ("missing", "not run yet"),
        ("failed", "failed (a crash says nothing of the variant: left out)"),
        ("diverged", "diverged (counted as worse than any that finished)"),
    ):
        found = [f"{v['name']} {v[kind]}" for v in variants if v[kind]]
        if found:
            each = f"{len(study.repeats)} runs" if study.folds else f"{len(study.seeds)} seeds"
            out.append(f"runs {says}, of {each} each: {', '.join(found)}")
    return out


def _cell(row: Row, study: Study) -> dict[str, Any]:
    return {
        "cell": row.cell, "variant": row.variant, "seed": row.seed, "fold": study.fold(row.overrides),
        "status": row.status, "purpose": row.purpose, "value": row.values.get(study.metric), "wall_s": row.wall_s,
        "cpu_s": row.cpu_s, "commit": row.commit, "command": row.command, "overrides": row.overrides,
    }  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tuned(choices: Mapping[str, Mapping[str, Any]], mode: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{leaf: {variant: points}} of the leaves with numbers, at the longest training tried; see plots.tuned."""
    out: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, choice in choices.items():
        tried = choice["tried"]
        longest = max((each["overrides"].get("steps", 0) for each in tried), default=0)
        for each in (e for e in tried if e["overrides"].get("steps", 0) == longest):
            chosen = choice["overrides"].items() <= each["overrides"].items()
            for leaf, value in each["overrides"].items():
                if leaf != "steps" and _is_number(value):
                    point = {"value": value, "metric": each["mean"], "chosen": chosen, "edge": leaf in choice["edge"]}
                    out.setdefault(leaf, {}).setdefault(name, []).append(point)
    return out


def _grids(study: Study, variants: Sequence[Mapping[str, Any]], choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Heat maps: what was tried of each variant with two tuned leaves; the variants, if they are a grid of two."""
    out = []
    for name, choice in choices.items():
        points = [({k: v for k, v in e["overrides"].items() if k != "steps"}, e["mean"]) for e in choice["tried"]]
        out += _grid(name, points)
    means = [(v["overrides"], math.nan if v["diverged"] else v["mean"]) for v in variants]
    return out + _grid(study.title, means)


def _grid(title: str, points: Sequence[tuple[Mapping[str, Any], float | None]]) -> list[dict[str, Any]]:
    """A heat map of points over the two leaves in which they differ by numbers, one for each setting of the others."""
    leaves = list(dict.fromkeys(leaf for overrides, _ in points for leaf in overrides))
    numeric = [
        leaf for leaf in leaves
        if all(_is_number(o.get(leaf)) for o, _ in points) and len({o[leaf] for o, _ in points}) > 1
    ]  # fmt: skip
    if len(numeric) != 2:
        return []
    x, y = numeric
    out = []
    others = list(dict.fromkeys(tuple((k, repr(o.get(k))) for k in leaves if k not in numeric) for o, _ in points))
    for other in others:
        mine = {
            (o[x], o[y]): value for o, value in points
            if tuple((k, repr(o.get(k))) for k in leaves if k not in numeric) == other
        }  # fmt: skip
        xs, ys = (sorted({key[i] for key in mine}) for i in (0, 1))
        if len(xs) < 2 or len(ys) < 2:
            continue
        z = [[mine.get((a, b)) for a in xs] for b in ys]
        # Where the leaves that differ are words, the map is named by them.
        words = ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in other) if len(others) > 1 else title
        out.append({"title": words, "x": x, "y": y, "xs": xs, "ys": ys, "z": z})
    return out
