# SPDX-License-Identifier: Apache-2.0
"""How long a compiled program takes in the order that the compiler gave it.

The text of a compiled program is scheduled: instructions run from top to bottom, and what is
asynchronous is begun by one and waited for by another. A walk over it with a clock gives a time
between the two bounds of `roofline`: what stands between the beginning of a collective and the wait
for it hides it, and nothing else does. Rules, each a decision:

- The core does one thing at a time; memory, interconnect and network serve those that ask in the
  order in which they ask.
- An instruction takes the longer of its arithmetic and its memory traffic.
- A synchronous collective is waited for at once, one that is begun when its `-done` comes.
- A turn of a loop takes as long as the next, and nothing of it is left running.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from r1jax.parallel.costs import Costs, Rules, branches, callee, cost, inside, turned
from r1jax.parallel.hlo import Instruction, Program
from r1jax.parallel.loops import Place
from r1jax.parallel.roofline import Spot, Times, times
from r1jax.parallel.topology import Chip


class Need(NamedTuple):
    """What an instruction keeps busy, and the kind of collective that it is, if it is one."""

    times: Times
    kind: str | None


class End(NamedTuple):
    """When something is done: all of it, and what of it goes over links."""

    all: float
    sent: float
    kind: str | None


@dataclass
class Scheduled:
    """Of one run on one device, in seconds.

    Attributes:
        seconds: from the first instruction to the last.
        moved: {kind: that its collectives keep interconnect and network busy}.
        waited: {kind: that the core does nothing but wait for them}.
        busy: of memory, interconnect and network.
    """

    seconds: float = 0.0
    moved: dict[str, float] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)
    busy: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


def scheduled(program: Program, rules: Rules, chip: Chip, where: Sequence[Spot]) -> Scheduled:
    """The time of a program on devices that lie so."""

    def need(one: Instruction, place: Place) -> Need:
        found: Costs = cost(program, one, place, 1.0, rules)
        kind = found.collectives[0].kind if found.collectives else None
        return Need(times(found, chip, where), kind)

    return _run(program, Place(program.computations[program.entry]), rules, need)


class _Clock:
    """Where the run of one computation stands."""

    def __init__(self):
        self.now, self.total = 0.0, Scheduled()
        self.free = [0.0, 0.0, 0.0]  # when memory and both kinds of links have done what was asked

    def ask(self, need: Need) -> End:
        """When all that is asked for now will be done."""
        ends = []
        for i, seconds in enumerate(need.times[1:]):
            self.total.busy[i] += seconds
            if seconds:
                self.free[i] = max(self.free[i], self.now) + seconds
            ends.append(self.free[i] if seconds else self.now)
        if need.kind is not None:
            _add(self.total.moved, need.kind, need.times.interconnect + need.times.network)
        return End(max(self.now + need.times.compute, *ends), max(ends[1:]), need.kind)

    def wait(self, end: End) -> None:
        """The core does nothing until then."""
        if end.kind is not None:
            _add(self.total.waited, end.kind, max(end.sent - self.now, 0.0))
        self.now = max(self.now, end.all)

    def pass_by(self, inner: Scheduled, turns: float, under_way: dict[str, Any]) -> None:
        """Another computation runs so often; what it sends holds up what is under way."""
        held = turns * sum(inner.busy[1:])
        for name, end in under_way.items():
            if isinstance(end, End) and end.kind is not None and end.sent > self.now:
                under_way[name] = End(max(end.all, end.sent + held), end.sent + held, end.kind)
        for i, seconds in enumerate(inner.busy):
            self.total.busy[i] += turns * seconds
            self.free[i] = max(self.free[i], self.now) + turns * seconds
        for mine, its in ((self.total.moved, inner.moved), (self.total.waited, inner.waited)):
            for kind, seconds in its.items():
                _add(mine, kind, turns * seconds)
        self.now += turns * inner.seconds


def _run(
    program: Program, place: Place, rules: Rules, need: Callable[[Instruction, Place], Need]
) -> Scheduled:
    clock, under_way = _Clock(), {}
    for one in place.computation.instructions.values():
        places, turns = _inner(program, one, place, rules)
        if places:
            runs = [_run(program, p, rules, need) for p in places]
            clock.pass_by(max(runs, key=lambda run: run.seconds), turns, under_way)
        else:
            _one(clock, one, lambda one=one: need(one, place), under_way)
    clock.total.seconds = max(clock.now, *clock.free)
    return clock.total


def _inner(
    program: Program, one: Instruction, place: Place, rules: Rules
) -> tuple[list[Place], float]:
    """(what runs in place of an instruction, one of these, how often); [] if it stands itself."""
    turns, found = 1.0, program.computations
    if one.opcode == "while" and (body := found.get(one.called("body") or "")):
        return [inside(place, one, body)], turned(program, one, place, rules)[0]
    names = list(branches(one)) if one.opcode == "conditional" else []
    if one.opcode == "call" or one.opcode == "custom-call":
        names = [callee(program, one)]
    return [Place(found[name], place.callers) for name in names if name in found], turns


def _one(
    clock: _Clock, one: Instruction, need: Callable[[], Need], under_way: dict[str, End | Need]
) -> None:
    """An instruction that runs, begins something, hands it on or waits for it."""
    begun = under_way.get(one.operands[0]) if one.operands else None
    if one.opcode.endswith("-done"):
        if isinstance(begun, End):
            clock.wait(begun)
    elif one.opcode.endswith("-update") and begun is not None:
        # Sparse cores are told early what to do, and later with what.
        asked = begun if isinstance(begun, Need) else need()
        under_way[one.name] = clock.ask(asked) if any(asked.times) else begun
    elif one.opcode == "async-start" and not one.operands:
        under_way[one.name] = need()
    elif one.opcode.endswith("-start") or one.opcode in ("send", "recv"):
        under_way[one.name] = clock.ask(need())
    else:
        clock.wait(clock.ask(need()))


def _add(sums: dict[str, float], name: str, seconds: float) -> None:
    sums[name] = sums.get(name, 0.0) + seconds
