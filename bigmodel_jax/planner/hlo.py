"""The text of a compiled program (`compiled.as_text()`) as values.

XLA prints the same language for CPU, CUDA and TPU: computations made of one instruction a line,
`%name = shape opcode(operands), attribute=value, ...`. Nothing is skipped: a line of a computation
that is not understood is an error that names it. What the program costs is read in costs.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from bigmodel_jax.errors import RunError

BITS = {
    "pred": 8, "token": 0, "opaque": 0,
    **{f"{sign}{bits}": bits for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
HOST_SPACE = 5
"""Memory space of arrays that are kept in the host's memory; 0 is the device's, others are on the chip."""


@dataclass(frozen=True)
class Array:
    """An array's element type, dimensions, and memory space (0: device memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.size * _bits(self.dtype) // 8)


Shape = Array | tuple["Shape", ...]


@dataclass(frozen=True)
class Instruction:
    """One line. `rest` is the text of its attributes, read on demand by `attribute`."""

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    rest: str
    root: bool
    line: int
    literal: str = ""
    """What stands between the brackets of a constant or parameter."""

    def attribute(self, key: str) -> str:
        """The value of `key=`, with its brackets or quotes, or ""."""
        found = re.search(rf"(?:^|[ ,]){re.escape(key)}=", self.rest)
        return _value(self.rest, found.end()) if found else ""

    def numbers(self, key: str) -> tuple[int, ...]:
        """The integers of a list attribute such as `lhs_contracting_dims={1,2}`."""
        return tuple(int(n) for n in re.findall(r"-?\d+", self.attribute(key)))

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, tuples flattened."""
        return tuple(_leaves(self.shape))

    def calls(self) -> tuple[str, ...]:
        """Computations this instruction runs, without the scalar ones applied by reductions."""
        if self.opcode == "while":
            return (self.attribute("body").lstrip("%"),)
        if self.opcode == "conditional":
            several = self.attribute("branch_computations")
            pair = [self.attribute(f"{side}_computation") for side in ("true", "false")]
            return tuple(n.strip().lstrip("%") for n in (several.strip("{}").split(",") if several else pair))
        keys = {"fusion": "calls", "call": "to_apply", "async-start": "calls", "custom-call": "called_computations"}
        named = self.attribute(keys[self.opcode]) if self.opcode in keys else ""
        return tuple(n.strip().lstrip("%") for n in named.strip("{}").split(",") if n.strip())

    @property
    def source(self) -> str:
        """Where it is from in the traced program ("jit(step)/layers/attn/dot_general"), or ""."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found.group(1) if found else ""


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.literal))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        out: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                out[name].append(instruction)
        return out


@dataclass
class Module:
    """A program. partitions: devices it is split over."""

    name: str
    partitions: int
    computations: dict[str, Computation]
    entry: str

    def __iter__(self) -> Iterator[Instruction]:
        return (i for c in self.computations.values() for i in c.instructions.values())


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    small = re.match(r"f(4|6|8)e\d", dtype)
    if not small:
        raise RunError(f"compiled program: unknown element type '{dtype}'")
    return int(small.group(1))


def _leaves(shape: Shape) -> Iterator[Array]:
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from _leaves(part)


_PAIRS = {"{": "}", "(": ")", "[": "]"}
_STRUCTURE = re.compile(r'[(){}\[\]"]')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


