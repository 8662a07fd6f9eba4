# SPDX-License-Identifier: Apache-2.0
"""Losses on pairs and on scores: golden values of TRL, hand-computed numbers, properties."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.rl import (
    cdpo_loss,
    dpo_loss,
    ipo_loss,
    logistic_term,
    mean_logp,
    mean_metrics,
    output_grpo_loss,
    pairwise_reward_loss,
    pointwise_reward_loss,
    preference_loss,
    preference_pairs,
    summed_logp,
)

PATH = pathlib.Path(__file__).parents[1] / "golden" / "preferences.json"
GOLDEN = json.loads(PATH.read_text())
# The same formula in float64, in another order of operations.
FLOAT64 = 1e-12
# float32 inputs are rounded by 6e-8; IPO's loss is of order 30.
FLOAT32 = 2e-5
# k micro-batches must equal one batch to this.
MICRO = 1e-6
both_precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, FLOAT64), (np.float32, FLOAT32)], ids=["64", "32"]
)
# The options that `golden/preferences_from_trl.py` has for its cases.
CASES = {
    "dpo": (functools.partial(dpo_loss, beta=0.1), summed_logp),
    "dpo_strong": (functools.partial(dpo_loss, beta=2.0), summed_logp),
    "dpo_mean": (functools.partial(dpo_loss, beta=0.5), mean_logp),
    "ipo": (functools.partial(ipo_loss, beta=0.1), mean_logp),
    "cdpo": (functools.partial(cdpo_loss, beta=0.5, label_smoothing=0.2), summed_logp),
}
LOSSES = {
    "dpo": functools.partial(dpo_loss, beta=0.7),
    "cdpo": functools.partial(cdpo_loss, beta=0.7),
    "ipo": functools.partial(ipo_loss, beta=0.7),
    "pairwise": lambda c, r, ref_c, ref_r, **options: pairwise_reward_loss(
        c, r, margin_B=ref_c, **options
    ),
    "pointwise": lambda c, r, ref_c, ref_r, **options: pointwise_reward_loss(
        c, (r > ref_r), **options
    ),
}
all_losses = pytest.mark.parametrize("name", LOSSES)


def draw(seed=0, pairs=6):
    """Four [B] float32 arrays: policy and reference log-probs of both answers of each pair."""
    policy = -5.0 * np.random.default_rng(seed).exponential(1, (2, pairs))
    reference = policy + np.random.default_rng(seed + 1).normal(size=(2, pairs))
    return tuple(jnp.asarray(x, jnp.float32) for x in (*policy, *reference))


@functools.cache
def compiled(name):
    """(arguments, weight_B=None) -> ((loss, metrics), gradient with respect to the first two)."""

    def loss(chosen_B, others, weight_B):
        return LOSSES[name](chosen_B, *others, weight_B=weight_B)

    slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda arguments, weight_B=None: slope(arguments[0], arguments[1:], weight_B)


@both_precisions
@pytest.mark.parametrize("case", CASES)
def test_golden_values_of_trl(case, dtype, tolerance):
    loss, per_answer = CASES[case]
    expected = GOLDEN["cases"][case]

    def from_tokens(logp_BT, ref_logp_BT, mask_BT):
        chosen_B, rejected_B = jnp.split(per_answer(logp_BT, mask_BT), 2)
        return loss(chosen_B, rejected_B, *jnp.split(per_answer(ref_logp_BT, mask_BT), 2))

    with jax.enable_x64(dtype is np.float64):
        arguments = (np.asarray(GOLDEN["inputs"][k], dtype) for k in ("logp", "ref_logp", "mask"))
        step = jax.jit(jax.value_and_grad(from_tokens, has_aux=True))
        (value, metrics), slope = step(*arguments)
        means = mean_metrics(metrics, count="pairs")
    assert value.dtype == slope.dtype == dtype
    np.testing.assert_allclose(value, expected["loss"], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(slope, expected["gradient"], rtol=0, atol=tolerance)
    if case in ("dpo", "dpo_strong"):  # TRL's rewards are those of summed log-probs
        for name, theirs in {
            "reward_chosen": "chosen", "reward_rejected": "rejected", "margin": "margins",
            "accuracy": "accuracies",
        }.items():  # fmt: skip
            reference = expected["metrics"][f"rewards/{theirs}"]
            # Their accuracy is a float32.
            np.testing.assert_allclose(means[name], reference, atol=max(tolerance, 1e-7))


@both_precisions
@pytest.mark.parametrize("case", ["pairwise", "pairwise_margin"])
def test_reward_model_loss_of_trl(case, dtype, tolerance):
    expected = GOLDEN["cases"][case]
    with jax.enable_x64(dtype is np.float64):
        score_B = jnp.asarray(GOLDEN["inputs"]["score"], dtype)
        margin_B = jnp.asarray(GOLDEN["inputs"]["margin"], dtype) if "margin" in case else None
        (value, _), slope = jax.value_and_grad(
            lambda s: pairwise_reward_loss(*jnp.split(s, 2), margin_B=margin_B), has_aux=True
        )(score_B)
    np.testing.assert_allclose(value, expected["loss"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(slope, expected["gradient"], rtol=0, atol=tolerance)


@both_precisions
def test_output_ratio_is_the_loss_of_trl_s_rloo(dtype, tolerance):
    """RLOO with several updates a batch: `output_grpo_loss` and leave-one-out advantages."""
    expected = GOLDEN["cases"]["rloo"]
    with jax.enable_x64(dtype is np.float64):
        x = {name: jnp.asarray(v, dtype) for name, v in GOLDEN["inputs"].items()}
        loss = functools.partial(output_grpo_loss, clip_low=0.2, clip_high=0.28, beta=0.0)
        (value, _), slope = jax.value_and_grad(loss, has_aux=True)(
            x["logp"], x["ref_logp"], None, x["advantage"], x["mask"]
        )
    np.testing.assert_allclose(value, expected["loss"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(slope, expected["gradient"], rtol=0, atol=tolerance)


# One pair: log-ratios 2 and −1, so h = 3.
PAIR = tuple(jnp.array([x]) for x in (-1.0, -5.0, -3.0, -4.0))


def test_hand_computed_losses():
    sigmoid = 1 / (1 + np.exp(-1.5))
    expected = {
        (dpo_loss, 0.5): (-np.log(sigmoid), 0.5 * (sigmoid - 1)),
        (ipo_loss, 0.5): ((3.0 - 1.0) ** 2, 2 * (3.0 - 1.0)),
        (ipo_loss, 0.1): ((3.0 - 5.0) ** 2, 2 * (3.0 - 5.0)),
        (functools.partial(cdpo_loss, label_smoothing=0.25), 0.5): (
            -0.75 * np.log(sigmoid) - 0.25 * np.log(1 - sigmoid),
            0.5 * (sigmoid - 0.75),
        ),
    }
    for (loss, beta), (value, slope) in expected.items():
        (found, metrics), slopes = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
            *PAIR, beta=beta
        )
        np.testing.assert_allclose(found, value, rtol=FLOAT32)
        np.testing.assert_allclose(np.ravel(slopes), [slope, -slope, 0, 0], rtol=FLOAT32)
        rewards = {"pairs": 1, "reward_chosen": 2 * beta, "reward_rejected": -beta, "accuracy": 1}
        for name, reward in (rewards | {"margin": 3 * beta}).items():
            np.testing.assert_allclose(metrics[name], reward, rtol=FLOAT32, err_msg=name)


def test_log_probabilities_of_answers_by_hand():
    logp_BT = jnp.array([[-1.0, -3.0, jnp.nan], [-jnp.inf, -2.0, 5.0], [jnp.nan, 0.0, 0.0]])
    mask_BT = jnp.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(summed_logp(logp_BT, mask_BT), [-4.0, -2.0, 0.0])
    np.testing.assert_allclose(mean_logp(logp_BT, mask_BT), [-2.0, -2.0, 0.0])
    slope = jax.grad(lambda x: mean_logp(x, mask_BT).sum())(logp_BT)
    np.testing.assert_allclose(slope, [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]])


def test_no_smoothing_is_dpo_and_a_saturated_pair_is_pushed_back():
    chex.assert_trees_all_close(
        cdpo_loss(*draw(), beta=0.7, label_smoothing=0.0), dpo_loss(*draw(), beta=0.7)
    )
    # The best σ(β·h) is 1 − ε: at β·h = log 9 for ε = 0.1, and beyond it the sign turns.
    zero = jnp.zeros(1)
    for h, sign in ((np.log(9.0) - 0.1, -1), (np.log(9.0) + 0.1, 1)):
        slope = jax.grad(lambda x: cdpo_loss(x, zero, zero, zero, beta=1.0)[0])(jnp.array([h]))
        assert np.sign(slope) == sign
    # IPO: the margin is led to 1 / (2β), from both sides.
    for h, sign in ((2.4, -1), (2.6, 1)):
        slope = jax.grad(lambda x: ipo_loss(x, zero, zero, zero, beta=0.2)[0])(jnp.array([h]))
        assert np.sign(slope) == sign


def test_at_the_reference_nothing_is_known():
    logp_B, other_B, _, _ = draw()
    loss, metrics = dpo_loss(logp_B, other_B, logp_B, other_B)
    np.testing.assert_allclose(loss, np.log(2.0), rtol=FLOAT32)
    means = mean_metrics(metrics, count="pairs")
    assert (means["margin"], means["accuracy"]) == (0.0, 0.5)


def test_reward_losses_by_hand():
    chosen_B, rejected_B = jnp.array([2.0, 0.0]), jnp.array([1.0, 3.0])
    loss, metrics = pairwise_reward_loss(chosen_B, rejected_B)
    np.testing.assert_allclose(loss, np.log((1 + np.exp(-1)) * (1 + np.exp(3))) / 2, rtol=FLOAT32)
    assert {k: float(v) for k, v in metrics.items()} == {
        "pairs": 2, "reward_chosen": 2, "reward_rejected": 4, "margin": -2, "accuracy": 1,
    }  # fmt: skip
    loss, _ = pairwise_reward_loss(chosen_B, rejected_B, margin_B=jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(loss, np.log(2 * (1 + np.exp(3))) / 2, rtol=FLOAT32)
    slope = jax.grad(lambda m: pairwise_reward_loss(chosen_B, rejected_B, margin_B=m)[0])
    np.testing.assert_array_equal(slope(jnp.ones(2)), 0.0)

    score_B, label_B = jnp.array([0.0, 2.0, 2.0, -1.0]), jnp.array([1, 1, 0, 0])
    (loss, metrics), slope = jax.value_and_grad(pointwise_reward_loss, has_aux=True)(
        score_B, label_B
    )
    p = 1 / (1 + np.exp(-np.asarray(score_B)))
    expected = -np.log(np.where(label_B == 1, p, 1 - p)).mean()
    np.testing.assert_allclose(loss, expected, rtol=FLOAT32)
    np.testing.assert_allclose(slope, (p - label_B) / 4, rtol=FLOAT32)
    assert {k: float(v) for k, v in metrics.items()} == {
        "answers": 4, "score": 3, "label": 2, "accuracy": 2.5,
    }  # fmt: skip
    # A label may be a probability: the loss is least where σ(s) is it.
    slope = jax.grad(lambda s: pointwise_reward_loss(s, jnp.array([0.75]))[0])
    np.testing.assert_allclose(slope(jnp.log(jnp.array([3.0]))), 0.0, atol=1e-7)
    for label in (True, 1, 1.0):
        found, _ = pointwise_reward_loss(jnp.array([2.0]), jnp.array([label]))
        np.testing.assert_allclose(found, np.log(1 + np.exp(-2)), rtol=FLOAT32)


@all_losses
def test_padding_is_never_looked_at(name):
    arguments = draw(1)
    weight_B = jnp.full(6, 1 / 6)
    expected, slope_B = compiled(name)(arguments)
    chex.assert_trees_all_close(compiled(name)(arguments, weight_B)[0], expected, rtol=MICRO)
    for bad in (0.0, jnp.nan, jnp.inf, -jnp.inf):
        padded = tuple(jnp.append(x, jnp.array([bad, bad])) for x in arguments)
        found, padded_slope_B = compiled(name)(padded, jnp.pad(weight_B, (0, 2)))
        chex.assert_trees_all_close(found, expected, rtol=MICRO, atol=MICRO)
        np.testing.assert_allclose(padded_slope_B[:6], slope_B, atol=MICRO)
        np.testing.assert_array_equal(padded_slope_B[6:], 0.0)
    nothing = compiled(name)(arguments, jnp.zeros(6))
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, nothing))


@all_losses
def test_micro_batches_add_up_to_the_batch(name):
    arguments = draw(2)
    whole, slope_B = compiled(name)(arguments)
    parts = [
        compiled(name)(tuple(x[i : i + 2] for x in arguments), jnp.full(2, 1 / 6))
        for i in range(0, 6, 2)
    ]
    total = jax.tree.map(lambda *x: sum(x), *(aux for aux, _ in parts))
    chex.assert_trees_all_close(total, whole, rtol=MICRO, atol=MICRO)
    joined_B = jnp.concatenate([slope for _, slope in parts])
    np.testing.assert_allclose(joined_B, slope_B, atol=MICRO)
    assert np.abs(slope_B).min() > 0


@all_losses
def test_extreme_log_probabilities_stay_finite(name):
    values = np.array([0.0, -1e-6, -50.0, -1e4])
    arguments = tuple(jnp.asarray(x.ravel(), jnp.float32) for x in np.meshgrid(*[values] * 4))
    chex.assert_tree_all_finite(compiled(name)(arguments))


@all_losses
def test_vmap_and_bfloat16(name):
    draws = [draw(seed) for seed in range(3)]
    found = jax.vmap(compiled(name))(jax.tree.map(lambda *x: jnp.stack(x), *draws))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(compiled(name)(x) for x in draws))
    chex.assert_trees_all_close(found, expected, rtol=FLOAT32, atol=FLOAT32)
    low = tuple(x.astype(jnp.bfloat16) for x in draws[0])
    (loss, _), _ = compiled(name)(low)
    assert loss.dtype == jnp.float32
    raised = tuple(x.astype(jnp.float32) for x in low)
    np.testing.assert_allclose(loss, compiled(name)(raised)[0][0], rtol=FLOAT32)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo"])
def test_only_the_difference_of_log_ratios_counts(name):
    """The same shift of both answers, or of policy and reference together, changes no loss."""
    chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = draw(3)
    loss = LOSSES[name]
    expected, _ = loss(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B)
    for shifted in (
        (chosen_B + 1, rejected_B + 1, ref_chosen_B, ref_rejected_B),
        (chosen_B - 2, rejected_B, ref_chosen_B - 2, ref_rejected_B),
    ):
        np.testing.assert_allclose(loss(*shifted)[0], expected, rtol=FLOAT32)


def test_the_minimum_of_dpo_is_the_policy_of_the_preferences():
    """Over three answers with known Bradley-Terry rewards, π ∝ π_ref·exp(r/β) has gradient 0."""
    reward_V, ref_V = jnp.array([0.3, -0.5, 1.1]), jax.nn.log_softmax(jnp.array([0.2, 0.9, -0.4]))
    first, second = map(jnp.ravel, jnp.meshgrid(jnp.arange(3), jnp.arange(3), indexing="ij"))
    weight_B = jax.nn.sigmoid(reward_V[first] - reward_V[second])  # how often first is preferred

    def loss(logits_V, beta):
        logp_V = jax.nn.log_softmax(logits_V)
        arguments = (logp_V[first], logp_V[second], ref_V[first], ref_V[second])
        return dpo_loss(*arguments, beta=beta, weight_B=weight_B)[0]

    best_V = ref_V + reward_V / 0.5
    np.testing.assert_allclose(jax.grad(loss)(best_V, 0.5), 0.0, atol=MICRO)
    assert np.abs(jax.grad(loss)(best_V, 1.0)).max() > 0.05


def test_a_loss_of_ones_own_from_the_parts():
    """SLiC's hinge, which the library does not name."""
    pairs = preference_pairs(*PAIR)
    term_B = jax.nn.relu(1 - 0.2 * (pairs.chosen_B - pairs.rejected_B))
    loss, metrics = preference_loss(pairs, term_B, beta=0.2)
    np.testing.assert_allclose(loss, 0.4, rtol=FLOAT32)
    np.testing.assert_allclose(metrics["margin"], 0.6, rtol=FLOAT32)


def test_the_logistic_term_is_finite_and_has_its_slope():
    x = jnp.array([-1e4, -1.0, 0.0, 1.0, 1e4])
    np.testing.assert_allclose(
        logistic_term(x), [1e4, 1.3132617, np.log(2), 0.3132617, 0.0], rtol=1e-6
    )
    slope = jax.vmap(jax.grad(logistic_term))(x)
    np.testing.assert_allclose(slope, [-1.0, -0.7310586, -0.5, -0.2689414, 0.0], rtol=1e-6)


def test_wrong_shapes_are_errors():
    chosen_B, *others = draw()
    with pytest.raises(AssertionError):
        dpo_loss(chosen_B[:3], *others)
    with pytest.raises(AssertionError):
        dpo_loss(chosen_B, *others, weight_B=jnp.ones(3))
    with pytest.raises(AssertionError):
        dpo_loss(*(x[:, None] for x in (chosen_B, *others)))
    with pytest.raises(AssertionError):
        pairwise_reward_loss(chosen_B, others[0], margin_B=jnp.ones(3))
    with pytest.raises(AssertionError):
        pointwise_reward_loss(chosen_B, jnp.ones((6, 1)))
