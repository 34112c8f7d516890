"""Learning rates as functions of the step.

`step` counts updates already applied, so the first update sees step 0 and a run of `total`
updates ends with step total - 1. All share one warm-up: lr = peak * (step + 1) / warmup for
step < warmup. The first update therefore has a non-zero rate (an lr of 0 there wastes a step),
and update number `warmup` is the first at the peak. The decay that follows reads
    progress = (step + 1 - warmup) / (total - warmup), clipped to [0, 1]
so the last update runs at exactly the final rate, and any later one stays there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from bigmodel_jax.errors import InputError, nearest

Schedule = Callable[[jax.Array | int], jax.Array]
Shape = Callable[[jax.Array, jax.Array], jax.Array]
"""(progress in [0, 1], updates done = step + 1) -> share of the peak."""


def constant(warmup: int, total: int) -> Shape:
    """Stay at the peak."""
    return lambda progress, done: jnp.ones_like(progress)


def linear(warmup: int, total: int, final: float = 0.0) -> Shape:
    """Straight line from the peak to final * peak."""
    return lambda progress, done: 1 - (1 - final) * progress


def cosine(warmup: int, total: int, final: float = 0.0) -> Shape:
    """Half a cosine from the peak to final * peak (SGDR without restarts, Loshchilov 2017)."""
    return lambda progress, done: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def long_cosine(warmup: int, total: int, *, length: float, final: float = 0.0) -> Shape:
    """The beginning of a cosine laid out for a run `length` times as long (Hoffmann et al. 2022, figure A1).

    length: at least 1, where it is `cosine`.
    """
    if length < 1:
        raise InputError(f"long_cosine: length {length} is in units of the run, at least 1")
    reach = (total - warmup) / max(length * total - warmup, 1)
    whole = cosine(warmup, total, final)
    return lambda progress, done: whole(progress * reach, done)


def rsqrt(warmup: int, total: int, timescale: int = 0) -> Shape:
    """peak * sqrt(timescale / updates done), at most the peak (Vaswani et al. 2017).

    timescale: updates until the decay sets in; 0 means the warm-up, at least 1.
    """
    scale = max(timescale or warmup, 1)
    return lambda progress, done: jnp.minimum(1.0, jnp.sqrt(scale / done))


def wsd(warmup: int, total: int, decay: float = 0.2, final: float = 0.0, shape: str = "linear") -> Shape:
    """Warm-up, stable, decay (MiniCPM, Hu et al. 2024).

    Args:
      decay: share of all `total` updates spent decaying, in (0, 1].
      shape: "linear", "cosine" or "sqrt" (1 - sqrt, Haegele et al. 2024).
    """
    curves = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
        "sqrt": lambda x: 1 - jnp.sqrt(x),
    }
    if shape not in curves:
        raise InputError(f"wsd: unknown shape '{shape}' of {tuple(curves)}{nearest(shape, curves)}")
    if not 0 < decay <= 1:
        raise InputError(f"wsd: decay {decay} is a share of all updates, in (0, 1]")
    length = max(round(decay * total), 1)

    def share(progress: jax.Array, done: jax.Array) -> jax.Array:
        x = jnp.clip((done - (total - length)) / length, 0.0, 1.0)
        return final + (1 - final) * curves[shape](x)

    return share


def piecewise(warmup: int, total: int, boundaries: Sequence[int | float] = (), factor: float = 0.1) -> Shape:
    """Multiply the rate by `factor` at each boundary (ResNet, He et al. 2016).

    boundaries: updates done before the drop; numbers below 1 are shares of `total`.
    """
    at = [round(b * total) if 0 < b < 1 else int(b) for b in boundaries]
    if any(b <= a for a, b in zip(at, at[1:], strict=False)):
        raise InputError(f"piecewise: boundaries {tuple(boundaries)} must increase")

    def share(progress: jax.Array, done: jax.Array) -> jax.Array:
        dropped = sum((done > b).astype(progress.dtype) for b in at)
        return jnp.ones_like(progress) * factor**dropped

    return share


SCHEDULES: dict[str, Callable[..., Shape]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "long_cosine": long_cosine,
    "rsqrt": rsqrt,
    "wsd": wsd,
    "piecewise": piecewise,
}


def make(name: str, peak: float, warmup: int, total: int, **options: float | str) -> Schedule:
    """step (updates already applied) -> learning rate, float32 (float64 under x64).

    Args:
      peak: largest rate.
      warmup: updates of linear warm-up; 0 for none.
      total: updates of the whole run, warm-up included.
      options: of the named schedule.

    Raises:
      InputError: unknown name or option, or warmup and total that do not fit.
    """
    if name not in SCHEDULES:
        raise InputError(f"unknown schedule '{name}' of {tuple(SCHEDULES)}{nearest(name, SCHEDULES)}")
    known = [p for p in inspect.signature(SCHEDULES[name]).parameters if p not in ("warmup", "total")]
    for option in options:
        if option not in known:
            raise InputError(f"schedule '{name}' has no option '{option}', only {tuple(known)}{nearest(option, known)}")
    if total < 1 or not 0 <= warmup <= total:
        raise InputError(f"schedule '{name}': warmup {warmup} must lie between 0 and total {total}")
    share = SCHEDULES[name](warmup, total, **options)

    def lr(step: jax.Array | int) -> jax.Array:
        done = jnp.asarray(step, jnp.result_type(float)) + 1
        progress = jnp.clip((done - warmup) / max(total - warmup, 1), 0.0, 1.0)
        rising = jnp.minimum(done / max(warmup, 1), 1.0)
        return peak * jnp.where(done <= warmup, rising, share(progress, done))

    return lr
