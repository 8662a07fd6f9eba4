# SPDX-License-Identifier: Apache-2.0
"""The text of a compiled XLA program as computations, instructions and array shapes.

Syntax alone; what an instruction costs is said in `r1jax.parallel.costs`.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,<=? ]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_BITS = re.compile(r"\d+")


class Array(NamedTuple):
    """One array: element type as XLA writes it, dimensions, memory space (0 is the main one)."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """Elements."""
        return functools.reduce(int.__mul__, self.dims, 1)

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        return self.size * bits(self.dtype) / 8


def bits(dtype: str) -> int:
    """Bits of an element: `bf16` → 16, `f8e4m3fn` → 8, `pred` → 8."""
    if dtype in ("token", "opaque"):
        return 0
    found = _BITS.search(dtype)
    width = int(found.group()) if found else 8
    return 2 * width if dtype == f"c{width}" and width < 64 else width


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the percent sign.
        opcode: as XLA writes it: `dot`, `while`, `all-gather-start`.
        arrays: of the result; several for a tuple, nested ones flattened.
        operands: names.
        inside: the text between the parentheses.
        attributes: the text behind them.
        root: whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """The scopes it was traced in, from its metadata."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    def called(self, role: str) -> str | None:
        """The computation that it names as `body`, `calls`, `to_apply`, …"""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """`lhs_contracting_dims={1,2}` → (1, 2); () if it is absent."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()

    def integer(self, attribute: str) -> int | None:
        """`index=3` → 3; None if it is absent."""
        found = re.search(rf"\b{attribute}=(\d+)", self.attributes)
        return int(found.group(1)) if found else None


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def root(self) -> Instruction | None:
        """The instruction whose value is the computation's."""
        return next((i for i in self.instructions.values() if i.root), None)

    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.inside): i for i in found}


class Program(NamedTuple):
    """A module: all computations by name, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Reads what `compiled.as_text()` returns.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations, entry, current = {}, None, None
    for line in _lines(text):
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = Computation(header.group(2))
                entry = current.name if header.group(1) else entry
        elif line.startswith("}"):
            computations[current.name] = current
            current = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if entry is None or entry not in computations:
        raise ValueError("the text is no compiled XLA program: it has no ENTRY computation")
    return Program(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """Lines, those that a kernel's metadata breaks put together again."""
    whole = ""
    for line in text.splitlines():
        if whole and not line.startswith(('"', "}}")):
            yield whole
            whole = ""
        whole += line
    if whole:
        yield whole


def arrays_of(shape: str) -> tuple[Array, ...]:
    """`(f32[2,3]{1,0:T(8,128)S(1)}, s32[])` → its arrays."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = _SPACE.search(layout)
        sizes = tuple(int(d.strip().removeprefix("<=")) for d in dims.split(",") if d.strip())
        found.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(found)


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.partition(" = ")
    if not equals:
        return None
    left = left.strip()
    root, name = left.startswith("ROOT "), left.removeprefix("ROOT ").lstrip("%")
    end = closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    shape, rest = right[:end], right[end:].lstrip()
    start = rest.find("(")
    if start < 0:
        return None
    stop = closing(rest, start)
    inside = rest[start + 1 : stop]
    return Instruction(
        name=name,
        opcode=rest[:start],
        arrays=arrays_of(shape),
        operands=tuple(_NAME.findall(inside)),
        inside=inside,
        attributes=rest[stop + 1 :],
        root=root,
    )


def closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`; the end if there is none."""
    depth = 0
    for place in _PARENTHESIS.finditer(text, start):
        depth += 1 if place.group() == "(" else -1
        if depth == 0:
            return place.start()
    return len(text)


_PARENTHESIS = re.compile(r"[()]")
