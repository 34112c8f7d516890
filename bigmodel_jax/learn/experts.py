"""The losses of a mixture of experts' router, as terms of an objective.

Router z-loss and dropped choices are sums over tokens. The balance loss is a product of two batch means, so
not a sum over examples; the model counts it over fixed groups of rows (`expert_group`), of which it is a
sum, and accumulation and layouts agree. Over a whole microbatch (`expert_group` 0) it is not additive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel_jax.errors import InputError

Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients of the terms "balance" and "router_z"; both are means over tokens, summed over layers.

    A row none of whose targets counts is padding of the batch and is left out.
    """

    balance: float = 0.0
    router_z: float = 0.0

    @property
    def coefficients(self) -> dict[str, float]:
        """{term: factor} beside "loss"; a term that is off is absent."""
        return {name: factor for name, factor in vars(self).items() if factor}

    def weights(self, batch: Mapping[str, jax.Array], weights: jax.Array) -> Sums:
        """{term: tokens it is a mean of}; any number of leading dimensions.

        Args:
          weights: of the targets, [..., rows, targets].
        """
        if not self.coefficients:
            return {}
        rows = _counts(weights)
        real = jnp.ones_like(batch["tokens"]) if "segments" not in batch else batch["segments"] > 0
        tokens = jnp.sum(rows * jnp.sum(real, axis=-1, dtype=rows.dtype))
        return {name: tokens for name in self.coefficients}

    def sums(self, extra: Mapping[str, Any], weights: jax.Array) -> tuple[Sums, dict[str, tuple[jax.Array, jax.Array]]]:
        """({term: sum}, {metric: (sum, weight)}) from Output.extra.

        Raises:
          InputError: a coefficient for a model without experts.
        """
        if "balance" not in extra:
            if self.coefficients:
                raise InputError("balance_loss and router_z_loss need a model with experts (num_experts)")
            return {}, {}
        rows = _counts(weights)
        metrics = {name: tuple(jnp.sum(rows * x) for x in extra[name]) for name in ("balance", "router_z", "dropped")}
        return {name: metrics[name][0] for name in self.coefficients}, metrics


def _counts(weights: jax.Array) -> jax.Array:
    """1 for rows with a target that counts."""
    return jnp.any(weights > 0, axis=-1).astype(jnp.promote_types(weights.dtype, jnp.float32))
