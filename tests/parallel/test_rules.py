"""Meshes and the layout table."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigmodel_jax.errors import InputError
from bigmodel_jax.models.spec import Spec
from bigmodel_jax.models.transformer import Embed
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel import rules


@pytest.mark.parametrize(
    "sizes, devices, shape",
    [
        (None, 8, (8, 1, 1)),
        ({"data": 1}, 1, (1, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 2)),
        ({"tensor": 3, "data": -1}, 6, (2, 1, 3)),
        ({"fsdp": 5}, 5, (1, 5, 1)),
    ],
)
def test_mesh_of_any_size(sizes, devices, shape):
    mesh = meshes.make_mesh(sizes, jax.devices()[:devices])
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == shape
    assert mesh.size == devices
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    "sizes, says",
    [
        ({"data": 3}, "would fit: data=8"),
        ({"data": 3, "fsdp": -1}, r"would fit: data in \[1, 2, 4, 8\]"),
        ({"data": 2, "fsdp": 2}, "data=4 or fsdp=4 or tensor=2"),
        ({"data": -1, "fsdp": -1}, "one axis at most may be -1"),
        ({"data": 0}, "sizes are positive"),
        ({"fsd": 8}, "did you mean 'fsdp'"),
    ],
)
def test_mesh_that_does_not_fit_says_what_would(sizes, says):
    with pytest.raises(InputError, match=says):
        meshes.make_mesh(sizes, jax.devices()[:8])


def test_batch_sizes():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert meshes.check_batch(16, 0, mesh) == 1
    assert meshes.check_batch(16, 4, mesh) == 4
    with pytest.raises(InputError, match=r"multiples of 4, the nearest \[12, 16\]"):
        meshes.check_batch(14, 0, mesh)
    with pytest.raises(InputError, match=r"legal sizes: \[4, 8, 16\]"):
        meshes.check_batch(16, 2, mesh)
    with pytest.raises(InputError, match=r"legal sizes: \[4, 8, 16\]"):
        meshes.check_batch(16, 12, mesh)


SPECS = [
    (("vocab", "embed"), (512, 64), P("tensor", "fsdp")),
    (("vocab", "embed"), (511, 64), P(None, "fsdp")),
    (("layers", "embed", "heads", "head_dim"), (4, 64, 8, 16), P(None, "fsdp", "tensor")),
    (("embed", "mlp"), (63, 64), P(None, ("tensor", "fsdp"))),
    (("embed", "mlp"), (63, 6), P(None, "tensor")),
    (("spatial", "spatial", "conv_in", "conv_out"), (3, 3, 3, 64), P(None, None, None, "fsdp")),
    (("spatial", "spatial", "conv_in", "conv_out"), (3, 3, 64, 64), P(None, None, "fsdp")),
    (("norm",), (64,), P()),
    ((None, "embed"), (8, 64), P(None, "fsdp")),
    (("batch", "length", "mlp"), (16, 8, 64), P(("data", "fsdp"), None, "tensor")),
    (("batch", "length", "mlp"), (2, 8, 64), P("data", None, "tensor")),
    (("batch", "length", "mlp"), (3, 8, 64), P(None, None, "tensor")),
]


@pytest.mark.parametrize("axes, shape, expected", SPECS, ids=str)
def test_layout_table(axes, shape, expected):
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    got = rules.spec(axes, shape, mesh)
    assert got == expected
    jax.device_put(jnp.zeros(shape), jax.sharding.NamedSharding(mesh, got))
    one = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    assert rules.spec(axes, shape, one) == P()


def test_unknown_names_are_errors():
    mesh = meshes.make_mesh({"fsdp": 8})
    with pytest.raises(InputError, match="did you mean 'embed'"):
        rules.spec(("embd",), (8,), mesh)
    with pytest.raises(ValueError, match="2 axis names"):
        rules.spec(("embed", "mlp"), (8,), mesh)
    with rules.use(rules.Layout(mesh)), pytest.raises(InputError, match="did you mean 'batch'"):
        rules.constrain(jnp.ones((8,)), ("bach",))


def test_what_stays_whole_is_reported():
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    axes = {"odd": ("vocab", "embed"), "even": ("vocab", "embed"), "scale": ("norm",)}
    sizes = {"odd": (511, 64), "even": (512, 64), "scale": (64,)}
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in sizes.items()}
    rows = rules.report(axes, shapes, mesh)
    assert [(r.path, r.bytes_per_device, r.missing) for r in rows] == [
        ("odd", 511 * 64 * 4 // 4, ("tensor",)),
        ("scale", 64 * 4, ("fsdp", "tensor")),
    ]
    assert "whole over tensor" in str(rows[0])
    assert not rules.report(axes, shapes, meshes.make_mesh({"data": 8}))


def test_constrain_follows_the_active_mesh_and_not_a_cached_trace():
    traces = []

    @jax.jit
    def double(x):
        traces.append(1)
        return rules.constrain(2 * x, ("batch", "mlp"))

    x = jnp.ones((8, 8))
    assert rules.constrain(x, ("batch", "mlp")) is x
    for sizes, spec in (({"fsdp": 8}, P("fsdp")), ({"data": 4, "tensor": 2}, P("data", "tensor"))):
        mesh = meshes.make_mesh(sizes)
        with rules.use(rules.Layout(mesh)):
            assert rules.active().mesh is mesh
            wanted = jax.sharding.NamedSharding(mesh, spec)
            assert double(x).sharding.is_equivalent_to(wanted, 2)
            double(x)
    assert len(double(x).sharding.device_set) == 1 and rules.active() is None
    assert len(traces) == 3


def test_a_sharded_table_is_read_where_it_is():
    """No device holds the whole table of 64 rows, and what is read is not sent around, also not backwards."""
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spec = Spec(vocab_size=64, embed_dim=16, num_heads=2, positions="none")

    def placed(axes, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, rules.spec(axes, shape, mesh)))

    table, rows = placed(("vocab", "embed"), (64, 16), "float32"), placed(("batch", "length"), (8, 12), "int32")

    def embedded(table, tokens):
        return Embed(spec).apply({"params": {"tokens": table}}, tokens, None, True, None)[0]

    def plain(table, tokens):
        return jnp.take(table, tokens, axis=0)

    def moved(read):
        def loss(table, tokens):
            return jnp.sum(jnp.sin(rules.constrain(read(table, tokens), ("batch", "length", "embed_act"))))

        with rules.use(rules.Layout(mesh)):
            text = jax.jit(jax.grad(loss)).lower(table, rows).compile().as_text()
        assert "f32[2,12,16]" in text
        return set(re.findall(r"f32\[64,\d+\]|collective-permute|all-to-all", text))

    assert not moved(embedded)
    assert {"f32[64,8]", "collective-permute"} <= moved(plain)
