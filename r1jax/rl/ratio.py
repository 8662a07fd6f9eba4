# SPDX-License-Identifier: Apache-2.0
"""Importance ratios between the policy and the one that sampled, and the ways to bound them.

Notation: d = log π(o_t) − log π_old(o_t) for each token, m the mask, n = Σ m of a row,
A the advantage. Log-ratios are bounded above by `MAX_LOG_RATIO` before they are exponentiated.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from r1jax.rl.reduce import mask_tokens

# exp(20) = 4.9e8 is far beyond any clip in use, and its square still fits float32. Above it the
# ratio is constant, so a token this far off policy has gradient 0 where it would have overflowed
# to inf and NaN.
MAX_LOG_RATIO = 20.0


def bounded_exp(x: jax.Array) -> jax.Array:
    """exp(min(x, MAX_LOG_RATIO)): finite for every finite x, gradient 0 above the bound."""
    return jnp.exp(jnp.minimum(x, MAX_LOG_RATIO))


def token_log_ratio(logp_BT: jax.Array, old_logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Log-ratio of every token on its own: s_t = d_t (PPO; GRPO of DeepSeekMath, eq. 3).

    Args:
      logp_BT: log-probabilities of the sampled tokens under the policy [B, T].
      old_logp_BT: the same under the policy that sampled [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      [B, T], 0 at masked positions. Gradient 1 to each token's `logp_BT`.
    """
    return mask_tokens(logp_BT, mask_BT) - mask_tokens(old_logp_BT, mask_BT)


