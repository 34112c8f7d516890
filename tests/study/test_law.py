"""The scaling law: known coefficients come back, intervals hold what they promise, and where they must not."""

import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.study import law as laws
from bigmodel_jax.study.law import CHINCHILLA, NAMES

BUDGETS = np.geomspace(6e18, 3e21, 6)


def ladder(sizes=5, spread=4.0, budgets=BUDGETS):
    """(N, D): so many sizes around the best of each budget."""
    n = np.concatenate([CHINCHILLA.best(c)[0] * np.geomspace(1 / spread, spread, sizes) for c in budgets])
    return n, np.repeat(budgets, sizes) / 6 / n


def test_the_published_law_comes_back():
    n, d = ladder()
    exact = laws.fit(n, d, CHINCHILLA(n, d))
    np.testing.assert_allclose(exact.theta, CHINCHILLA.theta, rtol=1e-5)
    noisy = CHINCHILLA(n, d) * np.exp(0.003 * np.random.default_rng(0).normal(size=len(n)))
    found = laws.fit_with_intervals(n, d, noisy, resamples=200)
    for name in NAMES:
        low, high = found.interval(name)
        assert low < getattr(CHINCHILLA, name) < high, name
    loss, low, high = found.predict(70e9, 1.4e12)
    assert low < CHINCHILLA(70e9, 1.4e12) < high and low < loss < high and high / low < 1.05
    # The control: runs of another law, whose coefficients the intervals must tell from these.
    steeper = laws.Law(1.69, 406.4, 410.7, 0.36, 0.28)
    other = laws.fit_with_intervals(n, d, noisy * steeper(n, d) / CHINCHILLA(n, d), resamples=200)
    low, high = other.interval("alpha")
    assert not low < CHINCHILLA.alpha < high and low < steeper.alpha < high
    noisy[7] *= 1.3  # a run that went wrong: Huber's loss bears it, least squares does not
    broken, squares = laws.fit(n, d, noisy), laws.fit(n, d, noisy, delta=10.0)
    assert broken(70e9, 1.4e12) == pytest.approx(loss, rel=0.005)
    assert squares(70e9, 1.4e12) != pytest.approx(loss, rel=0.02)


def test_the_best_split_of_a_budget_is_the_lowest_point():
    n = np.geomspace(1e8, 1e12, 4001)
    assert CHINCHILLA.best(5.76e23)[0] == pytest.approx(n[np.argmin(CHINCHILLA(n, 5.76e23 / 6 / n))], rel=0.01)


def test_the_fit_is_the_optimum_by_two_methods():
    """L-BFGS from many starts, and reweighted least squares from far off."""
    n, d = ladder(4)
    y = CHINCHILLA(n, d) * np.exp(0.005 * np.random.default_rng(1).normal(size=len(n)))
    found = laws.fit(n, d, y).theta
    starts = found + 0.1 * np.random.default_rng(2).normal(size=(20, 5))
    logs = [np.log(x) for x in (n, d, y)]
    other = laws.refit(starts, *logs[:2], np.repeat(logs[2][None], 20, 0), laws.DELTA)
    np.testing.assert_allclose(other, np.repeat(found[None], 20, 0), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def simulated():
    """250 ladders of 20 runs: (their laws, bootstrap samples, residuals, a further run of each)."""
    rng, count, noise = np.random.default_rng(3), 250, 0.003
    n, d = ladder(5, budgets=BUDGETS[:4])
    y = np.log(CHINCHILLA(n, d)) + noise * rng.normal(size=(count, len(n)))
    theta = laws.refit(np.repeat(CHINCHILLA.theta[None], count, 0), np.log(n), np.log(d), y, laws.DELTA)
    samples, residuals = laws.bootstrap(theta, np.log(n), np.log(d), y, 80, seed=4)
    held = CHINCHILLA.best(6e22)
    new = laws.log_losses(CHINCHILLA.theta, *held) + noise * rng.normal(size=count)
    return theta, samples, residuals, held, new


def test_intervals_cover_as_often_as_they_say(simulated):
    theta, samples, residuals, held, new = simulated
    runs = residuals.shape[-1]
    for at, name in enumerate(NAMES):
        low, high = laws.interval(theta[:, at], samples[..., at], runs)
        covered = np.mean((low <= CHINCHILLA.theta[at]) & (CHINCHILLA.theta[at] <= high))
        assert 0.90 <= covered <= 0.985, (name, covered)
    said, each = laws.log_losses(theta, *held), laws.log_losses(samples, *held)
    drawn = each + laws.noise(residuals, (each.shape[1],), np.random.default_rng(5))
    low, high = laws.interval(said, drawn, runs)
    assert 0.90 <= np.mean((low <= new) & (new <= high)) <= 0.985
    # The control: quantiles of residuals as they are left by the fit, neither widened nor smoothed.
    shrunk = theta[:, None] + (samples - theta[:, None]) * 0.6
    low, high = np.quantile(shrunk[..., 3], [0.025, 0.975], axis=-1)
    assert np.mean((low <= CHINCHILLA.alpha) & (CHINCHILLA.alpha <= high)) < 0.88


def test_the_best_size_per_budget():
    n, d = ladder(7, spread=2.0)
    valleys, exponent = laws.isoflop(6 * n * d, n, CHINCHILLA(n, d))
    first = np.isclose(6 * n * d, BUDGETS[0])
    parabola = np.poly1d(np.polyfit(np.log(n[first]), CHINCHILLA(n, d)[first], 2))
    np.testing.assert_allclose(valleys[0](n[first]), parabola(np.log(n[first])), rtol=1e-9)
    assert len(valleys) == len(BUDGETS) and all(v.inside for v in valleys)
    assert exponent == pytest.approx(CHINCHILLA.beta / (CHINCHILLA.alpha + CHINCHILLA.beta), abs=0.01)
    for valley, budget in zip(valleys, BUDGETS, strict=True):
        assert valley.parameters == pytest.approx(CHINCHILLA.best(budget)[0], rel=0.05)
    outside = n > 1.1 * np.repeat([CHINCHILLA.best(c)[0] for c in BUDGETS], 7)
    assert not any(v.inside for v in laws.isoflop((6 * n * d)[outside], n[outside], CHINCHILLA(n, d)[outside])[0])


@pytest.mark.parametrize(
    "n, d, y, says",
    [
        ([1e6] * 5, [1e7] * 5, [3.0] * 5, "at least six runs, not 5"),
        ([1e6] * 6, np.geomspace(1e6, 1e8, 6), [3.0] * 6, "three sizes"),
        (np.geomspace(1e6, 1e8, 6), np.geomspace(1e6, 1e8, 6), [3.0] * 5 + [-1.0], "positive numbers"),
    ],
)
def test_what_cannot_be_fitted(n, d, y, says):
    with pytest.raises(InputError, match=says):
        laws.fit(n, d, y)
    with pytest.raises(InputError, match="no smallest"):
        laws.isoflop([1.0] * 3 + [2.0] * 3, [1, 2, 3] * 2, [1, 2, 1] * 2)
    with pytest.raises(InputError, match="fewer than three sizes"):
        laws.isoflop([1.0] * 2, [1, 2], [1, 2])
