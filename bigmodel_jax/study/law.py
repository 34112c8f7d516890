"""The parametric scaling law of Hoffmann et al. 2022 (Chinchilla), fitted to runs, with what it does not know.

    L(N, D) = E + A / N^alpha + B / D^beta          N parameters, D tokens, L loss (in any unit)

Fitted as in their section D.2: the Huber loss of the residuals of log L, over the logarithms of E, A and B, by L-BFGS
from many starts. Intervals are a residual bootstrap: simulated ladders at the fitted law, with its residuals made as
wide as the runs' noise, are fitted again, all of them at once. Where a law predicts a run that has not been made, noise
is added to it, for the run itself is as noisy as the others. What no interval covers is a law of another form.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import minimize

from bigmodel_jax.errors import InputError

NAMES = ("E", "A", "B", "alpha", "beta")
STARTS = {  # of log E, log A, log B, alpha, beta (Hoffmann et al. 2022, section D.2)
    "e": (-1.0, -0.5, 0.0, 0.5, 1.0), "a": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0), "b": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    "alpha": (0.0, 0.5, 1.0, 1.5, 2.0), "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
}  # fmt: skip
REFINED = 24
"""Starts that are followed to their optimum: the best of the grid."""
DELTA = 1e-3
SAME_BUDGET = 0.05
"""Log FLOPs by which runs of one budget may differ."""


@dataclass(frozen=True)
class Law:
    """Coefficients; those of the paper are Law(1.69, 406.4, 410.7, 0.34, 0.28)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, parameters: Any, tokens: Any) -> np.ndarray:
        n, d = np.asarray(parameters, float), np.asarray(tokens, float)
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def best(self, flops: float) -> tuple[float, float]:
        """(N, D) of the smallest loss at a budget C = 6 N D (their equation 4)."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        share = self.beta / (self.alpha + self.beta)
        return g * (flops / 6) ** share, (flops / 6) ** (1 - share) / g

    @property
    def theta(self) -> np.ndarray:
        return np.array([np.log(self.E), np.log(self.A), np.log(self.B), self.alpha, self.beta])


CHINCHILLA = Law(1.69, 406.4, 410.7, 0.34, 0.28)
"""Hoffmann et al. 2022, equation 10."""


def _law(theta: np.ndarray) -> Law:
    return Law(*(float(x) for x in np.exp(theta[:3])), float(theta[3]), float(theta[4]))


def _model(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log L [..., P], its derivative by theta [..., P, 5]) at log N and log D [..., P], for theta [..., 5]."""
    e, a, b, alpha, beta = (theta[..., i, None] for i in range(5))
    terms = np.stack(np.broadcast_arrays(e + 0 * n, a - alpha * n, b - beta * d), -1)
    top = terms.max(-1, keepdims=True)
    parts = np.exp(terms - top)
    total = parts.sum(-1, keepdims=True)
    share = parts / total
    slopes = np.stack([share[..., 0], share[..., 1], share[..., 2], -n * share[..., 1], -d * share[..., 2]], -1)
    return (top + np.log(total))[..., 0], slopes


def _huber(residual: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residual)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


def _refined(theta: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, delta: float) -> tuple[np.ndarray, float]:
    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        said, slopes = _model(x, n, d)
        residual = said - y
        # In units of delta, so that L-BFGS's tolerances mean something.
        return _huber(residual, delta).sum() / delta, np.clip(residual, -delta, delta) @ slopes / delta

    options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9}
    found = minimize(objective, theta, jac=True, method="L-BFGS-B", options=options)
    return found.x, float(found.fun)


def _grid() -> np.ndarray:
    return np.array(list(itertools.product(STARTS["e"], STARTS["a"], STARTS["b"], STARTS["alpha"], STARTS["beta"])))


def fit(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], delta: float = DELTA) -> Law:
    """The law of these runs.

    Raises:
      InputError: fewer runs than coefficients and one, or sizes that cannot tell N from D.
    """
    n, d, y = _logs(parameters, tokens, losses)
    starts = _grid()
    scores = np.concatenate([_huber(_model(some, n, d)[0] - y, delta).sum(-1) for some in np.array_split(starts, 16)])
    # Neighbours on the grid end in the same place: take the best of each pair of exponents first.
    order = np.argsort(scores)
    pairs: dict[tuple[float, float], int] = {}
    for index in order:
        pairs.setdefault(tuple(starts[index, 3:]), index)
    chosen = [*pairs.values(), *order[:REFINED]][: REFINED + len(pairs)]
    ends = [_refined(starts[index], n, d, y, delta) for index in chosen]
    return _law(min(ends, key=lambda end: end[1])[0])


