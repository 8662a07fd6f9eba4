# SPDX-License-Identifier: Apache-2.0
"""How often the loops of a compiled program turn."""

import re
from typing import NamedTuple

from r1jax.parallel.hlo import Computation, Instruction, Program

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PASSES = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


class Place(NamedTuple):
    """A computation, and the loops it is the body of, outermost first."""

    computation: Computation
    callers: tuple[tuple[Computation, Instruction], ...] = ()


def trips(program: Program, loop: Instruction, place: Place) -> int | None:
    """Turns of a `while` that stands at `place`; None if the program does not say.

    XLA writes the count beside a loop on CPUs and GPUs. Elsewhere it is read from the condition
    `i < n`, the start of i and the step of the body, constants that may have been hoisted out of
    enclosing loops.
    """
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known.group(1))
    condition = program.computations.get(loop.called("condition") or "")
    body = program.computations.get(loop.called("body") or "")
    test = condition and body and _comparison(program, condition)
    if not test:
        return None
    index, limit, including = test
    if isinstance(limit, tuple):  # an element of what the loop carries
        limit = _start(program, loop, limit[0], place)
    if limit is None:
        return None
    start = _start(program, loop, index, place) or 0
    return max(-(-(limit + including - start) // _step(body, index)), 0)


def bound(program: Program, loop: Instruction) -> int | None:
    """The most turns a loop over blocks can take: blocks in the arrays that its body slices."""
    body = program.computations.get(loop.called("body") or "")
    found = [n for n in _slices(program, body) if n > 1] if body else []
    return min(found) if found else None


def _slices(program: Program, computation: Computation):
    for instruction in computation.instructions.values():
        if instruction.opcode == "fusion":
            inner = program.computations.get(instruction.called("calls") or "")
            if inner:
                yield from _slices(program, inner)
        elif instruction.opcode == "dynamic-slice":
            source = computation.instructions.get(instruction.operands[0])
            if source is not None and source.arrays:
                whole, part = source.arrays[0].dims, instruction.arrays[0].dims
                yield max((w // p for w, p in zip(whole, part, strict=True) if p), default=1)


def _comparison(program: Program, condition: Computation):
    """(index of i, n or (index of n,), whether i = n is a turn) of a condition i < n."""
    root, names = condition.root(), {}
    if root is not None and root.opcode == "fusion":
        inner = program.computations.get(root.called("calls") or "")
        names = {p.name: root.operands[n] for n, p in inner.parameters().items()} if inner else {}
        found = inner.root() if inner else None
    else:
        inner, found = condition, root
    if found is None or found.opcode != "compare" or len(found.operands) != 2:
        return None
    direction = re.search(r"direction=(\w+)", found.attributes)
    sides = [_side(condition, inner, names.get(o, o)) for o in found.operands]
    order = direction.group(1) if direction else ""
    if order in ("GT", "GE"):
        sides, order = sides[::-1], {"GT": "LT", "GE": "LE"}[order]
    if order not in ("LT", "LE") or not isinstance(sides[0], tuple) or sides[1] is None:
        return None
    return sides[0][0], sides[1], int(order == "LE")


def _side(condition: Computation, inner: Computation, name: str):
    """A constant, (index,) of an element of the loop's tuple, or None."""
    found = condition.instructions.get(name) or inner.instructions.get(name)
    if found is not None and found.opcode == "constant":
        return _number(found)
    if found is not None and found.opcode == "get-tuple-element":
        return (found.integer("index"),)
    return None


def _number(constant: Instruction) -> int | None:
    try:
        return int(constant.inside)
    except ValueError:
        return None


def _start(program: Program, loop: Instruction, index: int, place: Place) -> int | None:
    return _element(program, loop.operands[0], index, place) if loop.operands else None


def _element(program: Program, name: str, index: int, place: Place) -> int | None:
    """The constant that element `index` of the tuple `name` is, seen from `place`."""
    found = place.computation.instructions.get(name)
    if found is None:
        return None
    if found.opcode == "tuple":
        return _constant(program, found.operands[index], place)
    if found.opcode == "parameter" and place.callers:
        computation, loop = place.callers[-1]
        return _start(program, loop, index, Place(computation, place.callers[:-1]))
    if found.opcode in _PASSES:
        return _element(program, found.operands[0], index, place)
    return None


def _constant(program: Program, name: str, place: Place) -> int | None:
    found = place.computation.instructions.get(name)
    if found is None:
        return None
    if found.opcode == "constant":
        return _number(found)
    if found.opcode in _PASSES:
        return _constant(program, found.operands[0], place)
    if found.opcode == "get-tuple-element":
        return _element(program, found.operands[0], found.integer("index"), place)
    return None


def _step(body: Computation, index: int) -> int:
    """What a turn adds to element `index`; 1 if that cannot be read."""
    root = body.root()
    if root is None or root.opcode != "tuple" or index >= len(root.operands):
        return 1
    found = body.instructions.get(root.operands[index])
    while found is not None and found.opcode in _PASSES:
        found = body.instructions.get(found.operands[0])
    if found is None or found.opcode != "add":
        return 1
    sides = (body.instructions.get(o) for o in found.operands)
    numbers = [_number(s) for s in sides if s is not None and s.opcode == "constant"]
    return numbers[0] if numbers and numbers[0] and numbers[0] > 0 else 1
