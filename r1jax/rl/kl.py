# SPDX-License-Identifier: Apache-2.0
"""Per-token estimators of KL(π ‖ π_ref) from the log-probabilities of sampled tokens.

With x = log π_ref(o_t) − log π(o_t):

    k1 = −x                unbiased, may be negative
    k2 = x² / 2            biased, small variance
    k3 = exp(x) − x − 1    unbiased, never negative

(Schulman, "Approximating KL divergence", 2020; k3 is eq. 4 of DeepSeekMath.) Being unbiased in
*value* says nothing about the *gradient* of the estimate as a loss term, whose samples come from
the policy itself. In expectation over on-policy samples, and compared with the gradient of the
exact KL(π ‖ π_ref):

    in the loss     expected gradient
    k1              0: each token's is ∇log π, whatever the reference is
    k2              exact
    k3              that of KL(π_ref ‖ π), the other direction: same minimum, another path
    c·k1, c·k3      exact, also off policy (c = π / π_old, see `ratio_corrected`)
    c·k2            not exact

In the *reward* (`kl_penalised_reward`) the estimate is a constant and only its value counts: k1 is
the right choice there, and the policy gradient of the reward supplies the direction.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from r1jax.rl.ratio import MAX_LOG_RATIO, bounded_exp
from r1jax.rl.reduce import mask_tokens


class KLEstimator(Protocol):
    """(logp_BT, ref_logp_BT, old_logp_BT) -> [B, T]: one signature, so a loss can take any."""

    def __call__(
        self, logp_BT: jax.Array, ref_logp_BT: jax.Array, old_logp_BT: jax.Array | None = None
    ) -> jax.Array:
        """Estimates the KL of each token, in nats."""


def k1(
    logp_BT: jax.Array, ref_logp_BT: jax.Array, old_logp_BT: jax.Array | None = None
) -> jax.Array:
    """k1 = log π − log π_ref. For rewards: as a loss term its gradient does not know the reference.

    Args:
      logp_BT: log-probabilities under the policy [B, T], finite.
      ref_logp_BT: log-probabilities under the reference [B, T], finite.
      old_logp_BT: not used by this estimator.

    Returns:
      [B, T] in nats. Gradient 1 to `logp_BT`.
    """
    del old_logp_BT
    return logp_BT - ref_logp_BT


def k2(
    logp_BT: jax.Array, ref_logp_BT: jax.Array, old_logp_BT: jax.Array | None = None
) -> jax.Array:
    """k2 = (log π − log π_ref)² / 2. As a loss term on policy its gradient is that of the exact KL.

    Args:
      logp_BT: log-probabilities under the policy [B, T], finite.
      ref_logp_BT: log-probabilities under the reference [B, T], finite.
      old_logp_BT: not used by this estimator.

    Returns:
      [B, T] in nats. Gradient log π − log π_ref to `logp_BT`.
    """
    del old_logp_BT
    return 0.5 * jnp.square(logp_BT - ref_logp_BT)


def k3(
    logp_BT: jax.Array, ref_logp_BT: jax.Array, old_logp_BT: jax.Array | None = None
) -> jax.Array:
    """k3 = exp(x) − x − 1, x = log π_ref − log π: GRPO's own (DeepSeekMath, eq. 4).

    x is bounded above by `MAX_LOG_RATIO`: a token that the reference finds e²⁰ times likelier has
    the value at the bound and gradient 0, instead of inf.

    Args:
      logp_BT: log-probabilities under the policy [B, T], finite.
      ref_logp_BT: log-probabilities under the reference [B, T], finite.
      old_logp_BT: not used by this estimator.

    Returns:
      [B, T] in nats, non-negative. Gradient 1 − exp(x) to `logp_BT`.
    """
    del old_logp_BT
    x_BT = jnp.minimum(ref_logp_BT - logp_BT, MAX_LOG_RATIO)
    # exp(x) − x − 1 is x²/2 for small x: taking 1 away from exp(x) in float32 would leave only
    # rounding.
    return jnp.expm1(x_BT) - x_BT


def ratio_corrected(estimator: KLEstimator) -> KLEstimator:
    """c·k with c = π / π_old: samples of the old policy, expectation of the new (DeepSeek-V3.2).

    The ratio is differentiated too. That makes the gradient of c·k1 and c·k3 in the loss the exact
    one (table on top), on policy (where c = 1 in value) and off.

    Args:
      estimator: k1 or k3.

    Returns:
      An estimator that needs its third argument, `old_logp_BT` [B, T].
    """

    def corrected(
        logp_BT: jax.Array, ref_logp_BT: jax.Array, old_logp_BT: jax.Array | None = None
    ) -> jax.Array:
        if old_logp_BT is None:
            raise ValueError(
                "old_logp_BT=None: a ratio-corrected estimator needs the log-probs of the sampler"
            )
        ratio_BT = bounded_exp(logp_BT - old_logp_BT)
        return ratio_BT * estimator(logp_BT, ref_logp_BT, old_logp_BT)

    return corrected


def kl_penalised_reward(
    reward_B: jax.Array, kl_BT: jax.Array, mask_BT: jax.Array, *, beta: float
) -> jax.Array:
    """KL in the reward: r − β·Σ_t k_t over the tokens of each output (as in InstructGPT).

    Use it before `group_advantages`, with k1, and set the loss's own `beta` to 0.

    Args:
      reward_B: reward of each completion [B].
      kl_BT: per-token estimate under the policy that sampled [B, T], in nats.
      mask_BT: [B, T], true or non-zero where the token counts.
      beta: weight of the KL, reward per nat.

    Returns:
      [B]. No gradient flows through the KL.
    """
    total_B = jnp.sum(mask_tokens(kl_BT, mask_BT), axis=1)
    return reward_B - beta * jax.lax.stop_gradient(total_B)
