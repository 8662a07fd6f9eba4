# SPDX-License-Identifier: Apache-2.0
"""KL estimators against the exact KL, by enumerating a softmax policy over five tokens.

Every expectation is a sum over the whole vocabulary weighted by the sampling policy, so value and
gradient are exact. The estimators are differentiated inside `grpo_loss`, where they are used.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.rl import group_advantages, grpo_loss, k1, k2, k3, kl_penalised_reward, ratio_corrected

# Rounding of sums of five terms in float64.
EXACT = 1e-12
# Two gradients that differ by less could be called equal; the wrong ones below differ by more.
DIFFERENT = 1e-2

POLICY = np.array([0.3, -1.0, 0.8, 0.1, -0.4])
REFERENCE = np.array([-0.2, 0.5, 0.1, -0.9, 0.6])
STALE = np.array([0.5, -0.6, 0.2, 0.4, -0.7])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def exact_kl(logits_V, other_V):
    """KL(softmax(logits) ‖ softmax(other))."""
    logp_V, other_logp_V = jax.nn.log_softmax(logits_V), jax.nn.log_softmax(other_V)
    return jnp.sum(jnp.exp(logp_V) * (logp_V - other_logp_V))


def kl_term(logits_V, old_V, estimator, reference_V=REFERENCE):
    """E over tokens of `old` of the KL term of `grpo_loss`: one row per token of the vocabulary."""
    old_logp_V = jax.nn.log_softmax(old_V)
    probability_V = jax.lax.stop_gradient(jnp.exp(old_logp_V))
    loss, _ = grpo_loss(
        jax.nn.log_softmax(logits_V)[:, None],
        old_logp_V[:, None],
        jax.nn.log_softmax(reference_V)[:, None],
        jnp.zeros(len(POLICY)),
        jnp.ones((len(POLICY), 1), bool),
        beta=1.0,
        kl=estimator,
        weight_BT=probability_V[:, None],
    )
    return loss


@functools.partial(jax.jit, static_argnums=2)
def gradient(logits_V, old_V, estimator, reference_V=REFERENCE):
    return jax.grad(kl_term)(logits_V, old_V, estimator, reference_V)


EXACT_GRADIENT = {
    "k2": (k2, POLICY),
    "ratio-corrected k1": (ratio_corrected(k1), POLICY),
    "ratio-corrected k3": (ratio_corrected(k3), POLICY),
    "ratio-corrected k1, off policy": (ratio_corrected(k1), STALE),
    "ratio-corrected k3, off policy": (ratio_corrected(k3), STALE),
}
INEXACT_GRADIENT = {
    "k1": (k1, POLICY),
    "k3": (k3, POLICY),
    "ratio-corrected k2": (ratio_corrected(k2), POLICY),
    "k2, off policy": (k2, STALE),
    "k3, off policy": (k3, STALE),
}


@pytest.mark.parametrize("name", EXACT_GRADIENT)
def test_gradient_in_the_loss_is_that_of_the_exact_kl(name):
    estimator, old_V = EXACT_GRADIENT[name]
    expected = jax.grad(exact_kl)(POLICY, REFERENCE)
    np.testing.assert_allclose(gradient(POLICY, old_V, estimator), expected, atol=EXACT)


@pytest.mark.parametrize("name", INEXACT_GRADIENT)
def test_gradient_in_the_loss_is_not_that_of_the_exact_kl(name):
    """The table in `r1jax.rl.kl` says so; if one of these becomes exact, the table is wrong."""
    estimator, old_V = INEXACT_GRADIENT[name]
    expected = jax.grad(exact_kl)(POLICY, REFERENCE)
    assert np.abs(gradient(POLICY, old_V, estimator) - expected).max() > DIFFERENT


def test_k1_in_the_loss_ignores_the_reference():
    np.testing.assert_allclose(gradient(POLICY, POLICY, k1), 0.0, atol=EXACT)
    off_policy = gradient(POLICY, STALE, k1)
    assert np.abs(off_policy).max() > DIFFERENT
    np.testing.assert_array_equal(off_policy, gradient(POLICY, STALE, k1, reference_V=-REFERENCE))


def test_k3_in_the_loss_follows_the_other_direction():
    expected = jax.grad(lambda logits_V: exact_kl(REFERENCE, logits_V))(POLICY)
    np.testing.assert_allclose(gradient(POLICY, POLICY, k3), expected, atol=EXACT)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_value_is_unbiased(estimator):
    exact = exact_kl(POLICY, REFERENCE)
    np.testing.assert_allclose(kl_term(POLICY, POLICY, estimator), exact, atol=EXACT)
    corrected = kl_term(POLICY, STALE, ratio_corrected(estimator))
    np.testing.assert_allclose(corrected, exact, atol=EXACT)
    assert abs(kl_term(POLICY, STALE, estimator) - exact) > DIFFERENT


def test_k2_value_is_biased():
    assert abs(kl_term(POLICY, POLICY, k2) - exact_kl(POLICY, REFERENCE)) > DIFFERENT


def test_k1_in_the_reward_gives_the_exact_gradient():
    """−β·k1 as reward, on policy: the policy gradient is that of β·KL, baseline or not."""
    logp_V = jax.nn.log_softmax(POLICY)
    mask_V1 = jnp.ones((len(POLICY), 1), bool)
    kl_V1 = k1(logp_V, jax.nn.log_softmax(REFERENCE))[:, None]
    reward_V = kl_penalised_reward(jnp.zeros(len(POLICY)), kl_V1, mask_V1, beta=0.5)
    # The weights of the expectation are not equal, so this "group" only shifts the reward.
    centred_V = group_advantages(reward_V, group_size=len(POLICY), scale="none")

    def loss(logits_V, advantage_V):
        logp_V1 = jax.nn.log_softmax(logits_V)[:, None]
        weight_V1 = jnp.exp(jax.lax.stop_gradient(logp_V1))
        value, _ = grpo_loss(
            logp_V1, logp_V1, None, advantage_V, mask_V1, beta=0.0, weight_BT=weight_V1
        )
        return value

    expected = 0.5 * jax.grad(exact_kl)(POLICY, REFERENCE)
    for advantage_V in (reward_V, centred_V):
        np.testing.assert_allclose(jax.grad(loss)(POLICY, advantage_V), expected, atol=EXACT)


def test_reward_pays_for_unmasked_tokens_only():
    kl_BT = jnp.array([[0.5, 0.25, jnp.nan], [1.0, jnp.inf, jnp.nan]])
    mask_BT = jnp.array([[1, 1, 0], [1, 0, 0]])
    reward_B = kl_penalised_reward(jnp.array([1.0, 2.0]), kl_BT, mask_BT, beta=2.0)
    np.testing.assert_allclose(reward_B, [1.0 - 1.5, 2.0 - 2.0], atol=EXACT)
    slope = jax.grad(lambda x: kl_penalised_reward(jnp.ones(2), x, mask_BT, beta=2.0).sum())
    np.testing.assert_array_equal(slope(kl_BT), 0.0)


def test_hand_computed_values():
    # π = 1/2, π_ref = 1/4: log-ratio ln 2, and exp(−ln 2) + ln 2 − 1 = ln 2 − 1/2.
    logp, ref_logp, ln2 = jnp.log(0.5), jnp.log(0.25), np.log(2.0)
    np.testing.assert_allclose(k1(logp, ref_logp), ln2, atol=EXACT)
    np.testing.assert_allclose(k2(logp, ref_logp), ln2**2 / 2, atol=EXACT)
    np.testing.assert_allclose(k3(logp, ref_logp), ln2 - 0.5, atol=EXACT)
    # π_old = 1/6: the ratio is 3.
    corrected = ratio_corrected(k3)(logp, ref_logp, jnp.log(1 / 6))
    np.testing.assert_allclose(corrected, 3 * (ln2 - 0.5), atol=EXACT)


def test_ratio_corrected_needs_the_sampler():
    with pytest.raises(ValueError, match="old_logp_BT"):
        ratio_corrected(k3)(jnp.zeros(1), jnp.zeros(1))


def test_k3_keeps_small_values_in_float32():
    """Two policies a step apart: exp(x) − 1 in float32 would round k3 to 0 or to 1.2e-7."""
    logp = jnp.linspace(-5.0, 0.0, 11, dtype=jnp.float32)
    x = jnp.float32(2.0**-14)
    np.testing.assert_allclose(k3(logp, logp + x), float(x) ** 2 / 2, rtol=0.05)
    assert k3(logp, logp + x).dtype == jnp.float32


@pytest.mark.parametrize("estimator", [k1, k2, k3, ratio_corrected(k3)])
@pytest.mark.parametrize("difference", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_far_apart_policies_stay_finite(estimator, difference):
    logp = jnp.full((1, 1), -2e4, jnp.float32)
    value, slope = jax.value_and_grad(lambda x: estimator(x, logp + difference, logp).sum())(logp)
    chex.assert_tree_all_finite((value, slope))
