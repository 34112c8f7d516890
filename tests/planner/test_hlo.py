"""Compiled programs of three compilers, read: the same training step costs what its closed form says.

programs/*.txt are written by programs/generate.py: three scanned layers, x + tanh(x up) down with up [256, 512],
512 rows, gradient and update, on a mesh fsdp 2 x tensor 2.
"""

from pathlib import Path

import numpy as np
import pytest

from bigmodel_jax.errors import RunError
from bigmodel_jax.planner import collectives, hlo, loops
from bigmodel_jax.planner.arithmetic import work
from bigmodel_jax.planner.costs import costs

MESH = {"fsdp": 2, "tensor": 2}
LAYERS, ROWS, WIDTH, HIDDEN = 3, 512, 256, 512
TEXTS = {name: (Path(__file__).parent / "programs" / f"{name}.txt").read_text() for name in ("cpu", "gpu", "tpu")}
# Bytes of an element on the wire: XLA's CPU compiler widens what bfloat16 products need.
WIDE = {"cpu": 4, "gpu": 2, "tpu": 2}


def program(*lines: str) -> hlo.Module:
    return hlo.read("\n".join(["HloModule m, num_partitions=8", "", "ENTRY %main () -> f32[] {", *lines, "}"]))


@pytest.mark.parametrize("name", TEXTS)
def test_flops_are_the_closed_form_on_every_compiler(name):
    found = costs(hlo.read(TEXTS[name]), MESH)
    devices = 4
    assert found.flops == 3 * LAYERS * 2 * (2 * ROWS * WIDTH * HIDDEN) / devices
    assert not found.notes and not found.unknown


@pytest.mark.parametrize("name", TEXTS)
def test_every_byte_on_a_network_is_found_once(name):
    found = costs(hlo.read(TEXTS[name]), MESH)
    traffic = found.traffic()
    weights = 2 * LAYERS * WIDTH * HIDDEN * WIDE[name] / 2  # both matrices, a tensor shard
    gathered, wire = traffic["all-gather", ("fsdp",)]
    assert gathered == 2 * weights and wire == gathered / 2  # forward and backward; half is there already
    rows = LAYERS * ROWS * WIDTH * WIDE[name] / 2
    summed, wire = traffic["all-reduce", ("tensor",)]
    assert summed == 2 * rows and wire == summed  # 2 (n - 1) / n = 1 of two devices
    gradients = [payload for (kind, axes), (payload, _) in traffic.items() if kind != "all-gather" and "fsdp" in axes]
    assert sum(gradients) == weights + 4  # and the loss
    assert {axes for _, axes in traffic} == {("fsdp",), ("tensor",)}


def test_a_transfer_in_pieces_counts_once_and_a_fused_scatter_as_one():
    module = hlo.read(TEXTS["tpu"])
    pieces = [i for i in module if i.opcode == "all-gather"]
    channels = {i.attribute("channel_id") for i in pieces}
    found = [c for c in costs(module, MESH).collectives if c.kind == "all-gather"]
    assert len(pieces) > len(channels) == len(found)
    scattered = [c for c in costs(module, MESH).collectives if c.kind == "reduce-scatter"]
    assert scattered and all(c.wire_bytes == c.payload_bytes / 2 for c in scattered)
    assert not [i for i in module if i.opcode == "reduce-scatter"]  # written as an all-reduce and a slice


@pytest.mark.parametrize("name", TEXTS)
def test_loops_turn_as_often_as_there_are_layers(name):
    module = hlo.read(TEXTS[name])
    turns = [
        loops.trip_count(module, where, i)
        for where in module.computations.values() for i in where.instructions.values() if i.opcode == "while"
    ]  # fmt: skip
    assert turns == [LAYERS, LAYERS]
    # Without the compiler's own count, from counter, step and bound; a bound nobody knows is no count.
    bare = hlo.read(TEXTS[name].replace("known_trip_count", "unknown"))
    assert costs(bare, MESH).flops == costs(module, MESH).flops
    hidden = hlo.read(TEXTS[name].replace("known_trip_count", "unknown").replace("direction=LT", "direction=EQ"))
    assert len(costs(hidden, MESH).notes) == 2 and costs(hidden, MESH).flops < costs(module, MESH).flops


