"""What crosses a network: kind, bytes, and the mesh axes it crosses.

Payload is the whole array that one device ends up with or starts from: the result of an
all-gather, the operand of everything else. Bytes on the wire are what one device sends in a ring
(Thakur et al. 2005, doi:10.1177/1094342005051521, section 4): (n-1)/n of the payload for gather,
scatter and all-to-all among n devices, twice that for an all-reduce, all of it for a permute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bigmodel_jax.errors import RunError
from bigmodel_jax.planner.hlo import Computation, Instruction, Module

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_IOTA = r"\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?"
_MESH = r"mesh\[[^\]]*\](?:, device_ids=\((?:\[[\d,]*\](?:T\([\d,]*\))?|[\d, ]*)\))? \{[^}]*\}"
_GROUPS = re.compile(rf"(?:^|[ ,])replica_groups=({_MESH}|{_IOTA}|\{{)")
# What hands on an array to those that slice it.
PASS_ON = ("bitcast", "copy", "reshape", "convert", "get-tuple-element", "tuple", "transpose")


@dataclass(frozen=True)
class Collective:
    """One instruction's traffic per device in a whole step (loops multiplied in).

    axes: mesh axes it crosses, outermost first. size: devices of a group. name: of the instruction.
    source: where it is from in the traced program.
    """

    kind: str
    payload_bytes: float
    wire_bytes: float
    axes: tuple[str, ...]
    size: int
    count: float
    name: str
    source: str


def kind_of(instruction: Instruction) -> str:
    """Which of `KINDS` an instruction starts, or ""; the -done half of a pair starts nothing."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else ""


def wire(kind: str, payload: float, size: int) -> float:
    """Bytes one device sends for a collective among `size` devices."""
    if kind == "collective-permute":
        return payload
    share = (size - 1) / size
    return payload * {"all-reduce": 2 * share, "collective-broadcast": min(1, size - 1)}.get(kind, share)


def read(
    module: Module, where: Computation, instruction: Instruction, mesh: Mapping[str, int], fused: bool, times: float
) -> Collective | None:
    """The traffic of a collective, or None where its groups have one member.

    Args:
      mesh: {axis: size}, outermost first: the order in which the program numbers its devices.
      fused: it stands inside a fused computation, where TPU writes a reduce-scatter as an all-reduce of which each
        device keeps its slice.
    """
    kind = kind_of(instruction)
    groups = device_groups(module, instruction)
    crossed = axes_crossed(groups, mesh, instruction)
    size = groups.shape[1]
    if not crossed or size == 1:
        return None
    operands = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
    payload = sum(a.bytes for name in operands for a in where.instructions[name].arrays)
    payload *= size if kind == "all-gather" else 1
    if kind == "all-reduce" and fused and _only_sliced(where, instruction):
        kind = "reduce-scatter"
    return Collective(
        kind=kind, payload_bytes=payload * times, wire_bytes=wire(kind, payload, size) * times, axes=crossed,
        size=size, count=times, name=instruction.name, source=instruction.source,
    )  # fmt: skip


def _only_sliced(where: Computation, instruction: Instruction) -> bool:
    users = where.users[instruction.name]
    if not users:
        return False
    return all(u.opcode == "dynamic-slice" or (u.opcode in PASS_ON and _only_sliced(where, u)) for u in users)


def is_padded_gather(module: Module, where: Computation, instruction: Instruction) -> bool:
    """Whether an all-reduce stands for a gather: every device adds its piece to zeros. TPU writes small shards so."""
    found = where.instructions[instruction.operands[0]] if instruction.operands else instruction
    outer, given = where, ()
    while found.opcode in (*PASS_ON, "fusion") and found.operands:
        if found.opcode == "fusion":
            outer, given, where = where, found.operands, module.computations[found.calls()[0]]
            found = where.root
        else:
            found = where.instructions[found.operands[0]]
    if found.opcode != "dynamic-update-slice":
        return False
    base = where.instructions[found.operands[0]]
    if base.opcode == "parameter" and given:
        where, base = outer, outer.instructions[given[int(base.literal)]]
    value = where.instructions[base.operands[0]] if base.opcode == "broadcast" else base
    return value.opcode == "constant" and value.literal.strip() in ("0", "-0", "false")


