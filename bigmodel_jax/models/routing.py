"""Which expert serves which token: scores, choice, losses and places, as plain functions.

Shapes: B batch, L length, T tokens of a group, E experts, k experts per token, C capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import layers as ops

ROUTERS = ("softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Options of a mixture of experts in place of the feed-forward layer.

    num_experts: 0 for an ordinary feed-forward layer. expert_dim: their hidden size, 0 means mlp_dim.
    experts_per_token: the k with the highest score. shared_experts: as many more that serve every token.
    router: scores are a softmax over all experts, or a sigmoid of each (DeepSeek-V3, 2024, eq. 15).
    router_renormalise: the k scores are divided by their sum; with softmax that is the softmax over the
      chosen ones alone (Mixtral). router_scale: factor of the k scores after that.
    capacity_factor: each expert takes at most ceil(factor k T / E) of the T tokens of a group, first
      choices before second ones, in order; the rest are dropped and counted. 0 drops none (dropless).
    expert_group: rows of a batch that form a group, in which capacity and balance are counted; then
      microbatches and layouts agree. 0 is the whole microbatch: accumulation is refused.
    expert_bias_rate: step of the balancing bias that is added to scores for the choice alone, once per
      optimizer step (Wang et al. 2024); 0 has none.
    """

    num_experts: int = 0
    experts_per_token: int = 2
    shared_experts: int = 0
    expert_dim: int = 0
    router: str = "softmax"
    router_renormalise: bool = True
    router_scale: float = 1.0
    capacity_factor: float = 0.0
    expert_group: int = 1
    expert_bias_rate: float = 0.0

    def check_routing(self) -> None:
        """Raises InputError for options that do not fit together."""
        ops.one_of("router", self.router, ROUTERS)
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise InputError(f"experts_per_token={self.experts_per_token} must be 1 to num_experts={self.num_experts}")
        whole = ("num_experts", "shared_experts", "expert_dim", "expert_group")
        for option in (*whole, "capacity_factor", "expert_bias_rate"):
            if getattr(self, option) < 0:
                raise InputError(f"{option}={getattr(self, option)} must not be negative")


def scores(logits: jax.Array, router: str) -> jax.Array:
    """[..., E] -> [..., E], in the logits' dtype."""
    return jax.nn.softmax(logits, axis=-1) if router == "softmax" else jax.nn.sigmoid(logits)


def choose(s: jax.Array, bias: jax.Array | None, options: Routing) -> tuple[jax.Array, jax.Array]:
    """(experts [..., k] int32, their weights [..., k]) from scores [..., E], best first.

    bias: [E], for the choice alone.
    """
    ranked = jax.lax.stop_gradient(s if bias is None else s + bias)
    experts = jax.lax.top_k(ranked, options.experts_per_token)[1]
    weights = jnp.take_along_axis(s, experts, axis=-1)
    if options.router_renormalise:
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(s.dtype).tiny)
    return experts, weights * options.router_scale


def groups(rows: int, size: int) -> int:
    """Groups that `rows` rows form; one where they do not divide (generation, small evaluations)."""
    return rows // size if size and rows % size == 0 else 1


def balance(s: jax.Array, chosen: jax.Array, real: jax.Array, number: int) -> jax.Array:
    """Load-balancing loss [B] (Switch, Fedus et al. 2022, eq. 4-6), each row's share of its group's.

    A group's loss is E sum_i f_i P_i, 1 when balanced: f_i is the share of its choices that fell on expert
    i, P_i the mean share of the scores of i. It is a product of two means and no sum over examples; over
    fixed groups of rows it is a sum over groups. Each group counts by its tokens: the sum over rows of what
    is returned, divided by the number of tokens, is the mean loss.

    Args:
      s: scores [B, L, E]. chosen: how often each token chose each expert [B, L, E]. real: [B, L], 0 at
        padding. number: of groups, of consecutive rows.
    """
    share = s / jnp.maximum(jnp.sum(s, axis=-1, keepdims=True), jnp.finfo(s.dtype).tiny)

    def mean(x: jax.Array) -> jax.Array:
        x = (x * real[..., None]).reshape(number, -1, x.shape[-1])
        total = jnp.sum(x, axis=1)
        return total / jnp.maximum(jnp.sum(total, axis=-1, keepdims=True), 1e-9)

    loss = s.shape[-1] * jnp.sum(jax.lax.stop_gradient(mean(chosen)) * mean(share), axis=-1)
    tokens = jnp.sum(real, axis=1)
    return (loss[:, None] * tokens.reshape(number, -1)).reshape(-1)


