# SPDX-License-Identifier: Apache-2.0
"""Losses on pairs of answers: DPO and its kin for the policy, Bradley-Terry for reward models.

The losses see one number per answer: its log-probability under the policy and under the reference
(`summed_logp`, or `mean_logp` to normalise by length), or a reward model's score. As elsewhere a
named loss is a sentence over parts:

    pairs = preference_pairs(chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B)
    term_B = logistic_term(beta * (pairs.chosen_B - pairs.rejected_B))
    loss, metrics = preference_loss(pairs, term_B, beta=beta)

| loss | term of h = Δ_chosen − Δ_rejected, Δ = log π − log π_ref | log-probabilities |
|---|---|---|
| `dpo_loss` | −log σ(β·h) | summed |
| `cdpo_loss` | −(1 − ε)·log σ(β·h) − ε·log σ(−β·h) | summed |
| `ipo_loss` | (h − 1 / (2β))² | mean |
| `pairwise_reward_loss` | −log σ(s_chosen − s_rejected − m) | (scores) |
| `pointwise_reward_loss` | −y·log σ(s) − (1 − y)·log σ(−s) | (scores) |

`weight_B` [B] weighs the pairs and replaces their mean: a pair of weight 0 (padding of the last
batch) is never looked at, not even if it holds NaN. Computed for a whole batch and sliced, it makes
the losses, gradients and metrics of micro-batches add up to those of the batch.

Metrics are sums over the pairs of non-zero weight; `mean_metrics(metrics, count="pairs")`:

| name | sum over pairs of |
|---|---|
| `pairs` | 1 |
| `reward_chosen`, `reward_rejected` | implicit reward β·Δ (a score, for reward models) |
| `margin` | their difference |
| `accuracy` | 1 where chosen is above rejected, ½ where both are equal |
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from r1jax.rl.policy import Metrics
from r1jax.rl.reduce import mask_tokens


def summed_logp(logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """log π(o_i | q) = Σ_t m·logp of each row.

    Args:
      logp_BT: log-probabilities of the answer's tokens [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      [B], at least float32.
    """
    return jnp.sum(mask_tokens(logp_BT, mask_BT), axis=1)


def mean_logp(logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Σ_t m·logp / |o_i| of each row: the log-probability normalised by length.

    Args:
      logp_BT: log-probabilities of the answer's tokens [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      [B], at least float32; 0 for a row without tokens.
    """
    return summed_logp(logp_BT, mask_BT) / jnp.maximum(jnp.sum(mask_BT != 0, axis=1), 1)


class PreferencePairs(NamedTuple):
    """Two numbers to compare and the weight of the pair, [B] each; 0 where the weight is 0.

    Attributes:
      chosen_B: log-ratio Δ (or score) of the preferred answer.
      rejected_B: that of the other one.
      weight_B: weights, constant.
    """

    chosen_B: jax.Array
    rejected_B: jax.Array
    weight_B: jax.Array


def _weights(x_B: jax.Array, weight_B: jax.Array | None) -> jax.Array:
    """The weights given, or 1/B each, in the float type of the losses."""
    chex.assert_rank(x_B, 1)
    if weight_B is None:
        weight_B = jnp.full(x_B.shape, 1.0 / max(x_B.shape[0], 1))
    chex.assert_equal_shape([x_B, weight_B])
    return jax.lax.stop_gradient(jnp.asarray(weight_B, jnp.result_type(float)))


def preference_pairs(
    chosen_logp_B: jax.Array,
    rejected_logp_B: jax.Array,
    ref_chosen_logp_B: jax.Array,
    ref_rejected_logp_B: jax.Array,
    *,
    weight_B: jax.Array | None = None,
) -> PreferencePairs:
    """Δ = log π(o|q) − log π_ref(o|q) of both answers; no gradient flows to the reference.

    Args:
      chosen_logp_B: log-probability of the preferred answer under the policy [B], finite.
      rejected_logp_B: that of the other answer [B].
      ref_chosen_logp_B: log-probability of the preferred answer under the reference [B].
      ref_rejected_logp_B: that of the other answer [B].
      weight_B: weights of the pairs [B]; None is 1/B each.

    Returns:
      `PreferencePairs`, at least float32.
    """
    weight_B = _weights(chosen_logp_B, weight_B)

    def ratio(logp_B: jax.Array, ref_logp_B: jax.Array) -> jax.Array:
        constant_B = jax.lax.stop_gradient(mask_tokens(ref_logp_B, weight_B))
        return mask_tokens(logp_B, weight_B) - constant_B

    return PreferencePairs(
        chosen_B=ratio(chosen_logp_B, ref_chosen_logp_B),
        rejected_B=ratio(rejected_logp_B, ref_rejected_logp_B),
        weight_B=weight_B,
    )