def device_groups(module: Module, instruction: Instruction) -> np.ndarray:
    """Devices that talk to each other, [groups, members]; pairs of a permute are groups of two.

    Devices are numbered as in the program's device assignment, not by their hardware ids.

    Raises:
      RunError: a form of groups that is not known.
    """
    everyone = np.arange(module.partitions)[None, :]
    text = instruction.attribute("source_target_pairs")
    if text:
        pairs = np.array([int(n) for n in re.findall(r"\d+", text)]).reshape(-1, 2)
        moved = pairs[pairs[:, 0] != pairs[:, 1]]
        return moved if len(moved) else pairs[:, :1]
    across = bool(instruction.attribute("channel_id"))  # without one: between replicas, of which jax has one
    found = _GROUPS.search(instruction.rest)
    if not found:
        return everyone if across else everyone[:, :1]
    form = found.group(1)
    if form.startswith("mesh"):
        groups = _of_mesh(form, instruction)
    elif form == "{":
        listed = instruction.attribute("replica_groups")
        rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,\s]+)\}", listed[1:-1])]
        groups = np.array(rows) if rows else everyone
    else:
        groups = _iota(form)
    if across and not instruction.attribute("use_global_device_ids") and groups.size == 1:
        return everyone  # groups of replicas, each with all of its partitions
    return groups


def _iota(text: str) -> np.ndarray:
    """Of "[2,4]<=[8]" or "[2,4]<=[4,2]T(1,0)": 0..n-1 in the second shape, transposed, in the first."""
    shapes = [[int(n) for n in part.split(",")] for part in re.findall(r"[\[(]([\d,]+)[\])]", text)]
    ids = np.arange(math.prod(shapes[1])).reshape(shapes[1])
    return (ids.transpose(shapes[2]) if len(shapes) > 2 else ids).reshape(shapes[0])


def _of_mesh(text: str, instruction: Instruction) -> np.ndarray:
    """Groups along named axes: "mesh['a'=2,'b'=4] {'b'}"; "'b':(2)2" is a part of b: after 2, of size 2.

    "device_ids=([4,2]T(1,0))" before them: 0..n-1 in that shape, transposed; or the devices one by one.
    """
    inside, order, wanted = re.fullmatch(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? \{(.*)\}", text).groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", inside)}
    ids = np.arange(math.prod(sizes.values()))
    if order:
        listed = [[int(n) for n in part.split(",")] for part in re.findall(r"[\d,]+", order.replace(" ", ""))]
        ids = np.arange(math.prod(listed[0])).reshape(listed[0]) if order.startswith("[") else np.array(listed[0])
        ids = ids.transpose(listed[1]).ravel() if len(listed) > 1 else ids.ravel()
        if ids.size != math.prod(sizes.values()):
            raise RunError(f"compiled program, line {instruction.line}: unknown order of devices: {text[:200]}")
    parts: list[tuple[str, int, int]] = []  # every axis cut into the pieces that are named apart
    members = []
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", wanted):
        members.append((name, int(before or 1), int(size or sizes[name])))
    for axis, whole in sizes.items():
        at = 1
        for name, before, size in sorted(m for m in members if m[0] == axis):
            parts += [(axis, at, before // at)] if before > at else []
            parts.append((name, before, size))
            at = before * size
        parts += [(axis, at, whole // at)] if at < whole else []
    grid = ids.reshape([size for *_, size in parts])
    inner = [parts.index(member) for member in members]
    outer = [n for n in range(len(parts)) if n not in inner]
    return grid.transpose(outer + inner).reshape(-1, math.prod(size for *_, size in members))


def axes_crossed(groups: np.ndarray, mesh: Mapping[str, int], instruction: Instruction) -> tuple[str, ...]:
    """Mesh axes along which some group has members at different places.

    Raises:
      RunError: the groups name devices that the mesh does not have.
    """
    devices = math.prod(mesh.values())
    if groups.max(initial=0) >= devices:
        raise RunError(
            f"compiled program, line {instruction.line}: device {groups.max()} in a mesh of {devices} ({dict(mesh)})"
        )
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(axis for axis, at in zip(mesh, places, strict=True) if (at != at[:, :1]).any())