def test_an_unknown_line_is_an_error_that_names_it():
    lines = TEXTS["cpu"].splitlines()
    at = next(n for n, line in enumerate(lines) if " dot(" in line)
    for broken in (lines[at].replace(" dot(", " ("), lines[at].replace("f32[", "q77[", 1).replace("bf16[", "q77[", 1)):
        with pytest.raises(RunError, match=f"line {at + 1} "):
            hlo.read("\n".join([*lines[:at], broken, *lines[at + 1 :]]))
    with pytest.raises(RunError, match="operand nothing is not defined"):
        program("  ROOT %a = f32[] negate(%nothing)")
    with pytest.raises(RunError, match="does not begin"):
        hlo.read("module @jit_f {}")


def test_shapes():
    array = hlo.shape("bf16[8,128,64]{2,1,0:T(8,128)(2,1)S(1)}")
    assert (array.dims, array.space, array.bytes) == ((8, 128, 64), 1, 8 * 128 * 64 * 2)
    assert hlo.shape("f8e4m3fn[3,5]{1,0}").bytes == 15 and hlo.shape("s4[3]{0:E(4)}").bytes == 2
    nested = (hlo.Array("s32", ()), (hlo.Array("f32", (4,)), hlo.Array("token", ())))
    assert hlo.shape("(s32[], (f32[<=4], token[]))") == nested


