# SPDX-License-Identifier: Apache-2.0
"""The two ends of every policy objective: what is compared, and how it becomes one loss.

Metrics are sums over unmasked tokens, so that those of micro-batches and devices can be added up
(`jax.tree.map(jnp.add, …)`, `psum`); `mean_metrics` divides by the number of tokens at the end.

| name | sum over unmasked tokens of |
|---|---|
| `tokens` | 1 |
| `ratio` | c, the unclipped ratio |
| `ratio_square_error` | (c − 1)²: 0 if and only if every ratio is 1 |
| `clip_low`, `clip_high` | 1 where that bound is in force |
| `kl` | the KL estimate in nats; only if there is a reference |
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from r1jax.rl.kl import KLEstimator, k3
from r1jax.rl.ratio import Surrogate
from r1jax.rl.reduce import mask_tokens, weighted_sum

Metrics = dict[str, jax.Array]


class PolicyTokens(NamedTuple):
    """Everything a policy loss compares, [B, T] each, float, and 0 at masked positions.

    Only `logp_BT` carries a gradient. `ref_logp_BT` may be None.
    """

    logp_BT: jax.Array
    old_logp_BT: jax.Array
    ref_logp_BT: jax.Array | None
    advantage_BT: jax.Array
    mask_BT: jax.Array


def policy_tokens(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage: jax.Array,
    mask_BT: jax.Array,
) -> PolicyTokens:
    """Checks shapes, clears masked positions, stops gradients, spreads the advantage over tokens.

    Args:
      logp_BT: log-probabilities under the policy [B, T].
      old_logp_BT: log-probabilities under the policy that sampled [B, T].
      ref_logp_BT: log-probabilities under the reference [B, T], or None.
      advantage: [B] or [B, T].
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      `PolicyTokens`; the mask is bool.
    """
    chex.assert_rank(logp_BT, 2)
    if advantage.ndim == 1:
        chex.assert_shape(advantage, logp_BT.shape[:1])
        advantage = jnp.broadcast_to(advantage[:, None], logp_BT.shape)
    chex.assert_equal_shape([logp_BT, old_logp_BT, advantage, mask_BT])

    def constant(x_BT: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(mask_tokens(x_BT, mask_BT))

    return PolicyTokens(
        logp_BT=mask_tokens(logp_BT, mask_BT),
        old_logp_BT=constant(old_logp_BT),
        ref_logp_BT=None if ref_logp_BT is None else constant(ref_logp_BT),
        advantage_BT=constant(advantage),
        mask_BT=mask_BT != 0,
    )


def policy_loss(
    tokens: PolicyTokens,
    surrogate: Surrogate,
    weight_BT: jax.Array,
    *,
    beta: float = 0.0,
    kl: KLEstimator = k3,
) -> tuple[jax.Array, Metrics]:
    """Σ w·(−surrogate + β·KL) over unmasked tokens: where every objective ends.

    Args:
      tokens: from `policy_tokens`.
      surrogate: per-token surrogate made from them.
      weight_BT: the reduction, as weights [B, T].
      beta: weight of the KL, 0 or more; must be a Python number if there is no reference.
      kl: estimator, used if there is a reference.

    Returns:
      Scalar loss and metrics (sums, see the top of the module).

    Raises:
      ValueError: beta is not 0 and the reference is None.
    """
    if tokens.ref_logp_BT is None and not (isinstance(beta, int | float) and beta == 0):
        raise ValueError(
            f"{beta=} needs ref_logp_BT; pass the reference log-probs or set beta to 0"
        )
    weight_BT = jnp.where(tokens.mask_BT, weight_BT, 0)
    loss = -weighted_sum(surrogate.value_BT, weight_BT)
    metrics = _ratio_sums(surrogate, tokens.mask_BT)
    if tokens.ref_logp_BT is not None:
        kl_BT = kl(tokens.logp_BT, tokens.ref_logp_BT, tokens.old_logp_BT)
        loss = loss + beta * weighted_sum(kl_BT, weight_BT)
        metrics["kl"] = jax.lax.stop_gradient(jnp.sum(jnp.where(tokens.mask_BT, kl_BT, 0)))
    return loss, metrics


def _ratio_sums(surrogate: Surrogate, mask_BT: jax.Array) -> Metrics:
    """Sums over unmasked tokens of what there is to know about the ratio."""
    ratio_BT = jax.lax.stop_gradient(surrogate.ratio_BT)
    per_token = {
        "tokens": jnp.ones_like(ratio_BT),
        "ratio": ratio_BT,
        "ratio_square_error": jnp.square(ratio_BT - 1.0),
        "clip_low": surrogate.clipped_low_BT.astype(ratio_BT.dtype),
        "clip_high": surrogate.clipped_high_BT.astype(ratio_BT.dtype),
    }
    return {name: jnp.sum(jnp.where(mask_BT, x_BT, 0)) for name, x_BT in per_token.items()}


def mean_metrics(metrics: Metrics, *, count: str = "tokens") -> Metrics:
    """Sums to means per `count`, which itself stays a sum. A count of 0 gives zeros."""
    number = jnp.maximum(metrics[count], 1)
    return {k: v if k == count else v / number for k, v in metrics.items()}
