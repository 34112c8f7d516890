"""Gradients scattered ring by ring: the numbers of one device, by reduce-scatters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import objectives
from bigmodel_jax.models import MODELS
from bigmodel_jax.parallel import legal, rings
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel.rules import Layout, shardings, use
from bigmodel_jax.planner.costs import costs
from bigmodel_jax.planner.hlo import read

SIZES = {"data": 2, "fsdp": 4}
MODEL = dict(
    vocab_size=32, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, max_length=8, mlp_dim=32, norm="rmsnorm",
    positions="rotary", activation="swiglu", bias=False, tied_embeddings=False, dtype="float64", param_dtype="float64",
)  # fmt: skip


class Device:
    def __init__(self, coords):
        self.coords = coords


def grid(*sizes):
    return [Device(place) for place in np.ndindex(*sizes)]


@pytest.mark.parametrize(
    "devices, sizes, found",
    [
        (grid(4, 4), (1, 16), (4, 4)),
        (grid(2, 4, 8), (1, 64), (2, 4, 8)),
        (grid(2, 4, 8), (8, 8), (8,)),
        (grid(16), (1, 16), (16,)),
        ([Device(place) for place in [(0, 0), (0, 1), (1, 1), (1, 0)]], (1, 4), (4,)),  # no grid: around a square
        (jax.devices(), (1, 8), (8,)),
    ],
    ids=["plane", "space", "one dimension of three", "line", "no grid", "no coordinates"],
)
def test_rings_are_read_off_the_coordinates(devices, sizes, found):
    class Fake:
        axis_names = ("data", "fsdp")

    Fake.devices = np.array(devices, dtype=object).reshape(sizes)
    assert rings.dimensions(Fake) == found


@functools.cache
def problem():
    model = MODELS["decoder"](**MODEL)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (8, 8)).astype(np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": (rng.random((8, 8)) < 0.6) * 1.0}
    variables = model.init(jax.random.key(0))
    _, axes = model.abstract()
    return model, batch, variables["params"], axes["params"]


@functools.cache
def reference():
    return gradients(None)[0]


def gradients(layout):
    """(gradients by path, program)."""
    model, batch, params, axes = problem()
    objective = objectives.causal_lm(chunk=4)

    def loss(params):
        with use(layout):
            return objective(model.apply, {"params": params}, batch, None, True)[0]["loss"]

    if layout is None:
        return jax.device_get(tree.flatten(jax.jit(jax.grad(loss))(params))), None
    places = shardings(axes, params, layout.mesh)
    compiled = jax.jit(jax.grad(loss), in_shardings=(places,), out_shardings=places).lower(params).compile()
    return jax.device_get(tree.flatten(compiled(jax.device_put(params, places)))), compiled


def worst(a, b):
    return max(np.abs(a[path] - b[path]).max() / np.abs(a[path]).max() for path in a)


def ringed(sizes=SIZES, stages=(2, 2)):
    return Layout(meshes.make_mesh(sizes), rings=stages)


def test_the_numbers_are_those_of_one_device_and_no_gradient_of_a_weight_is_summed_whole(x64, monkeypatch):
    monkeypatch.setattr(rings, "LANES", 1)
    found, compiled = gradients(ringed())
    assert worst(reference(), found) < 1e-12
    module = read(compiled.as_text())
    spent = costs(module, dict(SIZES))
    scattered = [c for c in spent.collectives if c.kind == "reduce-scatter"]
    weights = [leaf for path, leaf in found.items() if "norm" not in path and "embed/tokens" not in path]
    assert {c.size for c in scattered} == {2} and all("fsdp" in c.axes for c in scattered)
    # Each weight whole along the first ring, a half of it along the second; each once.
    assert sum(c.payload_bytes for c in scattered) == 1.5 * sum(leaf.nbytes for leaf in weights)
    # The token table and its gradient stay where they are: rows read are exchanged, forward and backward.
    tokens = problem()[1]["tokens"]
    exchanged = [c.payload_bytes for c in spent.collectives if c.kind == "all-to-all"]
    assert sum(exchanged) == 2 * tokens.size / 8 * MODEL["embed_dim"] * 8
    summed = [c.payload_bytes for c in spent.collectives if c.kind == "all-reduce" and "fsdp" in c.axes]
    assert sum(summed) < 0.1 * sum(leaf.nbytes for leaf in weights)  # norms and the loss


def test_a_table_is_gathered_where_it_is_smaller_than_what_would_be_read(x64):
    llama = (128256, 4096)
    assert rings.exchanged(256 * 8192, llama, 256) and not rings.exchanged(4096 * 8192, llama, 4096)
    found, compiled = gradients(ringed())
    assert worst(reference(), found) < 1e-12
    assert "all-to-all" not in {c.kind for c in costs(read(compiled.as_text()), dict(SIZES)).collectives}


def test_control_rings_in_the_wrong_order_are_seen(x64, monkeypatch):
    order = rings._groups
    monkeypatch.setattr(rings, "_groups", lambda sizes: order(sizes)[::-1])
    assert worst(reference(), gradients(ringed())[0]) > 1e-3


def test_what_is_not_cut_over_fsdp_alone_is_left_to_the_compiler():
    mesh = meshes.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    x, w = jnp.ones((8, 4, 16)), jnp.ones((16, 32))
    assert rings._placed(Layout(mesh, rings=(2, 2)), x, w, ("embed", "mlp")) is None
    with pytest.raises(InputError, match="mesh.tensor 2 use mesh.weights_by=compiler"):
        legal.check(Layout(mesh, rings=(2, 2)), legal.Facts("decoder"))
    legal.check(ringed(), legal.Facts("decoder"))
    fsdp = Layout(Mesh(mesh.devices.reshape(1, 1, 8, 1, 1, 1), mesh.axis_names, axis_types=(AxisType.Auto,) * 6))
    assert rings._placed(fsdp, x, w, ("embed", "mlp")) is None, "no rings asked for"
