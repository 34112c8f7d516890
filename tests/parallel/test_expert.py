"""Experts on several devices compute what they compute on one, which tests/models/test_moe.py holds against numpy."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.models import moe
from bigmodel_jax.models.spec import Spec
from bigmodel_jax.parallel import expert, rules
from bigmodel_jax.parallel import mesh as meshes

B, L, D, F, E, K = 8, 4, 8, 12, 4, 2
OPTIONS = dict(
    vocab_size=11, num_layers=1, embed_dim=D, num_heads=2, mlp_dim=F, bias=False, activation="swiglu", num_experts=E,
    experts_per_token=K, dtype="float64", param_dtype="float64",
)  # fmt: skip
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ALL_EXPERTS = rf"f64\[{E},(1,)?({D},{F}|{F},{D})\]"
MESHES = {
    "expert4": {"data": 2, "expert": 4},
    "expert2_tensor2": {"data": 2, "expert": 2, "tensor": 2},
    "expert2_fsdp2_context2": {"data": 1, "expert": 2, "fsdp": 2, "context": 2},
}


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(3)
    x, segments = rng.normal(size=(B, L, D)), np.ones((B, L), np.int32)
    segments[1, 2:] = 0
    module = moe.Moe(Spec(**OPTIONS))
    with jax.enable_x64(True):
        boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.asarray(x), jnp.asarray(segments)))
    params = jax.tree.map(lambda leaf: 0.7 * rng.normal(size=leaf.shape), nn.meta.unbox(boxed["params"]))
    return params, x, segments


def lowered(drawn, layout=None, **options):
    params, x, segments = drawn
    module, real = moe.Moe(Spec(**OPTIONS | options)), segments[..., None] > 0

    def loss(params, x):
        y, routed = module.apply({"params": params}, x, jnp.asarray(segments))
        return jnp.sum(jnp.sin(y) * real), (y * real, routed["dropped"])

    def run(params, x):
        with rules.use(layout):
            return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    where = None
    if layout is not None:
        axes = {"router": ("embed", "experts"), "out": ("experts", "mlp", "embed")}
        axes |= {name: ("experts", "embed", "mlp") for name in ("gate", "up")}
        where = (rules.shardings(axes, params, layout.mesh), meshes.batch_sharding(layout.mesh, accumulated=False))
    return jax.jit(run, in_shardings=where, compiler_options=QUICK).lower(params, x).compile()


@pytest.fixture(scope="module")
def programs():
    """Compiled programs by layout and capacity, for what several tests ask of one."""
    return {}


def shared(programs, drawn, name, factor):
    if (name, factor) not in programs:
        programs[name, factor] = lowered(drawn, layout(name), capacity_factor=factor)
    return programs[name, factor]


def run(drawn, layout=None, program=None, **options):
    program = program or lowered(drawn, layout, **options)
    places = program.input_shardings[0]
    return jax.device_get(program(*jax.device_put(drawn[:2], places)))


@pytest.fixture(scope="module")
def alone(drawn):
    with jax.enable_x64(True):
        return {factor: run(drawn, capacity_factor=factor) for factor in (0.0, 0.75)}


def layout(name, **options):
    sizes = MESHES[name]
    return rules.Layout(meshes.make_mesh(sizes, jax.devices()[:8]), **options)


def apart(a, b):
    return max(np.abs(np.asarray(x) - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name, factor", [*((name, 0.0) for name in MESHES), ("expert4", 0.75)])
def test_same_as_on_one_device(name, factor, drawn, alone, programs, x64):
    assert apart(run(drawn, program=shared(programs, drawn, name, factor)), alone[factor]) < 1e-12
    dropped = alone[factor][0][1][1]
    assert (dropped.sum() > 0) == (factor > 0)


def emulated(self, x, into, taken, sizes, placed, received):
    """What `ragged_all_to_all` is specified to do, from gathered arrays."""
    xs, taken, sizes, placed = (self.all(y) for y in (x, taken, sizes, placed))
    me, at = self.index(), jnp.arange(len(into))
    for i in range(self.size):
        here = (at >= placed[i, me]) & (at < placed[i, me] + sizes[i, me])
        row = jnp.clip(at - placed[i, me] + taken[i, me], 0, len(x) - 1)
        into = jnp.where(here[:, None], xs[i][row], into)
    return into


def test_the_ragged_form_too(drawn, alone, x64, monkeypatch):
    monkeypatch.setattr(expert.Exchange, "ragged", emulated)
    assert apart(run(drawn, layout("expert4", dispatch="ragged")), alone[0.0]) < 1e-12
    # With little room, as many choices as are missing are counted, and no other is touched.
    ((_, (y, dropped)), _) = run(drawn, layout("expert4", dispatch="ragged", room=0.5))
    whole = alone[0.0][0][1][0]
    changed = np.abs(y - whole).max(-1).sum(-1) > 1e-12
    assert 0 < dropped.sum() < K * B * L and (changed == (dropped > 0)).all()


def test_room_that_is_too_small_is_counted(drawn, alone, x64):
    ((_, (y, dropped)), _) = run(drawn, layout("expert4", room=0.5))
    changed = np.abs(y - alone[0.0][0][1][0]).max(-1).sum(-1) > 1e-12
    assert 0 < dropped.sum() < K * B * L and (changed == (dropped > 0)).all()


def test_control_choices_that_do_not_come_home_are_seen(drawn, alone, x64, monkeypatch):
    monkeypatch.setattr(expert.Exchange, "swap", lambda self, x: x)
    assert apart(run(drawn, layout("expert4")), alone[0.0]) > 1e-3


@pytest.mark.parametrize("factor", [0.0, 0.75])
def test_tokens_travel_and_experts_stay(drawn, factor, programs, x64):
    """No device ever holds all experts; what crosses the expert axis is an all-to-all."""
    text = shared(programs, drawn, "expert4", factor).as_text()
    assert "all-to-all" in text and not re.search(ALL_EXPERTS, text)


def test_control_fsdp_gathers_all_experts(drawn, x64):
    fsdp = rules.Layout(meshes.make_mesh({"data": 2, "fsdp": 4}))
    assert re.search(ALL_EXPERTS, lowered(drawn, fsdp).as_text())
