# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimisation with a critic (PPO, arXiv 1707.06347), as functions of arrays.

    reward_BT = token_rewards(reward_B, k1(old_logp_BT, ref_logp_BT), mask_BT, beta=.05)
    batch = ppo_batch(old_logp_BT, old_value_BT, reward_BT, mask_BT, lam=.95)   # once per rollout
    loss, metrics = ppo_loss(logp_BT, value_BT, batch)                          # every update

What computes `value_BT`, a head on the policy's trunk or a model of its own, is not seen here: the
gradient goes to both arrays. With a critic of its own and two optimizers, `ppo_policy_loss` and
`value_loss` are the two losses.

Metrics are sums over tokens, as in `r1jax.rl.policy`, and `value_loss` has further ones:

| name | sum over unmasked tokens of |
|---|---|
| `tokens` | 1 |
| `value_clip` | 1 where the clipped value is the worse one |
| `value` | V |
| `value_error`, `value_error_square` | target − V, (target − V)² |
| `target`, `target_square` | target, target² |
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from r1jax.rl.kl import KLEstimator, k3
from r1jax.rl.objectives import grpo_loss
from r1jax.rl.policy import Metrics
from r1jax.rl.reduce import mask_tokens, token_weights_token_mean, weighted_sum
from r1jax.rl.returns import gae, scored_rows, whiten


class PPOBatch(NamedTuple):
    """What a rollout leaves for its updates, [B, T] each; slice it along B into minibatches.

    Attributes:
      old_logp_BT: log-probabilities under the policy that sampled.
      old_value_BT: the critic's values at that time.
      advantage_BT: normalised advantages.
      target_BT: targets of the critic.
      mask_BT: true or non-zero on completion tokens.
    """

    old_logp_BT: jax.Array
    old_value_BT: jax.Array
    advantage_BT: jax.Array
    target_BT: jax.Array
    mask_BT: jax.Array


def ppo_batch(
    old_logp_BT: jax.Array,
    old_value_BT: jax.Array,
    reward_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    gamma: float | jax.Array = 1.0,
    lam: float | jax.Array = 0.95,
    bootstrap_B: jax.Array | None = None,
    ddof: int = 0,
    eps: float = 1e-8,
) -> PPOBatch:
    """GAE, whitened over the batch; the critic's targets are not whitened.

    A row whose reward is not finite keeps its mask and gets advantage 0 and its own old value as
    the target, and does not count in the normalisation.

    Args:
      old_logp_BT: log-probabilities under the policy that sampled [B, T].
      old_value_BT: the critic's values at that time [B, T].
      reward_BT: reward of each token [B, T], from `token_rewards`.
      mask_BT: [B, T], true or non-zero on completion tokens.
      gamma: as in `gae`.
      lam: as in `gae`.
      bootstrap_B: as in `gae`.
      ddof: as in `whiten`.
      eps: as in `whiten`.

    Returns:
      A `PPOBatch`, without gradient, 0 at masked positions.
    """
    mask_BT = mask_BT != 0
    estimate = gae(reward_BT, old_value_BT, mask_BT, gamma=gamma, lam=lam, bootstrap_B=bootstrap_B)
    scored_BT = mask_BT & scored_rows(reward_BT, mask_BT)[:, None]
    return jax.lax.stop_gradient(
        PPOBatch(
            old_logp_BT=mask_tokens(old_logp_BT, mask_BT),
            old_value_BT=mask_tokens(old_value_BT, mask_BT),
            advantage_BT=whiten(estimate.advantage_BT, scored_BT, ddof=ddof, eps=eps),
            target_BT=estimate.target_BT,
            mask_BT=mask_BT,
        )
    )


@jax.named_scope("ppo_policy_objective")
def ppo_policy_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    kl: KLEstimator = k3,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """PPO's clipped policy loss (arXiv 1707.06347, eq. 7), mean over all tokens.

    −1/Σ|o_i| Σ_i Σ_t min(c·A_t, clip(c, 1 − low, 1 + high)·A_t): `grpo_loss` with the advantage of
    a critic, another reduction, and the KL in the reward.

    Args and returns as in `grpo_loss`.
    """
    if weight_BT is None:
        weight_BT = token_weights_token_mean(mask_BT)
    return grpo_loss(
        logp_BT, old_logp_BT, ref_logp_BT, advantage_BT, mask_BT,
        clip_low=clip_low, clip_high=clip_high, beta=beta, kl=kl, weight_BT=weight_BT,
    )  # fmt: skip