def _logs(parameters: Any, tokens: Any, losses: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d, y = (np.asarray(x, float) for x in (parameters, tokens, losses))
    if not len(n) == len(d) == len(y) or len(y) < 6:
        raise InputError(f"a scaling law of five coefficients needs at least six runs, not {len(y)}")
    if min(n.min(), d.min(), y.min()) <= 0 or not np.isfinite([n, d, y]).all():
        raise InputError("parameters, tokens and losses of a scaling law are positive numbers")
    n, d, y = np.log(n), np.log(d), np.log(y)
    if len(np.unique(n.round(6))) < 3 or len(np.unique(d.round(6))) < 3:
        raise InputError("a scaling law needs at least three sizes and three numbers of tokens")
    return n, d, y


def refit(theta: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, delta: float, rounds: int = 60) -> np.ndarray:
    """Optima [R, 5] of many ladders y [R, P] at once, each from theta [R, 5]: reweighted least squares with damping.

    Each round solves the problem in which a residual r weighs min(1, delta / |r|), whose optimum is nearer to Huber's
    (Huber 1964); the damping of a ladder falls where a round helped and grows where it did not (Marquardt 1963).
    """
    theta = theta.copy()
    damping = np.full(len(y), 1e-3)
    said, slopes = _model(theta, n, d)
    cost = _huber(said - y, delta).sum(-1)
    for _ in range(rounds):
        residual = said - y
        w = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        normal = np.einsum("rpi,rp,rpj->rij", slopes, w, slopes)
        diagonal = np.einsum("rii->ri", normal)
        normal = normal + (damping[:, None] * diagonal + 1e-14)[:, :, None] * np.eye(5)
        step = np.linalg.solve(normal, -np.einsum("rpi,rp,rp->ri", slopes, w, residual)[..., None])[..., 0]
        tried = theta + np.clip(step, -1.0, 1.0)
        new_said, new_slopes = _model(tried, n, d)
        new_cost = _huber(new_said - y, delta).sum(-1)
        better = new_cost <= cost
        theta[better], said[better], slopes[better] = tried[better], new_said[better], new_slopes[better]
        cost = np.where(better, new_cost, cost)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-12, 1e8)
    return theta


@dataclass(frozen=True)
class Fitted:
    """A law with its uncertainty.

    samples: [R, 5], theta of laws fitted to simulated ladders. residuals: [P] of log L, as wide as the runs' noise.
    """

    law: Law
    samples: np.ndarray
    residuals: np.ndarray
    seed: int

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Of a coefficient."""
        at = NAMES.index(name)
        low, high = interval(self.law.theta[at], self.samples[:, at], len(self.residuals), level)
        return (float(low), float(high)) if name in ("alpha", "beta") else (float(np.exp(low)), float(np.exp(high)))

    def predict(self, parameters: float, tokens: float, level: float = 0.95) -> tuple[float, float, float]:
        """(loss, low, high) of one more run of this size."""
        said = float(self.law(parameters, tokens))
        drawn = log_losses(self.samples, parameters, tokens) + noise(
            self.residuals, (len(self.samples),), np.random.default_rng(self.seed + 1)
        )
        low, high = np.exp(interval(np.log(said), drawn, len(self.residuals), level))
        return said, float(low), float(high)


def log_losses(theta: np.ndarray, parameters: float, tokens: float) -> np.ndarray:
    """log L [...] by theta [..., 5] at one size."""
    return _model(theta, np.log([parameters]), np.log([tokens]))[0][..., 0]


def interval(center: Any, samples: np.ndarray, runs: int, level: float = 0.95) -> np.ndarray:
    """[2, ...] bounds around `center` [...] by samples [..., R], wider by Student's t over the normal's quantile for
    the runs - 5 degrees of freedom in which the noise was estimated."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    wider = stats.t.ppf(tails[1], runs - 5) / stats.norm.ppf(tails[1])
    return center + wider * (np.quantile(samples, tails, axis=-1) - center)


