"""How often the body of a compiled loop runs.

CPU and CUDA texts carry `known_trip_count`. TPU's do not: there the condition compares a counter
with a constant, and the constant may be carried through the loop. So the counter is followed
through copies, fusions and tuples: its first value, its step, its bound.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from bigmodel_jax.planner.hlo import Computation, Instruction, Module

# Operations that hand on the value of their first operand.
SAME = ("copy", "convert", "bitcast", "reshape", "copy-start", "copy-done", "optimization-barrier")


class Carried(NamedTuple):
    """`slot` of the loop's tuple, plus a constant; slot None: the constant alone."""

    slot: int | None
    plus: int


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Times the body of the `while` instruction runs, or None where the text does not tell."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.attribute("condition").lstrip("%")]
    body = module.computations[loop.attribute("body").lstrip("%")]
    test, scope = _test(module, condition)
    if test is None:
        return None
    counter, bound = (_carried(module, scope, name) for name in test.operands)
    direction = test.attribute("direction")
    if counter is None or bound is None:
        return None
    if counter.slot is None or (bound.slot is not None and _step(module, body, counter.slot) == 0):
        counter, bound = bound, counter
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if counter.slot is None:
        return None
    step = _step(module, body, counter.slot)
    first = _initial(module, caller, loop, counter.slot)
    last = bound.plus
    if bound.slot is not None:
        start = _initial(module, caller, loop, bound.slot)
        if start is None or _step(module, body, bound.slot) != 0:
            return None
        last += start
    if not step or first is None:
        return None
    return _times(first + counter.plus, last, step, direction)


def _times(first: int, last: int, step: int, direction: str) -> int | None:
    span = {"LT": last - first, "LE": last - first + 1, "GT": first - last, "GE": first - last + 1}.get(direction)
    if direction == "NE":
        span, step = abs(last - first), abs(step)
    if span is None or (step > 0) != (direction in ("LT", "LE", "NE")):
        return None
    return max(0, -(-span // abs(step)))


class _Scope(NamedTuple):
    """A computation, and what its parameters stand for where it is a fused one."""

    computation: Computation
    arguments: tuple[Carried | None, ...] | None


def _test(module: Module, condition: Computation) -> tuple[Instruction | None, _Scope]:
    """The comparison that decides, also inside a fusion."""
    scope, at = _Scope(condition, None), condition.root
    while at.opcode in ("fusion", "call", *SAME):
        if at.opcode in SAME:
            at = scope.computation.instructions[at.operands[0]]
            continue
        inner = module.computations[at.calls()[0]]
        scope = _Scope(inner, tuple(_carried(module, scope, name) for name in at.operands))
        at = inner.root
    return (at if at.opcode == "compare" else None), scope


def _carried(module: Module, scope: _Scope, name: str) -> Carried | None:
    """What a scalar integer is, in terms of the loop's tuple."""
    at = scope.computation.instructions[name]
    inside = [_carried(module, scope, operand) for operand in at.operands] if at.opcode in ("add", "subtract") else []
    if at.opcode == "constant":
        return Carried(None, int(at.literal)) if re.fullmatch(r"-?\d+", at.literal.strip()) else None
    if at.opcode == "parameter" and scope.arguments is not None:
        return scope.arguments[int(at.literal)]
    if at.opcode == "get-tuple-element":
        source = scope.computation.instructions[at.operands[0]]
        return Carried(int(at.attribute("index")), 0) if source.opcode == "parameter" else None
    if at.opcode in SAME:
        return _carried(module, scope, at.operands[0])
    if at.opcode in ("fusion", "call"):
        inner = module.computations[at.calls()[0]]
        arguments = tuple(_carried(module, scope, operand) for operand in at.operands)
        return _carried(module, _Scope(inner, arguments), inner.root.name)
    if inside and None not in inside:
        left, right = inside
        if at.opcode == "add" and (left.slot is None or right.slot is None):
            return Carried(right.slot if left.slot is None else left.slot, left.plus + right.plus)
        if at.opcode == "subtract" and right.slot is None:
            return Carried(left.slot, left.plus - right.plus)
    return None


def _step(module: Module, body: Computation, slot: int) -> int | None:
    """What one pass adds to a slot; 0 for one that is handed on, None where it is not known."""
    root = body.root
    if root.opcode != "tuple":
        return None
    after = _carried(module, _Scope(body, None), root.operands[slot])
    return after.plus if after is not None and after.slot == slot else None


def _initial(module: Module, caller: Computation, loop: Instruction, slot: int) -> int | None:
    """The constant that a slot starts with."""
    start = caller.instructions[loop.operands[0]]
    if start.opcode != "tuple":
        return None
    found = _carried(module, _Scope(caller, None), start.operands[slot])
    return found.plus if found is not None and found.slot is None else None
