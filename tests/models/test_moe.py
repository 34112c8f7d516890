"""Mixture of experts against a dense loop over experts in numpy, forward and gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import decoder, moe, routing
from bigmodel_jax.models.spec import Spec
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel import rules

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


def test_dropless_on_a_mesh_sorts_each_shard_alone(x64):
    spec, module, variables, x, segments = built(CASES["mixtral"])
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])

    def run(variables, x):
        return module.apply(variables, x, jnp.asarray(segments))[0]

    with rules.use(rules.Layout(mesh)):
        sharded = jax.jit(run, in_shardings=(None, meshes.batch_sharding(mesh, accumulated=False)))(variables, x)
    expected, _ = np_moe(variables["params"], np.zeros(E), x, segments, spec)
    real = segments[..., None] > 0
    np.testing.assert_allclose(np.asarray(sharded) * real, expected * real, atol=1e-12)


def test_balance_is_a_sum_over_groups_of_rows_and_of_nothing_smaller():
    rng = np.random.default_rng(0)
    s = rng.dirichlet(np.ones(E), (8, L))
    real = (rng.random((8, L)) < 0.7).astype(float)
    chosen = np.eye(E)[np.argsort(-s)[..., :K]].sum(-2)

    balance = jax.jit(routing.balance, static_argnums=3)

    def total(rows, number):
        return float(np.sum(balance(s[rows], chosen[rows], real[rows], number)))

    expected = 0.0
    for g in range(4):
        rows = slice(2 * g, 2 * g + 2)
        tokens = real[rows].sum()
        f = (chosen[rows] * real[rows][..., None]).sum((0, 1)) / (K * tokens)
        p = (s[rows] * real[rows][..., None]).sum((0, 1)) / tokens
        expected += tokens * E * (f * p).sum()
    whole = total(slice(0, 8), 4)
    assert whole == pytest.approx(expected, rel=1e-5)
    halves, quarters = ([total(slice(i, i + n), n // 2) for i in range(0, 8, n)] for n in (4, 2))
    assert sum(halves) == pytest.approx(whole, rel=1e-5) and sum(quarters) == pytest.approx(whole, rel=1e-5)
    # Control: as one group it is no sum over parts.
    assert abs(sum(total(slice(i, i + 4), 1) for i in (0, 4)) - total(slice(0, 8), 1)) > 1e-3
    even = np.full((2, L, E), 1 / E)
    assert float(np.sum(balance(even, even * K, np.ones((2, L)), 1))) == pytest.approx(2 * L, rel=1e-5)


def test_places_count_the_dropped_exactly_and_invert_each_other():
    experts = np.random.default_rng(1).integers(0, 2, (3, 8, 1))
    real = np.ones((3, 8))
    real[2, 5:] = 0
    places = jax.jit(routing.places, static_argnums=(2, 3))
    for room in (2, 8):
        slot, back = (np.asarray(y) for y in places(experts, real, 2, room))
        for g in range(3):
            counts = [int((experts[g, :, 0][real[g] > 0] == e).sum()) for e in range(2)]
            assert (slot[g] < 2 * room).sum() == sum(min(count, room) for count in counts)
            for t in np.flatnonzero(slot[g] < 2 * room):
                assert back[g, slot[g, t]] == t and slot[g, t] // room == experts[g, t, 0] and real[g, t]
            assert (back[g] < 8).sum() == (slot[g] < 2 * room).sum()


def test_bias_moves_towards_balance_once_per_step():
    load = jnp.asarray([[4.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    moved = moe.merge({"bias": jnp.full((2, 3), 0.5)}, {"bias": load}, 0.125)["bias"]
    assert moved.tolist() == [[0.375, 0.625, 0.5], [0.5, 0.5, 0.5]]
    other = moe.merge({"bias": jnp.full((2, 3), 0.5)}, {"bias": load / 4}, 0.125)["bias"]
    assert (other == moved).all()  # the mean over microbatches serves as well as the sum


def test_flops_count_active_experts_alone():
    sizes = SIZES | {"activation": "relu"}
    dense = decoder(**sizes | {"mlp_dim": 3 * F}).flops(L)
    mixed = decoder(**sizes, num_experts=16, experts_per_token=2, shared_experts=1).flops(L)
    assert mixed == dense + 2 * 2.0 * D * 16  # and the router, in two layers


def test_options_that_do_not_fit():
    for options in (dict(num_experts=2, experts_per_token=3), dict(router="hash"), dict(capacity_factor=-1.0)):
        with pytest.raises(InputError):
            decoder(**SIZES | options)
