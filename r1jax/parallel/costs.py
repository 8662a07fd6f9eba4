# SPDX-License-Identifier: Apache-2.0
"""What one run of a compiled program does on one device: arithmetic, memory traffic, collectives.

The compiler's own `cost_analysis` counts the body of a loop once; here every count is multiplied by
the turns of the loops around it. Rules, each a decision:

- Arithmetic is that of products (`r1jax.parallel.arithmetic`), by the type of the left operand.
- A conditional runs the branch with the most arithmetic.
- A loop without a fixed count is reported as such, and turns as often as `guess` says.
- Memory traffic is operands read and results written by everything that is not inside a fusion and
  lies in the main memory; of a sliced operand the slice, of an updated one the update.
- A collective moves (n − 1)/n of what it leaves or takes, n devices in its group: an all-gather
  n − 1 times its operand, a reduce-scatter and an all-to-all (n − 1)/n of it, an all-reduce twice
  that, a permutation all of it. An all-to-all of ragged rows moves as many as the smaller of its
  two buffers holds: on the way back that is the one which is filled.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from r1jax.parallel.arithmetic import flops, kernel, ragged_groups, ragged_kernel, read_again
from r1jax.parallel.groups import Groups, groups
from r1jax.parallel.hlo import Array, Computation, Instruction, Program
from r1jax.parallel.loops import Place, bound, trips
from r1jax.parallel.traffic import LIBRARY, traffic

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_TWICE = {"all-reduce"}
_WHOLE = {"collective-permute", "collective-broadcast"}
_HOSTS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class Collective(NamedTuple):
    """One collective, counted over the whole run.

    Attributes:
        kind: one of `KINDS`.
        groups: devices that it joins; () is all.
        sent: bytes that leave a device, all turns together.
        times: how often it runs.
        op_name: scopes it was traced in.
    """

    kind: str
    groups: Groups
    sent: float
    times: float
    op_name: str


class Loop(NamedTuple):
    """A loop whose count depends on data.

    Attributes:
        op_name: scopes it was traced in.
        bound: its most turns, if they can be told.
        turns: those taken.
        flops: arithmetic of all of them, over the whole run.
    """

    op_name: str
    bound: int | None
    turns: float
    flops: float


@dataclass
class Costs:
    """Of one device and one run.

    Attributes:
        flops: by element type.
        traffic: bytes read and written in the main memory.
        collectives: all of them.
        loops: those without a fixed count.
        opaque: {target: runs} of library calls that do not say what they cost.
    """

    flops: dict[str, float] = field(default_factory=dict)
    traffic: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    opaque: dict[str, float] = field(default_factory=dict)

    @property
    def total_flops(self) -> float:
        """Of all types."""
        return sum(self.flops.values())

    def add(self, other: "Costs") -> None:
        """Adds what another part does."""
        for name, n in other.flops.items():
            self.flops[name] = self.flops.get(name, 0.0) + n
        for name, n in other.opaque.items():
            self.opaque[name] = self.opaque.get(name, 0.0) + n
        self.traffic += other.traffic
        self.collectives += other.collectives
        self.loops += other.loops


class Rules(NamedTuple):
    """What the program does not say.

    Attributes:
        devices: in the program, for groups written as "all".
        guess: turns of a loop from its scopes and the most it can take (None: unknown).
        filled: share of the rows of a ragged product that belong to some group.
        apart: devices that hosts send between, over the network: the same of each slice.
        used: share of the turns in which an all-to-all of ragged rows has any, from its scopes.
    """

    devices: int
    guess: Callable[[str, int | None], float]
    filled: float = 1.0
    apart: Groups = ()
    used: Callable[[str], float] = lambda op_name: 1.0


def half(op_name: str, most: int | None) -> float:
    """(n + 1) / 2 of at most n turns: a causal row of blocks, averaged over its queries."""
    del op_name
    return (most + 1) / 2 if most else 1.0


def measure(program: Program, rules: Rules) -> Costs:
    """The costs of one run of the program on one device."""
    return _costs(program, Place(program.computations[program.entry]), 1.0, rules)


def _costs(program: Program, place: Place, times: float, rules: Rules, fused: float = 0.0) -> Costs:
    """Of a computation that runs `times` times; `fused` as for `cost`."""
    total = Costs()
    for one in place.computation.instructions.values():
        total.add(cost(program, one, place, times, rules, fused=fused))
    return total


def cost(
    program: Program,
    one: Instruction,
    place: Place,
    times: float,
    rules: Rules,
    *,
    fused: float = 0.0,
) -> Costs:
    """Of an instruction that runs `times` times, with all that it calls.

    `fused` is 0 outside fusions; in one it is what its arithmetic is to be divided by.
    """
    inner, name = program.computations, callee(program, one)
    if one.opcode == "while":
        return _loop(program, one, place, times, rules)
    if one.opcode == "conditional":
        return _conditional(program, one, place, times, rules)
    if name in inner:
        return _costs(program, Place(inner[name], place.callers), times, rules, fused)
    total, operands = Costs(), arrays(place.computation, one)
    if one.opcode == "fusion" and (fusion := one.called("calls")) in inner:
        groups_of = ragged_groups(one)
        shares = groups_of / rules.filled if groups_of > 1 else max(fused, 1.0)
        total.add(_costs(program, Place(inner[fusion]), times, rules, shares))
    _single(total, one, operands, times / max(fused, 1.0), rules)
    if (kind := _kind(place.computation, one)) is not None:
        total.collectives.append(_collective(kind, one, operands, times, rules))
    if not fused:
        total.traffic += times * traffic(program, place.computation, one)
        total.traffic += times * read_again(one, operands)
    return total


def _single(
    total: Costs, one: Instruction, operands: tuple[Array, ...], times: float, rules: Rules
) -> None:
    n = flops(one, operands)
    if n:
        floats = [a.dtype for a in (*operands, *one.arrays) if a.dtype[0] in "bf" and a.dims]
        name = floats[0] if floats else one.arrays[0].dtype
        n *= rules.filled if ragged_kernel(one) else 1.0
        total.flops[name] = total.flops.get(name, 0.0) + n * times
    elif kernel(one):
        name = one.name.rstrip(".0123456789")
        total.opaque[name] = total.opaque.get(name, 0.0) + times


def _loop(program: Program, one: Instruction, place: Place, times: float, rules: Rules) -> Costs:
    body = program.computations.get(one.called("body") or "")
    if body is None:
        return Costs()
    turns, known = turned(program, one, place, rules)
    found = _costs(program, inside(place, one, body), times * turns, rules)
    if not known:
        most = bound(program, one)
        found.loops.append(Loop(one.op_name, most, turns, found.total_flops))
    return found


def turned(program: Program, loop: Instruction, place: Place, rules: Rules) -> tuple[float, bool]:
    """(turns of a loop that stands at `place`, whether the program says so)."""
    turns = trips(program, loop, place)
    if turns is None:
        return rules.guess(loop.op_name, bound(program, loop)), False
    return turns, True


def inside(place: Place, loop: Instruction, body: Computation) -> Place:
    """The body of a loop that stands at `place`."""
    return Place(body, (*place.callers, (place.computation, loop)))


def _conditional(
    program: Program, one: Instruction, place: Place, times: float, rules: Rules
) -> Costs:
    names = list(branches(one))
    found = [
        _costs(program, Place(program.computations[name], place.callers), times, rules)
        for name in names
        if name in program.computations
    ]
    return max(found, key=lambda costs: costs.total_flops, default=Costs())


def branches(one: Instruction) -> Iterator[str]:
    """Names of the computations of a conditional."""
    many = one.attributes.partition("branch_computations={")[2].partition("}")[0]
    yield from (name.strip().lstrip("%") for name in many.split(",") if name.strip())
    for role in ("true_computation", "false_computation"):
        if (name := one.called(role)) is not None:
            yield name


def callee(program: Program, one: Instruction) -> str | None:
    """The computation that runs in its place. On tpu7x collectives stand in library calls."""
    opcode = one.opcode.removesuffix("-start")
    if opcode in ("call", "async"):
        return one.called("to_apply" if opcode == "call" else "calls")
    found = LIBRARY.search(one.attributes) if opcode == "custom-call" else None
    inner = program.computations.get(found.group(1)) if found else None
    holds = inner and any(_kind(inner, i) for i in inner.instructions.values())
    return inner.name if holds else None


def _kind(computation: Computation, one: Instruction) -> str | None:
    """The kind of a collective; None for anything else, and for copies of one that runs once.

    XLA:TPU copies an overlapped collective into each fusion that hides a piece of it; the one that
    starts it counts. A reduce-scatter is written as an all-reduce in a computation of that name,
    and what crosses the network between slices is sent by hosts.
    """
    if one.opcode == "send" and (hosts := _HOSTS.search(one.attributes)):
        return hosts.group(1).lower().replace("_", "-")
    kind = one.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if "async_collective_fusion_config" in one.attributes:
        starts = (i for i in computation.instructions.values() if _starts(i))
        if not any(one.name in start.operands for start in starts):
            return None
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind


def _starts(one: Instruction) -> bool:
    return one.opcode == "custom-call" and "AsyncCollectiveStart" in one.attributes


def _collective(
    kind: str, one: Instruction, operands: tuple[Array, ...], times: float, rules: Rules
) -> Collective:
    found = rules.apart if one.opcode == "send" else groups(one)
    n = len(found[0]) if found else rules.devices
    size = sum(a.bytes for a in operands)
    if kind == "ragged-all-to-all":
        size = min(a.bytes for a in operands[:2]) * rules.used(one.op_name)
    if kind in _WHOLE:
        sent = size
    elif kind == "all-gather":
        sent = size * (n - 1)
    else:
        sent = size * (n - 1) / n * (2 if kind in _TWICE else 1)
    return Collective(kind, found, sent * times, times, one.op_name)


def arrays(computation: Computation, one: Instruction) -> tuple[Array, ...]:
    """Arrays of all operands."""
    found = (computation.instructions.get(name) for name in one.operands)
    return tuple(a for operand in found if operand is not None for a in operand.arrays)
