"""A study as a value: variants of one config, seeds, the metric, the claim, and what the paper reports.

`configs/papers/<paper>/<table>.py` has `get_study()`, a dict of plain values with the fields of `Study`:

    base        a config, as get_config gives it
    variants    {name: {"optimizer.lr": 1e-3, ...}}: what each changes; a section given as a dict replaces it
    grid        {leaf: values}: every combination of them, times the variants where both are given
    claims      dicts with the fields of Claim
    first       as variants: runs that others start from, by "init_from.path": "first:NAME", each from its own seed's
    folds       {leaf: values}: every run once for each, as {"data.fold": range(5)} of k-fold cross-validation

and may have `get_config(arg)`; without one, "FILE.py:VARIANT" is the config of that variant anyway.
Everything that can be checked without data is checked here, in one line that names the nearest legal name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bigmodel_jax import experiment, schema
from bigmodel_jax.errors import InputError, nearest
from bigmodel_jax.study import search
from bigmodel_jax.variants import expand, overridden

FIRST = "first:"


@dataclass(frozen=True)
class Claim:
    """`better` beats `worse` on the study's metric, by more than `margin` (in units of the metric)."""

    better: str
    worse: str
    text: str
    margin: float = 0.0


@dataclass(frozen=True)
class Study:
    """What is compared with what, and what would count as an answer.

    name: of the folder and the files of results. title: one line. source: paper, table or figure.
    base: raw config. variants: name -> overrides by leaf. seeds: of every variant.
    metric: "SET/METRIC" as in result.json, "best/SET/METRIC" of the best checkpoint, or the difference of two such,
      "SET/METRIC - SET/METRIC". mode: "min" or "max".
    baseline: the variant that the others are compared with.
    published: variant -> the paper's number of `published_metric`, with its place in the paper.
    tune: leaf -> values tried for every variant on `tune_seeds`, before the seeds run at the best.
    search: settings of a search over leaves, see search.py; empty for none.
    first: name -> overrides of the base, of runs that variants start from; they are made, not reported.
    folds: one leaf that decides which rows are held out -> its values; each seed is run with each of them, and so are
      the `first` runs, which would otherwise train on rows that are held out.
    held_out: variants of a ladder that its law predicts before they run, see scaling.py.
    full: raw config of the same study at the paper's scale, or {arm: raw config} where its arms are different code.
    budget_minutes: of all cells together, wall time.
    file: where it was read from.
    """

    name: str
    title: str
    source: str
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    metric: str
    mode: str
    baseline: str
    claims: tuple[Claim, ...] = ()
    published: dict[str, float] = field(default_factory=dict)
    published_metric: str = ""
    published_source: str = ""
    tune: dict[str, tuple] = field(default_factory=dict)
    tune_seeds: tuple[int, ...] = ()
    search: dict[str, Any] = field(default_factory=dict)
    first: dict[str, dict[str, Any]] = field(default_factory=dict)
    folds: dict[str, tuple] = field(default_factory=dict)
    held_out: tuple[str, ...] = ()
    full: dict[str, Any] | None = None
    budget_minutes: float = 90.0
    file: str = ""

    @property
    def terms(self) -> tuple[str, ...]:
        """The metric's one name, or the two whose difference it is."""
        return tuple(self.metric.split(" - "))

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The full-scale configs by name, one alone under ""; none without them."""
        return {} if self.full is None else {"": self.full} if "model" in self.full else self.full

    @property
    def repeats(self) -> list[tuple[int, dict[str, Any]]]:
        """(seed, the fold's override, if any) of every run of a variant."""
        folds = [{leaf: value} for leaf, values in self.folds.items() for value in values] or [{}]
        return [(seed, fold) for seed in self.seeds for fold in folds]

    def fold(self, overrides: Mapping[str, Any]) -> Any:
        """The fold that a run's overrides name; None in a study without folds."""
        return next((overrides[leaf] for leaf in self.folds), None)

    def config(self, variant: str, **overrides: Any) -> dict[str, Any]:
        """Raw config of a variant, or of "first:NAME"; `overrides` by leaf come last."""
        return overridden(self.base, self.changes(variant) | overrides)

    def changes(self, variant: str) -> dict[str, Any]:
        """What a variant, or "first:NAME", changes of the base."""
        name = variant.removeprefix(FIRST)
        return self.variants[variant] if name == variant else self.first[name]


@dataclass(frozen=True)
class Row:
    """One finished cell, as read from the store.

    values: every number of the run: "SET/METRIC" and "best/SET/METRIC" of its evaluations, "train/loss" and the like
    of its last training row, "rows/train" and "rows/SET" of its data, "parameters". overrides: by leaf, the variant's,
    those that were tuned or searched, and the fold.
    status: "done", "diverged" (numeric abort, or a metric that is not finite) or "failed". wall_s, cpu_s: over all
    starts. curve: (step, metric) of every evaluation. purpose: "seeds", "tune" or "search".
    """

    cell: str
    variant: str
    seed: int
    values: dict[str, float]
    data_fingerprint: str
    eval_fingerprint: str
    overrides: dict[str, Any]
    status: str
    wall_s: float
    cpu_s: float
    command: str
    commit: str
    curve: list[tuple[int, float]]
    purpose: str = "seeds"


def read(file: str) -> Study:
    """The study of a file.

    Raises:
      InputError: the file, a field, a name or a leaf is not as it should be.
    """
    raw = experiment.read_study(file)
    variants = expand(raw.pop("variants", {}), raw.pop("grid", {}))
    fields = {f.name: f for f in dataclasses.fields(Study)}
    for key in raw:
        if key not in fields or key == "file":
            raise InputError(f"study '{file}' has no field '{key}'{nearest(key, [*fields, 'grid'])}")
    needed = [
        name for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name != "variants"
    ]  # fmt: skip
    missing = [name for name in needed if name not in raw]
    if missing:
        raise InputError(f"study '{file}' lacks {', '.join(missing)}")
    claims = tuple(_claim(claim) for claim in raw.pop("claims", ()))
    for name in ("seeds", "tune_seeds"):
        raw[name] = tuple(raw.get(name, ()))
    raw["folds"] = {leaf: tuple(values) for leaf, values in raw.get("folds", {}).items()}
    study = Study(**raw, variants=variants, claims=claims, file=file)
    check(study)
    return study


def _claim(raw: Any) -> Claim:
    known = [f.name for f in dataclasses.fields(Claim)]
    if not isinstance(raw, Mapping):
        raise InputError(f"study claim should be a dict with {', '.join(known)}, not {raw!r}")
    for key in raw:
        if key not in known:
            raise InputError(f"study claim has no field '{key}'{nearest(key, known)}")
    lacks = [key for key in ("better", "worse", "text") if key not in raw]
    if lacks:
        raise InputError(f"study claim lacks {', '.join(lacks)}: {dict(raw)!r}")
    return Claim(**raw)


def check(study: Study) -> None:
    """Names, seeds, metric and every config; see the module's docstring.

    Raises:
      InputError: one line: what, where, and what would be right.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", study.name):
        raise InputError(f"study name '{study.name}' should be letters, digits, - and _: it names a file")
    if not study.variants:
        raise InputError(f"study '{study.name}' has neither variants nor a grid")
    _check_seeds(study)
    if study.mode not in ("min", "max"):
        raise InputError(f"study mode '{study.mode}' should be min or max")
    if not 1 <= len(study.terms) <= 2 or not all("/" in term for term in study.terms):
        raise InputError(
            f"study metric '{study.metric}' should be SET/METRIC, for example validation/loss, or the difference of two"
        )
    for what, name in (
        ("baseline", study.baseline),
        *((f"claim '{c.text}'", variant) for c in study.claims for variant in (c.better, c.worse)),
        *(("published number", variant) for variant in study.published),
        *(("held-out run", variant) for variant in study.held_out),
    ):
        if name not in study.variants:
            raise InputError(f"study {what}: there is no variant '{name}'{_near(name, study.variants)}")
    if study.published and not (study.published_source and study.published_metric):
        raise InputError("study: published numbers need published_metric and published_source")
    _check_folds(study)
    _check_first(study)
    _check_configs(study)


def _check_folds(study: Study) -> None:
    if len(study.folds) > 1:
        raise InputError(f"study folds: one leaf decides what is held out, not {', '.join(study.folds)}")
    for leaf, values in study.folds.items():
        if len(set(values)) < max(len(values), 2):
            raise InputError(f"study folds: '{leaf}' needs at least two values, each once, not {values!r}")
        if study.tune or study.search:
            raise InputError("study: with folds, tune and search would choose by rows that are held out to judge")
        for kind, runs in (("variant", study.variants), ("first run", study.first)):
            for name, overrides in runs.items():
                if leaf in overrides:
                    raise InputError(f"study {kind} '{name}' sets '{leaf}'; folds are the study's")
                for value in values:
                    raw = study.config(name if kind == "variant" else FIRST + name, **{leaf: value})
                    _resolved(f"{kind} '{name}' in fold {value!r}", raw)


def _check_first(study: Study) -> None:
    starts = {name: study.config(name).get("init_from", {}).get("path", "") for name in study.variants}
    for name, path in starts.items():
        wanted = path.removeprefix(FIRST)
        if path != wanted and wanted not in study.first:
            near = _near(wanted, study.first)
            raise InputError(f"study variant '{name}' starts from '{path}', which is not there{near}")
    for name in study.first:
        config = _resolved(f"first run '{name}'", study.config(FIRST + name))
        if config["init_from"]["path"].startswith(FIRST):
            raise InputError(f"study first run '{name}' starts from another; one stage may come before the variants")
        if FIRST + name not in starts.values():
            raise InputError(f"study first run '{name}': no variant starts from '{FIRST}{name}'")


def _near(name: str, names: Mapping[str, Any]) -> str:
    return nearest(name, names) or f"; there are {', '.join(names) or 'none'}"


def _check_seeds(study: Study) -> None:
    for what, seeds in (("seeds", study.seeds), ("tune_seeds", study.tune_seeds)):
        if any(not isinstance(seed, int) or isinstance(seed, bool) for seed in seeds) or len(set(seeds)) < len(seeds):
            raise InputError(f"study {what} {seeds!r} should be different integers")
    if not study.seeds:
        raise InputError(f"study '{study.name}' has no seeds")
    if study.tune and study.search:
        raise InputError("study: tune is a grid and search another way to choose; give one of them")
    if bool(study.tune or study.search) != bool(study.tune_seeds):
        raise InputError("study: tune (or search) and tune_seeds come together")
    both = sorted(set(study.seeds) & set(study.tune_seeds))
    if both:
        # A value chosen on a seed flatters that seed.
        raise InputError(f"study: seeds {both} are among tune_seeds; choose on others than those that are reported")


def _check_configs(study: Study) -> None:
    seen: dict[str, str] = {}
    ends = search.check(study.search) if study.search else []
    for name, overrides in study.variants.items():
        if "seed" in overrides:
            raise InputError(f"study variant '{name}' sets 'seed'; seeds are the study's")
        config = _resolved(f"variant '{name}'", study.config(name))
        other = _resolved(f"get_config('{name}')", experiment.read(f"{study.file}:{name}")) if study.file else config
        if other != config:
            leaf = next(iter(schema.difference(config, other)))
            raise InputError(f"study variant '{name}': get_config('{name}') gives another config, in {leaf}")
        twin = seen.setdefault(experiment.config_hash(config), name)
        if twin != name:
            raise InputError(f"study variants '{twin}' and '{name}' are the same experiment")
        for leaf, values in study.tune.items():
            if not isinstance(values, (tuple, list)) or len(values) < 2:
                raise InputError(f"study tune: '{leaf}' needs at least two values, not {values!r}")
            for value in values:
                _resolved(f"tune of variant '{name}'", study.config(name, **{leaf: value}))
        for point in ends:
            _resolved(f"search of variant '{name}'", study.config(name, **point))
    for arm, raw in study.arms.items():
        _resolved(f"full-scale twin {arm}".rstrip(), raw)


def _resolved(what: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return experiment.resolve(raw)
    except InputError as error:
        raise InputError(f"study {what}: {error}") from None


def check_comparable(study: Study, rows: Sequence[Row]) -> None:
    """Refuse rows that were not measured on the same examples, or not trained on the same data.

    Evaluation must be one for all rows of a fold, and another for each fold. Training data must be one for all rows of
    a variant and fold, and for all variants that set no leaf of `data`: a study that varies the data does so by name.

    Raises:
      InputError: one line that names two rows.
    """
    first: dict[tuple[str, str, Any], Row] = {}
    held: dict[str, Row] = {}
    for row in rows:
        if row.status != "done":
            continue
        own = any(leaf.split(".")[0] == "data" for leaf in study.variants.get(row.variant, {}))
        fold = study.fold(row.overrides)
        for what, group in (("evaluation", ""), ("data", row.variant if own else "")):
            other = first.setdefault((what, group, fold), row)
            theirs, found = (r.eval_fingerprint if what == "evaluation" else r.data_fingerprint for r in (other, row))
            if found != theirs:
                raise InputError(
                    f"study '{study.name}': rows {_named(study, other)} and {_named(study, row)} differ in their "
                    f"{what} fingerprint ({theirs[:12]} and {found[:12]}); rerun one of them, they cannot be compared"
                )
        other = held.setdefault(row.eval_fingerprint, row)
        if study.fold(other.overrides) != fold:
            raise InputError(
                f"study '{study.name}': rows {_named(study, other)} and {_named(study, row)} were evaluated on the "
                f"same examples; folds need a leaf that changes what is held out in {study.metric}"
            )


def _named(study: Study, row: Row) -> str:
    return f"'{row.variant}' seed {row.seed}{fold_words(study, row.overrides)} (cell {row.cell})"


def fold_words(study: Study, overrides: Mapping[str, Any]) -> str:
    """ " data.fold=3" of a run's overrides, "" in a study without folds."""
    return "".join(f" {leaf}={overrides[leaf]}" for leaf in study.folds)
