# SPDX-License-Identifier: Apache-2.0
"""The objectives of the trainer: each is the sentence it claims to be, on policy and off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import rl
from r1jax.config import OBJECTIVES as NAMES
from r1jax.config import UpdateConfig
from r1jax.train.objective import OBJECTIVES, objective_of

GROUP, ROWS, LENGTH = 3, 6, 5
RNG = np.random.default_rng(0)
LOGP = -RNG.exponential(1.0, (ROWS, LENGTH)).astype(np.float32)
OLD = LOGP + 0.3 * RNG.normal(size=LOGP.shape).astype(np.float32)
REF = LOGP + 0.3 * RNG.normal(size=LOGP.shape).astype(np.float32)
MASK = (np.arange(LENGTH) < np.array([[5], [2], [3], [4], [1], [5]])).astype(np.float32)
REWARD = np.array([1.0, 0.0, 0.25, 0.5, 0.75, 0.0], np.float32)
BATCH = {"mask": MASK, "old_logp": OLD, "ref_logp": REF}
TOKENS, LENGTHS = MASK.sum(), MASK.sum(1, keepdims=True)


def cfg_of(name, **changes):
    changes = changes or dict(beta=0.04, clip_low=0.2, clip_high=0.28)
    return UpdateConfig(objective=name, **changes)


def gradient(name, old, **changes):
    """(value, gradient to the log-probabilities, advantages) of an objective."""
    cfg = cfg_of(name, **changes)
    objective = objective_of(cfg)
    ref = REF if cfg.beta else None
    batch = BATCH if cfg.beta else {"mask": MASK}
    advantage = objective.advantages(REWARD, batch, GROUP)
    weight = objective.weights(MASK)

    def loss(logp):
        return objective.loss(logp, old, ref, advantage, MASK, weight_BT=weight)[0]

    value, grad = jax.value_and_grad(loss)(jnp.asarray(LOGP))
    return value, np.asarray(grad), np.asarray(advantage)


def test_config_and_table_know_the_same_names():
    assert tuple(OBJECTIVES) == NAMES


GROUPED = (REWARD.reshape(-1, GROUP) - REWARD.reshape(-1, GROUP).mean(1, keepdims=True)).reshape(-1)
SCALED = GROUPED / np.repeat(REWARD.reshape(-1, GROUP).std(1), GROUP)
LEFT_OUT = GROUPED * GROUP / (GROUP - 1)
# d(−objective) / d logp on policy, without KL: what each row's token gets.
ON_POLICY = {
    "grpo": SCALED[:, None] * MASK / LENGTHS / ROWS,
    "output_grpo": SCALED[:, None] * MASK / ROWS,
    "dr_grpo": GROUPED[:, None] * MASK / LENGTH / ROWS,
    "dapo": SCALED[:, None] * MASK / TOKENS,
    "gspo": SCALED[:, None] * MASK / LENGTHS / ROWS,
    "gspo_token": SCALED[:, None] * MASK / LENGTHS / ROWS,
    "cispo": SCALED[:, None] * MASK / TOKENS,
    "rloo": LEFT_OUT[:, None] * MASK / ROWS,
}


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    _, grad, advantage = gradient(name, LOGP, beta=0.0)
    if name in ON_POLICY:
        expected = ON_POLICY[name]
    else:  # whitened over tokens: mean 0 and deviation 1
        centred = REWARD if name == "reinforce_pp" else GROUPED
        each = np.repeat(centred, LENGTHS[:, 0].astype(int))
        expected = ((centred - each.mean()) / each.std())[:, None] * MASK / TOKENS
    np.testing.assert_allclose(grad, -expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("grpo", rl.grpo_loss),
        ("output_grpo", rl.output_grpo_loss),
        ("dapo", rl.dapo_loss),
        ("gspo", rl.gspo_loss),
        ("gspo_token", rl.gspo_token_loss),
    ],
)
def test_off_policy_it_is_the_named_loss(name, loss):
    value, _, advantage = gradient(name, OLD)
    expected = loss(
        LOGP, OLD, REF, jnp.asarray(advantage), MASK, clip_low=0.2, clip_high=0.28, beta=0.04
    )[0]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("grpo", rl.grpo_loss),
        ("dr_grpo", rl.dr_grpo_loss),
        ("dapo", rl.dapo_loss),
        ("gspo", rl.gspo_loss),
        ("gspo_token", rl.gspo_token_loss),
        ("cispo", rl.cispo_loss),
    ],
)
def test_without_a_clip_it_has_its_papers(name, loss):
    """GRPO's would never touch GSPO's mean ratios, nor leave CISPO's small weights alone."""
    value, _, advantage = gradient(name, OLD, beta=0.04)
    expected = loss(LOGP, OLD, REF, jnp.asarray(advantage), MASK, beta=0.04)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_the_cap_of_cispo_is_one_plus_the_upper_clip():
    value, _, advantage = gradient("cispo", OLD, clip_low=1.0, clip_high=4.0, beta=0.04)
    expected = rl.cispo_loss(LOGP, OLD, REF, jnp.asarray(advantage), MASK, ratio_cap=5.0, beta=0.04)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["rloo", "reinforce_pp"])
