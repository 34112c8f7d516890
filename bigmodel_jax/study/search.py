"""Searches over leaves, as methods of tuning.py: walk, random, successive halving, Hyperband, Bayesian.

A study's `search` is a dict:

    method   "walk", "random", "halving", "hyperband" or "bayesian"
    leaves   {leaf: list of choices, or {"low": a, "high": b, "log": True, "integer": False}}
    start    walk: the choice to begin with
    trials   points to try (not walk; not hyperband, which follows from its lengths)
    steps    (fewest, most): lengths of runs for halving and hyperband; others train for the study's own
    eta      one in so many goes on to a run so many times as long, default 3
    batch    bayesian: points asked for at a time, default 4
    seed     of the draws, default 0

Every variant is offered the same draws. A longer run of a point starts anew: its schedule is another.
"""

from __future__ import annotations

import inspect
import itertools
import math
import random
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from bigmodel_jax.errors import InputError, nearest

Point = dict[str, Any]
Method = Generator[list[Point], list[float], None]
"""Yields points (overrides by leaf), receives the score of each: lower is better, inf for divergence."""
Space = Mapping[str, Any]
RANGE = ("low", "high", "log", "integer")


def draw(space: Space, rng: random.Random) -> Point:
    """A point of the space, each leaf by itself."""
    return {leaf: _value(axis, rng.random()) for leaf, axis in space.items()}


def _value(axis: Any, share: float) -> Any:
    """The value at `share` in [0, 1) of a range or a list."""
    if not isinstance(axis, Mapping):
        return axis[int(share * len(axis))]
    low, high = axis["low"], axis["high"]
    if axis.get("integer") and not axis.get("log"):
        return low + int(share * (high + 1 - low))
    value = low * (high / low) ** share if axis.get("log") else low + (high - low) * share
    return round(value) if axis.get("integer") else float(f"{value:.6g}")  # readable in commands and tables


def walk(space: Space, *, start: Any) -> Method:
    """From `start` along the ordered choices of one leaf, until the best has a tried one on either side.

    A grid as wide as one likes for the price of the few points around its best, if there is one valley. Of equals the
    lower choice is the best, so that the walk leaves a range in which everything diverges at its low end.
    """
    ((leaf, choices),) = space.items()
    values = sorted(choices)
    scores: dict[int, float] = {}
    best = values.index(start)
    while asked := [n for n in (best - 1, best, best + 1) if 0 <= n < len(values) and n not in scores]:
        found = yield [{leaf: values[n]} for n in asked]
        scores.update(zip(asked, found, strict=True))
        best = min(scores, key=lambda n: (scores[n], n))


def sample(space: Space, *, trials: int, seed: int = 0) -> Method:
    """Random search (Bergstra & Bengio 2012)."""
    rng = random.Random(seed)
    yield [draw(space, rng) for _ in range(trials)]


def halving(space: Space, *, trials: int, steps: Sequence[int], eta: int = 3, seed: int = 0) -> Method:
    """Successive halving (Jamieson & Talwalkar 2016): the best 1/eta of the points go on for eta times as long."""
    rng = random.Random(seed)
    yield from _bracket([draw(space, rng) for _ in range(trials)], steps[0], steps[1], eta)