GROUPS = {
    "{{0,1},{2,3},{4,5},{6,7}}": (("c",), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    "[4,2]<=[8]": (("c",), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    "[4,2]<=[4,2]T(1,0)": (("b",), [[0, 2], [4, 6], [1, 3], [5, 7]]),
    "[2,4]<=[2,2,2]T(1,0,2)": (("a", "c"), [[0, 1, 4, 5], [2, 3, 6, 7]]),
    "{}": (("a", "b", "c"), [list(range(8))]),
    "mesh['a'=2,'b'=2,'c'=2] {'b'}": (("b",), [[0, 2], [1, 3], [4, 6], [5, 7]]),
    "mesh['a'=2,'b'=2,'c'=2] {'c','a'}": (("a", "c"), [[0, 4, 1, 5], [2, 6, 3, 7]]),
    "mesh['x'=8] {'x':(2)2}": (("b",), [[0, 2], [1, 3], [4, 6], [5, 7]]),
    "mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}": (("a",), [[0, 4], [1, 5], [2, 6], [3, 7]]),
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_of_devices_cross_mesh_axes(text):
    axes, expected = GROUPS[text]
    line = f"  ROOT %r = f32[8] all-reduce(%p), channel_id=1, replica_groups={text}, use_global_device_ids=true"
    module = program("  %p = f32[8]{0} parameter(0)", line)
    groups = collectives.device_groups(module, module.computations["main"].root)
    assert np.array_equal(groups, expected)
    (found,) = costs(module, {"a": 2, "b": 2, "c": 2}).collectives
    assert set(found.axes) == set(axes) and found.payload_bytes == 32


def test_permutes_and_all_to_alls():
    pairs = "{{0,1},{1,0},{2,3},{3,2}}"
    module = program(
        "  %p = bf16[4,16]{1,0} parameter(0)",
        f"  %s = (bf16[4,16], bf16[4,16]) collective-permute-start(%p), channel_id=1, source_target_pairs={pairs}",
        "  %d = bf16[4,16] collective-permute-done(%s)",
        "  ROOT %a = bf16[4,16] all-to-all(%d), channel_id=2, replica_groups=[2,4]<=[2,4], dimensions={0}",
    )
    permute, exchange = costs(module, {"a": 2, "b": 2, "c": 2}).collectives
    assert (permute.kind, permute.axes, permute.wire_bytes) == ("collective-permute", ("c",), 128)
    assert (exchange.axes, exchange.payload_bytes, exchange.wire_bytes) == (("b", "c"), 128, 96)
    with pytest.raises(RunError, match="device 7 in a mesh of 4"):
        costs(module, {"a": 2, "c": 2})


def test_a_gather_written_as_a_sum_of_zero_padded_shards_is_named():
    def module(zero):
        return program(
            "  %p = f32[4]{0} parameter(0)", "  %i = s32[] parameter(1)", f"  %z = f32[] constant({zero})",
            "  %b = f32[32]{0} broadcast(%z), dimensions={}", "  %u = f32[32]{0} dynamic-update-slice(%b, %p, %i)",
            "  ROOT %r = f32[32]{0} all-reduce(%u), channel_id=1, replica_groups={}, use_global_device_ids=true",
        )  # fmt: skip

    assert "padded with zeros" in costs(module("0"), {"a": 8}).notes[0]
    assert costs(module("1"), {"a": 8}).notes == ()


def test_products_that_are_library_calls_and_convolutions_that_are_products():
    gemm = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    module = program(
        "  %a = f32[32,64] parameter(0)", "  %b = f32[64,16] parameter(1)",
        f'  %g = (f32[32,16], s8[64]) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={gemm}',
        "  %x = f32[8,4,4,3] parameter(2)", "  %k = f32[3,3,3,7] parameter(3)",
        "  %c = f32[8,4,4,7] convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
        # A batch of 8 products [64, 16] x [16, 5] as TPU writes it: strides and holes select one tap of eight.
        "  %q = f32[8,64,16] parameter(4)", "  %v = f32[8,16,5] parameter(5)",
        "  %t = f32[8,64,5] convolution(%q, %v), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
        '  ROOT %u = f32[4] custom-call(%v), custom_call_target="SomeKernel"',
    )  # fmt: skip
    main = module.computations["main"]
    flops = {name: work(main, main.instructions[name]).flops for name in "gct"}
    assert flops["g"] == 2 * 32 * 64 * 16
    assert flops["c"] == 2 * 8 * 3 * 7 * (4 * 3 - 2) ** 2  # taps on the padding hold nothing
    assert flops["t"] == 2 * 8 * 64 * 16 * 5
    assert costs(module, {}).unknown == {"SomeKernel": 1}


def test_memory_traffic_counts_slices_updates_and_what_is_on_the_chip():
    module = program(
        "  %w = f32[100,1000]{1,0} parameter(0)", "  %i = s32[] parameter(1)", "  %z = s32[] constant(0)",
        "  %s = f32[1,1000]{1,0} dynamic-slice(%w, %i, %z), dynamic_slice_sizes={1,1000}",
        "  %n = f32[1,1000]{1,0:S(1)} negate(%s)",
        "  ROOT %u = f32[100,1000]{1,0} dynamic-update-slice(%w, %n, %i, %z)",
    )  # fmt: skip
    ops = {op.name: op.bytes for op in costs(module, {}).ops}
    assert ops == {"s": 8000 + 8, "n": 4000, "u": 4000 + 8}  # two indices of four bytes; n is written on the chip


def test_of_a_conditional_the_dearest_branch_counts():
    text = """HloModule m

%small (p: f32[8,8]) -> f32[8,8] {
  ROOT %p = f32[8,8] parameter(0)
}

%large (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8] parameter(0)
  ROOT %d = f32[8,8] dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (c: s32[], x: f32[8,8]) -> f32[8,8] {
  %c = s32[] parameter(0)
  %x = f32[8,8] parameter(1)
  ROOT %r = f32[8,8] conditional(%c, %x, %x), branch_computations={%small, %large}
}
"""
    found = costs(hlo.read(text), {})
    assert found.flops == 1024 and "2 branches" in found.notes[0]


def test_a_grouped_product_is_of_its_weights_type_not_of_its_group_sizes():
    """The kernel of jax's grouped matmul takes its group sizes first; its FLOPs are those that its author states."""
    stated = '{"custom_call_config": {"cost_estimate": {"flops": "1.5e9"}}}'
    call = (
        "ROOT %gmm = f32[256,64]{1,0} custom-call(%sizes, %rows, %weights), "
        'custom_call_target="tpu_custom_call", backend_config=BACKEND'
    )
    lines = (
        "%sizes = s32[8]{0} parameter(0)", "%rows = bf16[256,128]{1,0} parameter(1)",
        "%weights = bf16[8,128,64]{2,1,0} parameter(2)",
    )  # fmt: skip
    module = program(*lines, call.replace("BACKEND", stated))
    entry = module.computations[module.entry]
    found = work(entry, entry.instructions["gmm"])
    assert found.flops == 1.5e9 and found.dtype == "bf16" and "author" in found.note
    silent = program(*lines, call.replace("BACKEND", "{}")).computations[module.entry]
    assert work(silent, silent.instructions["gmm"]).unknown  # nothing is made up where nothing is stated
