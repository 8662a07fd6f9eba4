# SPDX-License-Identifier: Apache-2.0
"""Objectives: golden values of TRL, hand-computed numbers, and every part on its own."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.rl import (
    MAX_LOG_RATIO,
    cispo_loss,
    cispo_surrogate,
    clipped_surrogate,
    constant_length_mean,
    dapo_loss,
    dr_grpo_loss,
    dual_clip,
    group_advantages,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    k3,
    mean_metrics,
    output_grpo_loss,
    output_log_ratio,
    policy_loss,
    policy_tokens,
    ratio_corrected,
    sequence_log_ratio,
    sequence_mean,
    sequence_token_log_ratio,
    sft_loss,
    token_log_ratio,
    token_mean,
    token_sum,
    token_weights_sequence_mean,
    token_weights_sum,
    truncated_importance_weight,
)

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "objectives.json").read_text())
# The same formula in float64, in another order of operations.
FLOAT64 = 1e-12
# float32 inputs are rounded by 6e-8 and exponentiated.
FLOAT32 = 1e-5


def dual_clip_grpo_loss(logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT, *, beta):
    """GRPO with a dual clip: an algorithm the library does not name, said in its parts."""
    tokens = policy_tokens(logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT)
    log_ratio_BT = token_log_ratio(tokens.logp_BT, tokens.old_logp_BT, tokens.mask_BT)
    surrogate = clipped_surrogate(log_ratio_BT, tokens.advantage_BT, clip_low=0.2, clip_high=0.28)
    surrogate = dual_clip(surrogate, tokens.advantage_BT, cap=1.5)
    weight_BT = token_weights_sequence_mean(tokens.mask_BT)
    return policy_loss(tokens, surrogate, weight_BT, beta=beta, kl=ratio_corrected(k3))


# The options that `golden/objectives_from_trl.py` shares between its cases.
CORRECTED = {"beta": 0.04, "kl": ratio_corrected(k3)}
WIDE_CORRECTED = {"clip_low": 0.2, "clip_high": 0.28, **CORRECTED}
CASES = {
    "grpo": functools.partial(grpo_loss, **WIDE_CORRECTED),
    "dapo": functools.partial(dapo_loss, **CORRECTED),
    "dr_grpo": functools.partial(dr_grpo_loss, **WIDE_CORRECTED),
    "cispo": functools.partial(cispo_loss, ratio_cap=5.0, **CORRECTED),
    "gspo": functools.partial(gspo_loss, clip_low=0.2, clip_high=0.2),
    "grpo_plain_k3": functools.partial(grpo_loss, clip_high=0.28),
    "grpo_r1_clip": functools.partial(grpo_loss, clip_high=10.0, beta=0.001),
    "grpo_dual_clip": functools.partial(dual_clip_grpo_loss, beta=0.04),
    "dapo_importance": functools.partial(dapo_loss, **CORRECTED),
}
# (loss, Σ|∂loss/∂logp|) of the draw called "near", written down apart from the file.
PUBLISHED = {
    "grpo": (0.443513664, 0.603510823),
    "dapo": (0.431516627, 0.760276559),
    "dr_grpo": (0.251718033, 0.44349466),
    "cispo": (-0.268095876, 0.903410704),
    "gspo": (0.395569843, 0.694041509),
}


@functools.cache
def compiled(case):
    return jax.jit(jax.value_and_grad(CASES[case], has_aux=True))


def loss_and_gradient(case, inputs, dtype):
    """One jitted call on one recorded draw."""
    data = {name: np.asarray(x, dtype) for name, x in inputs.items()}
    advantage = data["advantage"]
    if case.endswith("_importance"):
        advantage = advantage[:, None] * data["importance"]
    arguments = (data["logp"], data["old_logp"], data["ref_logp"], advantage, data["mask"])
    (loss, _), gradient_BT = compiled(case)(*arguments)
    assert loss.dtype == gradient_BT.dtype == dtype
    return loss, gradient_BT


@pytest.mark.parametrize("draw", ["near", "far"])
@pytest.mark.parametrize("case", CASES)
def test_golden_values_of_trl(case, draw):
    expected = GOLDEN[draw]["cases"][case]
    with jax.enable_x64(True):
        loss, gradient_BT = loss_and_gradient(case, GOLDEN[draw]["inputs"], np.float64)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=FLOAT64)
    np.testing.assert_allclose(gradient_BT, expected["gradient"], rtol=0, atol=FLOAT64)
    if draw == "near" and case in PUBLISHED:
        found = (loss, np.abs(gradient_BT).sum())
        np.testing.assert_allclose(found, PUBLISHED[case], rtol=0, atol=5e-10)
    loss, gradient_BT = loss_and_gradient(case, GOLDEN[draw]["inputs"], np.float32)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=FLOAT32)
    np.testing.assert_allclose(gradient_BT, expected["gradient"], rtol=0, atol=FLOAT32)


# Two rows of two tokens with ratios 2, 1/2 | 3, (masked); advantages 1 and −1.
RATIO = np.array([[2.0, 0.5], [3.0, np.nan]])
MASK = np.array([[1, 1], [1, 0]])
ADVANTAGE = np.array([1.0, -1.0])
OLD = np.array([[-1.0, -2.0], [-4.0, np.nan]])
LOGP = OLD + np.log(RATIO)


def test_hand_computed_losses():
    """Per token: min(2, 1.28) = 1.28; min(0.5, 0.8) = 0.5; min(−3, −1.28) = −3."""
    arguments = (LOGP, OLD, None, ADVANTAGE, MASK)
    clip = {"clip_low": 0.2, "clip_high": 0.28, "beta": 0.0}
    expected = {
        grpo_loss: -((1.28 + 0.5) / 2 - 3) / 2,
        dapo_loss: -(1.28 + 0.5 - 3) / 3,
        dr_grpo_loss: -(1.28 + 0.5 - 3) / (2 * 2),
        # Both ratios of the first row multiply to 1, and so does their mean.
        gspo_loss: -(1 - 3) / 2,
        gspo_token_loss: -(1 - 3) / 2,
        output_grpo_loss: -(1 - 3) / 2,
    }
    for loss, value in expected.items():
        np.testing.assert_allclose(loss(*arguments, **clip)[0], value, rtol=FLOAT32)
    cispo, _ = cispo_loss(*arguments, ratio_floor=0.75, ratio_cap=2.5)
    log2, log3 = np.log([2.0, 3.0])
    value = -(2 * (log2 - 1) + 0.75 * (-log2 - 2) - 2.5 * (log3 - 4)) / 3
    np.testing.assert_allclose(cispo, value, rtol=FLOAT32)


def test_hand_computed_metrics():
    ref_logp_BT = LOGP - np.log(2.0)
    _, metrics = grpo_loss(LOGP, OLD, ref_logp_BT, ADVANTAGE, MASK)
    expected = {
        "tokens": 3.0,
        "ratio": 5.5,
        "ratio_square_error": 1.0 + 0.25 + 4.0,
        "clip_low": 0.0,
        "clip_high": 1.0,
        "kl": 3 * (np.log(2.0) - 0.5),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=FLOAT32, err_msg=name)
    means = mean_metrics(metrics)
    np.testing.assert_allclose(means["ratio"], 5.5 / 3, rtol=FLOAT32)
    np.testing.assert_allclose(means["clip_high"], 1 / 3, rtol=FLOAT32)
    assert means["tokens"] == 3.0
    # The other sign of the advantage puts the other bound in force.
    _, metrics = grpo_loss(LOGP, OLD, None, -ADVANTAGE, MASK, beta=0.0)
    assert (metrics["clip_low"], metrics["clip_high"]) == (1.0, 1.0)
    assert "kl" not in metrics
    _, metrics = cispo_loss(LOGP, OLD, None, ADVANTAGE, MASK, ratio_floor=0.75, ratio_cap=2.5)
    assert (metrics["clip_low"], metrics["clip_high"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high", "value", "slope"),
    [
        (1.0, 2.0, 0.2, 0.2, 2.0, 2.0),  # on policy the gradient is A, undivided by ties
        (1.0, 2.0, 0.0, 0.0, 2.0, 2.0),
        (1.3, 2.0, 0.2, 0.2, 2.4, 0.0),  # better than the bound allows
        (0.5, 2.0, 0.2, 0.2, 1.0, 1.0),  # a good token that fell is always raised
        (0.5, -2.0, 0.2, 0.2, -1.6, 0.0),
        (1.3, -2.0, 0.2, 0.2, -2.6, -2.6),
        (1.25, 2.0, 0.2, 0.28, 2.5, 2.5),  # the upper bound is the upper one
        (10.5, 1.0, 0.2, 10.0, 10.5, 10.5),  # R1: the bound is at 11
        (11.5, 1.0, 0.2, 10.0, 11.0, 0.0),
        (1e-4, -1.0, 1.0, 0.2, -1e-4, -1e-4),  # no lower bound
        (0.01, -1.0, 10.0, 10.0, -0.01, -0.01),
        (5.0, 0.0, 0.2, 0.2, 0.0, 0.0),
    ],
)
def test_clip(ratio, advantage, low, high, value, slope):
    """Value, and slope with respect to logp, which is the ratio times that with respect to it."""

    def surrogate(log_ratio):
        result = clipped_surrogate(log_ratio, jnp.array(advantage), clip_low=low, clip_high=high)
        return result.value_BT

    found = jax.value_and_grad(surrogate)(jnp.log(ratio))
    np.testing.assert_allclose(found, (value, slope), rtol=FLOAT32)
    # The textbook form, written independently.
    textbook = min(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
    np.testing.assert_allclose(found[0], textbook, rtol=FLOAT32)


def test_dual_clip_bounds_bad_tokens_only():
    log_ratio_T = jnp.log(jnp.array([5.0, 2.0, 5.0, 0.1]))
    advantage_T = jnp.array([-1.0, -1.0, 1.0, -1.0])

    def surrogate(log_ratio_T):
        clipped = clipped_surrogate(log_ratio_T, advantage_T, clip_low=0.2, clip_high=0.2)
        return dual_clip(clipped, advantage_T, cap=3.0)

    result = surrogate(log_ratio_T)
    np.testing.assert_allclose(result.value_BT, [-3.0, -2.0, 1.2, -0.8], rtol=FLOAT32)
    np.testing.assert_array_equal(result.clipped_high_BT, [True, False, True, False])
    np.testing.assert_array_equal(result.clipped_low_BT, [False, False, False, True])
    slope = jax.grad(lambda x: surrogate(x).value_BT.sum())(log_ratio_T)
    np.testing.assert_allclose(slope, [0.0, -2.0, 0.0, 0.0], rtol=FLOAT32)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    logp_T = jnp.array([-1.0, -1.0, -1.0])
    log_ratio_T = jnp.log(jnp.array([10.0, 2.0, 0.1]))
    advantage_T = jnp.array([1.0, -1.0, 1.0])

    def value(logp_T, log_ratio_T):
        bounds = {"ratio_floor": 0.5, "ratio_cap": 5.0}
        return cispo_surrogate(logp_T, log_ratio_T, advantage_T, **bounds).value_BT.sum()

    slopes = jax.grad(value, argnums=(0, 1))(logp_T, log_ratio_T)
    np.testing.assert_allclose(slopes[0], [5.0, -2.0, 0.5], rtol=FLOAT32)
    np.testing.assert_array_equal(slopes[1], 0.0)


def test_ratios_by_hand():
    with np.errstate(invalid="ignore"):
        d_BT = np.log(RATIO)
    np.testing.assert_allclose(
        token_log_ratio(LOGP, OLD, MASK), np.where(MASK, d_BT, 0), atol=FLOAT32
    )
    row_B1 = np.array([[0.0], [np.log(3.0)]])
    for ratio in (sequence_log_ratio, sequence_token_log_ratio, output_log_ratio):
        np.testing.assert_allclose(
            ratio(LOGP, OLD, MASK), np.broadcast_to(row_B1, (2, 2)), atol=FLOAT32
        )
    # Mean and sum differ where the tokens do not cancel: ratios 2 and 8.
    logp_BT, old_BT, mask_BT = np.log([[2.0, 8.0]]), np.zeros((1, 2)), np.ones((1, 2))
    np.testing.assert_allclose(
        jnp.exp(sequence_log_ratio(logp_BT, old_BT, mask_BT)), 4.0, rtol=FLOAT32
    )
    np.testing.assert_allclose(
        jnp.exp(output_log_ratio(logp_BT, old_BT, mask_BT)), 16.0, rtol=FLOAT32
    )
    slopes = {
        ratio: jax.grad(lambda x, ratio=ratio: ratio(x, old_BT, mask_BT)[0, 0])(logp_BT)[0]
        for ratio in (sequence_log_ratio, sequence_token_log_ratio, output_log_ratio)
    }
    np.testing.assert_allclose(slopes[sequence_log_ratio], [0.5, 0.5])
    np.testing.assert_allclose(slopes[sequence_token_log_ratio], [1.0, 0.0])
    np.testing.assert_allclose(slopes[output_log_ratio], [1.0, 1.0])


def test_truncated_importance_weight():
    weight_BT = truncated_importance_weight(LOGP, OLD, MASK, cap=2.5)
    np.testing.assert_allclose(weight_BT, [[2.0, 0.5], [2.5, 1.0]], rtol=FLOAT32)
    slope = jax.grad(lambda x: truncated_importance_weight(x, OLD, MASK, cap=2.5).sum())(LOGP)
    np.testing.assert_array_equal(slope, 0.0)


def test_reductions_by_hand():
    x_BT = jnp.array([[1.0, 2.0, 3.0], [10.0, jnp.nan, jnp.inf], [jnp.nan, jnp.nan, jnp.nan]])
    mask_BT = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(sequence_mean(x_BT, mask_BT), (2 + 10) / 2)
    np.testing.assert_allclose(token_mean(x_BT, mask_BT), 16 / 4)
    np.testing.assert_allclose(constant_length_mean(x_BT, mask_BT), 16 / (3 * 2), rtol=FLOAT32)
    np.testing.assert_allclose(constant_length_mean(x_BT, mask_BT, length=8), 16 / (8 * 2))
    np.testing.assert_allclose(token_sum(x_BT, mask_BT), 16.0)
    for reduce in (sequence_mean, token_mean, constant_length_mean, token_sum):
        value, slope = jax.value_and_grad(reduce)(x_BT, mask_BT)
        assert np.all(np.isfinite(slope)), reduce
        assert np.all(slope[mask_BT == 0] == 0), reduce
        nothing = jax.value_and_grad(reduce)(x_BT, jnp.zeros_like(mask_BT))
        assert nothing[0] == 0.0, reduce
        np.testing.assert_array_equal(nothing[1], 0.0)


def test_given_weights_count_on_unmasked_tokens_only():
    """Even with an estimator that is 1 everywhere, masked positions included."""

    def one_nat(logp_BT, ref_logp_BT, old_logp_BT=None):
        return jnp.ones_like(logp_BT)

    arguments = (LOGP, OLD, LOGP, ADVANTAGE, MASK)
    options = {"clip_high": 0.28, "beta": 0.5, "kl": one_nat, "weight_BT": jnp.full((2, 2), 2.0)}
    for loss in (grpo_loss, dr_grpo_loss, dapo_loss):
        value, metrics = loss(*arguments, **options)
        np.testing.assert_allclose(value, 2 * (-(1.28 + 0.5 - 3) + 0.5 * 3), rtol=FLOAT32)
        assert metrics["kl"] == metrics["tokens"] == 3.0


def test_gspo_token_equals_gspo():
    """Value and gradient agree when each row has one advantage; per token only one of them may."""
    inputs = {name: np.asarray(x) for name, x in GOLDEN["far"]["inputs"].items()}
    arguments = (inputs["old_logp"], inputs["ref_logp"], inputs["advantage"], inputs["mask"])
    with jax.enable_x64(True):
        results = [
            jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs["logp"], *arguments)
            for loss in (gspo_loss, gspo_token_loss)
        ]
    (values, gradients) = zip(*results, strict=True)
    np.testing.assert_allclose(values[0][0], values[1][0], atol=FLOAT64)
    np.testing.assert_allclose(gradients[0], gradients[1], atol=FLOAT64)
    assert np.abs(gradients[0]).max() > 1e-3


def test_sft_loss_by_hand():
    logp_BT = jnp.array([[-1.0, -2.0, -jnp.inf], [-4.0, jnp.nan, 0.0]])
    mask_BT = jnp.array([[1, 1, 0], [1, 0, 0]])
    (loss, metrics), slope = jax.value_and_grad(sft_loss, has_aux=True)(logp_BT, mask_BT)
    np.testing.assert_allclose(loss, 7 / 3, rtol=FLOAT32)
    np.testing.assert_allclose(slope, -np.asarray(mask_BT) / 3, rtol=FLOAT32)
    np.testing.assert_allclose(mean_metrics(metrics)["nll"], 7 / 3, rtol=FLOAT32)
    total, _ = sft_loss(logp_BT, mask_BT, weight_BT=token_weights_sum(mask_BT))
    np.testing.assert_allclose(total, 7.0)


def test_gradient_stops_everywhere_but_at_the_policy():
    others = (OLD, LOGP - 0.5, ADVANTAGE)
    for loss in (grpo_loss, cispo_loss, output_grpo_loss):
        slopes = jax.grad(
            lambda *x, loss=loss: loss(LOGP, *x, MASK, beta=0.1)[0], argnums=(0, 1, 2)
        )(*others)
        for slope in slopes:
            np.testing.assert_array_equal(slope, 0.0)


def test_a_missing_reference_is_an_error_unless_beta_is_zero():
    arguments = (LOGP, OLD, None, ADVANTAGE, MASK)
    with pytest.raises(ValueError, match=r"beta=0.04 needs ref_logp_BT"):
        grpo_loss(*arguments)
    with pytest.raises(ValueError, match="needs ref_logp_BT"):
        jax.jit(lambda beta: grpo_loss(*arguments, beta=beta)[0])(0.0)
    assert jnp.isfinite(grpo_loss(*arguments, beta=0)[0])


def test_wrong_shapes_are_errors():
    with pytest.raises(AssertionError):
        grpo_loss(LOGP, OLD[:, :1], None, ADVANTAGE, MASK, beta=0.0)
    with pytest.raises(AssertionError):
        grpo_loss(LOGP, OLD, None, ADVANTAGE[:1], MASK, beta=0.0)
    with pytest.raises(AssertionError):
        grpo_loss(LOGP[0], OLD[0], None, ADVANTAGE, MASK[0], beta=0.0)


def test_a_ratio_beyond_the_bound_has_a_value_and_no_gradient():
    logp_BT = jnp.array([[MAX_LOG_RATIO + 1.0]])
    old_BT, mask_BT = jnp.zeros((1, 1)), jnp.ones((1, 1))
    (loss, _), slope = jax.value_and_grad(grpo_loss, has_aux=True)(
        logp_BT, old_BT, None, jnp.array([-1.0]), mask_BT, beta=0.0
    )
    np.testing.assert_allclose(loss, np.exp(MAX_LOG_RATIO), rtol=FLOAT32)
    assert slope == 0.0


def test_readme_example():
    """The README's example of importing the pure functions."""
    rewards = jnp.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5])  # 2 prompts × 4 samples
    advantages = group_advantages(rewards, group_size=4)
    logp = -jax.random.exponential(jax.random.key(0), (8, 16))  # [samples, tokens]
    mask = jnp.arange(16) < jnp.array([16, 9, 12, 4, 16, 16, 3, 1])[:, None]

    @jax.jit
    def step(logp):
        return jax.value_and_grad(grpo_loss, has_aux=True)(logp, logp, logp, advantages, mask)

    (loss, metrics), grad = step(logp)

    # On policy and at the reference: no clipping, no KL, gradient −w·A.
    assert mean_metrics(metrics)["ratio"] == 1.0
    assert metrics["kl"] == metrics["ratio_square_error"] == metrics["clip_high"] == 0.0
    expected = -advantages[:, None] * token_weights_sequence_mean(mask)
    np.testing.assert_allclose(grad, expected, rtol=FLOAT32, atol=1e-9)
    np.testing.assert_allclose(loss, -advantages.mean(), atol=FLOAT32)