def _bracket(points: list[Point], fewest: int, most: int, eta: int) -> Method:
    rungs = math.floor(math.log(most / fewest, eta) + 1e-9)
    for rung in range(rungs + 1):
        length = max(1, round(most / eta ** (rungs - rung)))
        scores = yield [{**point, "steps": length} for point in points]
        best = sorted(range(len(points)), key=lambda n: scores[n])  # stable: the first of equals
        points = [points[n] for n in best[: max(1, len(points) // eta)]]


def hyperband(space: Space, *, steps: Sequence[int], eta: int = 3, seed: int = 0) -> Method:
    """Hyperband (Li et al. 2018, algorithm 1): brackets from many short runs to few long ones."""
    rng = random.Random(seed)
    most = math.floor(math.log(steps[1] / steps[0], eta) + 1e-9)
    for s in range(most, -1, -1):
        count = math.ceil((most + 1) / (s + 1) * eta**s)
        points = [draw(space, rng) for _ in range(count)]
        yield from _bracket(points, max(1, round(steps[1] / eta**s)), steps[1], eta)


def bayesian(space: Space, *, trials: int, batch: int = 4, seed: int = 0) -> Method:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), by Optuna.

    Raises:
      InputError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise InputError("search method bayesian needs Optuna: pip install 'bigmodel_jax[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    axes = {leaf: _distribution(optuna.distributions, axis) for leaf, axis in space.items()}
    # The constant liar keeps the points of one batch apart; its first ones are random.
    first = min(10, max(batch, trials // 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=first, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    for start in range(0, trials, batch):
        asked = [study.ask(axes) for _ in range(min(batch, trials - start))]
        scores = yield [_readable(dict(trial.params), space) for trial in asked]
        for trial, score in zip(asked, scores, strict=True):
            study.tell(trial, score)


def _distribution(kinds: Any, axis: Any) -> Any:
    if not isinstance(axis, Mapping):
        return kinds.CategoricalDistribution(list(axis))
    kind = kinds.IntDistribution if axis.get("integer") else kinds.FloatDistribution
    return kind(axis["low"], axis["high"], log=bool(axis.get("log")))


def _readable(point: Point, space: Space) -> Point:
    return {leaf: float(f"{v:.6g}") if isinstance(v, float) and isinstance(space[leaf], Mapping) else v
            for leaf, v in point.items()}  # fmt: skip


METHODS: dict[str, Callable[..., Method]] = {
    "walk": walk, "random": sample, "halving": halving, "hyperband": hyperband, "bayesian": bayesian,
}  # fmt: skip


def make(settings: Mapping[str, Any]) -> Method:
    """The method that a study's `search` describes; see `check` for its errors."""
    options = {key: value for key, value in settings.items() if key not in ("method", "leaves")}
    return METHODS[settings["method"]](settings["leaves"], **options)


def check(settings: Mapping[str, Any]) -> list[Point]:
    """Refuse what `make` could not use; the outermost points of the space, to be resolved as configs.

    Raises:
      InputError: unknown method or option (with the nearest), a range that is none, lengths that do not fit.
    """
    for key in ("method", "leaves"):
        if key not in settings:
            raise InputError(f"study search lacks '{key}'")
    method, space = settings["method"], settings["leaves"]
    if method not in METHODS:
        hint = nearest(str(method), METHODS)
        raise InputError(f"study search method '{method}' is none of {', '.join(METHODS)}{hint}")
    takes = inspect.signature(METHODS[method]).parameters
    known = [name for name in takes if name != "space"]
    for key in settings:
        if key not in ("method", "leaves", *known):
            hint = nearest(key, known)
            raise InputError(f"study search '{method}' has no option '{key}', only {', '.join(known)}{hint}")
    lacks = [name for name in known if takes[name].default is inspect.Parameter.empty and name not in settings]
    if lacks:
        raise InputError(f"study search '{method}' lacks {', '.join(lacks)}")
    steps = settings.get("steps", (1, 1))
    if not (isinstance(steps, (tuple, list)) and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise InputError(f"study search steps {steps!r} should be (fewest, most)")
    if settings.get("eta", 3) < 2 or settings.get("trials", 1) < 1 or settings.get("batch", 1) < 1:
        raise InputError("study search: eta is at least 2, trials and batch at least 1")
    if not space:
        raise InputError("study search has no leaves")
    for leaf, axis in space.items():
        _check_axis(leaf, axis)
    if method == "walk":
        _check_walk(space, settings["start"])
    ends = [[axis["low"], axis["high"]] if isinstance(axis, Mapping) else list(axis) for axis in space.values()]
    return [dict(zip(space, point, strict=True)) for point in itertools.islice(itertools.product(*ends), 64)]


def _check_walk(space: Space, start: Any) -> None:
    choices = next(iter(space.values()))
    if len(space) != 1 or isinstance(choices, Mapping):
        raise InputError(f"study search 'walk' goes along the choices of one leaf, not {dict(space)!r}")
    if start not in choices:
        raise InputError(f"study search 'walk' starts at one of {tuple(choices)!r}, not {start!r}")


def _check_axis(leaf: str, axis: Any) -> None:
    if isinstance(axis, (tuple, list)) and axis:
        return
    if not isinstance(axis, Mapping) or not {"low", "high"} <= set(axis) <= set(RANGE):
        raise InputError(f"study search leaf '{leaf}' is a list of choices or has {', '.join(RANGE)}, not {axis!r}")
    if not axis["low"] < axis["high"] or (axis.get("log") and axis["low"] <= 0):
        raise InputError(f"study search leaf '{leaf}': need low < high, and low > 0 on a log scale, not {axis!r}")
