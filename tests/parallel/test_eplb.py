# SPDX-License-Identifier: Apache-2.0
"""The expert-parallel load balancer: one example by hand, and what holds for all loads."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.parallel import eplb

# As they run: inside programs. One by one their operations would compile anew in every call.
balanced_packs = jax.jit(eplb.balanced_packs, static_argnums=1)
copies = jax.jit(eplb.copies, static_argnums=1)
beside = jax.jit(eplb.beside, static_argnames=("slots", "devices"))
spread_out = jax.jit(eplb.spread_out, static_argnames=("slots", "devices"))
hierarchical = jax.jit(eplb.hierarchical, static_argnames=("slots", "devices", "nodes", "groups"))
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
    assert np.bincount(found.expert_S).tolist() == [3, 1, 1, 1, 3, 1, 1, 1]
    np.testing.assert_allclose(found.device_loads(load, 4), [80, 70, 110 / 3, 100 / 3])
    assert sorted(found.expert_S[:3].tolist()) == [0, 0, 2]
    assert sorted(found.expert_S[3:6].tolist()) == [0, 1, 3]
    # Without nodes, the ninth to twelfth slot go to 90 (45), 45 (30), 40 (20), and 90 or 30 (30).
    anywhere = spread_out(load, slots=12, devices=4)
    assert np.bincount(anywhere.expert_S).tolist() == [4, 1, 1, 1, 2, 1, 1, 1]
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
    copies_E = np.bincount(found.expert_S, minlength=8)
    np.testing.assert_allclose(found.share_S, 1 / copies_E[found.expert_S])
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


def test_beside_by_hand():
    """Loads 90, 10 | 20, 20 | 10, 10 | 30, 30 on four devices with a slot more each: mean 55.

    The third, 20, takes 35 of the first expert: the first device is left with 65. The second, 40,
    takes 10 more. Now the fourth is the fullest, 60, and no device with a slot is below the mean.
    """
    load = np.array([90, 10, 20, 20, 10, 10, 30, 30])
    found = beside(load, slots=12, devices=4)
    assert found.expert_S.tolist() == [0, 1, 8, 2, 3, 0, 4, 5, 0, 6, 7, 8]
    share = [45 / 90, 1, 0, 1, 1, 10 / 90, 1, 1, 35 / 90, 1, 1, 0]
    np.testing.assert_allclose(found.share_S, share, rtol=1e-6)
    np.testing.assert_allclose(found.device_loads(load, 4), [55, 50, 55, 60], rtol=1e-6)


@given(load=LOADS)
def test_beside_moves_none_loses_none_and_makes_no_device_fuller(load):
    found = beside(load, slots=16, devices=4)
    own_nE = np.asarray(found.expert_S).reshape(4, 4)[:, :2]
    np.testing.assert_array_equal(own_nE.reshape(-1), np.arange(8))
    whole_E = np.bincount(found.expert_S, weights=found.share_S, minlength=9)
    np.testing.assert_allclose(whole_E, [1] * 8 + [0], atol=1e-5)
    assert (np.asarray(found.share_S) >= 0).all()
    before, after = load.reshape(4, 2).sum(1), found.device_loads(load, 4)
    assert after.max() <= before.max() * (1 + 1e-5)
    # With two slots a device all of a surplus of one device finds room.
    if (before > before.mean()).sum() <= 1:
        assert after.max() <= before.mean() * (1 + 1e-5)


def test_a_copy_a_device_evens_out_skewed_loads():
    """256 experts with Zipf loads: the fullest of 64 devices is within 7 % of the mean."""
    load = np.random.default_rng(0).permutation(1e6 / np.arange(1, 257))
    before = load.reshape(64, 4).sum(1)
    after = beside(load, slots=320, devices=64).device_loads(load, 64)
    assert before.max() > 10 * before.mean()
    assert after.max() < 1.07 * after.mean()


@given(load=LOADS, start=st.integers(0, 2**31 - 1))
def test_copies_take_turns_by_their_shares(load, start):
    """Whatever number the first token has, even one after which numbers wrap round."""
    found = beside(load, slots=16, devices=4)
    turn = (start + np.arange(200)).astype(np.int64).astype(np.int32)
    index = np.array([np.arange(9)] * 200, np.int32)
    slot = np.asarray(found.slots(index, turn, 8))
    assert (slot[:, 8] == 16).all()
    np.testing.assert_array_equal(np.asarray(found.expert_S)[slot[:, :8]], index[:, :8])
    taken = np.bincount(slot[:, :8].reshape(-1), minlength=16)
    assert np.abs(taken - 200 * np.asarray(found.share_S)).max() < 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balanced_packs(np.ones(5), 2), "5 items do not fill packs=2"),
        (lambda: copies(np.ones(5), 4), "slots=4 cannot hold 5 experts"),
        (lambda: beside(np.ones(8), slots=11, devices=4), "8 experts in slots=11 do not fill"),
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
