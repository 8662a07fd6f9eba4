# SPDX-License-Identifier: Apache-2.0
"""Arrays that a scan over layers fills, layer by layer: what a backward pass finds, gradients."""

from typing import NamedTuple

from r1jax.parallel.hlo import Computation, Instruction, Program


class Stacked(NamedTuple):
    """Bytes of arrays that loops of the whole program fill a slice a turn.

    Attributes:
        forward: by loops of the forward pass: activations kept for the backward pass, and caches.
        backward: by loops of the backward pass: gradients of stacked layers.
    """

    forward: float
    backward: float


def stacked(program: Program) -> Stacked:
    """Of the loops that the program runs itself, not of those inside them."""
    sums = {False: 0.0, True: 0.0}
    for loop in program.computations[program.entry].instructions.values():
        body = (
            program.computations.get(loop.called("body") or "") if loop.opcode == "while" else None
        )
        root = body.root() if body else None
        if root is None or root.opcode != "tuple" or len(root.operands) != len(loop.arrays):
            continue
        for array, name in zip(loop.arrays, root.operands, strict=True):
            if array.space == 0 and _filled(program, body, body.instructions.get(name)):
                sums["transpose(" in loop.op_name] += array.bytes
    return Stacked(sums[False], sums[True])


def _filled(program: Program, body: Computation, one: Instruction | None) -> bool:
    """Whether the value is an array with a slice of it written."""
    while one is not None and one.opcode in ("bitcast", "copy", "copy-done", "copy-start"):
        one = body.instructions.get(one.operands[0])
    if one is None:
        return False
    if one.opcode == "get-tuple-element":
        source = body.instructions.get(one.operands[0])
        if source is None or source.opcode != "fusion":
            return False
        inner = program.computations.get(source.called("calls") or "")
        root = inner.root() if inner else None
        if root is None or root.opcode != "tuple":
            return False
        return _filled(program, inner, inner.instructions.get(root.operands[one.integer("index")]))
    if one.opcode == "fusion":
        inner = program.computations.get(one.called("calls") or "")
        return bool(inner) and _filled(program, inner, inner.root())
    return one.opcode == "dynamic-update-slice"
