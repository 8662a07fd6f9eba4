# SPDX-License-Identifier: Apache-2.0
"""The expert-parallel load balancer: one example by hand, and what holds for all loads."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.parallel.eplb import balanced_packs, copies, hierarchical, spread_out

LOADS = st.lists(st.integers(0, 1000), min_size=8, max_size=8).map(np.array)


def test_an_example_by_hand():
    """Loads 90, 30, 20, 10 | 40, 10, 10, 10 of two groups; 12 slots, 4 devices, 2 nodes.

    The first group, 150, gets a node, the second, 70, the other. On the first node two copies more:
    90 → 45, 45, then 45 → 30, 30, 30. Packs of three: 30, 30, 30, 30, 20, 10 in order of weight:
    one each twice, then 20 and 10: 80 and 70. On the second 40 → 20, 20 → 13.3 thrice: 13.3, 13.3,
    13.3, 10, 10, 10: 13.3 + 13.3 + 10 and 13.3 + 10 + 10.
    """
    load = np.array([90, 30, 20, 10, 40, 10, 10, 10])
    found = hierarchical(load, slots=12, devices=4, nodes=2, groups=2)
    assert found.copies_E.tolist() == [3, 1, 1, 1, 3, 1, 1, 1]
    np.testing.assert_allclose(found.device_loads(load, 4), [80, 70, 110 / 3, 100 / 3])
    assert sorted(found.expert_S[:3].tolist()) == [0, 0, 2]
    assert sorted(found.expert_S[3:6].tolist()) == [0, 1, 3]
    # Without nodes, the ninth to twelfth slot go to 90 (45), 45 (30), 40 (20), and 90 or 30 (30).
    anywhere = spread_out(load, slots=12, devices=4)
    assert anywhere.copies_E.tolist() == [4, 1, 1, 1, 2, 1, 1, 1]
    assert anywhere.device_loads(load, 4).max() < 80


def test_packs_by_hand():
    assert balanced_packs(np.array([1, 9, 5, 4]), 2).tolist() == [0, 0, 1, 1]
    # The fuller pack has no room for the last item though it is the lighter one.
    assert balanced_packs(np.array([9, 1, 1, 1]), 2).tolist() == [0, 1, 1, 0]


@given(load=LOADS, extra=st.integers(0, 8))
def test_copies_make_the_largest_share_as_small_as_can_be(load, extra):
    found = copies(load, 8 + extra)
    assert found.sum() == 8 + extra
    assert found.min() >= 1
    # With a smaller largest share, item e would need more than its load / share copies.
    largest = (load / found).max()
    needed = np.maximum(np.ceil(load / max(largest * 0.999, 1e-9)), 1)
    assert largest == 0 or needed.sum() > 8 + extra


@given(load=LOADS)
def test_a_node_holds_whole_groups_and_every_slot_is_used(load):
    found = hierarchical(load, slots=16, devices=4, nodes=2, groups=4)
    assert (np.bincount(found.expert_S, minlength=8) == found.copies_E).all()
    nodes = [set((half // 2).tolist()) for half in found.expert_S.reshape(2, -1)]
    assert not nodes[0] & nodes[1]
    np.testing.assert_allclose(found.device_loads(load, 4).sum(), load.sum())


@given(load=LOADS)
def test_packs_are_within_one_item_of_the_best(load):
    """The fullest exceeds the best possible by one item at most."""
    pack = balanced_packs(load, 2)
    sums = np.bincount(pack, weights=load, minlength=2)
    assert np.bincount(pack).tolist() == [4, 4]
    best = min(
        max(load[list(c)].sum(), load.sum() - load[list(c)].sum())
        for c in itertools.combinations(range(8), 4)
    )
    assert best <= sums.max() <= best + load.max()


def test_redundant_experts_even_out_skewed_loads():
    """256 experts with Zipf loads on 64 devices, 32 slots more: the fullest is near the mean."""
    rng = np.random.default_rng(0)
    load = rng.permutation(1e6 / np.arange(1, 257))
    before = load.reshape(64, 4).sum(1).max() / load.sum() * 64
    after = spread_out(load, slots=320, devices=64).device_loads(load, 64)
    assert before > 8
    assert after.max() / after.mean() < 1.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balanced_packs(np.ones(5), 2), "5 items do not fill packs=2"),
        (lambda: copies(np.ones(5), 4), "slots=4 cannot hold 5 experts"),
        (
            lambda: hierarchical(np.ones(8), slots=8, devices=3, nodes=2, groups=2),
            "devices=3 must be divisible by 2",
        ),
        (
            lambda: hierarchical(np.ones(8), slots=8, devices=4, nodes=2, groups=3),
            "experts=8 must be divisible by 3",
        ),
    ],
)
def test_what_does_not_divide_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
