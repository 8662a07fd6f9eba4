# SPDX-License-Identifier: Apache-2.0
"""Bytes that one instruction reads and writes in a device's main memory."""

import re

from r1jax.parallel.hlo import Array, Computation, Instruction, Program

# These move nothing themselves: they name, rename or hold together, or their work stands elsewhere.
_STILL = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "add-dependency", "partition-id", "replica-id", "opt-barrier",
    "async-start", "async-update", "async-done", "copy-done", "slice-done",
}  # fmt: skip
_CUTS = {"dynamic-slice", "slice", "slice-start", "gather"}
_RENAMES = {"bitcast", "reshape", "copy"}  # inside a fusion a copy is made of what is asked for
LIBRARY = re.compile(r"called_computations=\{%?([\w.\-]+)\}")
_COLLECTIVES = ("all-", "reduce-scatter", "ragged-all-", "collective-")
_VIEWS = {"bitcast", "reshape", "copy", "convert", "transpose"}


def traffic(program: Program, computation: Computation, one: Instruction) -> float:
    """Of one run of an instruction that stands outside fusions.

    A slice reads what it cuts out; an update in place writes what it puts in; a fusion does so for
    the operands that it only slices and the result that it only updates.
    """
    if one.opcode == "custom-call-update":
        return _given_later(program, computation, one)
    if one.opcode in _STILL or one.opcode.endswith(("-done", "-call-update")) or _marks(one):
        return 0.0
    operands = [computation.instructions.get(name) for name in one.operands]
    read = [_main(o.arrays) if o is not None else 0.0 for o in operands]
    if one.opcode == "fusion":
        inner = program.computations.get(one.called("calls") or "")
        return _fusion(program, inner, one, read) if inner else sum(read) + _main(one.arrays)
    if one.opcode in _CUTS:
        kept = one.arrays[-1:] if one.opcode == "slice-start" else one.arrays
        cut = sum(a.bytes for a in kept)
        return (cut if read[:1] != [0.0] else 0.0) + _main(kept)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = 1 if one.opcode == "dynamic-update-slice" else 2
        return 2 * read[update] if len(read) > update else sum(read)
    if one.opcode == "send":  # by a host, to another slice
        return sum(read)
    if one.opcode.endswith("-start"):  # operands are part of the result
        return sum(read) + max(_main(one.arrays) - sum(read), 0.0)
    return sum(read) + _main(one.arrays)


def _given_later(program: Program, computation: Computation, one: Instruction) -> float:
    """What a sparse core reads and writes that was begun without operands, and gets them now."""
    begun, *given = (computation.instructions.get(name) for name in one.operands)
    if begun is None or begun.operands or _network(program, begun):
        return 0.0
    operands = [a for o in given if o is not None for a in o.arrays]
    return _main((*operands, *one.arrays[len(operands) : len(operands) + 1]))


def _network(program: Program, begun: Instruction) -> bool:
    """Whether it calls a computation with a collective, whose own traffic is counted."""
    found = LIBRARY.search(begun.attributes)
    inner = program.computations.get(found.group(1)) if found else None
    holds = inner.instructions.values() if inner is not None else ()
    return any(one.opcode.startswith(_COLLECTIVES) for one in holds)


def _marks(one: Instruction) -> bool:
    marks = ("AllocateBuffer", "ConcatBitcast", "AssumeGather", "GatherScatterIndices", "Sharding")
    return one.opcode == "custom-call" and any(m in one.attributes for m in marks)


def _main(arrays: tuple[Array, ...]) -> float:
    return sum(a.bytes for a in arrays if a.space == 0)


def _fusion(program: Program, inner: Computation, one: Instruction, read: list[float]) -> float:
    total = 0.0
    for number, parameter in inner.parameters().items():
        if number < len(read) and read[number]:
            touched = _touched(program, inner, parameter.name)
            total += read[number] if touched is None else min(touched, read[number])
    root = inner.root()
    if root is None or root.opcode != "tuple":
        ends = [root] * len(one.arrays)
    else:
        ends = [inner.instructions.get(o) for o in root.operands]
    for array, end in zip(one.arrays, ends, strict=False):
        if end is not None and (end.opcode == "parameter" or (_piece(end) and not _starts(end))):
            continue  # handed through, or filled by the network
        update = _update(program, inner, end)
        total += min(update, array.bytes) if update is not None else _main((array,))
    return total


def _piece(one: Instruction) -> bool:
    """Whether it belongs to a collective that is spread over the fusions that hide it.

    XLA:TPU hands its operand and its result through each of them; both are counted where it starts.
    """
    return "async_collective_fusion_config" in one.attributes or "AsyncCollective" in one.attributes


def _starts(one: Instruction) -> bool:
    return "AsyncCollectiveStart" in one.attributes


def _free(user: Instruction, first: bool) -> bool:
    """Whether an operand is not read: updated in place, handed through, or moved by the network."""
    updated = user.opcode == "dynamic-update-slice" and first
    return updated or (user.opcode == "tuple" and user.root) or _piece(user)


def _touched(program: Program, inner: Computation, name: str) -> float | None:
    """Bytes that a fusion reads of an operand that it only cuts or updates; None: all of it."""
    total = 0.0
    for user in inner.instructions.values():
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode in _CUTS and first:
            total += sum(a.bytes for a in user.arrays)
            continue
        if _free(user, first):
            continue
        if user.opcode not in (*_RENAMES, "fusion"):
            return None
        parts = _nested(program, user, name) if user.opcode == "fusion" else []
        parts = parts or [_touched(program, inner, user.name)]  # renamed: who reads it then?
        if None in parts:
            return None
        total += sum(parts)
    return total


def _nested(program: Program, user: Instruction, name: str) -> list[float | None]:
    """What a fusion inside a fusion reads of each of its operands of that name."""
    nested = program.computations.get(user.called("calls") or "")
    if nested is None or _view(nested):
        return []
    places = (p for n, p in nested.parameters().items() if user.operands[n] == name)
    return [_touched(program, nested, p.name) for p in places]


def _view(nested: Computation) -> bool:
    """Whether a fusion only renames an operand."""
    end = nested.root()
    while end is not None and end.opcode in _RENAMES:
        end = nested.instructions.get(end.operands[0])
    return end is not None and end.opcode == "parameter"


def _update(program: Program, inner: Computation, end: Instruction | None) -> float | None:
    """Bytes that a result which is an operand updated in place gets written; None: it is not."""
    while end is not None and end.opcode in _VIEWS and end.operands:
        end = inner.instructions.get(end.operands[0])
    if end is not None and end.opcode == "fusion":
        nested = program.computations.get(end.called("calls") or "")
        return _update(program, nested, nested.root()) if nested else None
    if end is None or end.opcode != "dynamic-update-slice":
        return None
    put = inner.instructions.get(end.operands[1])
    return sum(a.bytes for a in put.arrays) if put is not None else None
