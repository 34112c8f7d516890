"""When a run is at its best, and when it stops: hand-made histories."""

from types import SimpleNamespace

import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.stopping import Best, Stopping

NAN = float("nan")


def settings(metric="validation/accuracy", mode="auto", patience=2, min_delta=0.0):
    return SimpleNamespace(metric=metric, mode=mode, patience=patience, min_delta=min_delta)


def history(*values, metric="accuracy"):
    return [(10 * (i + 1), {metric: value, "other": 0.0}) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "options", "best", "over"),
    [
        ((0.5,), {}, Best(10, 0.5, 0), False),
        ((0.5, 0.7, 0.6), {}, Best(20, 0.7, 1), False),
        ((0.5, 0.7, 0.6, 0.7), {}, Best(20, 0.7, 2), True),  # as good is not better
        ((0.5, 0.7, 0.6, 0.71), {}, Best(40, 0.71, 0), False),
        ((0.5, 0.7, 0.6, 0.71), {"min_delta": 0.05}, Best(20, 0.7, 2), True),
        ((0.5, 0.7, 0.6, 0.5, 0.4), {"patience": 0}, Best(20, 0.7, 3), False),
        ((0.5, 0.7), {"mode": "min"}, Best(10, 0.5, 1), False),
        ((NAN, 0.2, NAN), {}, Best(20, 0.2, 1), False),
    ],
)
def test_best_and_patience(values, options, best, over):
    judge = Stopping.of(settings(**options), ["validation", "test"])
    found = judge.best(history(*values))
    assert found == best and judge.over(found) is over


def test_losses_count_downwards_and_names_are_checked():
    judge = Stopping.of(settings("validation/nll"), ["validation"])
    assert judge.best(history(2.0, 1.0, 1.5, metric="nll")) == Best(20, 1.0, 1)
    assert Stopping.of(settings("", patience=0), ["validation"]) is None
    with pytest.raises(InputError, match="no metric 'acuracy'; did you mean 'accuracy'"):
        Stopping.of(settings("validation/acuracy"), ["validation"]).best(history(0.5))
    for bad, message in (
        (settings("accuracy"), "should be one of validation/..."),
        (settings("valid/accuracy"), "did you mean 'validation'"),
        (settings(""), "patience needs eval.metric"),
        (settings(mode="up"), "should be auto, min or max"),
        (settings(patience=-1), "negative"),
    ):
        with pytest.raises(InputError, match=message):
            Stopping.of(bad, ["validation"])