def logistic_term(margin_B: jax.Array) -> jax.Array:
    """−log σ(x) = softplus(−x): finite and with slope −σ(−x) for every finite x, any shape."""
    return jax.nn.softplus(-margin_B)


def preference_loss(
    pairs: PreferencePairs, term_B: jax.Array, *, beta: float
) -> tuple[jax.Array, Metrics]:
    """Σ w·term over the pairs, and the metrics: where every loss on pairs ends.

    Args:
      pairs: from `preference_pairs`.
      term_B: loss of each pair [B]; its value is not looked at where the weight is 0.
      beta: reward per nat, for the metrics.

    Returns:
      Scalar loss and metrics (sums, see the top of the module).
    """
    chosen_B, rejected_B, weight_B = jax.lax.stop_gradient(pairs)
    per_pair = {
        "pairs": jnp.ones_like(chosen_B),
        "reward_chosen": beta * chosen_B,
        "reward_rejected": beta * rejected_B,
        "margin": beta * (chosen_B - rejected_B),
        # A policy that has not moved from its reference knows nothing, and is not always wrong.
        "accuracy": 0.5 * (1.0 + jnp.sign(chosen_B - rejected_B)),
    }
    metrics = {name: jnp.sum(jnp.where(weight_B != 0, x_B, 0)) for name, x_B in per_pair.items()}
    return jnp.sum(mask_tokens(term_B, weight_B) * weight_B), metrics