@jax.named_scope("value_objective")
def value_loss(
    value_BT: jax.Array,
    old_value_BT: jax.Array,
    target_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    clip: float = 0.2,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """½ Σ w·max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²) (OpenAI baselines' PPO2).

    Args:
      value_BT: the critic's values [B, T].
      old_value_BT: its values when the rollout was made [B, T].
      target_BT: R [B, T], from `gae`.
      mask_BT: [B, T], true or non-zero where the token counts.
      clip: ε, in units of the reward; `float("inf")` leaves the clip out.
      weight_BT: replaces the token-mean weights [B, T].

    Returns:
      Scalar loss and metrics (sums, see the top of the module). Gradient to `value_BT` only:
      w·(V − R), and 0 where V has left the range around V_old to the side of a larger clipped
      error.
    """
    chex.assert_rank(value_BT, 2)
    chex.assert_equal_shape([value_BT, old_value_BT, target_BT, mask_BT])
    mask_BT = mask_BT != 0
    value_BT = mask_tokens(value_BT, mask_BT)
    old_value_BT, target_BT = jax.lax.stop_gradient(
        (mask_tokens(old_value_BT, mask_BT), mask_tokens(target_BT, mask_BT))
    )
    clipped_BT = jnp.clip(value_BT, old_value_BT - clip, old_value_BT + clip)
    square_BT, clipped_square_BT = (jnp.square(v - target_BT) for v in (value_BT, clipped_BT))
    # Inside the range both are equal, in value and in gradient, and nothing counts as clipped.
    worse_BT = clipped_square_BT > square_BT
    if weight_BT is None:
        weight_BT = token_weights_token_mean(mask_BT)
    weight_BT = jnp.where(mask_BT, weight_BT, 0)
    loss = 0.5 * weighted_sum(jnp.where(worse_BT, clipped_square_BT, square_BT), weight_BT)
    per_token = {
        "tokens": mask_BT,
        "value_clip": worse_BT,
        "value": value_BT,
        "value_error": target_BT - value_BT,
        "value_error_square": square_BT,
        "target": target_BT,
        "target_square": jnp.square(target_BT),
    }
    sums = {k: jnp.sum(jnp.where(mask_BT, x, 0), dtype=loss.dtype) for k, x in per_token.items()}
    return loss, jax.lax.stop_gradient(sums)


def explained_variance(metrics: Metrics) -> jax.Array:
    """1 − Var(R − V) / Var(R): 1 is a perfect critic, 0 one that knows the mean alone.

    Args:
      metrics: sums of `value_loss`, added up over what they shall be computed for.

    Returns:
      A scalar; 0 where the targets do not vary, NaN where something is not a number.
    """
    tokens = jnp.maximum(metrics["tokens"], 1)
    mean = {name: value / tokens for name, value in metrics.items()}
    variance = mean["target_square"] - jnp.square(mean["target"])
    rest = mean["value_error_square"] - jnp.square(mean["value_error"])
    # Of equal targets the difference of squares leaves a rounding error. NaN is not `<=`.
    varies = ~(variance <= 1e-5 * mean["target_square"])
    return jnp.where(varies, 1.0 - rest / jnp.where(varies, variance, 1), 0.0)


@jax.named_scope("ppo_objective")
def ppo_loss(
    logp_BT: jax.Array,
    value_BT: jax.Array,
    batch: PPOBatch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 0.5,
    entropy_BT: jax.Array | None = None,
    entropy_weight: float = 0.0,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """L = L_policy + c1·L_value − c2·H (arXiv 1707.06347, eq. 9, as a loss).

    Args:
      logp_BT: log-probabilities under the policy [B, T].
      value_BT: the critic's values [B, T].
      batch: from `ppo_batch`, or rows of it.
      clip_low: distance of the lower bound of the ratio from 1.
      clip_high: distance of the upper bound of the ratio from 1.
      value_clip: as `clip` in `value_loss`.
      value_weight: c1; `value_loss` has its own factor ½.
      entropy_BT: entropy of the policy at each token [B, T], in nats, or None.
      entropy_weight: c2; needs `entropy_BT` if it is not 0.
      weight_BT: replaces the token-mean weights [B, T], of all terms.

    Returns:
      Scalar loss and metrics (sums) of both losses, `entropy` among them if given.

    Raises:
      ValueError: `entropy_weight` is not 0 and there is no entropy.
    """
    if entropy_BT is None and not (isinstance(entropy_weight, int | float) and entropy_weight == 0):
        raise ValueError(f"{entropy_weight=} needs entropy_BT; pass it or set the weight to 0")
    old_logp_BT, old_value_BT, advantage_BT, target_BT, mask_BT = batch
    if weight_BT is None:
        weight_BT = token_weights_token_mean(mask_BT)
    loss, metrics = ppo_policy_loss(
        logp_BT, old_logp_BT, None, advantage_BT, mask_BT,
        clip_low=clip_low, clip_high=clip_high, weight_BT=weight_BT,
    )  # fmt: skip
    critic, critic_metrics = value_loss(
        value_BT, old_value_BT, target_BT, mask_BT, clip=value_clip, weight_BT=weight_BT
    )
    loss = loss + value_weight * critic
    metrics = metrics | critic_metrics
    if entropy_BT is not None:
        entropy_BT = mask_tokens(entropy_BT, mask_BT)
        weight_BT = jnp.where(mask_BT != 0, weight_BT, 0)
        loss = loss - entropy_weight * weighted_sum(entropy_BT, weight_BT)
        metrics["entropy"] = jax.lax.stop_gradient(jnp.sum(entropy_BT))
    return loss, metrics
