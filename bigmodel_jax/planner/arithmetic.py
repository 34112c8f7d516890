"""FLOPs of single instructions, from their shapes: two per multiply-accumulate.

Dots and convolutions count; so do the library calls and kernels that stand for them on GPUs and
TPUs. Convolutions follow the window positions that hold data: TPU writes every dot as a
convolution with padding, strides and holes that select, and most positions of it are empty.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass

import numpy as np

from bigmodel_jax.planner.hlo import Array, Computation, Instruction

# Element-wise operations that cost more than one simple instruction of a vector unit.
TRANSCENDENTAL = frozenset({
    "exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh", "tan", "sine", "cosine",
    "power", "erf", "atan2", "cbrt",
})  # fmt: skip
ELEMENTWISE = frozenset({
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "compare", "select", "clamp", "negate", "abs",
    "sign", "floor", "ceil", "round-nearest-even", "round-nearest-afz", "and", "or", "xor", "not", "remainder",
    "convert", "is-finite", "sqrt", "rsqrt", "shift-left", "shift-right-logical", "shift-right-arithmetic",
    "reduce-precision", "map", "rng-bit-generator", "rng", "popcnt", "clz", "stochastic-convert",
})  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Arithmetic of one execution.

    flops: of matrix products and convolutions. dtype: of their operands. simple, transcendental: element operations
    outside of them. unknown: a kernel whose inside the text does not show, or "". note: what was assumed, or "".
    """

    flops: float = 0.0
    dtype: str = ""
    simple: float = 0.0
    transcendental: float = 0.0
    unknown: str = ""
    note: str = ""


def work(where: Computation, instruction: Instruction) -> Work:
    """Arithmetic of an instruction, without the computations it calls."""
    opcode = instruction.opcode
    operands = [where.instructions[name].arrays for name in instruction.operands]
    if opcode == "dot":
        dims = instruction.numbers("lhs_contracting_dims")
        return Work(_dot(instruction.arrays[0], operands[0][0], dims), _dtype(operands))
    if opcode == "convolution":
        return Work(convolution(instruction, operands[0][0], operands[1][0], instruction.arrays[0]), _dtype(operands))
    if opcode == "ragged-dot":
        rows, weights = operands[0][0], operands[1][0]
        return Work(2.0 * rows.size * weights.dims[-1], _dtype(operands))
    if opcode == "custom-call":
        return _custom(instruction, operands)
    size = float(sum(a.size for a in instruction.arrays))
    if opcode in TRANSCENDENTAL:
        return Work(transcendental=size)
    if opcode in ELEMENTWISE:
        return Work(simple=size)
    if opcode in ("reduce", "reduce-window", "select-and-scatter"):
        window = re.search(r"size=([\dx]+)", instruction.rest) if opcode == "reduce-window" else None
        each = math.prod(int(n) for n in window.group(1).split("x")) if window else 1
        return Work(simple=each * float(operands[0][0].size if window is None else size))
    return Work()


def _dtype(operands: list[tuple[Array, ...]]) -> str:
    """The wider element type of both operands: it decides the rate."""
    return max((o[0] for o in operands[:2]), key=lambda a: a.bytes / max(a.size, 1)).dtype


def _dot(out: Array, left: Array, contracting: tuple[int, ...]) -> float:
    return 2.0 * out.size * math.prod(left.dims[d] for d in contracting)