def router_z(logits: jax.Array, real: jax.Array) -> jax.Array:
    """Sum over each row's tokens of logsumexp(logits)^2, [B] (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return jnp.sum(real * jnp.square(jax.nn.logsumexp(logits, axis=-1)), axis=-1)


def capacity(tokens: int, options: Routing) -> int:
    """C of a group of T tokens."""
    asked = options.capacity_factor * options.experts_per_token * tokens / options.num_experts
    return min(math.ceil(asked - 1e-9), tokens)


def places(experts: jax.Array, real: jax.Array, number: int, room: int) -> tuple[jax.Array, jax.Array]:
    """Place of each choice in its expert's queue.

    Args:
      experts: [G, T, k]. real: [G, T]; padding takes no place. number: E. room: C.

    Returns:
      slot [G, T k]: e C + place, or E C for a choice that finds no room; back [G, E C]: the choice in
      that slot as t k + j, or T k for an empty slot.
    """
    g, t, k = experts.shape
    # All first choices, then all second ones.
    queue = jnp.swapaxes(experts, 1, 2).reshape(g, k * t)
    valid = jnp.tile(real > 0, (1, k))
    hot = (queue[..., None] == jnp.arange(number)) & valid[..., None]
    at = jnp.sum(jnp.where(hot, jnp.cumsum(hot, axis=1) - 1, 0), axis=-1)
    slot = jnp.where(valid & (at < room), queue * room + at, number * room)
    slot = jnp.swapaxes(slot.reshape(g, k, t), 1, 2).reshape(g, t * k)
    # The inverse by sorting, not scattering: what expert e serves lies in one run of the sorted queue.
    order = jnp.argsort(jnp.where(valid, queue, number), axis=1, stable=True)
    counts = jnp.sum(hot, axis=1)
    served = jnp.arange(room) < counts[..., None]
    run = (jnp.cumsum(counts, axis=1) - counts)[..., None] + jnp.arange(room)
    turn = jnp.take_along_axis(order, jnp.where(served, run, 0).reshape(g, -1), axis=1)
    back = jnp.where(served.reshape(g, -1), turn % t * k + turn // t, t * k)
    return slot, back


def sorted_places(experts: jax.Array, number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(slot [T k], back [T k], tokens of each expert [E]): choices in the order of their experts."""
    flat = experts.reshape(-1)
    back = jnp.argsort(flat, stable=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(number), axis=0, dtype=jnp.int32)
    return jnp.argsort(back), back, sizes


@jax.custom_vjp
def permute(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    """x [G, n, D] -> [G, m, D], row i being x[there[i]], or 0 where there[i] is out of range.

    back [G, n]: the inverse, so that the gradient is a lookup as well and not a scatter.
    """
    return _rows(x, there)


def _rows(x: jax.Array, at: jax.Array) -> jax.Array:
    taken = jnp.take_along_axis(x, jnp.minimum(at, x.shape[1] - 1)[..., None], axis=1)
    return jnp.where((at < x.shape[1])[..., None], taken, 0)


def _permute_forward(x, there, back):
    return _rows(x, there), back


def _permute_backward(back, g):
    return _rows(g, back), None, None


permute.defvjp(_permute_forward, _permute_backward)