def _close(text: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`; brackets in quotes do not count."""
    depth, at = 0, start
    while True:
        found = _STRUCTURE.search(text, at)
        if not found:
            raise ValueError("a bracket is not closed")
        mark, at = found.group(), found.end()
        if mark == '"':
            at = _QUOTED.match(text, at - 1).end()
        elif mark in _PAIRS:
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return at


def _value(text: str, start: int) -> str:
    """The attribute value that begins at `start`."""
    if text[start : start + 1] in _PAIRS:
        return text[start : _close(text, start)]
    if text[start : start + 1] == '"':
        return _QUOTED.match(text, start).group()
    return re.match(r"[^,\s]*", text[start:]).group()


def _split(text: str) -> list[str]:
    """Pieces between the commas outside all brackets."""
    out, begin, at = [], 0, 0
    for found in re.finditer(r'[,({\["]', text):
        if found.start() < at:
            continue
        if found.group() == ",":
            out.append(text[begin : found.start()])
            begin = found.end()
        elif found.group() == '"':
            at = _QUOTED.match(text, found.start()).end()
        else:
            at = _close(text, found.start())
    return [piece.strip() for piece in [*out, text[begin:]] if piece.strip()]


_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](\{[^}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")


@functools.cache
def shape(text: str) -> Shape:
    """A shape as printed: "f32[8,128]{1,0:T(8,128)S(1)}", "(s32[], bf16[4])".

    Raises:
      ValueError: it is none.
    """
    text = text.strip()
    if text.startswith("("):
        return tuple(shape(piece) for piece in _split(text[1:-1]))
    found = _ARRAY.fullmatch(text)
    if not found:
        raise ValueError(f"not a shape: {text[:80]}")
    dtype, dims, layout = found.groups()
    space = re.search(r"S\((\d+)\)", layout or "")
    sizes = tuple(int(d.strip().removeprefix("<=")) for d in dims.split(",") if d.strip())
    array = Array(dtype, sizes, int(space.group(1)) if space else 0)
    _ = array.bytes
    return array


_NAME = re.compile(r"\s*(ROOT )?%?([\w.$~-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w-]*)\(")


def _instruction(line: str, number: int) -> Instruction:
    line = _COMMENT.sub("", line) if "/*" in line else line
    head = _NAME.match(line)
    if not head:
        raise ValueError("no 'name = '")
    at = head.end()
    end = _close(line, at) if line[at] == "(" else line.index(" ", at)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        raise ValueError("no operation after the shape")
    stop = _close(line, opcode.end() - 1)
    inside, kind = line[opcode.end() : stop - 1], opcode.group(1)
    literal = inside if kind in ("constant", "parameter") else ""
    operands = () if literal else tuple(_operand(piece) for piece in _split(inside))
    return Instruction(
        name=head.group(2), opcode=kind, shape=shape(line[at:end]), operands=operands,
        rest=line[stop:].lstrip(", ").rstrip(), root=bool(head.group(1)), line=number, literal=literal,
    )  # fmt: skip


def _operand(piece: str) -> str:
    """Name of an operand, printed with its shape before it or without."""
    return piece.split(" ")[-1].lstrip("%")


_HEADER = re.compile(r"(ENTRY )?%?([\w.$~-]+) \(.*\{$|(ENTRY )?%?([\w.$~-]+) \{$")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def read(text: str) -> Module:
    """Parse a compiled program.

    Raises:
      RunError: names the line that is not understood.
    """
    lines = text.splitlines()
    if not lines or not lines[0].startswith("HloModule "):
        raise RunError("compiled program: the text does not begin with HloModule")
    partitions = re.search(r"num_partitions=(\d+)", lines[0])
    module = Module(re.split(r"[ ,]", lines[0])[1], int(partitions.group(1)) if partitions else 1, {}, "")
    current: Computation | None = None
    table = False
    for number, line in _whole(lines):
        if not line.strip():
            table = False
        elif line in _TABLES:
            table = True
        elif table:
            continue
        elif current is None:
            header = _HEADER.match(line)
            if not header:
                raise RunError(f"compiled program, line {number} is no computation: {line[:200]}")
            current = Computation(header.group(2) or header.group(4))
            module.entry = current.name if line.startswith("ENTRY") else module.entry
        elif line.startswith("}"):
            _check(current, number)
            module.computations[current.name] = current
            current = None
        else:
            try:
                found = _instruction(line, number)
            except (ValueError, IndexError, AttributeError, RunError) as error:
                raise RunError(f"compiled program, line {number} is not understood ({error}): {line[:200]}") from error
            for name in found.operands:
                _element(current, name, number)
            current.instructions[found.name] = found
    if current is not None or not module.entry:
        raise RunError("compiled program: the text ends before its entry computation does")
    return module


def _whole(lines: list[str]) -> Iterator[tuple[int, str]]:
    """(number, line) after the first; what a kernel says of itself is printed over several lines, here joined."""
    number = 1
    while number < len(lines):
        start, line = number + 1, lines[number]
        while line.endswith("={") and line.startswith("  ") and not lines[number + 1].startswith("  "):
            number += 1
            line += lines[number]
            while not lines[number].startswith("}"):
                number += 1
                line += lines[number]
        yield start, line
        number += 1


def _element(where: Computation, name: str, line: int) -> None:
    """Dumps of a program write "tuple.3#0" for an element of a tuple, which `as_text` gives an instruction: so here."""
    whole, hash_, index = name.rpartition("#")
    if not hash_ or name in where.instructions:
        return
    _element(where, whole, line)
    if whole in where.instructions:
        shape = where.instructions[whole].shape[int(index)]
        rest = f" index={index}"
        made = Instruction(name, "get-tuple-element", shape, (whole,), rest, root=False, line=line)
        where.instructions[name] = made


def _check(computation: Computation, number: int) -> None:
    """Every operand is defined, and there is a root."""
    if not any(i.root for i in computation.instructions.values()):
        raise RunError(f"compiled program, line {number}: computation {computation.name} has no ROOT")
    for instruction in computation.instructions.values():
        for name in instruction.operands:
            if name not in computation.instructions:
                raise RunError(f"compiled program, line {instruction.line}: operand {name} is not defined")