@jax.named_scope("dpo_objective")
def dpo_loss(
    chosen_logp_B: jax.Array,
    rejected_logp_B: jax.Array,
    ref_chosen_logp_B: jax.Array,
    ref_rejected_logp_B: jax.Array,
    *,
    beta: float = 0.1,
    weight_B: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Direct preference optimisation (DPO, arXiv 2305.18290, eq. 7): −log σ(β·h).

    Args:
      chosen_logp_B: log-probability of the preferred answer under the policy [B], from
        `summed_logp`.
      rejected_logp_B: that of the other answer [B].
      ref_chosen_logp_B: log-probability of the preferred answer under the reference [B].
      ref_rejected_logp_B: that of the other answer [B].
      beta: strength of the tie to the reference, reward per nat.
      weight_B: weights of the pairs [B]; None is 1/B each.

    Returns:
      Scalar loss and metrics (sums). Gradient ∓w·β·σ(−β·h) to the policy's two log-probabilities.
    """
    pairs = preference_pairs(
        chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B, weight_B=weight_B
    )
    term_B = logistic_term(beta * (pairs.chosen_B - pairs.rejected_B))
    return preference_loss(pairs, term_B, beta=beta)


@jax.named_scope("cdpo_objective")
def cdpo_loss(
    chosen_logp_B: jax.Array,
    rejected_logp_B: jax.Array,
    ref_chosen_logp_B: jax.Array,
    ref_rejected_logp_B: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    weight_B: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023).

    −(1 − ε)·log σ(β·h) − ε·log σ(−β·h): labels are wrong with probability ε, so the best σ(β·h) is
    1 − ε, not 1.

    Args:
      chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B: as in `dpo_loss`.
      beta: as in `dpo_loss`.
      label_smoothing: ε, from 0 (`dpo_loss`) to below ½.
      weight_B: weights of the pairs [B]; None is 1/B each.

    Returns:
      As `dpo_loss`.
    """
    pairs = preference_pairs(
        chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B, weight_B=weight_B
    )
    margin_B = beta * (pairs.chosen_B - pairs.rejected_B)
    right_B, wrong_B = logistic_term(margin_B), logistic_term(-margin_B)
    term_B = (1.0 - label_smoothing) * right_B + label_smoothing * wrong_B
    return preference_loss(pairs, term_B, beta=beta)


@jax.named_scope("ipo_objective")
def ipo_loss(
    chosen_logp_B: jax.Array,
    rejected_logp_B: jax.Array,
    ref_chosen_logp_B: jax.Array,
    ref_rejected_logp_B: jax.Array,
    *,
    beta: float = 0.1,
    weight_B: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Identity preference optimisation (IPO, arXiv 2310.12036, eq. 17): (h − 1 / (2β))².

    The margin is led to 1 / (2β), not to infinity. Its authors and TRL pass log-probabilities
    normalised by length, from `mean_logp`, which is not in the paper.

    Args:
      chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B: as in `dpo_loss`,
        from `mean_logp`.
      beta: the paper's τ, greater than 0.
      weight_B: weights of the pairs [B]; None is 1/B each.

    Returns:
      As `dpo_loss`. Gradient ±2w·(h − 1 / (2β)).
    """
    pairs = preference_pairs(
        chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B, weight_B=weight_B
    )
    term_B = jnp.square(pairs.chosen_B - pairs.rejected_B - 1.0 / (2.0 * beta))
    return preference_loss(pairs, term_B, beta=beta)


@jax.named_scope("pairwise_reward_objective")
def pairwise_reward_loss(
    chosen_score_B: jax.Array,
    rejected_score_B: jax.Array,
    *,
    margin_B: jax.Array | None = None,
    weight_B: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Bradley-Terry loss of a helpfulness reward model: −log σ(s_chosen − s_rejected − m).

    InstructGPT (arXiv 2203.02155, eq. 1) without its factor; the margin is Llama 2's (arXiv
    2307.09288, eq. 2).

    Args:
      chosen_score_B: score of the preferred answer [B].
      rejected_score_B: score of the other answer [B].
      margin_B: how far apart they shall at least be [B], at least 0; None is 0.
      weight_B: weights of the pairs [B]; None is 1/B each.

    Returns:
      Scalar loss and metrics (sums, see the top of the module; `margin` is s_chosen − s_rejected).
    """
    weight_B = _weights(chosen_score_B, weight_B)
    chosen_B, rejected_B = (mask_tokens(s, weight_B) for s in (chosen_score_B, rejected_score_B))
    difference_B = chosen_B - rejected_B
    if margin_B is not None:
        difference_B = difference_B - jax.lax.stop_gradient(mask_tokens(margin_B, weight_B))
    pairs = PreferencePairs(chosen_B, rejected_B, weight_B)
    return preference_loss(pairs, logistic_term(difference_B), beta=1.0)


@jax.named_scope("pointwise_reward_objective")
def pointwise_reward_loss(
    score_B: jax.Array, label_B: jax.Array, *, weight_B: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """Binary cross-entropy of a safety reward model: −y·log σ(s) − (1 − y)·log σ(−s).

    As R1 (arXiv 2501.12948) trains its safety reward model, on single answers.

    Args:
      score_B: logit that the answer is safe [B].
      label_B: 1 safe, 0 unsafe [B], boolean, integer or a probability.
      weight_B: weights of the answers [B]; None is 1/B each.

    Returns:
      Scalar loss and metrics, sums over the answers of non-zero weight: `answers`, `score`,
      `label`, and `accuracy` (s > 0 where y > ½, s < 0 where y < ½; ½ at s = 0).
    """
    weight_B = _weights(score_B, weight_B)
    score_B, label_B = mask_tokens(score_B, weight_B), mask_tokens(label_B, weight_B)
    label_B = jax.lax.stop_gradient(label_B)
    term_B = label_B * logistic_term(score_B) + (1.0 - label_B) * logistic_term(-score_B)
    per_answer = {
        "answers": jnp.ones_like(score_B),
        "score": score_B,
        "label": label_B,
        "accuracy": 0.5 * (1.0 + jnp.sign(score_B) * jnp.sign(label_B - 0.5)),
    }
    metrics = {name: jnp.sum(jnp.where(weight_B != 0, x, 0)) for name, x in per_answer.items()}
    loss = jnp.sum(mask_tokens(term_B, weight_B) * weight_B)
    return loss, jax.lax.stop_gradient(metrics)
