"""A ladder of runs for a scaling law: a study whose variants are sizes and lengths, and the run it leads up to.

A rung is a variant of a language model's study: its `model` leaves make the size N, its steps, batch and length the
number of tokens D. The law is fitted to all but those that the study names as `held_out`, its prediction of these
is written down, and only then are they run. Sizes are proposed by fixed tokens per parameter, or by budgets with
the same FLOPs for every size (Hoffmann et al. 2022, approaches 1 and 2), with C = 6 N D.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel_jax import experiment, tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import MODELS
from bigmodel_jax.study.law import Fitted
from bigmodel_jax.study.spec import Row, Study
from bigmodel_jax.variants import overridden


@dataclass(frozen=True)
class Point:
    """One run of a ladder, made (loss) or not (None)."""

    variant: str
    parameters: int
    tokens: int
    seed: int = 0
    loss: float | None = None

    @property
    def flops(self) -> float:
        return 6.0 * self.parameters * self.tokens


def parameters(raw: Mapping[str, Any]) -> int:
    """Parameters of a raw config's model, embeddings included.

    Raises:
      InputError: the model's sizes are left to the data.
    """
    config = experiment.resolve(raw)
    section = dict(config["model"])
    for leaf in experiment.FROM_DATA:
        if section.get(leaf) == 0 and leaf in ("vocab_size", "num_classes") and not _unused(section, leaf):
            raise InputError(f"a ladder needs model.{leaf}, which is otherwise taken from the data")
    return _counted(json.dumps(section, sort_keys=True))


@functools.cache
def _counted(section: str) -> int:
    options = json.loads(section)
    model = MODELS[options.pop("name")](**options)
    return tree.count(model.abstract()[0]["params"])


def _unused(section: Mapping[str, Any], leaf: str) -> bool:
    return leaf == "num_classes" and section.get("head") in ("lm", "none", "spans")


def tokens(raw: Mapping[str, Any]) -> int:
    """Tokens that a raw config trains on: rows of every step times their length."""
    config = experiment.resolve(raw)
    length, size, steps = config["data"].get("length", 0), config["batch_size"], config["steps"]
    if not length:
        raise InputError("a ladder is of texts: data.length says how many tokens a row has")
    ramp = ((0, size),) if isinstance(size, int) else tuple(size)
    ends = [first for first, _ in ramp[1:]] + [steps]
    return length * sum(rows * max(min(end, steps) - first, 0) for (first, rows), end in zip(ramp, ends, strict=True))


def points(study: Study) -> list[Point]:
    """Every variant, without its loss."""
    raws = {name: study.config(name) for name in study.variants}
    return [Point(name, parameters(raw), tokens(raw)) for name, raw in raws.items()]


def measured(planned: Sequence[Point], rows: Sequence[Row], metric: str) -> list[Point]:
    """The points that rows have been made of; a run that diverged is none.

    Raises:
      InputError: a run has other parameters than its variant.
    """
    by_name = {point.variant: point for point in planned}
    out = []
    for row in rows:
        if row.status != "done" or row.variant not in by_name:
            continue
        point = by_name[row.variant]
        made = int(row.values.get("parameters", point.parameters))
        if made != point.parameters:
            raise InputError(f"the run of '{row.variant}' has {made} parameters, its variant {point.parameters}")
        out.append(Point(point.variant, point.parameters, point.tokens, row.seed, row.values[metric]))
    return out


def proposed(study: Study, *, ratios: Sequence[float] = (), budgets: Sequence[float] = ()) -> dict[str, dict[str, Any]]:
    """Variants of the study's sizes at so many tokens per parameter, or at so many FLOPs: what to put into its file.

    Steps are whole; a size whose run would be shorter than one step is left out.
    """
    size = study.base["batch_size"]
    if not isinstance(size, int):
        raise InputError("a ladder is proposed at one batch size; batch_size is a ramp")
    per_step = tokens(study.base) // experiment.resolve(study.base)["steps"]
    out: dict[str, dict[str, Any]] = {}
    seen: dict[int, dict[str, Any]] = {}
    for point in points(study):
        leaves = {k: v for k, v in study.variants[point.variant].items() if k.split(".")[0] == "model"}
        seen.setdefault(point.parameters, leaves)
    for count, leaves in sorted(seen.items()):
        lengths = [(f"{r:g} per parameter", r * count) for r in ratios]
        lengths += [(f"{c:g} FLOPs", c / 6 / count) for c in budgets]
        for label, wanted in lengths:
            steps = round(wanted / per_step)
            if steps:
                out[f"{short(count)}, {label}"] = {**leaves, "steps": steps}
    return out


def short(count: float) -> str:
    """430000 -> "430k"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"


def target(study: Study, fitted: Fitted, flops: float) -> tuple[dict[str, Any], Point, tuple[float, float, float]]:
    """(raw config, its size, (loss, low, high)) of the run that the law prefers at a budget.

    The largest size of the ladder is made wider in whole heads, and deeper, with the mlp in proportion, to the smallest
    predicted loss at 6 N D = flops among shapes of about the ladder's own ratio of width to depth.
    """
    planned = points(study)
    largest = max(planned, key=lambda point: point.parameters)
    raw = study.config(largest.variant)
    model = experiment.resolve(raw)["model"]
    wanted, _ = fitted.law.best(flops)
    grow = (wanted / largest.parameters) ** (1 / 3)
    head = model["head_dim"] or model["embed_dim"] // model["num_heads"]
    best: tuple[float, dict[str, Any], int] | None = None
    heads, layers = max(model["num_heads"] * grow, 1), max(model["num_layers"] * grow, 1)
    for wide, deep in itertools.product(_near(heads), _near(layers)):
        leaves = {"model.num_heads": wide, "model.embed_dim": wide * head, "model.num_layers": deep}
        for option, over in (("mlp_dim", "embed_dim"), ("num_kv_heads", "num_heads")):
            if model[option]:
                leaves[f"model.{option}"] = max(round(model[option] * leaves[f"model.{over}"] / model[over]), 1)
        if wide % leaves.get("model.num_kv_heads", 1):
            continue
        count = parameters(overridden(raw, leaves))
        loss = float(fitted.law(count, flops / 6 / count)) * (1 + 0.002 * abs(math.log(wide * layers / (deep * heads))))
        if best is None or loss < best[0]:
            best = loss, leaves, count
    _, leaves, count = best
    per_step = tokens(raw) // experiment.resolve(raw)["steps"]
    steps = max(round(flops / 6 / count / per_step), 1)
    point = Point(f"{short(count)}, {flops:g} FLOPs", count, steps * per_step)
    return overridden(raw, {**leaves, "steps": steps}), point, fitted.predict(count, point.tokens)


def _near(x: float) -> list[int]:
    return sorted({max(round(x) + k, 1) for k in (-1, 0, 1)})


def as_json(point: Point) -> dict[str, Any]:
    return {
        "variant": point.variant, "seed": point.seed, "parameters": point.parameters, "tokens": point.tokens,
        "loss": point.loss,
    }  # fmt: skip
