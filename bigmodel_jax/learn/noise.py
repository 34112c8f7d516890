"""The gradient noise scale: how large a batch has to be before it stops paying (McCandlish et al. 2018).

The gradient of B rows has the expected square |G|^2 + tr(Sigma) / B, where G is the gradient of the whole distribution
and Sigma the covariance of one row's gradient. Accumulation gives it at two sizes for free, M rows of a microbatch and
the A M of a step, and two sizes give both unknowns without bias (appendix A.1, equations A.2 and A.3):

    |G|^2     = (A M |g|^2 - M mean|g_a|^2) / (A M - M)
    tr(Sigma) = (mean|g_a|^2 - |g|^2) / (1 / M - 1 / (A M))

B_simple = tr(Sigma) / |G|^2, in rows: far below it twice the batch does the work of twice the steps, far above it
nearly nothing. Each estimate is noisy and a ratio of noisy numbers is biased, so both are averaged over steps
before they are divided. Both are unbiased at any batch size, hence averages go on across a ramp of sizes; a step
without accumulation adds nothing. Rows of different weight (padding) count their weight as noise too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def estimates(small: jax.Array, big: jax.Array, rows: int, steps: int) -> tuple[jax.Array, jax.Array]:
    """(|G|^2, tr(Sigma)) of one step; the first may come out negative.

    Args:
      small: mean square norm of the gradients of `steps` microbatches of `rows`, each a mean over its rows.
      big: square norm of the gradient of all rows * steps.
    """
    trace = (small - big) * rows * steps / (steps - 1)
    return big - trace / (rows * steps), trace


def averaged(books: jax.Array, decay: float, found: tuple[jax.Array, jax.Array], good: jax.Array) -> jax.Array:
    """Averages [2] of both estimates after a step; unchanged unless `good`. They start at 0: in their ratio the
    correction for that cancels."""
    new = decay * books + (1 - decay) * jnp.stack(found).astype(books.dtype)
    return jnp.where(good, new, books)


def scale(books: jax.Array) -> jax.Array:
    """B_simple in rows; 0 as long as it is not known."""
    signal, trace = books[0], books[1]
    return jnp.where(signal > 0, jnp.maximum(trace, 0) / jnp.where(signal > 0, signal, 1), 0)
