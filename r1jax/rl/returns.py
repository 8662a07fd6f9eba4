# SPDX-License-Identifier: Apache-2.0
"""Advantages by token: rewards spread over tokens, returns, GAE, and whitening over the batch.

All arrays are [B, T], a row is one completion, and the mask is true on its tokens, EOS included.
Positions off the mask are stepped over: a hole (the output of a tool, say) neither breaks a return
nor delays it, and what stands there is never looked at. After the last token of a row comes
nothing, or `bootstrap_B` where the length limit cut the completion.

A row whose reward is NaN or infinite on any of its tokens (a verifier that failed) teaches
nothing: its advantages are 0 and it is left out of the statistics of the batch.

    REINFORCE++           reinforce_pp_advantages(token_rewards(…, k1(…), …), mask_BT)
    REINFORCE++-baseline  reinforce_pp_baseline_advantages(reward_B, mask_BT, group_size=…)
    PPO                   gae(token_rewards(…), value_BT, mask_BT), then whiten(…, mask_BT)
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from r1jax.rl.advantages import group_advantages
from r1jax.rl.reduce import mask_tokens


def token_rewards(
    reward_B: jax.Array, kl_BT: jax.Array, mask_BT: jax.Array, *, beta: float
) -> jax.Array:
    """r_t = −β·k_t, plus the outcome's reward at the last token (InstructGPT, arXiv 2203.02155).

    Args:
      reward_B: reward of each completion [B]; may be NaN, which then stands at its last token.
      kl_BT: per-token KL estimate under the policy that sampled [B, T], in nats; k1 is unbiased.
      mask_BT: [B, T], true or non-zero where the token counts.
      beta: weight of the KL, reward per nat.

    Returns:
      [B, T], at least float32, 0 at masked positions. A row without tokens gets no reward. No
      gradient flows through it.
    """
    reward_B = jnp.asarray(reward_B)
    chex.assert_shape(reward_B, kl_BT.shape[:1])
    penalty_BT = -beta * mask_tokens(kl_BT, mask_BT)
    position_T = jnp.arange(kl_BT.shape[1])
    last_B1 = jnp.max(jnp.where(mask_BT != 0, position_T, -1), axis=1, keepdims=True)
    # Added by `where`: 0·NaN would spread a reward that is not a number over the whole row.
    reward_B1 = reward_B[:, None].astype(penalty_BT.dtype)
    return jax.lax.stop_gradient(
        jnp.where(position_T == last_B1, penalty_BT + reward_B1, penalty_BT)
    )


def scored_rows(reward_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """[B] bool: every reward on the tokens of the row is finite."""
    chex.assert_equal_shape([reward_BT, mask_BT])
    return jnp.all(jnp.isfinite(reward_BT) | (mask_BT == 0), axis=1)


def discounted_sum(x_BT: jax.Array, decay_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """y_t = x_t + decay_t·y_{t+1}, backwards over the tokens of each row.

    In O(log T) parallel steps. Masked positions are stepped over: a masked t holds y_{t+1}.

    Args:
      x_BT: per-token values [B, T], float.
      decay_BT: factors that broadcast to [B, T]; that of the last token has nothing to weigh.
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      [B, T].
    """
    x_BT = mask_tokens(x_BT, mask_BT)
    decay_BT = jnp.where(mask_BT != 0, jnp.broadcast_to(decay_BT, x_BT.shape), 1)

    def then(later, earlier):
        x_later, decay_later = later
        x_earlier, decay_earlier = earlier
        return x_earlier + decay_earlier * x_later, decay_earlier * decay_later

    return jax.lax.associative_scan(
        then, (x_BT, decay_BT.astype(x_BT.dtype)), reverse=True, axis=1
    )[0]


def returns_to_go(
    reward_BT: jax.Array, mask_BT: jax.Array, *, gamma: float | jax.Array = 1.0
) -> jax.Array:
    """G_t = r_t + γ·G_{t+1}: what a token was followed by.

    Args:
      reward_BT: reward of each token [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.
      gamma: discount, a number or broadcastable to [B, T].

    Returns:
      [B, T], 0 at masked positions and in rows with a reward that is not finite.
    """
    valid_BT = (mask_BT != 0) & scored_rows(reward_BT, mask_BT)[:, None]
    reward_BT = jax.lax.stop_gradient(mask_tokens(reward_BT, valid_BT))
    return jnp.where(valid_BT, discounted_sum(reward_BT, gamma, valid_BT), 0)


class GAE(NamedTuple):
    """Advantages and the targets of the critic, [B, T] each, 0 at masked positions.

    In a row with a reward that is not finite the advantage is 0 and the target is the value it had.
    """

    advantage_BT: jax.Array
    target_BT: jax.Array


@jax.named_scope("generalized_advantage_estimation")
def gae(
    reward_BT: jax.Array,
    value_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    gamma: float | jax.Array = 1.0,
    lam: float | jax.Array = 0.95,
    bootstrap_B: jax.Array | None = None,
) -> GAE:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), over the tokens of each row.

    δ_t = r_t + γ_t·V_{t+1} − V_t,   A_t = δ_t + γ_t·λ_t·A_{t+1},   target_t = A_t + V_t

    t + 1 is the next unmasked token. After the last one V is 0, for the episode is over, or
    `bootstrap_B`. r_t is the reward for producing token t and V_t the critic's value before it,
    seeing tokens up to t − 1: rlax's `truncated_generalized_advantage_estimation` with r_t, γ_t
    and λ_t at the same index and `values` = [V_0 … V_{T−1}, bootstrap].

    Args:
      reward_BT: reward of each token [B, T], from `token_rewards`.
      value_BT: the critic's values of the states the tokens were produced in [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.
      gamma: discount, a number or broadcastable to [B, T]; 1 is usual for language.
      lam: λ, a number or broadcastable to [B, T]; 1 is the return less the value, 0 is δ.
      bootstrap_B: value of the state after the last token [B], where the length limit cut the
        completion; None is 0 everywhere.

    Returns:
      `GAE`, at least float32. No gradient flows through it.
    """
    chex.assert_equal_shape([reward_BT, value_BT, mask_BT])
    mask_BT = mask_BT != 0
    scored_BT = mask_BT & scored_rows(reward_BT, mask_BT)[:, None]
    reward_BT, value_BT = mask_tokens(reward_BT, scored_BT), mask_tokens(value_BT, mask_BT)
    after_B1 = jnp.zeros((value_BT.shape[0], 1), value_BT.dtype)
    if bootstrap_B is not None:
        chex.assert_shape(bootstrap_B, value_BT.shape[:1])
        after_B1 = bootstrap_B[:, None].astype(value_BT.dtype)
    delta_BT = reward_BT + gamma * _next_value(value_BT, after_B1, mask_BT) - value_BT
    advantage_BT = discounted_sum(delta_BT, jnp.asarray(gamma) * lam, mask_BT)
    advantage_BT = jnp.where(scored_BT, advantage_BT, 0)
    return jax.lax.stop_gradient(GAE(advantage_BT, advantage_BT + value_BT))


def _next_value(value_BT: jax.Array, after_B1: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """V at the next unmasked position of the row, `after_B1` where there is none [B, T]."""
    length = value_BT.shape[1]
    here_BT = jnp.where(mask_BT, jnp.arange(length), length)
    first_BT = jax.lax.cummin(here_BT, axis=1, reverse=True)  # the first unmasked one from t on
    next_BT = jnp.pad(first_BT[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    return jnp.take_along_axis(jnp.concatenate([value_BT, after_B1], axis=1), next_BT, axis=1)


def whiten(x_BT: jax.Array, mask_BT: jax.Array, *, ddof: int = 0, eps: float = 1e-8) -> jax.Array:
    """(x − mean) / (std + eps), over all unmasked tokens of the batch together.

    Equal values have no contrast: all become exactly 0, not the rounding of their mean over eps.
    For micro-batches whiten the whole batch first and slice.

    Args:
      x_BT: per-token values [B, T], float.
      mask_BT: [B, T], true or non-zero where the token counts.
      ddof: 0 divides the squares by the number of tokens, 1 by one less (TRL, verl).
      eps: added to the deviation.

    Returns:
      [B, T], at least float32, 0 at masked positions.
    """
    mask_BT = mask_BT != 0
    x_BT = mask_tokens(x_BT, mask_BT)
    count = jnp.sum(mask_BT)
    centred_BT = jnp.where(mask_BT, x_BT - jnp.sum(x_BT) / jnp.maximum(count, 1), 0)
    deviation = jnp.sqrt(jnp.sum(jnp.square(centred_BT)) / jnp.maximum(count - ddof, 1))
    highest = jnp.max(jnp.where(mask_BT, x_BT, -jnp.inf))
    # Not `>`: a NaN among them must stay one, or a step without any signal would pass for sound.
    differ = ~(highest <= jnp.min(jnp.where(mask_BT, x_BT, jnp.inf)))
    return jnp.where(differ, centred_BT / jnp.where(differ, deviation + eps, 1), 0)


def reinforce_pp_advantages(
    reward_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    gamma: float | jax.Array = 1.0,
    ddof: int = 0,
    eps: float = 1e-8,
) -> jax.Array:
    """REINFORCE++: returns, KL included, normalised over the batch (arXiv 2501.03262).

    A_t = G_t = r(q, o) − β·Σ_{s ≥ t} KL_s, then (A − mean(A)) / (std(A) + eps) over all tokens of
    all prompts: no critic and no group, so one sample a prompt is enough.

    Args:
      reward_BT: reward of each token [B, T], from `token_rewards(…, k1(old, ref), …)`.
      mask_BT: [B, T], true or non-zero where the token counts.
      gamma: discount; 1 in the paper.
      ddof: as in `whiten`.
      eps: as in `whiten`.

    Returns:
      [B, T], at least float32, 0 at masked positions and in rows without a finite reward.
    """
    valid_BT = (mask_BT != 0) & scored_rows(reward_BT, mask_BT)[:, None]
    return whiten(returns_to_go(reward_BT, mask_BT, gamma=gamma), valid_BT, ddof=ddof, eps=eps)


def reinforce_pp_baseline_advantages(
    reward_B: jax.Array,
    mask_BT: jax.Array,
    *,
    group_size: int,
    ddof: int = 0,
    eps: float = 1e-8,
) -> jax.Array:
    """REINFORCE++-baseline: r − mean_G, normalised over the batch (arXiv 2501.03262).

    The KL is not in this reward but in the loss, as k2. As published, the mean subtracted last is
    that of all *tokens*: it is 0 only if all outputs are equally long, so a group without contrast
    has a small advantage, the same for its every token. To leave it out, clear its mask
    (`informative_groups`).

    Args:
      reward_B: rewards [B = P·G], float, integer or boolean.
      mask_BT: [B, T], true or non-zero where the token counts.
      group_size: G, completions per prompt.
      ddof: as in `whiten`.
      eps: as in `whiten`.

    Returns:
      [B, T], at least float32, 0 at masked positions and in rows without a finite reward.
    """
    reward_B = jnp.asarray(reward_B)
    advantage_B = group_advantages(reward_B, group_size=group_size, scale="none")
    valid_BT = (mask_BT != 0) & jnp.isfinite(reward_B)[:, None]
    advantage_BT = jnp.broadcast_to(advantage_B[:, None], mask_BT.shape)
    return whiten(advantage_BT, valid_BT, ddof=ddof, eps=eps)