def test_the_kl_is_in_the_reward_and_nowhere_else(name):
    """The advantages know the reference, and the loss does not add it again."""
    _, with_kl, advantage = gradient(name, LOGP)
    _, _, without = gradient(name, LOGP, beta=0.0)
    assert np.abs(advantage - without).max() > 1e-3
    if name == "rloo":
        reward = REWARD - 0.04 * ((OLD - REF) * MASK).sum(1)
        grouped = reward.reshape(-1, GROUP)
        others = (grouped.sum(1, keepdims=True) - grouped) / (GROUP - 1)
        np.testing.assert_allclose(advantage, (grouped - others).reshape(-1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(with_kl, -advantage[:, None] * MASK / ROWS, rtol=1e-5)
    assert objective_of(cfg_of(name)).kl_in_reward


@pytest.mark.parametrize("name", [n for n in NAMES if n != "reinforce_pp"])
def test_a_group_with_equal_rewards_has_no_advantage(name):
    """SPEC of every group objective; `reinforce_pp` compares with the batch and not the group."""
    reward = np.array([0.1, 0.1, 0.1, 1.0, 0.0, 0.5], np.float32)
    advantage = objective_of(cfg_of(name, beta=0.0)).advantages(reward, {"mask": MASK}, GROUP)
    assert np.abs(np.asarray(advantage)[:GROUP]).max() == 0.0
    assert np.abs(np.asarray(advantage)[GROUP:]).max() > 0.1


def test_scale_ddof_and_eps_reach_the_advantages():
    plain = gradient("grpo", LOGP, beta=0.0)[2]
    wide = gradient("grpo", LOGP, beta=0.0, ddof=1)[2]
    np.testing.assert_allclose(wide, plain * np.sqrt((GROUP - 1) / GROUP), rtol=1e-5)
    np.testing.assert_allclose(gradient("grpo", LOGP, beta=0.0, scale="none")[2], GROUPED)
    half = gradient("grpo", LOGP, beta=0.0, eps=1e3)[2]
    np.testing.assert_allclose(half, GROUPED / 1e3, rtol=1e-3)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("output_grpo", "rloo")])
def test_each_token_is_weighed_for_the_sampler_by_itself(name):
    """But where the ratio is that of a whole output: there a row's mean weighs it."""
    objective = objective_of(UpdateConfig(objective=name, beta=0.0, importance_cap=2.0))
    importance = RNG.uniform(0.2, 2.0, MASK.shape).astype(np.float32)
    advantage = objective.advantages(REWARD, {"mask": MASK}, GROUP)
    advantage = np.broadcast_to(np.asarray(advantage).reshape(ROWS, -1), MASK.shape)
    weight = objective.weights(MASK)

    def gradient(advantage):
        loss = lambda x: objective.loss(x, LOGP, None, advantage, MASK, weight_BT=weight)[0]  # noqa: E731
        return np.asarray(jax.grad(loss)(jnp.asarray(LOGP)))

    got, plain = gradient(advantage * importance), gradient(advantage)
    np.testing.assert_allclose(got, plain * importance, rtol=1e-5, atol=1e-6)