def noise(residuals: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """[..., *shape] draws of the runs' noise from residuals [..., P], smoothed: half of the variance is normal.

    Huber's fit passes through some of the runs exactly. Resampled as they are, those residuals would make every fit
    to the simulated ladders pass near them too, and intervals too narrow (86 to 90% for 95 in simulation).
    """
    runs = residuals.shape[-1]
    lead = residuals.shape[:-1]
    picks = rng.integers(0, runs, (*lead, int(np.prod(shape))))
    drawn = np.take_along_axis(residuals, picks, -1).reshape(*lead, *shape)
    spread = np.sqrt(np.mean(residuals**2, -1)).reshape(*lead, *[1] * len(shape))
    return (drawn + spread * rng.normal(size=drawn.shape)) / np.sqrt(2)


def fit_with_intervals(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], *, resamples: int = 400,
    seed: int = 0, delta: float = DELTA,
) -> Fitted:  # fmt: skip
    """`fit`, and the same of `resamples` simulated ladders."""
    law = fit(parameters, tokens, losses, delta)
    n, d, y = _logs(parameters, tokens, losses)
    samples, residuals = bootstrap(law.theta[None], n, d, y[None], resamples, seed, delta)
    return Fitted(law, samples[0], residuals[0], seed)


def bootstrap(
    theta: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, resamples: int, seed: int, delta: float = DELTA
) -> tuple[np.ndarray, np.ndarray]:
    """(thetas [S, R, 5], residuals [S, P]) of S ladders y [S, P] (logs) fitted by theta [S, 5].

    Fitted residuals are smaller than the noise by sqrt(1 - 5 / P) on average; they are made larger by as much.
    """
    ladders, runs = y.shape
    said = _model(theta, n, d)[0]
    residuals = (y - said) * np.sqrt(runs / (runs - 5))
    residuals = residuals - residuals.mean(-1, keepdims=True)
    drawn = said[:, None] + noise(residuals, (resamples, runs), np.random.default_rng(seed))
    starts = np.repeat(theta[:, None], resamples, axis=1).reshape(-1, 5)
    found = refit(starts, n, d, drawn.reshape(-1, runs), delta, rounds=20)
    return found.reshape(ladders, resamples, 5), residuals


@dataclass(frozen=True)
class Valley:
    """The best size at one budget, and the parabola whose bottom it is: loss + bend log(N / parameters)^2.

    inside: whether it lies between the smallest and the largest that were run.
    """

    flops: float
    parameters: float
    loss: float
    bend: float
    inside: bool

    def __call__(self, parameters: Any) -> np.ndarray:
        return self.loss + self.bend * np.log(np.asarray(parameters, float) / self.parameters) ** 2


def isoflop(flops: Sequence[float], parameters: Sequence[float], losses: Sequence[float]) -> tuple[list[Valley], float]:
    """(best size per budget, exponent a of N_best ~ C^a): a parabola in log N through the runs of each budget, then a
    line through their bottoms (Hoffmann et al. 2022, approach 2). Runs that are 5% apart or less are of one budget.

    Raises:
      InputError: a budget with fewer than three sizes, or whose losses have no bottom; fewer than two budgets.
    """
    c, n, y = (np.asarray(x, float) for x in (flops, parameters, losses))
    order = np.argsort(c)
    cuts = np.flatnonzero(np.diff(np.log(c[order])) > SAME_BUDGET) + 1
    valleys = []
    for group in np.split(order, cuts):
        budget, x = float(np.exp(np.mean(np.log(c[group])))), np.log(n[group])
        if len(np.unique(x.round(6))) < 3:
            raise InputError(f"budget of {budget:.3g} FLOPs has fewer than three sizes")
        a, b, _ = fitted = np.polyfit(x, y[group], 2)
        if a <= 0:
            raise InputError(f"losses at {budget:.3g} FLOPs have no smallest; run more sizes")
        bottom = -b / (2 * a)
        inside = bool(x.min() <= bottom <= x.max())
        valleys.append(Valley(budget, float(np.exp(bottom)), float(np.polyval(fitted, bottom)), float(a), inside))
    if len(valleys) < 2:
        raise InputError("the best size by budget needs at least two budgets")
    exponent = np.polyfit(np.log([v.flops for v in valleys]), np.log([v.parameters for v in valleys]), 1)[0]
    return valleys, float(exponent)
