"""What one run of a compiled program costs a device: arithmetic, memory traffic, communication.

A walk over the program: loops count as often as they turn, of a conditional the dearest branch.
Memory traffic is the operands and results of what is launched as one piece (a fusion's inside
stays on the chip), counting only the slices that are read or written in place, and nothing that
lives on the chip already (TPU marks those arrays). Of work done element by element, inside
fusions or not, the elements are counted.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from bigmodel_jax.planner import arithmetic, collectives, loops
from bigmodel_jax.planner.collectives import Collective
from bigmodel_jax.planner.hlo import HOST_SPACE, Array, Computation, Instruction, Module

# Names for values, bookkeeping, and the second halves of pairs: nothing is read or written.
FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "partition-id",
    "replica-id", "domain", "optimization-barrier", "get-dimension-size", "copy-done", "slice-done", "send-done",
    "recv-done", "async-done", "async-update", "all-gather-done", "all-reduce-done", "collective-permute-done",
    "while", "conditional", "call", "async-start",
})  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather", "slice-start")
SAME = ("bitcast", "reshape", "copy", "convert", "transpose")


@dataclass(frozen=True)
class Op:
    """One launched piece: its cost each time, and how often it runs.

    flops: matrix products and convolutions, in `dtype`. simple, transcendental: element operations. bytes: device
    memory read and written. host_bytes: moved from or to the host's memory.
    """

    name: str
    kind: str
    count: float
    flops: float = 0.0
    dtype: str = ""
    simple: float = 0.0
    transcendental: float = 0.0
    bytes: float = 0.0
    host_bytes: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Costs:
    """Of one device and one run of the program.

    unknown: {kernel whose arithmetic the text does not show: runs}. notes: what had to be assumed.
    """

    ops: tuple[Op, ...]
    collectives: tuple[Collective, ...]
    unknown: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        return sum(op.flops * op.count for op in self.ops)

    @property
    def bytes(self) -> float:
        return sum(op.bytes * op.count for op in self.ops)

    @property
    def host_bytes(self) -> float:
        return sum(op.host_bytes * op.count for op in self.ops)

    def flops_by_dtype(self) -> dict[str, float]:
        out: dict[str, float] = defaultdict(float)
        for op in self.ops:
            if op.flops:
                out[op.dtype] += op.flops * op.count
        return dict(out)

    def traffic(self) -> dict[tuple[str, tuple[str, ...]], tuple[float, float]]:
        """{(kind, mesh axes): (payload bytes, bytes on the wire)} per device."""
        out: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for c in self.collectives:
            payload, wire = out[c.kind, c.axes]
            out[c.kind, c.axes] = (payload + c.payload_bytes, wire + c.wire_bytes)
        return dict(out)


def costs(module: Module, mesh: Mapping[str, int]) -> Costs:
    """Walk the program from its entry.

    Args:
      mesh: {axis: size}, outermost first, as `mesh.shape` of the jax mesh the program was compiled for.

    Raises:
      RunError: a collective among devices that the mesh does not have.
    """
    walk = _Walk(module, dict(mesh))
    walk.computation(module.computations[module.entry], 1.0)
    if walk.padded:
        walk.notes.append(f"gathers of {walk.padded / 1e9:.3g} GB are written as sums of shards padded with zeros")
    return Costs(tuple(walk.ops), tuple(walk.collectives), dict(walk.unknown), tuple(dict.fromkeys(walk.notes)))


class _Walk:
    def __init__(self, module: Module, mesh: dict[str, int]):
        self.module, self.mesh = module, mesh
        self.ops: list[Op] = []
        self.collectives: list[Collective] = []
        self.unknown: dict[str, float] = defaultdict(float)
        self.notes: list[str] = []
        self.padded = 0.0

    def computation(self, where: Computation, times: float) -> None:
        channels: set[str] = set()
        for instruction in where.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                self._loop(where, instruction, times)
            elif opcode == "conditional":
                self._branches(instruction, times)
            elif opcode in ("call", "async-start"):
                for name in instruction.calls():
                    self.computation(self.module.computations[name], times)
            else:
                self._launch(where, instruction, times, channels)

    def _loop(self, where: Computation, instruction: Instruction, times: float) -> None:
        turns = loops.trip_count(self.module, where, instruction)
        if turns is None:
            turns = 1
            self.notes.append(f"{instruction.name}: how often it turns is not in the text; counted once")
        for key in ("body", "condition"):
            self.computation(self.module.computations[instruction.attribute(key).lstrip("%")], times * turns)

    def _branches(self, instruction: Instruction, times: float) -> None:
        walks = []
        for name in instruction.calls():
            walk = _Walk(self.module, self.mesh)
            walk.computation(self.module.computations[name], times)
            walks.append(walk)
        size = [(sum(o.flops * o.count for o in w.ops), sum(o.bytes * o.count for o in w.ops)) for w in walks]
        worst = walks[size.index(max(size))]
        if min(size) != max(size):
            self.notes.append(f"{instruction.name}: of {len(walks)} branches the dearest is counted")
        self.ops += worst.ops
        self.collectives += worst.collectives
        self.notes += worst.notes
        self.padded += worst.padded
        for name, runs in worst.unknown.items():
            self.unknown[name] += runs

    def _launch(self, where: Computation, instruction: Instruction, times: float, channels: set[str]) -> None:
        """One piece: a fusion, a kernel, a plain instruction."""
        if collectives.kind_of(instruction):
            self._communicate(where, instruction, times, False, channels)
        if instruction.opcode in FREE:
            return
        done = self._work(where, instruction, times, channels)
        memory, host = self._bytes(where, instruction)
        if done == arithmetic.Work() and not memory and not host:
            return
        self.ops.append(
            Op(
                name=instruction.name,
                kind=instruction.opcode,
                count=times,
                flops=done.flops,
                dtype=done.dtype,
                simple=done.simple,
                transcendental=done.transcendental,
                bytes=memory,
                host_bytes=host,
                source=instruction.source,
            )  # fmt: skip
        )

    def _communicate(
        self, where: Computation, instruction: Instruction, times: float, fused: bool, channels: set[str]
    ) -> None:
        """TPU cuts one transfer into pieces that share a channel and hides each in another fusion: count it once."""
        channel = instruction.attribute("channel_id")
        if fused and channel in channels:
            return
        channels.update({channel} if fused and channel else ())
        found = collectives.read(self.module, where, instruction, self.mesh, fused, times)
        if found is not None:
            self.collectives.append(found)
            if found.kind == "all-reduce" and collectives.is_padded_gather(self.module, where, instruction):
                self.padded += found.payload_bytes
        if instruction.opcode.startswith("ragged"):
            self.notes.append(f"{instruction.name}: payload is the whole buffer, the most that can be sent")

    def _work(self, where: Computation, instruction: Instruction, times: float, channels: set[str]) -> arithmetic.Work:
        """Arithmetic of an instruction with everything fused into it."""
        total = arithmetic.work(where, instruction)
        if total.unknown:
            self.unknown[total.unknown] += times
        if total.note:
            self.notes.append(total.note)
        if instruction.opcode != "fusion":
            return total
        for name in instruction.calls():
            inner = self.module.computations[name]
            for part in inner.instructions.values():
                if collectives.kind_of(part):
                    self._communicate(inner, part, times, True, channels)
                found = self._work(inner, part, times, channels)
                total = dataclasses.replace(
                    total, flops=total.flops + found.flops, simple=total.simple + found.simple,
                    transcendental=total.transcendental + found.transcendental, dtype=found.dtype or total.dtype,
                )  # fmt: skip
        return total

    def _bytes(self, where: Computation, instruction: Instruction) -> tuple[float, float]:
        """(device memory, host memory) traffic of one launched piece."""
        if instruction.opcode == "custom-call" and arithmetic.target(instruction) in arithmetic.FREE_CALLS:
            return 0.0, 0.0
        pieces: list[tuple[float, int]] = []
        for name, part in zip(instruction.operands, self._reads(where, instruction), strict=True):
            for array in where.instructions[name].arrays:
                pieces.append((array.bytes if part is None else min(part, array.bytes), array.space))
        pieces += self._writes(where, instruction)
        memory = sum(size for size, space in pieces if space == 0)
        return memory, sum(size for size, space in pieces if space == HOST_SPACE)

    def _reads(self, where: Computation, instruction: Instruction) -> list[float | None]:
        """Bytes read of each operand; None: all of it."""
        opcode, n = instruction.opcode, len(instruction.operands)
        out = sum(a.bytes for a in instruction.arrays)
        if opcode in SLICES:
            out = instruction.arrays[-1].bytes if opcode != "slice-start" else instruction.arrays[1].bytes
            return [float(out)] + [None] * (n - 1)
        if opcode in ("dynamic-update-slice", "scatter"):
            return [0.0] + [None] * (n - 1) if opcode == "dynamic-update-slice" else self._scatter(where, instruction)
        if opcode != "fusion":
            return [None] * n
        inner = self.module.computations[instruction.calls()[0]]
        return [self._read_inside(inner, p.name) for p in inner.parameters]

    @staticmethod
    def _scatter(where: Computation, instruction: Instruction) -> list[float | None]:
        """Of the arrays scattered into, only what is updated."""
        several = (len(instruction.operands) - 1) // 2
        updates = [where.instructions[n].arrays[0].bytes for n in instruction.operands[several + 1 :]]
        return [float(u) for u in updates] + [None] * (several + 1)

    def _read_inside(self, inner: Computation, name: str) -> float | None:
        """Bytes a fusion reads of a parameter: slices where only slices of it are used."""
        total = 0.0
        for user in inner.users[name]:
            first = user.operands[0] == name
            if user.opcode in SLICES and first and name not in user.operands[1:]:
                total += sum(a.bytes for a in user.arrays)
            elif user.opcode == "dynamic-update-slice" and first and name not in user.operands[1:]:
                continue
            elif user.opcode in ("bitcast", "get-tuple-element", "tuple"):
                found = self._read_inside(inner, user.name)
                if found is None:
                    return None
                total += found
            elif user.opcode == "fusion":
                nested = self.module.computations[user.calls()[0]]
                for at, operand in enumerate(user.operands):
                    found = self._read_inside(nested, nested.parameters[at].name) if operand == name else 0.0
                    if found is None:
                        return None
                    total += found
            else:
                return None
        return total

    def _writes(self, where: Computation, instruction: Instruction) -> list[tuple[float, int]]:
        """(bytes, memory space) of each array written; in-place updates write the update alone."""
        opcode = instruction.opcode
        arrays = list(instruction.arrays)
        if opcode.endswith("-start") and opcode != "all-reduce-start":
            arrays = arrays[1:2]  # (operand, result, flags ...)
        if opcode == "dynamic-update-slice":
            return [(where.instructions[instruction.operands[1]].arrays[0].bytes, arrays[0].space)]
        if opcode == "scatter":
            several = (len(instruction.operands) - 1) // 2
            updates = [where.instructions[n].arrays[0] for n in instruction.operands[several + 1 :]]
            return [(u.bytes, a.space) for u, a in zip(updates, arrays, strict=True)]
        if opcode != "fusion":
            return [(a.bytes, a.space) for a in arrays]
        inner = self.module.computations[instruction.calls()[0]]
        roots = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
        if len(roots) != len(arrays):
            return [(a.bytes, a.space) for a in arrays]
        return [(self._updated(inner, root, array), array.space) for root, array in zip(roots, arrays, strict=True)]

    def _updated(self, inner: Computation, name: str, array: Array) -> float:
        """Bytes a fusion writes into one result."""
        at = inner.instructions[name]
        while at.opcode in SAME and at.operands:
            at = inner.instructions[at.operands[0]]
        if at.opcode == "dynamic-update-slice":
            return min(inner.instructions[at.operands[1]].arrays[0].bytes, array.bytes)
        return 0.0 if at.opcode == "parameter" and name == at.name else array.bytes
