# SPDX-License-Identifier: Apache-2.0
"""Bounds on time against hand-computed ones, for devices in a torus, on one chip, in two slices."""

import types

import pytest

from r1jax.parallel import roofline
from r1jax.parallel.costs import Collective, Costs
from r1jax.parallel.roofline import Spot
from r1jax.parallel.topology import Chip

CHIP = Chip(1e9, 100e12, 200e12, 1e12, 10e9, 1e9, 2)
GRID = [Spot(0, (x, y)) for y in range(4) for x in range(8)]  # device 8y + x
ROW, COLUMN = tuple(range(8)), tuple(range(0, 32, 8))


def sent(kind, groups, gb=1.0):
    return Collective(kind, groups, gb * 1e9, 1, "")


@pytest.mark.parametrize(
    ("kind", "groups", "seconds"),
    [
        ("all-gather", (ROW,), 1 / 20),  # both directions of one dimension
        ("all-gather", (COLUMN,), 1 / 20),
        ("all-gather", (), 1 / 40),  # of both dimensions
        ("all-reduce", ((0, 1, 8, 9),), 1 / 40),
        ("all-to-all", (ROW,), 8 / 4 / 20),  # a quarter of eight devices in hops
        ("all-to-all", ((0, 1),), 1 / 20),  # never less than its bytes
        ("ragged-all-to-all", (), 8 / 4 * 2 / 40),
        ("collective-permute", ((0, 1), (1, 0)), 1 / 20),
        ("all-reduce", ((3,),), 0.0),
    ],
)
def test_a_byte_over_the_torus(kind, groups, seconds):
    inside, between = roofline.seconds_a_byte(sent(kind, groups), CHIP, GRID)
    assert inside * 1e9 == pytest.approx(seconds)
    assert between == 0.0


def test_devices_of_one_chip_talk_at_the_speed_of_memory():
    pair = [Spot(0, (0, 0)), Spot(0, (0, 0))]
    assert roofline.seconds_a_byte(sent("all-gather", ((0, 1),)), CHIP, pair) == (1e-12, 0.0)


def test_between_slices():
    two = [Spot(s, (x,)) for s in (0, 1) for x in range(4)]
    whole = roofline.seconds_a_byte(sent("all-reduce", ()), CHIP, two)
    assert whole[1] * 1e9 == pytest.approx(1 / 7), "one of seven parts leaves the slice"
    everyone = roofline.seconds_a_byte(sent("all-to-all", ()), CHIP, two)
    assert everyone[1] * 1e9 == pytest.approx(4 / 7), "four of seven destinations are elsewhere"
    assert roofline.counterparts(two) == ((0, 4), (1, 5), (2, 6), (3, 7))
    turned = [Spot(s, (x,)) for x in range(2) for s in (0, 1)]
    assert roofline.counterparts(turned) == ((0, 1), (2, 3))
    across = roofline.seconds_a_byte(sent("all-reduce", ((0, 4),)), CHIP, two)
    assert across == (0.0, pytest.approx(1e-9)), "hosts send it"


def test_times_of_a_program():
    costs = Costs(
        flops={"bf16": 50e12, "f8e4m3fn": 100e12, "f32": 50e12},
        traffic=0.25e12,
        collectives=[sent("all-gather", (ROW,), 2.0), sent("all-to-all", (ROW,))],
    )
    found = roofline.times(costs, CHIP, GRID)
    assert found == pytest.approx((0.5 + 0.5 + 0.5, 0.25, 0.1 + 0.1, 0.0))
    assert found.overlapped == 1.5
    assert found.serial == pytest.approx(1.95)


def test_bytes_by_kind_and_axis():
    costs = Costs(
        collectives=[sent("all-gather", (ROW,)), sent("all-gather", (ROW,)), sent("all-to-all", ())]
    )
    assert roofline.by_axis(costs, dict(fsdp=4, expert=8)) == {
        "all-gather": {"expert": 2e9},
        "all-to-all": {"fsdp+expert": 1e9},
    }


def test_where_devices_are():
    chip = types.SimpleNamespace(coords=[1, 2, 0], slice_index=1)
    assert roofline.spots([chip, object()]) == [Spot(1, (1, 2, 0)), Spot(0, (1,))]
