"""Mixture of experts in place of the feed-forward layer (Shazeer et al. 2017; Switch, Fedus et al. 2022).

Shapes: B batch, L length, G groups, T tokens of a group, D model, F ffn, E experts, k experts per token,
C capacity, N layers. Experts have no biases. The router works in at least float32.

capacity  every expert gets C tokens of each group: einsums of fixed shape
dropless  choices sorted by expert, one grouped matmul (jax.lax.ragged_dot) over runs of any length; where
          a platform has no kernel for it (CPU), jax multiplies every token with every expert

On a mesh with an expert axis every device holds some of the experts. With a capacity the buffer [G, E, C, D]
changes places by all-to-all; dropless choices travel as models/dispatch.py has it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigmodel_jax.models import dispatch, routing
from bigmodel_jax.models import layers as ops
from bigmodel_jax.models.block import Mlp, _out_scale, drawn, weight
from bigmodel_jax.models.model import keep
from bigmodel_jax.models.spec import Spec
from bigmodel_jax.parallel import expert
from bigmodel_jax.parallel.pieces import pieces
from bigmodel_jax.parallel.rules import constrain


class Moe(nn.Module):
    """x [B, L, D] -> (y [B, L, D], what the router did: sums over the tokens of each row, [B, ...])."""

    spec: Spec

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        spec, rows, length = self.spec, *x.shape[:2]
        high = ops.wide(x.dtype)
        real = jnp.ones((rows, length), high) if segments is None else (segments > 0).astype(high)
        init = nn.with_partitioning(drawn(("embed", "experts"), spec.embed_dim, spec), ("embed", "experts"))
        router = self.param("router", init, (spec.embed_dim, spec.num_experts), jnp.dtype(spec.param_dtype))
        logits = jnp.einsum("bld,de->ble", x.astype(high), router.astype(high), precision="highest")
        s = routing.scores(logits, spec.router)
        experts, weights = routing.choose(s, self._bias(), spec)
        chosen = jnp.sum(experts[..., None] == jnp.arange(spec.num_experts), axis=-2, dtype=high)
        load = jnp.sum(chosen * real[..., None], axis=1)
        if spec.expert_bias_rate:
            self.put_variable("updates", "bias", jnp.sum(load, axis=0))
        weights = (weights * real[..., None]).astype(x.dtype)
        number = routing.groups(rows, spec.expert_group)
        if spec.capacity_factor:
            y, kept = self._with_capacity(x, experts, weights, real, number)
        else:
            y, kept = self._dropless(x, experts, weights, real, load)
        if spec.shared_experts:
            width = spec.shared_experts * expert_dim(spec)
            shared = dataclasses.replace(spec, mlp_dim=width, bias=False)
            y = y + Mlp(shared, name="shared")(x)
        made = jnp.sum(load, axis=-1)
        return y, {
            "balance": routing.balance(s, chosen, real, number),
            "router_z": routing.router_z(logits, real),
            "dropped": made - kept,
            "load": load,
            "tokens": jnp.sum(real, axis=1),
        }

    @nn.nowrap
    def _bias(self) -> jax.Array | None:
        if not self.spec.expert_bias_rate:
            return None
        zeros = nn.with_partitioning(nn.initializers.zeros, ("experts",))
        return self.variable("stats", "bias", zeros, None, (self.spec.num_experts,), jnp.float32).value

    @nn.nowrap
    def _weights(self) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        """(gate or None, up [E, D, F], out [E, F, D])."""
        spec, number, dim = self.spec, self.spec.num_experts, self.spec.embed_dim
        width = expert_dim(spec)
        into = ((number, dim, width), ("experts", "embed", "mlp"), dim, spec)
        gate = weight(self, "gate", *into) if ops.ACTIVATIONS[spec.activation][1] else None
        up = weight(self, "in" if gate is None else "up", *into)
        shape = (number, width, dim)
        return gate, up, weight(self, "out", shape, ("experts", "mlp", "embed"), width, spec, _out_scale(spec))

    @nn.nowrap
    def _act(self, gate: jax.Array | None, up: jax.Array) -> jax.Array:
        fn = ops.ACTIVATIONS[self.spec.activation][0]
        return fn(up) if gate is None else fn(gate) * up

    @nn.nowrap
    def _with_capacity(self, x, experts, weights, real, number: int) -> tuple[jax.Array, jax.Array]:
        """(y [B, L, D], choices served in each row [B])."""
        spec, (rows, length, dim), k = self.spec, x.shape, self.spec.experts_per_token
        tokens = rows * length // number
        room = routing.capacity(tokens, spec)
        slot, back = routing.places(
            experts.reshape(number, tokens, k), real.reshape(number, tokens), spec.num_experts, room
        )
        copies = jnp.repeat(x.reshape(number, tokens, dim), k, axis=1)
        buffer = routing.permute(copies, back, slot).reshape(number, spec.num_experts, room, dim)
        buffer = constrain(buffer, ("group", "experts", None, "embed_act"))
        gate, up, out = self._weights()
        h = [None if w is None else jnp.einsum("gecd,edf->gecf", buffer, w) for w in (gate, up)]
        h = constrain(self._act(*h), ("group", "experts", None, "mlp"))
        y = constrain(jnp.einsum("gecf,efd->gecd", h, out), ("group", "experts", None, "embed_act"))
        y = constrain(y.reshape(number, -1, dim), ("batch", None, "embed_act"))
        y = routing.permute(y, slot, back).reshape(rows, length, k, dim)
        kept = jnp.sum((slot < back.shape[1]).reshape(rows, -1), axis=1, dtype=real.dtype)
        return jnp.einsum("blkd,blk->bld", y, weights), kept

    @nn.nowrap
    def _dropless(self, x, experts, weights, real, load) -> tuple[jax.Array, jax.Array]:
        """(y [B, L, D], choices served in each row [B]). On a mesh each shard sorts its own tokens."""
        spec, (rows, length, dim), k = self.spec, x.shape, self.spec.experts_per_token
        w = [each for each in self._weights() if each is not None]
        if expert.shards() > 1:
            axes = [*[("experts", "embed", "mlp")] * (len(w) - 1), ("experts", "mlp", "embed")]
            travel = functools.partial(dispatch.dispatched, act=self._act, number=spec.num_experts)
            y, kept = expert.on_each_device(travel, [x, experts, weights, real], w, axes, like=(0, 3))
            return y, jnp.sum(kept, axis=1)
        cut = pieces(rows, length)

        def one(x: jax.Array, experts: jax.Array, *w: jax.Array) -> jax.Array:
            return dispatch.grouped(jnp.repeat(x, k, axis=0), experts.reshape(-1), w, self._act)

        w = cut.pin([jnp.broadcast_to(each, (cut.count, *each.shape)) for each in w])
        own = [cut.split(each) for each in (x, experts)]
        y = jax.vmap(one)(*(each.reshape(cut.count, -1, each.shape[-1]) for each in own), *w)
        y = cut.join(y.reshape(*own[0].shape[:3], k, dim))
        return jnp.einsum("blkd,blk->bld", y, weights), jnp.sum(load, axis=-1)


def expert_dim(spec: Spec) -> int:
    """F of one expert."""
    return spec.expert_dim or spec.mlp_dim


def active_dim(spec: Spec) -> int:
    """Hidden features that a token passes through: of its k experts and the shared ones."""
    if not spec.num_experts:
        return spec.mlp_dim
    return (spec.experts_per_token + spec.shared_experts) * expert_dim(spec)


def extra(routed: dict[str, jax.Array] | None) -> dict[str, Any]:
    """Output.extra of a stack, from what its layers' routers did, [N, B, ...].

    Pairs (sum, weight) over the tokens of each row, both [B] and so additive over rows: balance and
    router_z are summed over layers and count per token, dropped per choice. load [B, N, E] counts choices.
    """
    if routed is None:
        return {}
    tokens = routed["tokens"][0]
    made = jnp.sum(routed["load"], axis=(0, 2))
    return {
        "balance": (jnp.sum(routed["balance"], axis=0), tokens),
        "router_z": (jnp.sum(routed["router_z"], axis=0), tokens),
        "dropped": (jnp.sum(routed["dropped"], axis=0), made),
        "load": jnp.swapaxes(routed["load"], 0, 1),
    }


def merging(spec: Spec) -> Any:
    """`Model.merge` of a Transformer with these options."""
    return functools.partial(merge, rate=spec.expert_bias_rate) if spec.expert_bias_rate else keep


def merge(stats: Any, updates: Any, rate: float) -> Any:
    """Balancing biases after an optimizer step: up by `rate` where an expert got less than the mean of its
    layer, down where it got more (Wang et al. 2024, algorithm 1). stats and updates (choices): [..., E]."""

    def moved(bias: jax.Array, load: jax.Array) -> jax.Array:
        return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load).astype(bias.dtype)

    return jax.tree.map(moved, stats, updates)
