# SPDX-License-Identifier: Apache-2.0
"""How long a program takes at the least: each resource at its peak, from the counts of `costs`.

`ASSUMED` says what is taken for granted. The truth lies between the longest of the four times,
where everything overlaps, and their sum, where nothing does, and `schedule` says where; kernels
below their peak come on top.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from r1jax.parallel.costs import Collective, Costs
from r1jax.parallel.groups import Groups, along
from r1jax.parallel.topology import Chip

ASSUMED = (
    "products run at the data sheet's peak, float32 ones as bfloat16",
    "memory traffic is what leaves fusions, at the data sheet's bandwidth",
    "a collective uses both directions of every torus dimension that its group spans",
    "an all-to-all pays a quarter of its longest dimension in hops",
    "what crosses slices does so at the full bandwidth of each device's network",
    "as scheduled: links carry one collective after another, in the order of the program",
)
_EVERYONE = {"all-to-all", "ragged-all-to-all"}


class Spot(NamedTuple):
    """Where a device of the mesh is: its slice, and its chip's place in the torus."""

    slice: int
    chip: tuple[int, ...]


class Times(NamedTuple):
    """Seconds that a step keeps each resource busy on one device."""

    compute: float
    memory: float
    interconnect: float
    network: float

    @property
    def overlapped(self) -> float:
        """If all four overlap."""
        return max(self)

    @property
    def serial(self) -> float:
        """If none do."""
        return sum(self)


def spots(devices: Sequence[Any]) -> list[Spot]:
    """Of devices in the order of the mesh; those without coordinates are one chip each in a row."""
    found = []
    for n, device in enumerate(devices):
        chip = getattr(device, "coords", None)
        found.append(Spot(getattr(device, "slice_index", 0) or 0, tuple(chip or (n,))))
    return found


def counterparts(where: Sequence[Spot]) -> Groups:
    """Devices, by number, that stand at the same place in the order of each slice."""
    slices: dict[int, list[int]] = {}
    for n, spot in enumerate(where):
        slices.setdefault(spot.slice, []).append(n)
    return tuple(zip(*slices.values(), strict=True))


def times(costs: Costs, chip: Chip, where: Sequence[Spot]) -> Times:
    """The four times of a program on devices that lie so."""
    compute = sum(n / _peak(chip, dtype) for dtype, n in costs.flops.items())
    interconnect = network = 0.0
    known: dict[Any, tuple[float, float]] = {}
    for one in costs.collectives:
        key = (one.kind in _EVERYONE, one.groups)
        if key not in known:
            known[key] = seconds_a_byte(one, chip, where)
        inside, between = known[key]
        interconnect += one.sent * inside
        network += one.sent * between
    return Times(compute, costs.traffic / chip.memory, interconnect, network)


def seconds_a_byte(one: Collective, chip: Chip, where: Sequence[Spot]) -> tuple[float, float]:
    """(over the interconnect, over the network) for each byte that a device sends."""
    group = one.groups[0] if one.groups else range(len(where))
    if one.kind == "collective-permute":
        group = max(one.groups, key=lambda pair: _distance(where, pair), default=group)
    places = [where[i] for i in group if i < len(where)]
    n, slices = len(places), len({p.slice for p in places})
    if n < 2:
        return 0.0, 0.0
    extents = [len(set(axis)) for axis in zip(*(p.chip for p in places), strict=True)]
    spans = [extent for extent in extents if extent > 1]
    if not spans:  # devices of one chip, or of each slice the same
        return (0.0, 1 / chip.network) if slices > 1 else (1 / chip.memory, 0.0)
    everyone = one.kind in _EVERYONE
    links = 2 * len(spans) * chip.link
    hops = max(max(spans) / 4 * len(spans), 1.0) if everyone else 1.0
    crossing = 0.0
    if slices > 1:
        crossing = (n - n / slices if everyone else slices - 1) / (n - 1)
    return hops / links, crossing / chip.network


def _distance(where: Sequence[Spot], pair: tuple[int, ...]) -> tuple[int, int]:
    a, b = (where[i] for i in pair)
    return int(a.slice != b.slice), sum(x != y for x, y in zip(a.chip, b.chip, strict=True))


def _peak(chip: Chip, dtype: str) -> float:
    return chip.fp8 if dtype.startswith("f8") else chip.bf16


def by_axis(costs: Costs, mesh: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """{kind: {axes, as "fsdp+expert": bytes sent}}."""
    found: dict[str, dict[str, float]] = {}
    for one in costs.collectives:
        axes = "+".join(along(one.groups, mesh)) or "none"
        kinds = found.setdefault(one.kind, {})
        kinds[axes] = kinds.get(axes, 0.0) + one.sent
    return found
