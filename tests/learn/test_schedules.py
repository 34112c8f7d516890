"""Schedules against numpy, at every boundary."""

import jax
import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import schedules

PEAK, WARMUP, TOTAL = 0.5, 10, 100


def expected(name: str, step: int, warmup: int, **o) -> float:
    """Written from the definitions, one step at a time."""
    done = step + 1
    if done <= warmup:
        return PEAK * done / warmup
    x = min((done - warmup) / (TOTAL - warmup), 1.0)
    if name == "constant":
        return PEAK
    if name == "linear":
        return PEAK + (o["final"] * PEAK - PEAK) * x
    if name == "cosine":
        return o["final"] * PEAK + (PEAK - o["final"] * PEAK) * (1 + np.cos(np.pi * x)) / 2
    if name == "long_cosine":
        x = (min(done, TOTAL) - warmup) / (150 - warmup)
        return PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi * x)) / 2)
    if name == "rsqrt":
        return PEAK * min(1.0, (max(warmup, 1) / done) ** 0.5)
    if name == "wsd":
        y = max(0.0, min(1.0, (done - 75) / 25))
        curve = {"linear": 1 - y, "cosine": (1 + np.cos(np.pi * y)) / 2, "sqrt": 1 - y**0.5}
        return PEAK * (o["final"] + (1 - o["final"]) * curve[o["shape"]])
    return PEAK * 0.1 ** ((step >= 30) + (step >= 60))


CASES = [
    ("constant", {}), ("linear", {"final": 0.0}), ("linear", {"final": 0.2}),
    ("cosine", {"final": 0.1}), ("long_cosine", {"length": 1.5, "final": 0.1}), ("rsqrt", {}),
    ("piecewise", {"boundaries": (30, 0.6)}),
    *[("wsd", {"decay": 0.25, "final": 0.1, "shape": s}) for s in ("linear", "cosine", "sqrt")],
]  # fmt: skip
STEPS = [0, 1, 8, 9, 10, 11, 29, 30, 31, 59, 60, 74, 75, 76, 98, 99, 100, 250]


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize("name, options", CASES)
def test_against_numpy(name, options, warmup):
    lr = jax.jit(jax.vmap(schedules.make(name, PEAK, warmup, TOTAL, **options)))(np.array(STEPS))
    want = [expected(name, step, warmup, **options) for step in STEPS]
    np.testing.assert_allclose(lr, want, rtol=2e-6, atol=1e-7)
    shifted = [expected(name, step + 1, warmup, **options) for step in STEPS]
    if name != "constant" or warmup > 1:  # off by one must not pass
        assert np.abs(np.array(lr) - shifted).max() > 1e-3


def test_first_update_moves_and_last_one_is_final():
    for name, options in CASES:
        lr = schedules.make(name, PEAK, WARMUP, TOTAL, **options)
        assert lr(0) == pytest.approx(PEAK / WARMUP)
        assert lr(WARMUP - 1) == pytest.approx(PEAK)
        assert lr(TOTAL - 1) == pytest.approx(float(lr(TOTAL + 50)), abs=1e-7) or name == "rsqrt"
    assert schedules.make("cosine", PEAK, 0, TOTAL, final=0.1)(TOTAL - 1) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "args, options, says",
    [
        (("cosin", 1.0, 0, 10), {}, "did you mean 'cosine'"),
        (("cosine", 1.0, 0, 10), {"finall": 0.1}, "did you mean 'final'"),
        (("cosine", 1.0, 11, 10), {}, "between 0 and total 10"),
        (("wsd", 1.0, 0, 10), {"shape": "cosin"}, "did you mean 'cosine'"),
        (("wsd", 1.0, 0, 10), {"decay": 2.0}, "(0, 1]"),
        (("long_cosine", 1.0, 0, 10), {"length": 0.9}, "at least 1"),
        (("piecewise", 1.0, 0, 10), {"boundaries": (5, 5)}, "must increase"),
    ],
)
def test_bad_input(args, options, says):
    with pytest.raises(InputError, match=says.replace("(", r"\(").replace("]", r"\]")):
        schedules.make(*args, **options)
