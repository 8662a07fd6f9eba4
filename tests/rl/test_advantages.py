# SPDX-License-Identifier: Apache-2.0
"""Advantages: hand-computed numbers, every degenerate group, dtypes, and the length penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.rl import (
    group_advantages,
    informative_groups,
    leave_one_out_advantages,
    overlong_penalty,
)

# One division and one square root in float32.
FLOAT32 = 1e-6
SCALES = ("group", "batch", "none")


def test_hand_computed_group():
    # Mean 0.5, population deviation 0.5; sample deviation sqrt(1/3).
    reward_B = jnp.array([1.0, 0.0, 0.0, 1.0])
    expected = np.array([1.0, -1.0, -1.0, 1.0])
    np.testing.assert_allclose(
        group_advantages(reward_B, group_size=4, eps=0.0), expected, rtol=FLOAT32
    )
    np.testing.assert_allclose(
        group_advantages(reward_B, group_size=4, eps=0.0, ddof=1),
        expected * 0.5 * np.sqrt(3.0),
        rtol=FLOAT32,
    )
    # eps is added to the deviation, not to the variance.
    np.testing.assert_allclose(
        group_advantages(reward_B, group_size=4, eps=0.5), expected / 2, rtol=FLOAT32
    )


def test_scale_changes_the_divisor_and_never_the_mean():
    reward_B = jnp.array([1.0, 3.0, 10.0, 16.0])
    centred = np.array([-1.0, 1.0, -3.0, 3.0])
    for scale, divisor in {
        "group": np.array([1.0, 1.0, 3.0, 3.0]),
        "batch": np.std([1.0, 3.0, 10.0, 16.0]),
        "none": 1.0,
    }.items():
        result = group_advantages(reward_B, group_size=2, scale=scale, eps=0.0)
        np.testing.assert_allclose(result, centred / divisor, rtol=FLOAT32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1.0 / 3.0, 1e6 + 0.1])
@pytest.mark.parametrize("group_size", [1, 3, 7, 16])
def test_equal_rewards_have_exactly_no_advantage(scale, value, group_size):
    # The second group keeps the deviation of the batch away from 0.
    contrast = np.arange(group_size) * 1.0
    reward_B = jnp.asarray(np.concatenate([np.full(group_size, value), contrast]))
    advantage_B = group_advantages(reward_B, group_size=group_size, scale=scale)
    np.testing.assert_array_equal(advantage_B[:group_size], 0.0)
    assert np.any(advantage_B[group_size:] != 0) == (group_size > 1)
    np.testing.assert_array_equal(
        informative_groups(reward_B, group_size=group_size), [False, group_size > 1]
    )


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_invalid_reward_is_left_out(bad, scale, ddof):
    """The others get what they would get without it; it gets 0."""
    with_bad = jnp.array([1.0, bad, 0.0, 0.5, 2.0, 2.0, 3.0, 1.0])
    advantage_B = group_advantages(with_bad, group_size=4, scale=scale, ddof=ddof, eps=0.0)
    valid = np.array([1.0, 0.0, 0.5])
    divisor = {
        "group": np.std(valid, ddof=ddof),
        "batch": np.std([1.0, 0.0, 0.5, 2.0, 2.0, 3.0, 1.0], ddof=ddof),
        "none": 1.0,
    }[scale]
    np.testing.assert_allclose(
        advantage_B[jnp.array([0, 2, 3])], (valid - 0.5) / divisor, rtol=1e-5
    )
    assert advantage_B[1] == 0.0


@pytest.mark.parametrize("scale", SCALES)
def test_nothing_valid_is_no_advantage(scale):
    reward_B = jnp.array([jnp.nan, jnp.nan, 1.0, jnp.nan])
    for ddof in (0, 1):
        advantage_B = group_advantages(reward_B, group_size=2, scale=scale, ddof=ddof)
        np.testing.assert_array_equal(advantage_B, 0.0)
    np.testing.assert_array_equal(informative_groups(reward_B, group_size=2), [False, False])


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int32, jnp.bfloat16, jnp.float16])
def test_every_dtype_becomes_float32(dtype):
    reward_B = jnp.array([1, 0, 0, 0]).astype(dtype)
    advantage_B = group_advantages(reward_B, group_size=4, eps=0.0)
    assert advantage_B.dtype == jnp.float32
    root3 = np.sqrt(3.0)
    np.testing.assert_allclose(
        advantage_B, [root3, -1 / root3, -1 / root3, -1 / root3], rtol=FLOAT32
    )


def test_fractions_survive():
    """Partial credit ranks completions; cast to integers these groups would have no contrast."""
    reward_B = jnp.array([0.1, 0.9, 0.5, 0.5])
    advantage_B = group_advantages(reward_B, group_size=4, scale="none")
    np.testing.assert_allclose(advantage_B, [-0.4, 0.4, 0.0, 0.0], atol=FLOAT32)
    assert informative_groups(reward_B, group_size=4).all()


def test_numpy_and_lists_are_accepted():
    expected = group_advantages(jnp.array([1.0, 0.0]), group_size=2)
    np.testing.assert_array_equal(group_advantages(np.array([1.0, 0.0]), group_size=2), expected)
    np.testing.assert_array_equal(group_advantages([True, False], group_size=2), expected)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="group_size=3"):
        group_advantages(jnp.zeros(4), group_size=3)
    with pytest.raises(ValueError, match="group_size=0"):
        group_advantages(jnp.zeros(4), group_size=0)
    with pytest.raises(ValueError, match="scale='sequence'"):
        group_advantages(jnp.zeros(4), group_size=2, scale="sequence")
    with pytest.raises(AssertionError, match="rank"):
        group_advantages(jnp.zeros((2, 2)), group_size=2)


# Quarters are exact in float32, so equal rewards are equal whatever is added to them.
QUARTERS = st.integers(-8, 8).map(lambda n: n / 4)


@settings(deadline=None, max_examples=50)
@given(rewards=st.lists(QUARTERS, min_size=12, max_size=12), shift=QUARTERS)
def test_shift_invariant_centred_and_unit(rewards, shift):
    reward_B = jnp.array(rewards)
    advantage_PG = np.asarray(group_advantages(reward_B, group_size=4, eps=0.0)).reshape(3, 4)
    assert np.all(np.isfinite(advantage_PG))
    np.testing.assert_allclose(advantage_PG.mean(axis=1), 0.0, atol=FLOAT32)
    informative = np.asarray(informative_groups(reward_B, group_size=4))
    np.testing.assert_allclose(advantage_PG.std(axis=1), informative * 1.0, rtol=1e-5)
    shifted = group_advantages(reward_B + shift, group_size=4, eps=0.0)
    np.testing.assert_allclose(shifted, advantage_PG.reshape(-1), atol=1e-5)


def test_leave_one_out_by_hand():
    # The means of the others are 2, 3, 4; of two samples each is the other's baseline.
    reward_B = jnp.array([5.0, 3.0, 1.0])
    found = leave_one_out_advantages(reward_B, group_size=3)
    np.testing.assert_allclose(found, [3.0, 0.0, -3.0], rtol=FLOAT32)
    found = leave_one_out_advantages(jnp.array([5.0, 3.0, 0.0, 1.0]), group_size=2)
    np.testing.assert_allclose(found, [2.0, -2.0, -1.0, 1.0], rtol=FLOAT32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_leave_one_out_without_contrast_or_reward(bad):
    found = leave_one_out_advantages(jnp.array([1.0, bad, 0.0, 0.5, 2.0, 2.0]), group_size=3)
    np.testing.assert_allclose(found, [1.0, 0.0, -1.0, -1.5, 0.75, 0.75], rtol=FLOAT32)
    alone = jnp.array([bad, 3.0, bad] + [0.1] * 3)
    np.testing.assert_array_equal(leave_one_out_advantages(alone, group_size=3), 0.0)
    np.testing.assert_array_equal(leave_one_out_advantages(alone[1:2], group_size=1), 0.0)
    assert leave_one_out_advantages([True, False], group_size=2).dtype == jnp.float32
    with pytest.raises(ValueError, match="group_size=4"):
        leave_one_out_advantages(alone, group_size=4)


@settings(deadline=None, max_examples=50)
@given(rewards=st.lists(QUARTERS, min_size=12, max_size=12))
def test_leave_one_out_equals_the_loop(rewards):
    """Also: the baseline of a sample is the same whatever its own reward is."""
    groups = np.array(rewards).reshape(3, 4)
    expected = [[g[i] - np.delete(g, i).mean() for i in range(4)] for g in groups]
    found = leave_one_out_advantages(jnp.array(rewards), group_size=4)
    np.testing.assert_allclose(found, np.ravel(expected), atol=1e-5)
    scaled = group_advantages(jnp.array(rewards), group_size=4, scale="none") * 4 / 3
    np.testing.assert_allclose(found, scaled, atol=1e-5)


def test_jit_and_vmap_change_nothing():
    reward_KB = jnp.array([[1.0, 0.0, jnp.nan, 0.5], [1.0, 1.0, 0.0, 0.25]])

    def advantages(reward_B):
        return group_advantages(reward_B, group_size=2, scale="batch")

    one_by_one = jnp.stack([advantages(reward_B) for reward_B in reward_KB])
    np.testing.assert_allclose(jax.jit(jax.vmap(advantages))(reward_KB), one_by_one, rtol=FLOAT32)


def test_overlong_penalty_ramp():
    # 100 tokens allowed, the last 20 on a ramp: free up to 80, halfway at 90, -1 from 100 on.
    length_B = jnp.array([0, 80, 85, 90, 100, 500])
    penalty_B = overlong_penalty(length_B, max_length=100, buffer=20)
    np.testing.assert_allclose(penalty_B, [0.0, 0.0, -0.25, -0.5, -1.0, -1.0], rtol=FLOAT32)
    on_host_B = overlong_penalty(np.asarray(length_B), max_length=100, buffer=20)
    assert type(on_host_B) is np.ndarray, "judges would wait for a device that samples"
    assert on_host_B.dtype == penalty_B.dtype == np.float32
    np.testing.assert_array_equal(on_host_B, penalty_B)
    with pytest.raises(ValueError, match="buffer=0"):
        overlong_penalty(length_B, max_length=100, buffer=0)
    with pytest.raises(ValueError, match="buffer=101"):
        overlong_penalty(length_B, max_length=100, buffer=101)
