"""Searches and the choice they lead to, on a function whose optimum is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.study import search, tuning
from bigmodel_jax.study.spec import Row, Study

SPACE = {"optimizer.lr": {"low": 1e-4, "high": 1.0, "log": True}, "optimizer.name": ["sgd", "adam"]}


def cost(point: dict) -> float:
    """Least at lr 0.01 with adam; short runs are worse, and noisier in a fixed way."""
    lr = math.log10(point["optimizer.lr"])
    return (lr + 2) ** 2 + (point["optimizer.name"] == "sgd") + 1 / point.get("steps", 1000)


def carried_out(method: search.Method) -> list[tuple[list[dict], list[float]]]:
    rounds, points = [], next(method)
    while True:
        rounds.append((points, [cost(point) for point in points]))
        try:
            points = method.send(rounds[-1][1])
        except StopIteration:
            return rounds


def test_hyperband_has_the_brackets_of_its_paper():
    """Li et al. 2018, table 1: R = 81, eta = 3; (points, steps) of every rung."""
    rounds = carried_out(search.make({"method": "hyperband", "leaves": SPACE, "steps": (1, 81)}))
    assert [(len(points), points[0]["steps"]) for points, _ in rounds] == [
        (81, 1), (27, 3), (9, 9), (3, 27), (1, 81),
        (34, 3), (11, 9), (3, 27), (1, 81), (15, 9), (5, 27), (1, 81), (8, 27), (2, 81), (5, 81),
    ]  # fmt: skip


def test_halving_keeps_the_best():
    rounds = carried_out(search.make({"method": "halving", "leaves": SPACE, "trials": 27, "steps": (10, 270)}))
    assert [len(points) for points, _ in rounds] == [27, 9, 3, 1]
    for (points, scores), (kept, _) in zip(rounds, rounds[1:], strict=False):
        ranked = [point for _, point in sorted(zip(scores, points, strict=True), key=lambda pair: pair[0])]
        bare = [{k: v for k, v in point.items() if k != "steps"} for point in (*ranked, *kept)]
        assert bare[len(ranked) :] == bare[: len(kept)]


def walked(start: float, best: float) -> list[float]:
    """The rates in the order in which a walk over ten of them tries them, for a valley with its floor at `best`."""
    rates = [2.0**-n for n in range(10)]
    method = search.make({"method": "walk", "leaves": {"optimizer.lr": rates}, "start": start})
    tried, points = [], next(method)
    while True:
        tried += [point["optimizer.lr"] for point in points]
        try:
            points = method.send([abs(math.log2(point["optimizer.lr"] / best)) for point in points])
        except StopIteration:
            return tried


def test_a_walk_goes_downhill_until_the_best_has_neighbours():
    assert walked(1 / 8, best=1 / 8) == [1 / 16, 1 / 8, 1 / 4]
    assert walked(1 / 8, best=1 / 64) == [1 / 16, 1 / 8, 1 / 4, 1 / 32, 1 / 64, 1 / 128]
    assert walked(1 / 8, best=4.0) == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]  # to the end, where the edge is told of
    method = search.make({"method": "walk", "leaves": {"optimizer.lr": [0.1, 1.0, 10.0]}, "start": 10.0})
    assert next(method) == [{"optimizer.lr": 1.0}, {"optimizer.lr": 10.0}]
    assert method.send([math.inf, math.inf]) == [{"optimizer.lr": 0.1}]  # away from divergence
    for leaves, start in (
        ({"optimizer.lr": [0.1, 1.0]}, 0.5),
        ({"optimizer.lr": {"low": 0.1, "high": 1.0}}, 0.1),
        (SPACE, 0.1),
    ):
        with pytest.raises(InputError, match="'walk'"):
            search.check({"method": "walk", "leaves": leaves, "start": start})


@pytest.mark.parametrize("name", ["random", "bayesian"])
def test_the_optimum_is_found_and_found_again(name):
    settings = {"method": name, "leaves": SPACE, "trials": 40}
    rounds = carried_out(search.make(settings))
    assert rounds == carried_out(search.make(settings))  # after a kill the same points are asked for
    assert sum(len(points) for points, _ in rounds) == 40
    assert min(score for _, scores in rounds for score in scores) < 0.1
    if name == "bayesian":
        late = [score for _, scores in rounds[4:] for score in scores]
        blind = [score for _, scores in carried_out(search.make(settings | {"method": "random"})) for score in scores]
        assert sum(late) / len(late) < 0.6 * sum(blind) / len(blind)


def row(cell: SimpleNamespace, value: float) -> Row:
    done = "done" if math.isfinite(value) else "diverged"
    values = {"validation/loss": value} if done == "done" else {}
    return Row(cell.id, cell.variant, cell.seed, values, "", "", cell.extra, done, 1.0, 1.0, "", "", [])


def tuned(values: dict[float, tuple[float, float]], rates: tuple = (0.01, 0.1, 1.0)) -> tuning.Choice:
    """The choice where lr has these losses on two seeds."""
    study = Study(
        "s", "t", "s", {}, {"v": {}}, (0,), "validation/loss", "min", "v", tune={"optimizer.lr": rates},
        tune_seeds=(7, 8),
    )  # fmt: skip
    cells = []

    def cell(variant, seed, extra, purpose):
        return SimpleNamespace(id=f"{extra}{seed}", variant=variant, seed=seed, extra=extra)

    def run(asked):
        cells.extend(asked)
        return [row(each, values[each.extra["optimizer.lr"]][each.seed - 7]) for each in asked]

    choice = tuning.tune(SimpleNamespace(study=study, cell=cell), ["v"], run)["v"]
    assert [each.seed for each in cells] == [7] * len(rates) + [8] * len(rates)
    return choice


def test_tuning_chooses_by_the_mean_and_tells_of_an_edge():
    inside = tuned({0.01: (2.0, 2.0), 0.1: (1.0, 1.2), 1.0: (0.5, 3.0)})
    assert inside.overrides == {"optimizer.lr": 0.1} and inside.edge == []
    assert [each.values for each in inside.tried] == [[2.0, 2.0], [1.0, 1.2], [0.5, 3.0]]
    edge = tuned({0.01: (2.0, 2.0), 0.1: (1.0, 1.2), 1.0: (0.5, 0.6)})
    assert edge.overrides == {"optimizer.lr": 1.0} and edge.edge == ["optimizer.lr"]
    assert "at the edge" in tuning.lines({"v": edge}, "validation/loss")[0]
    diverged = tuned({0.01: (2.0, 2.0), 0.1: (1.0, math.inf), 1.0: (math.inf, math.inf)})
    assert diverged.overrides == {"optimizer.lr": 0.01}
    # Of equals the middle one by value, the lower of two, in whatever order they were tried.
    level = (1.0, 1.2)
    assert tuned({0.01: level, 0.1: level, 1.0: level}, (1.0, 0.01, 0.1)).overrides == {"optimizer.lr": 0.1}
    assert tuned({0.01: (2.0, 2.0), 0.1: level, 1.0: level}).overrides == {"optimizer.lr": 0.1}
    assert tuned({0.01: level, 0.1: (1.0, 1.3), 1.0: level}).overrides == {"optimizer.lr": 0.01}
    lost = (math.inf, math.inf)
    assert tuned({0.01: lost, 0.1: lost, 1.0: lost}).overrides == {"optimizer.lr": 0.01}
    assert tuning.at_edge({"low": 1e-4, "high": 1.0, "log": True}, 1.2e-4)
    assert not tuning.at_edge({"low": 1e-4, "high": 1.0, "log": True}, 0.01)