def sequence_log_ratio(logp_BT: jax.Array, old_logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean log-ratio of a sequence: s = Σ d·m / n (GSPO, arXiv 2507.18071, eq. 7).

    Args:
      logp_BT: log-probabilities of the sampled tokens under the policy [B, T].
      old_logp_BT: the same under the policy that sampled [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      [B, T], one value per row repeated along T; 0 for an empty row. Gradient m / n to the row's
      `logp_BT`.
    """
    log_ratio_BT = token_log_ratio(logp_BT, old_logp_BT, mask_BT)
    length_B1 = jnp.sum(mask_BT != 0, axis=1, keepdims=True)
    mean_B1 = jnp.sum(log_ratio_BT, axis=1, keepdims=True) / jnp.maximum(length_B1, 1)
    return jnp.broadcast_to(mean_B1, log_ratio_BT.shape)


def sequence_token_log_ratio(
    logp_BT: jax.Array, old_logp_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """Mean log-ratio in value, per token in gradient: sg[s] + logp − sg[logp] (GSPO-token, eq. 14).

    With one advantage per sequence it gives the loss and gradient of `sequence_log_ratio`; unlike
    that, it also takes an advantage per token.

    Args:
      logp_BT: log-probabilities of the sampled tokens under the policy [B, T].
      old_logp_BT: the same under the policy that sampled [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      [B, T], one value per row. Gradient 1 to each token's own `logp_BT`.
    """
    mean_BT = jax.lax.stop_gradient(sequence_log_ratio(logp_BT, old_logp_BT, mask_BT))
    masked_logp_BT = mask_tokens(logp_BT, mask_BT)
    return mean_BT + (masked_logp_BT - jax.lax.stop_gradient(masked_logp_BT))


def output_log_ratio(logp_BT: jax.Array, old_logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Log-ratio of the whole output: s = Σ d·m, as π(o|q) / π_old(o|q) is written (R1, eq. 1).

    Args:
      logp_BT: log-probabilities of the sampled tokens under the policy [B, T].
      old_logp_BT: the same under the policy that sampled [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      [B, T], one value per row repeated along T. Gradient m to the row's `logp_BT`.
    """
    log_ratio_BT = token_log_ratio(logp_BT, old_logp_BT, mask_BT)
    total_B1 = jnp.sum(log_ratio_BT, axis=1, keepdims=True)
    return jnp.broadcast_to(total_B1, log_ratio_BT.shape)


class Surrogate(NamedTuple):
    """What a policy term maximises per token, and where its ratio was bounded.

    Attributes:
      value_BT: surrogate objective [B, T]; the loss is minus its reduction.
      ratio_BT: the ratio it was made from [B, T], unclipped.
      clipped_low_BT: [B, T] bool, the lower bound is in force (no gradient through the ratio).
      clipped_high_BT: [B, T] bool, the upper bound is in force.
    """

    value_BT: jax.Array
    ratio_BT: jax.Array
    clipped_low_BT: jax.Array
    clipped_high_BT: jax.Array


def clipped_surrogate(
    log_ratio_BT: jax.Array, advantage_BT: jax.Array, *, clip_low: float, clip_high: float
) -> Surrogate:
    """PPO's pessimistic surrogate with its own bound on either side.

    min(c·A, clip(c, 1 − low, 1 + high)·A) with c = exp(s): for A > 0 only the upper bound can act,
    for A < 0 only the lower one, and there the gradient is 0. R1 uses high = 10 (any non-negative
    number is allowed); `clip_low >= 1` leaves no lower bound, as a ratio is never negative.

    Args:
      log_ratio_BT: s [B, T], from one of the `*_log_ratio`.
      advantage_BT: A [B, T].
      clip_low: distance of the lower bound from 1, at least 0.
      clip_high: distance of the upper bound from 1, at least 0.

    Returns:
      A `Surrogate`.
    """
    chex.assert_equal_shape([log_ratio_BT, advantage_BT])
    ratio_BT = bounded_exp(log_ratio_BT)
    low_BT = (advantage_BT < 0) & (ratio_BT < 1.0 - clip_low)
    high_BT = (advantage_BT > 0) & (ratio_BT > 1.0 + clip_high)
    # Chosen by `where`, not `minimum`: at c = 1 both branches are equal and `minimum` would split
    # the gradient.
    bounded_BT = jnp.where(low_BT, 1.0 - clip_low, jnp.where(high_BT, 1.0 + clip_high, ratio_BT))
    return Surrogate(bounded_BT * advantage_BT, ratio_BT, low_BT, high_BT)


def dual_clip(surrogate: Surrogate, advantage_BT: jax.Array, *, cap: float) -> Surrogate:
    """Bounds the ratio of bad tokens too: max(surrogate, cap·A) where A < 0 (arXiv 1912.09729).

    Without it a token of negative advantage whose ratio has grown has an unbounded loss.

    Args:
      surrogate: from `clipped_surrogate`.
      advantage_BT: A [B, T].
      cap: largest ratio of a token with A < 0, greater than 1 (3 in that paper).

    Returns:
      A `Surrogate`; tokens bounded here count as clipped high.
    """
    bounded_BT = (advantage_BT < 0) & (surrogate.ratio_BT > cap)
    return surrogate._replace(
        value_BT=jnp.where(bounded_BT, cap * advantage_BT, surrogate.value_BT),
        clipped_high_BT=surrogate.clipped_high_BT | bounded_BT,
    )


def cispo_surrogate(
    logp_BT: jax.Array,
    log_ratio_BT: jax.Array,
    advantage_BT: jax.Array,
    *,
    ratio_floor: float,
    ratio_cap: float,
) -> Surrogate:
    """sg[clip(c, floor, cap)]·A·logp (CISPO, arXiv 2506.13585): clips the weight only.

    No token loses its gradient, only the size of it is bounded.

    Args:
      logp_BT: log-probabilities under the policy [B, T], finite (see `mask_tokens`).
      log_ratio_BT: s [B, T], from one of the `*_log_ratio`.
      advantage_BT: A [B, T].
      ratio_floor: smallest weight; 0 is no bound.
      ratio_cap: largest weight (the bound itself, not its distance from 1).

    Returns:
      A `Surrogate`. Gradient: sg[clip(c)]·A to each token's `logp_BT`.
    """
    chex.assert_equal_shape([logp_BT, log_ratio_BT, advantage_BT])
    ratio_BT = jax.lax.stop_gradient(bounded_exp(log_ratio_BT))
    weight_BT = jnp.clip(ratio_BT, ratio_floor, ratio_cap)
    value_BT = weight_BT * advantage_BT * logp_BT
    return Surrogate(value_BT, ratio_BT, ratio_BT < ratio_floor, ratio_BT > ratio_cap)


def reinforce_surrogate(logp_BT: jax.Array, advantage_BT: jax.Array) -> Surrogate:
    """A·logp: the score-function surrogate of REINFORCE (Williams, 1992), on policy, no ratio.

    Args:
      logp_BT: log-probabilities under the policy [B, T], finite (see `mask_tokens`).
      advantage_BT: A [B, T].

    Returns:
      A `Surrogate` whose ratio is 1 everywhere. Gradient: A to each token's `logp_BT`.
    """
    chex.assert_equal_shape([logp_BT, advantage_BT])
    never_BT = jnp.zeros(logp_BT.shape, bool)
    return Surrogate(advantage_BT * logp_BT, jnp.ones_like(logp_BT), never_BT, never_BT)


def truncated_importance_weight(
    logp_BT: jax.Array, behaviour_logp_BT: jax.Array, mask_BT: jax.Array, *, cap: float = 2.0
) -> jax.Array:
    """min(π(o_t) / μ(o_t), cap): corrects for a sampler μ that is not quite the trainer's π.

    The sampler's arithmetic (dtype, kernels, cache) or its truncation (top-k, top-p) may differ
    from the trainer's. Multiply the advantage by this weight: `advantage_B[:, None] * weight_BT`.
    Every surrogate is homogeneous in A, so that weighs each token's policy term and leaves the KL
    term alone.

    Args:
      logp_BT: log-probabilities the trainer computes for the policy that sampled [B, T].
      behaviour_logp_BT: log-probabilities the sampler reported [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.
      cap: largest weight.

    Returns:
      Weights [B, T], 1 at masked positions. No gradient flows through them.
    """
    log_ratio_BT = token_log_ratio(logp_BT, behaviour_logp_BT, mask_BT)
    return jax.lax.stop_gradient(jnp.minimum(bounded_exp(log_ratio_BT), cap))
