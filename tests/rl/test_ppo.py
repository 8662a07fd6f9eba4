# SPDX-License-Identifier: Apache-2.0
"""PPO: golden values of rlax and verl, hand-computed numbers, and what must not matter."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.rl import (
    PPOBatch,
    explained_variance,
    gae,
    grpo_loss,
    mean_metrics,
    ppo_batch,
    ppo_loss,
    ppo_policy_loss,
    token_rewards,
    token_weights_token_mean,
    value_loss,
    weighted_sum,
    whiten,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RLAX = json.loads((GOLDEN / "ppo_rlax.json").read_text())
VERL = json.loads((GOLDEN / "ppo_verl.json").read_text())
# The same formula in float64, in another order of operations.
FLOAT64 = 1e-12
# float32 inputs are rounded by 6e-8 and exponentiated; sums of up to 48 terms.
FLOAT32 = 1e-5
# k micro-batches must equal one batch to this.
MICRO = 1e-6
both_precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, FLOAT64), (np.float32, FLOAT32)], ids=["64", "32"]
)


def draw(seed=0, rows=8, length=6):
    """(logp_BT, value_BT, PPOBatch), float32, made from a rollout; lengths from 0 to `length`."""
    rng = np.random.default_rng(seed)
    old_BT = -rng.exponential(1, (rows, length))
    logp_BT, ref_BT = (old_BT + 0.4 * rng.normal(size=old_BT.shape) for _ in range(2))
    old_value_BT, value_BT = rng.normal(size=(2, rows, length))
    mask_BT = jnp.asarray(np.arange(length) < rng.integers(0, length + 1, rows)[:, None])
    logp_BT, old_BT, ref_BT, old_value_BT, value_BT, reward_B = (
        jnp.asarray(x, jnp.float32)
        for x in (logp_BT, old_BT, ref_BT, old_value_BT, value_BT, rng.normal(size=rows))
    )
    reward_BT = token_rewards(reward_B, old_BT - ref_BT, mask_BT, beta=0.1)
    return logp_BT, value_BT, ppo_batch(old_BT, old_value_BT, reward_BT, mask_BT)


@functools.cache
def compiled(**options):
    """(logp, value, batch) -> ((loss, metrics), gradients with respect to logp and value)."""
    loss = functools.partial(ppo_loss, **options)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@both_precisions
@pytest.mark.parametrize(("case", "clip"), [("usual", 0.2), ("tight", 0.05)])
def test_policy_loss_equals_rlax(case, clip, dtype, tolerance):
    x = {name: np.asarray(v) for name, v in RLAX["inputs"].items()}
    mask_BT = np.arange(x["reward"].shape[1]) < x["length"][:, None]
    old_BT = -np.ones_like(x["log_ratio"])
    loss = functools.partial(ppo_policy_loss, clip_low=clip, clip_high=clip)
    with jax.enable_x64(dtype is np.float64):
        logp_BT, old_BT, advantage_BT = (
            jnp.asarray(v, dtype) for v in (old_BT + x["log_ratio"], old_BT, x["advantage"])
        )
        (value, metrics), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            logp_BT, old_BT, None, advantage_BT, mask_BT
        )
        means = mean_metrics(metrics)
    expected = RLAX["clip"][case]
    np.testing.assert_allclose(value, expected["loss"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(slope, expected["gradient"], rtol=0, atol=tolerance)
    assert float(means["clip_low"]) > 0
    assert float(means["clip_high"]) > 0


@both_precisions
@pytest.mark.parametrize(("case", "clip"), [("usual", 0.2), ("wide", 1.0)])
def test_value_loss_equals_verl(case, clip, dtype, tolerance):
    with jax.enable_x64(dtype is np.float64):
        x = {name: jnp.asarray(v, dtype) for name, v in VERL["inputs"].items()}
        target_BT = gae(x["reward"], x["value"], x["mask"], gamma=0.97, lam=0.9).target_BT
        loss = functools.partial(value_loss, clip=clip)
        (value, metrics), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            x["new_value"], x["value"], target_BT, x["mask"]
        )
        means = mean_metrics(metrics)
    expected = VERL["value"][case]
    assert value.dtype == slope.dtype == dtype
    np.testing.assert_allclose(value, expected["loss"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(slope, expected["gradient"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(means["value_clip"], expected["clipped"], rtol=1e-6)
    assert 0 < expected["clipped"] < 1


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9),  # inside the range: ½·0.9²
        (1.0, 1.0, 2.0, 0.5, -1.0),  # at the start the gradient is undivided by ties
        (1.5, 1.0, 2.0, 0.32, 0.0),  # too far on the way to the target: ½·(1.2 − 2)²
        (0.5, 1.0, 2.0, 1.125, -1.5),  # away from the target: pulled back
        (3.0, 1.0, 2.0, 0.5, 1.0),  # as far past the target, and further than the bound is short
        (2.1, 1.0, 2.0, 0.32, 0.0),  # a little past the target: the clipped error is larger
    ],
)
def test_value_clip_by_hand(value, old, target, loss, slope):
    arrays = (jnp.full((1, 1), x) for x in (value, old, target))
    found = jax.value_and_grad(lambda *x: value_loss(*x, jnp.ones((1, 1)), clip=0.2)[0])(*arrays)
    np.testing.assert_allclose(found[0], loss, rtol=FLOAT32)
    np.testing.assert_allclose(found[1], [[slope]], atol=FLOAT32)


def test_without_a_clip_it_is_half_the_square_error():
    value_BT, old_BT, target_BT = (jnp.array([[x, 9.0]]) for x in (5.0, 0.0, 2.0))
    mask_BT = jnp.array([[1, 0]])
    (loss, metrics), slope = jax.value_and_grad(value_loss, has_aux=True)(
        value_BT, old_BT, target_BT, mask_BT, clip=float("inf")
    )
    np.testing.assert_allclose(loss, 4.5)
    np.testing.assert_allclose(slope, [[3.0, 0.0]])
    expected = {
        "tokens": 1, "value_clip": 0, "value": 5, "value_error": -3, "value_error_square": 9,
        "target": 2, "target_square": 4,
    }  # fmt: skip
    assert {name: float(x) for name, x in metrics.items()} == expected


def test_explained_variance():
    target_BT = jnp.array([[1.0, 2.0, 3.0, 6.0]])
    mask_BT = jnp.ones((1, 4))

    def explained(value_BT):
        return explained_variance(value_loss(value_BT, value_BT, target_BT, mask_BT)[1])

    np.testing.assert_allclose(explained(target_BT), 1.0)
    np.testing.assert_allclose(explained(jnp.full((1, 4), 3.0)), 0.0, atol=FLOAT32)
    # A constant offset is not a matter of variance; half the slope leaves a quarter of it.
    np.testing.assert_allclose(explained(target_BT + 5), 1.0, rtol=FLOAT32)
    np.testing.assert_allclose(explained(target_BT / 2), 0.75, rtol=FLOAT32)
    constant = value_loss(target_BT, target_BT, jnp.ones((1, 4)), mask_BT)[1]
    assert explained_variance(constant) == 0.0
    tenths_BT = jnp.full((1, 4), 0.1).repeat(7, 0)
    tenths = value_loss(tenths_BT + 0.5, tenths_BT, tenths_BT, jnp.ones((7, 4)))[1]
    assert explained_variance(tenths) == 0.0
    assert jnp.isnan(explained(target_BT * jnp.nan))
    nothing = value_loss(target_BT, target_BT, target_BT, 0 * mask_BT)[1]
    assert explained_variance(nothing) == 0.0


def test_the_batch_is_gae_whitened_and_nothing_else():
    rng = np.random.default_rng(0)
    old_BT, value_BT, reward_BT = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    mask_BT = jnp.arange(5) < jnp.array([5, 2, 3, 1])[:, None]
    options = {"gamma": 0.9, "lam": 0.8, "bootstrap_B": jnp.arange(4.0)}
    batch = ppo_batch(old_BT, value_BT, reward_BT, mask_BT, ddof=1, eps=0.1, **options)
    estimate = gae(reward_BT, value_BT, mask_BT, **options)
    whitened_BT = whiten(estimate.advantage_BT, mask_BT, ddof=1, eps=0.1)
    chex.assert_trees_all_equal(batch.advantage_BT, whitened_BT)
    chex.assert_trees_all_equal(batch.target_BT, estimate.target_BT)
    np.testing.assert_array_equal(batch.old_logp_BT, jnp.where(mask_BT, old_BT, 0))
    np.testing.assert_array_equal(batch.old_value_BT, jnp.where(mask_BT, value_BT, 0))
    np.testing.assert_array_equal(batch.mask_BT, mask_BT)


def test_a_row_without_a_finite_reward_moves_neither_policy_nor_critic():
    """At the first update the critic is at its target there; the statistics leave the row out."""
    rng = np.random.default_rng(1)
    old_BT, value_BT = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)
    mask_BT = jnp.ones((4, 5), bool)
    reward_B = jnp.array([1.0, jnp.nan, -1.0, 0.5])
    reward_BT = token_rewards(reward_B, jnp.zeros((4, 5)), mask_BT, beta=0.0)
    batch = ppo_batch(old_BT, value_BT, reward_BT, mask_BT)
    (loss, metrics), slopes = compiled()(old_BT, value_BT, batch)
    chex.assert_tree_all_finite((loss, metrics, slopes))
    for slope in slopes:
        np.testing.assert_array_equal(slope[1], 0.0)
        assert np.abs(slope[jnp.array([0, 2, 3])]).min() > 0
    kept = np.array([0, 2, 3])
    others = ppo_batch(old_BT[kept], value_BT[kept], reward_BT[kept], mask_BT[kept])
    np.testing.assert_allclose(batch.advantage_BT[kept], others.advantage_BT, rtol=FLOAT32)


def test_the_loss_is_the_sum_of_its_terms():
    logp_BT, value_BT, batch = draw(2)
    entropy_BT = -logp_BT
    options = {"value_weight": 0.3, "entropy_weight": 0.01, "clip_low": 0.1, "clip_high": 0.3}
    loss, metrics = ppo_loss(
        logp_BT, value_BT, batch, entropy_BT=entropy_BT, value_clip=0.5, **options
    )
    policy, policy_metrics = ppo_policy_loss(
        logp_BT, batch.old_logp_BT, None, batch.advantage_BT, batch.mask_BT,
        clip_low=0.1, clip_high=0.3,
    )  # fmt: skip
    critic, critic_metrics = value_loss(
        value_BT, batch.old_value_BT, batch.target_BT, batch.mask_BT, clip=0.5
    )
    entropy = weighted_sum(entropy_BT, token_weights_token_mean(batch.mask_BT))
    np.testing.assert_allclose(loss, policy + 0.3 * critic - 0.01 * entropy, rtol=FLOAT32)
    assert min(abs(critic), abs(policy), entropy) > 1e-3
    np.testing.assert_allclose(mean_metrics(metrics)["entropy"], entropy, rtol=FLOAT32)
    for name, value in (policy_metrics | critic_metrics).items():
        assert metrics[name] == value, name


def test_policy_loss_is_grpo_with_an_advantage_per_token():
    logp_BT, _, batch = draw(3)
    arguments = (logp_BT, batch.old_logp_BT, None, batch.advantage_BT, batch.mask_BT)
    weight_BT = token_weights_token_mean(batch.mask_BT)
    expected = grpo_loss(*arguments, beta=0.0, weight_BT=weight_BT)
    chex.assert_trees_all_equal(ppo_policy_loss(*arguments), expected)


def test_gradient_directions():
    """A step against the gradient makes good tokens likelier and values nearer to their targets."""
    _, _, batch = draw(4)
    _, (to_logp_BT, to_value_BT) = compiled()(batch.old_logp_BT, batch.old_value_BT, batch)
    mask_BT = np.asarray(batch.mask_BT)
    np.testing.assert_array_equal(np.sign(-to_logp_BT), np.sign(batch.advantage_BT))
    error_BT = batch.target_BT - batch.old_value_BT
    np.testing.assert_array_equal(np.sign(-to_value_BT)[mask_BT], np.sign(error_BT)[mask_BT])
    np.testing.assert_array_equal(to_value_BT[~mask_BT], 0.0)


def test_gradient_stops_at_the_batch():
    logp_BT, value_BT, batch = draw(5)

    def loss(arrays):
        return ppo_loss(logp_BT, value_BT, PPOBatch(*arrays, batch.mask_BT))[0]

    for slope in jax.grad(loss)(tuple(batch[:4])):
        np.testing.assert_array_equal(slope, 0.0)


def test_garbage_under_the_mask_changes_nothing():
    logp_BT, value_BT, batch = draw(6)
    mask_BT = batch.mask_BT
    bad_values = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e30])
    soil_BT = bad_values[np.random.default_rng(7).integers(0, 4, mask_BT.shape)]
    soiled = [jnp.where(mask_BT, x, soil_BT) for x in (logp_BT, value_BT, *batch[:4])]
    found = compiled()(*soiled[:2], PPOBatch(*soiled[2:], mask_BT))
    chex.assert_trees_all_equal(found, compiled()(logp_BT, value_BT, batch))
    # Rows of padding do not count.
    padded = jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), (logp_BT, value_BT, batch)
    )
    chex.assert_trees_all_close(compiled()(*padded)[0], found[0], rtol=MICRO, atol=MICRO)
    nothing = compiled()(logp_BT, value_BT, batch._replace(mask_BT=jnp.zeros_like(mask_BT)))
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, nothing))


def test_micro_batches_add_up_to_the_batch():
    logp_BT, value_BT, batch = draw(8)
    weight_BT = token_weights_token_mean(batch.mask_BT)
    whole, slopes = compiled()(logp_BT, value_BT, batch)
    parts = []
    for i in range(0, 8, 2):
        *rows, weight_bT = jax.tree.map(
            lambda x, i=i: x[i : i + 2], (logp_BT, value_BT, batch, weight_BT)
        )
        loss = functools.partial(ppo_loss, weight_BT=weight_bT)
        parts.append(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*rows))
    total = jax.tree.map(lambda *x: sum(x), *(aux for aux, _ in parts))
    chex.assert_trees_all_close(total, whole, rtol=MICRO, atol=MICRO)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *(slope for _, slope in parts))
    chex.assert_trees_all_close(joined, slopes, atol=MICRO)


def test_vmap_and_bfloat16():
    draws = [draw(seed) for seed in range(3)]
    found = jax.vmap(compiled())(*jax.tree.map(lambda *x: jnp.stack(x), *draws))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(compiled()(*x) for x in draws))
    chex.assert_trees_all_close(found, expected, rtol=FLOAT32, atol=FLOAT32)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draws[0])
    (loss, metrics), _ = compiled()(*low)
    raised = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    assert loss.dtype == metrics["value"].dtype == jnp.float32
    np.testing.assert_allclose(loss, compiled()(*raised)[0][0], rtol=FLOAT32)


def test_a_missing_entropy_is_an_error_unless_its_weight_is_zero():
    with pytest.raises(ValueError, match=r"entropy_weight=0.01 needs entropy_BT"):
        ppo_loss(*draw(), entropy_weight=0.01)
    with pytest.raises(AssertionError):
        value_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2), jnp.ones((2, 3)))
