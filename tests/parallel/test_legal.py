"""Layouts that a model cannot take are refused with the reason and what would do."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from bigmodel_jax.errors import InputError
from bigmodel_jax.parallel import legal, rules
from bigmodel_jax.parallel.mesh import make_mesh

DECODER = legal.Facts("decoder", stacks=(6,), lengths=(32,), heads=4, rows=16)
NETWORK = legal.Facts("resnet", rows=16)
EXPERTS = dataclasses.replace(DECODER, experts=6)


def layout(sizes, **options):
    slices = options.pop("slices", 1)
    return rules.Layout(make_mesh({"data": 1} | sizes, jax.devices()[:8], slices), **options)


LEGAL = [
    (DECODER, {"data": -1}, {}),
    (DECODER, {"data": -1, "stage": 2}, {"repeats": 3, "microbatches": 4}),
    (DECODER, {"data": -1, "context": 4}, {}),
    (DECODER, {"data": -1, "context": 4}, {"context": "ulysses"}),
    (EXPERTS, {"data": -1, "expert": 2}, {}),
    (NETWORK, {"data": 2, "fsdp": 4}, {"zero": 1, "offload": "optimizer"}),
]
REFUSED = [
    (NETWORK, {"data": -1, "stage": 2}, {}, "this resnet has none; use mesh.fsdp"),
    (DECODER, {"data": -1, "stage": 4}, {}, r"does not divide 6 layers; legal mesh.stage: \[1, 2, 3, 6\]"),
    (DECODER, {"data": -1, "stage": 2}, {"repeats": 2}, r"legal mesh.stage: \[1, 3\]"),
    (DECODER, {"data": -1, "stage": 2}, {"microbatches": 8}, r"evenly; legal: \[2, 4\]"),
    (DECODER, {"data": -1, "stage": 2}, {"microbatches": 3}, r"a multiple of mesh.stage 2 and .* legal: \[2, 4\]"),
    (dataclasses.replace(EXPERTS, group=2), {"data": 4, "stage": 2}, {"microbatches": 4}, r"of 2, .* legal: \[2\]"),
    (dataclasses.replace(EXPERTS, group=0), {"data": 4, "stage": 2}, {}, "set model.expert_group to 1"),
    (dataclasses.replace(DECODER, shared=True), {"data": 4, "stage": 2}, {}, "has one for all layers"),
    (DECODER, {"data": 8}, {"repeats": 2}, "need mesh.stage above 1"),
    (NETWORK, {"data": -1, "context": 2}, {}, "this resnet has none"),
    (dataclasses.replace(DECODER, lengths=(36,)), {"data": -1, "context": 4}, {}, r"the nearest \[32, 40\]"),
    (DECODER, {"data": 1, "context": 4, "tensor": 2}, {"context": "ulysses"}, r"legal mesh.context: \[1, 2\]"),
    (DECODER, {"data": -1, "expert": 2}, {}, "use mesh.fsdp instead"),
    (EXPERTS, {"data": -1, "expert": 4}, {}, r"legal: \[1, 2, 3, 6\]"),
    (dataclasses.replace(EXPERTS, buffers=4), {"data": -1, "expert": 2}, {}, "4 groups of rows do not divide over 8"),
    (dataclasses.replace(EXPERTS, buffers=8), {"data": -1, "context": 2}, {}, "set model.capacity_factor=0"),
    (DECODER, {"data": 8}, {"room": -1.0}, "multiple of an even share"),
    (DECODER, {"data": 8}, {"context": "rings"}, "did you mean 'ring'"),
    (DECODER, {"data": 8}, {"zero": 2}, r"mesh.zero = 2 should be one of \(3, 1\)"),
]


@pytest.mark.parametrize("facts, sizes, options", LEGAL, ids=str)
def test_legal(facts, sizes, options):
    try:
        refused = legal.check(layout(sizes, **options), facts)
    except InputError as error:
        refused = error
    assert refused is None


@pytest.mark.parametrize("facts, sizes, options, says", REFUSED, ids=str)
def test_refused_with_what_would_be_legal(facts, sizes, options, says):
    with pytest.raises(InputError, match=says) as refusal:
        legal.check(layout(sizes, **options), facts)
    assert "\n" not in str(refusal.value)


def test_only_the_data_axis_crosses_slices():
    mesh = make_mesh({"data": 4, "fsdp": 2}, jax.devices()[:8], slices=2)
    ids = [[device.id for device in row] for row in mesh.devices.reshape(4, 2)]
    assert ids == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(InputError, match="only the data axis crosses"):
        make_mesh({"data": 1, "fsdp": 8}, jax.devices()[:8], slices=2)
    with pytest.raises(InputError, match=r"does not divide 8 devices: \[1, 2, 4, 8\]"):
        make_mesh({"data": 8}, jax.devices()[:8], slices=3)


def test_the_slices_of_the_hardware_are_kept_together():
    """Devices listed alternately by slice come out with one slice to each half of the data axis."""

    class Device:
        platform, device_kind, process_index = "cpu", "cpu", 0

        def __init__(self, number):
            self.id, self.slice_index = number, number % 2

    devices = [Device(number) for number in range(8)]
    mesh = make_mesh({"data": 2, "fsdp": 4}, devices, slices=2)
    assert [[device.id for device in row] for row in mesh.devices.reshape(2, 4)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(InputError, match="form 2 slices; set mesh.slices=2"):
        make_mesh({"data": 8}, devices)


def test_zero_1_cuts_the_optimizer_state_alone():
    whole = layout({"data": 2, "fsdp": 2, "tensor": 2}, zero=1)
    axes, shape = ("embed", "mlp"), (64, 64)
    assert rules.spec(axes, shape, whole.mesh, whole.weights) == P(None, "tensor")
    assert rules.spec(axes, shape, whole.mesh, whole.rules) == P("fsdp", "tensor")
    assert rules.spec(("batch", "mlp"), shape, whole.mesh, whole.weights) == P(("data", "fsdp"), "tensor")
