# SPDX-License-Identifier: Apache-2.0
"""Advantages by token: golden values of rlax and verl, hand-computed numbers, padding and holes."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.rl import (
    discounted_sum,
    gae,
    k1,
    leave_one_out_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    returns_to_go,
    token_rewards,
    whiten,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RLAX = json.loads((GOLDEN / "ppo_rlax.json").read_text())
VERL = json.loads((GOLDEN / "ppo_verl.json").read_text())
# The same formula in float64, in another order of operations.
FLOAT64 = 1e-12
# verl adds 1e-8 to the variance and r1jax to the deviation, both of order 1.
EPS = 1e-7
# Sums of up to 32 float32 numbers of order 1.
FLOAT32 = 1e-5
GAE_CASES = {
    "usual": {"gamma": 1.0, "lam": 0.95},
    "discounted": {"gamma": 0.9, "lam": 0.7},
    "one_step": {"gamma": 0.99, "lam": 0.0},
    "monte_carlo": {"gamma": 1.0, "lam": 1.0},
    "discounts_by_token": {"gamma": np.asarray(RLAX["inputs"]["discount"]), "lam": 0.9},
}


def draw(seed=0, rows=4, length=6):
    """(reward, value, mask), float32; masks with holes, and some rows without a token."""
    rng = np.random.default_rng(seed)
    reward_BT, value_BT = rng.normal(size=(2, rows, length)).astype(np.float32)
    return reward_BT, value_BT, rng.random((rows, length)) < rng.random((rows, 1))


def naive_gae(reward_T, value_T, mask_T, gamma, lam):
    """One row without its masked positions, by sums of discounted errors: no recursion."""
    kept = np.flatnonzero(mask_T)
    value = np.append(np.asarray(value_T, np.float64)[kept], 0.0)
    delta = np.asarray(reward_T, np.float64)[kept] + gamma * value[1:] - value[:-1]
    advantage_T = np.zeros(len(mask_T))
    for i, t in enumerate(kept):
        advantage_T[t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
    return advantage_T


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, FLOAT64), (np.float32, FLOAT32)], ids=["64", "32"]
)
@pytest.mark.parametrize("case", GAE_CASES)
def test_gae_equals_rlax(case, dtype, tolerance):
    x = {name: np.asarray(v) for name, v in RLAX["inputs"].items()}
    mask_BT = np.arange(x["reward"].shape[1]) < x["length"][:, None]
    with jax.enable_x64(dtype is np.float64):
        reward_BT, value_BT, bootstrap_B = (
            jnp.asarray(x[name], dtype) for name in ("reward", "value", "bootstrap")
        )
        options = {k: jnp.asarray(v, dtype) for k, v in GAE_CASES[case].items()}
        found = jax.jit(gae)(reward_BT, value_BT, mask_BT, bootstrap_B=bootstrap_B, **options)
    assert found.advantage_BT.dtype == found.target_BT.dtype == dtype
    for i, expected in enumerate(RLAX["gae"][case]):
        n = len(expected)
        np.testing.assert_allclose(found.advantage_BT[i, :n], expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(
            found.target_BT[i, :n], expected + x["value"][i, :n], rtol=0, atol=tolerance
        )
        np.testing.assert_array_equal(found.advantage_BT[i, n:], 0.0)
        np.testing.assert_array_equal(found.target_BT[i, n:], 0.0)


def test_advantages_equal_verl():
    """GAE over a hole, RLOO, REINFORCE++ and its baseline variant, rows of unequal length."""
    with jax.enable_x64(True):
        x = {name: jnp.asarray(v) for name, v in VERL["inputs"].items()}
        mask_BT = x["mask"]
        estimate = gae(x["reward"], x["value"], mask_BT, gamma=0.97, lam=0.9)
        found = {
            "leave_one_out": leave_one_out_advantages(x["outcome"], group_size=4)[:, None]
            * mask_BT,
            "returns": returns_to_go(x["reward"], mask_BT, gamma=0.97),
            "reinforce_pp": reinforce_pp_advantages(x["reward"], mask_BT, gamma=0.97, ddof=1),
            "reinforce_pp_baseline": reinforce_pp_baseline_advantages(
                x["outcome"], mask_BT, group_size=4, ddof=1
            ),
        }
        whitened_BT = whiten(estimate.advantage_BT, mask_BT, ddof=1)
    for name, value in found.items():
        np.testing.assert_allclose(value, VERL[name], rtol=0, atol=EPS, err_msg=name)
    np.testing.assert_allclose(estimate.target_BT, VERL["gae"]["target"], rtol=0, atol=FLOAT64)
    np.testing.assert_allclose(whitened_BT, VERL["gae"]["advantage"], rtol=0, atol=EPS)


def test_gae_by_hand():
    """γ = ½, λ = ½. δ = (0 + ½·4 − 2, 1 + 0 − 4) = (0, −3); A = (0 + ¼·(−3), −3)."""
    reward_BT = jnp.array([[0.0, 1.0, 99.0]])
    value_BT = jnp.array([[2.0, 4.0, 99.0]])
    mask_BT = jnp.array([[1, 1, 0]])
    advantage_BT, target_BT = gae(reward_BT, value_BT, mask_BT, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(advantage_BT, [[-0.75, -3.0, 0.0]])
    # At the last token nothing is left but the reward: the target is it, whatever the value was.
    np.testing.assert_allclose(target_BT, [[1.25, 1.0, 0.0]])
    # Cut short, the last token is followed by the value of what would have come: δ = 1 + ½·6 − 4.
    cut = gae(reward_BT, value_BT, mask_BT, gamma=0.5, lam=0.5, bootstrap_B=jnp.array([6.0]))
    np.testing.assert_allclose(cut.advantage_BT, [[0.0, 0.0, 0.0]])
    np.testing.assert_allclose(cut.target_BT, [[2.0, 4.0, 0.0]])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), gamma=st.floats(0.0, 1.0), lam=st.floats(0.0, 1.0))
def test_gae_equals_the_sums_over_what_is_left_without_padding(seed, gamma, lam):
    reward_BT, value_BT, mask_BT = draw(seed)
    found_BT = jax.jit(gae)(reward_BT, value_BT, mask_BT, gamma=gamma, lam=lam).advantage_BT
    expected_BT = [naive_gae(*row, gamma, lam) for row in zip(*draw(seed), strict=True)]
    np.testing.assert_allclose(found_BT, expected_BT, rtol=0, atol=FLOAT32)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_lambda_one_is_the_return_less_the_value(seed):
    reward_BT, value_BT, mask_BT = draw(seed)
    estimate = gae(reward_BT, value_BT, mask_BT, gamma=0.9, lam=1.0)
    return_BT = returns_to_go(reward_BT, mask_BT, gamma=0.9)
    np.testing.assert_allclose(estimate.target_BT, return_BT, atol=FLOAT32)
    # And λ = 0 on the true values of a deterministic chain has nothing to correct.
    estimate = gae(reward_BT, return_BT, mask_BT, gamma=0.9, lam=0.0)
    np.testing.assert_allclose(estimate.advantage_BT, 0.0, atol=FLOAT32)


def test_token_rewards_by_hand():
    kl_BT = jnp.array([[0.5, 1.0, jnp.nan], [0.25, 0.0, 2.0], [jnp.inf, jnp.nan, 1.0]])
    mask_BT = jnp.array([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    reward_B = jnp.array([3.0, jnp.nan, 7.0])
    found = token_rewards(reward_B, kl_BT, mask_BT, beta=2.0)
    np.testing.assert_allclose(
        found, [[-1.0, 3.0 - 2.0, 0.0], [-0.5, 0.0, jnp.nan], [0.0, 0.0, 0.0]]
    )
    slope = jax.grad(lambda kl: token_rewards(jnp.ones(3), kl, mask_BT, beta=2.0).sum())(kl_BT)
    np.testing.assert_array_equal(slope, 0.0)
    # An integer or boolean reward is a number as any other.
    found = token_rewards(jnp.array([True, False, True]), 0 * mask_BT, mask_BT, beta=2.0)
    np.testing.assert_array_equal(found, [[0, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert found.dtype == jnp.float32


def test_reinforce_pp_by_hand():
    """KL (½, −1 | 0): rewards (−½, 1 + 2 | 1), returns (2.5, 3 | 1)."""
    logp_BT = jnp.array([[-1.0, -2.0], [-1.0, jnp.nan]])
    ref_BT = jnp.array([[-1.5, -1.0], [-1.0, jnp.nan]])
    mask_BT = jnp.array([[1, 1], [1, 0]])
    reward_BT = token_rewards(jnp.array([2.0, 1.0]), k1(logp_BT, ref_BT), mask_BT, beta=1.0)
    np.testing.assert_allclose(reward_BT, [[-0.5, 3.0], [1.0, 0.0]])
    found = reinforce_pp_advantages(reward_BT, mask_BT, eps=0.0)
    values = np.array([2.5, 3.0, 1.0])
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(found, [expected[:2], [expected[2], 0.0]], rtol=FLOAT32)
    discounted = returns_to_go(reward_BT, mask_BT, gamma=0.5)
    np.testing.assert_allclose(discounted, [[1.0, 3.0], [1.0, 0.0]])


def test_reinforce_pp_baseline_by_hand():
    """Centred in the group: (1, −1 | 0, 0); over 2 + 1 + 1 + 1 tokens the mean is 1/5."""
    reward_B = jnp.array([3.0, 1.0, 5.0, 5.0])
    mask_BT = jnp.array([[1, 1], [1, 0], [1, 0], [0, 1]])
    tokens = np.array([1.0, 1.0, -1.0, 0.0, 0.0])
    expected = (tokens - 0.2) / tokens.std()
    found = reinforce_pp_baseline_advantages(reward_B, mask_BT, group_size=2, eps=0.0)
    np.testing.assert_allclose(found[mask_BT == 1], expected, rtol=FLOAT32)
    np.testing.assert_array_equal(found[mask_BT == 0], 0.0)
    # Of equal length, a group without contrast has exactly no advantage.
    found = reinforce_pp_baseline_advantages(reward_B, jnp.ones((4, 2)), group_size=2)
    np.testing.assert_array_equal(found[2:], 0.0)
    np.testing.assert_allclose(found[:2], [[np.sqrt(2)] * 2, [-np.sqrt(2)] * 2], rtol=FLOAT32)


def test_whiten_by_hand():
    x_BT = jnp.array([[1.0, 3.0, jnp.nan], [jnp.inf, 5.0, 7.0]])
    mask_BT = jnp.array([[1, 1, 0], [0, 1, 1]])
    for ddof, deviation in ((0, np.sqrt(5.0)), (1, np.sqrt(20 / 3))):
        expected = np.array([[-3.0, -1.0, 0.0], [0.0, 1.0, 3.0]]) / deviation
        found = whiten(x_BT, mask_BT, ddof=ddof, eps=0.0)
        np.testing.assert_allclose(found, expected, rtol=FLOAT32)
    # What is not a number under the mask stays seen; nothing at all is still 0.
    assert np.isnan(whiten(x_BT, jnp.ones((2, 3)))).all()
    np.testing.assert_array_equal(whiten(x_BT, jnp.zeros((2, 3)), eps=0.0), 0.0)
    # eps is added to the deviation.
    found = whiten(x_BT, mask_BT, eps=np.sqrt(5.0))
    np.testing.assert_allclose(found[0, 0], -1.5 / np.sqrt(5.0), rtol=FLOAT32)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0 / 3.0, 1e6 + 0.1])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_equal_values_whiten_to_exactly_zero(value, eps):
    """The mean of equal fractions is rounded, and that rounding over eps is of order 1."""
    for rows in (1, 7, 33):
        x_BT = jnp.full((rows, 3), value)
        found = whiten(x_BT, jnp.ones((rows, 3)), eps=eps)
        np.testing.assert_array_equal(found, 0.0)
    np.testing.assert_array_equal(whiten(x_BT, jnp.zeros((rows, 3)), ddof=1, eps=eps), 0.0)
    alone = jnp.zeros((rows, 3)).at[2, 1].set(1)
    np.testing.assert_array_equal(whiten(x_BT, alone, ddof=1, eps=eps), 0.0)


# name -> (reward_BT, value_BT, mask_BT) -> advantages [B, T]
BY_TOKEN = {
    "gae": lambda r, v, m: gae(r, v, m, gamma=0.9, lam=0.8).advantage_BT,
    "returns": lambda r, v, m: returns_to_go(r, m, gamma=0.9),
    "reinforce_pp": lambda r, v, m: reinforce_pp_advantages(r, m),
    "baseline": lambda r, v, m: reinforce_pp_baseline_advantages(r[:, 0], m, group_size=2),
    "whiten": lambda r, v, m: whiten(jnp.nan_to_num(r), m),
}
each = pytest.mark.parametrize("name", BY_TOKEN)


@functools.cache
def compiled(name):
    return jax.jit(BY_TOKEN[name])


@each
def test_garbage_under_the_mask_changes_nothing(name):
    reward_BT, value_BT, mask_BT = draw(1)
    mask_BT[:, 0] = True  # the baseline variant reads its rewards there
    bad_values = np.array([np.nan, np.inf, -np.inf, 1e30])
    soil = np.random.default_rng(2).choice(bad_values, mask_BT.shape).astype(np.float32)
    soiled = (np.where(mask_BT, x, soil) for x in (reward_BT, value_BT))
    expected = compiled(name)(reward_BT, value_BT, mask_BT)
    np.testing.assert_array_equal(compiled(name)(*soiled, mask_BT), expected)
    np.testing.assert_array_equal(expected[~mask_BT], 0.0)
    assert np.abs(expected).max() > 0.1
    # More padding on the right, and rows of nothing else, are no part of the batch either.
    wider = (np.pad(x, ((0, 2), (0, 3))) for x in (reward_BT, value_BT, mask_BT))
    np.testing.assert_allclose(compiled(name)(*wider)[:4, :6], expected, atol=FLOAT32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["gae", "returns", "reinforce_pp"])
def test_a_row_without_a_finite_reward_teaches_nothing(name, bad):
    """Its advantages are 0 from the first token on, and the others are as if it were not there."""
    reward_BT, value_BT, mask_BT = draw(3)
    mask_BT[1], mask_BT[2, :2] = True, True
    soiled = reward_BT.copy()
    soiled[1, 4] = bad
    found = compiled(name)(soiled, value_BT, mask_BT)
    without = mask_BT.copy()
    without[1] = False
    np.testing.assert_array_equal(found[1], 0.0)
    np.testing.assert_allclose(found, compiled(name)(reward_BT, value_BT, without), atol=FLOAT32)
    assert np.abs(found).max() > 0.1
    target_BT = gae(soiled, value_BT, mask_BT).target_BT
    np.testing.assert_array_equal(target_BT[1], value_BT[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_reinforce_pp_baseline_leaves_invalid_rewards_out(bad):
    mask_BT = jnp.array([[1, 1], [1, 0], [1, 1], [1, 1], [1, 0], [1, 0]])
    found = reinforce_pp_baseline_advantages(
        jnp.array([1.0, 0.0, bad, 2.0, 5.0, 4.0]), mask_BT, group_size=3, eps=0.0
    )
    tokens = np.array([0.5, 0.5, -0.5, 2 - 11 / 3, 2 - 11 / 3, 5 - 11 / 3, 4 - 11 / 3])
    expected = (tokens - tokens.mean()) / tokens.std()
    np.testing.assert_allclose(found[jnp.array([0, 0, 1])][:, 0], expected[[0, 0, 2]], rtol=1e-5)
    np.testing.assert_allclose(found[3], expected[3:5], rtol=1e-5)
    np.testing.assert_array_equal(found[2], 0.0)


@each
def test_jit_and_vmap_change_nothing(name):
    draws = [draw(seed) for seed in range(3)]
    found = jax.vmap(compiled(name))(*(np.stack(x) for x in zip(*draws, strict=True)))
    for i, arguments in enumerate(draws):
        np.testing.assert_allclose(found[i], BY_TOKEN[name](*arguments), atol=FLOAT32)


@each
def test_bfloat16_is_raised_to_float32(name):
    reward_BT, value_BT, mask_BT = draw(4)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (reward_BT, value_BT)]
    found = compiled(name)(*low, mask_BT)
    assert found.dtype == jnp.float32
    expected = compiled(name)(*(x.astype(jnp.float32) for x in low), mask_BT.astype(jnp.int32))
    np.testing.assert_allclose(found, expected, atol=FLOAT32)


def test_no_gradient_flows_through_advantages():
    reward_BT, value_BT, mask_BT = draw(5)
    slopes = jax.grad(lambda r, v: sum(x.sum() for x in gae(r, v, mask_BT)), argnums=(0, 1))(
        reward_BT, value_BT
    )
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0.0)


def test_discounted_sum_holds_the_next_value_at_masked_positions():
    found = discounted_sum(
        jnp.array([[1.0, jnp.nan, 4.0]]), jnp.array([[0.5, jnp.nan, 9.0]]), jnp.array([[1, 0, 1]])
    )
    np.testing.assert_allclose(found, [[3.0, 4.0, 4.0]])


def test_wrong_shapes_are_errors():
    reward_BT, value_BT, mask_BT = draw()
    with pytest.raises(AssertionError):
        gae(reward_BT, value_BT[:, :5], mask_BT)
    with pytest.raises(AssertionError):
        gae(reward_BT, value_BT, mask_BT, bootstrap_B=jnp.zeros((4, 1)))
    with pytest.raises(AssertionError):
        token_rewards(reward_BT[:2, 0], reward_BT, mask_BT, beta=0.1)
    with pytest.raises(ValueError, match="group_size=3"):
        reinforce_pp_baseline_advantages(reward_BT[:, 0], mask_BT, group_size=3)
