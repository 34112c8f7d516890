"""Mixture of experts against a dense loop over experts in numpy, forward and gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import decoder, moe, routing
from bigmodel_jax.models.spec import Spec

B, L, D, F, E, K = 4, 6, 8, 12, 5, 2
SIZES = dict(vocab_size=11, num_layers=2, embed_dim=D, num_heads=2, mlp_dim=F, max_length=L, bias=False,
             activation="swiglu", norm="rmsnorm", norm_bias=False, positions="rotary")  # fmt: skip
CASES = {
    "mixtral": dict(),
    "raw_scores": dict(router_renormalise=False),
    "deepseek": dict(router="sigmoid", shared_experts=1, router_scale=2.5, expert_bias_rate=0.01, activation="relu"),
    "capacity": dict(capacity_factor=0.75),
    "capacity_of_two_rows": dict(capacity_factor=0.75, expert_group=2),
}


def np_moe(p, bias, x, segments, o):
    """(y, dropped [B]) token by token: every choice is served unless its expert's queue is full."""
    act = (lambda z: z / (1 + np.exp(-z))) if o.activation == "swiglu" else (lambda z: np.maximum(z, 0))
    logits = x @ p["router"]
    s = 1 / (1 + np.exp(-logits))
    if o.router == "softmax":
        s = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y, dropped = np.zeros_like(x), np.zeros(len(x))
    rank = np.argsort(-(s + bias), axis=-1, kind="stable")[..., :K]
    group = o.expert_group if o.capacity_factor else len(x)
    room = int(np.ceil(o.capacity_factor * K * group * L / E)) if o.capacity_factor else 10**9
    for first in range(0, len(x), group):
        queue = np.zeros(E, int)
        for j in range(K):
            for b in range(first, first + group):
                for t in range(L):
                    if not segments[b, t]:
                        continue
                    e = rank[b, t, j]
                    queue[e] += 1
                    if queue[e] > room:
                        dropped[b] += 1
                        continue
                    w = s[b, t, e] / (s[b, t, rank[b, t]].sum() if o.router_renormalise else 1)
                    h = act(x[b, t] @ (p["gate"][e] if "gate" in p else p["in"][e]))
                    h = h * (x[b, t] @ p["up"][e]) if "gate" in p else h
                    y[b, t] += o.router_scale * w * (h @ p["out"][e])
    if o.shared_experts:
        y = y + act(x @ p["shared"]["in"]) @ p["shared"]["out"]
    return y, dropped


def built(options):
    """(spec, module, variables, x, segments) in float64; the second row ends in padding."""
    spec = Spec(**SIZES | dict(num_experts=E, experts_per_token=K, dtype="float64", param_dtype="float64") | options)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(B, L, D))
    segments = np.ones((B, L), np.int32)
    segments[1, 4:] = 0
    module = moe.Moe(spec)
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.asarray(x), jnp.asarray(segments)))
    fill = lambda leaf: jnp.asarray(0.7 * rng.normal(size=leaf.shape))  # noqa: E731
    values = jax.tree.map(fill, nn.meta.unbox({k: boxed[k] for k in ("params", "stats") if k in boxed}))
    return spec, module, jax.device_get(values), x, segments


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_experts(name, x64):
    spec, module, variables, x, segments = built(CASES[name])
    real = segments[..., None] > 0

    @jax.jit
    def f(variables, x):
        (y, routed), updates = module.apply(variables, x, jnp.asarray(segments), mutable=["updates"])
        pull = jax.grad(lambda v, x: jnp.sum(jnp.sin(module.apply(
            v, x, jnp.asarray(segments), mutable=["updates"])[0][0]) * real), (0, 1))  # fmt: skip
        return y, routed, updates, pull(variables, x)

    y, routed, updates, (dv, dx) = jax.device_get(f(variables, x))
    bias = variables.get("stats", {}).get("bias", np.zeros(E))
    expected, dropped = np_moe(variables["params"], bias, x, segments, spec)
    np.testing.assert_allclose(y * real, expected * real, atol=1e-12)
    np.testing.assert_array_equal(routed["dropped"], dropped)
    assert (dropped.sum() > 0) == bool(spec.capacity_factor)
    assert routed["load"].sum() == K * segments.sum()
    if spec.expert_bias_rate:
        np.testing.assert_array_equal(updates["updates"]["bias"], routed["load"].sum(0))
        assert np.abs(np_moe(variables["params"], 0 * bias, x, segments, spec)[0] - expected).max() > 1e-3

    def loss(params, x):
        return np.sum(np.sin(np_moe(params, bias, x, segments, spec)[0]) * real)

    # Directional derivatives: of the input, and of every parameter at once.
    rng = np.random.default_rng(6)
    to = rng.normal(size=x.shape)
    step = 1e-6
    slope = (loss(variables["params"], x + step * to) - loss(variables["params"], x - step * to)) / (2 * step)
    np.testing.assert_allclose(np.sum(dx * to), slope, rtol=1e-6)
    ways = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), variables["params"])
    ends = [jax.tree.map(lambda p, w, s=s: p + s * step * w, variables["params"], ways) for s in (1, -1)]
    slope = (loss(ends[0], x) - loss(ends[1], x)) / (2 * step)
    got = sum(jax.tree.leaves(jax.tree.map(lambda g, w: np.sum(g * w), dv["params"], ways)))
    np.testing.assert_allclose(got, slope, rtol=1e-6)