def convolution(instruction: Instruction, left: Array, right: Array, out: Array) -> float:
    """FLOPs of a convolution: window positions with data x input features of a group x output features x batch."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    left_dims, right_dims, out_dims = labels.groups()
    window = dict(re.findall(r"(\w+)=([-\dx_]+)", instruction.attribute("window")))
    rank = len(left_dims) - 2

    def numbers(key: str, default: int) -> list[int]:
        return [int(n) for n in window[key].split("x")] if key in window else [default] * rank

    pads = [int(part.split("_")[0]) for part in window["pad"].split("x")] if "pad" in window else [0] * rank
    taps = 1.0
    for d in range(rank):
        taps *= _positions(
            left.dims[left_dims.index(str(d))], right.dims[right_dims.index(str(d))], out.dims[out_dims.index(str(d))],
            numbers("stride", 1)[d], pads[d], numbers("lhs_dilate", 1)[d], numbers("rhs_dilate", 1)[d],
        )  # fmt: skip
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    features = right.dims[right_dims.index("i")]  # of one feature group
    batch = left.dims[left_dims.index("b")] // batch_groups
    return 2.0 * taps * features * out.dims[out_dims.index("f")] * batch


@functools.lru_cache(maxsize=4096)
def _positions(n: int, kernel: int, out: int, stride: int, pad: int, holes: int, spread: int) -> int:
    """Pairs (output, tap) that meet an element of an input of n, with `holes` between its elements."""
    total = 0
    outputs = np.arange(out, dtype=np.int64) * stride - pad
    for taps in np.array_split(np.arange(kernel, dtype=np.int64) * spread, max(1, kernel * out // 2_000_000)):
        at = outputs[:, None] + taps[None, :]
        total += int(np.count_nonzero((at >= 0) & (at < n * holes) & (at % holes == 0)))
    return total


# Custom calls that move nothing: placements, markers, halves of a pair.
FREE_CALLS = frozenset({
    "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "AllocateBuffer", "ConcatBitcast",
    "AsyncCollectiveStart", "AsyncCollectiveDone", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked",
    "annotate_device_placement", "MoveToHost", "MoveToDevice", "LayoutConstraint", "X64Combine", "X64SplitLow",
    "X64SplitHigh",
})  # fmt: skip
# Matrix products inside one attention kernel, forward and backward (scores, values; and their gradients).
_ATTENTION = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}


def target(instruction: Instruction) -> str:
    return instruction.attribute("custom_call_target").strip('"')


def _custom(instruction: Instruction, operands: list[tuple[Array, ...]]) -> Work:
    """Library products (cuBLAS, cuDNN, oneDNN) and attention kernels; anything else is unknown work."""
    name = target(instruction)
    if name in FREE_CALLS:
        return Work()
    if name.startswith(("__cublas$", "__cublas$lt$")) or "matmul" in name.lower():
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
        left, out = operands[0][0], instruction.arrays[0]
        dims = [int(n) for n in re.findall(r"\d+", found.group(1))] if found else [len(left.dims) - 1]
        return Work(_dot(out, left, tuple(dims)), _dtype(operands))
    if "conv" in name.lower() and "dim_labels=" in instruction.rest:
        first, second, out = operands[0][0], operands[1][0], instruction.arrays[0]
        # Labels and window are always those of the forward convolution.
        shapes = {"Input": (out, second, first), "Filter": (first, out, second)}
        kind = next((k for k in shapes if f"Backward{k}" in name), "")
        return Work(convolution(instruction, *shapes.get(kind, (first, second, out))), _dtype(operands))
    if name.startswith("__cudnn$fmha"):
        backward = "Backward" in name
        q, k = operands[0][0], operands[1][0]
        flops = (5 if backward else 2) * 2.0 * q.size * k.dims[-3 if len(k.dims) == 4 else -2]
        return Work(flops, q.dtype, note=f"{name}: counted without its mask")
    if name == "tpu_custom_call":
        return _pallas(instruction, operands)
    return Work(unknown=name)


def _pallas(instruction: Instruction, operands: list[tuple[Array, ...]]) -> Work:
    """A kernel written in Pallas: attention is known by name, and the compiler's estimate where it is given."""
    named = re.search(r"(splash|flash)\w*", f"{instruction.name} {instruction.source} {instruction.rest[:2000]}")
    if named:
        heads = [a for found in operands for a in found if len(a.dims) >= 3 and a.dtype in ("bf16", "f32", "f16")]
        if len(heads) >= 2:
            q, k = heads[:2]
            text = instruction.source + instruction.name
            kind = "dq" if "dq" in text else "fused" if "fused" in text else "dkv" if "dkv" in text else "fwd"
            flops = _ATTENTION[kind] * 2.0 * q.size * k.dims[-2]
            return Work(flops, q.dtype, note=f"{named.group()} ({kind}): counted without its mask")
    estimate = _estimate(instruction)
    if estimate:
        widest = max((a for found in operands for a in found), key=lambda a: a.bytes)  # group sizes may come first
        return Work(estimate, widest.dtype, note=f"{instruction.name}: FLOPs as its author states")
    return Work(unknown=f"tpu_custom_call {instruction.source.rsplit('/', 1)[-1] or instruction.name}")


def _estimate(instruction: Instruction) -> float:
    text = instruction.attribute("backend_config")
    try:
        config = json.loads(text) if text.startswith("{") else {}
    except json.JSONDecodeError:
        return 0.0
    stated = config.get("custom_call_config", {}).get("cost_estimate", {})
    return float(stated.get("flops", 0) or 0)
