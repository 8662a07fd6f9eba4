# SPDX-License-Identifier: Apache-2.0
"""Losses of the GRPO family: log-probabilities in, (loss, metrics) out. None of them runs a model.

A named algorithm is a sentence over parts that can all be imported:

    # policy.py: what is compared; ratio.py; reduce.py; kl.py
    tokens = policy_tokens(logp_BT, old_logp_BT, ref_logp_BT, advantage, mask_BT)
    log_ratio_BT = token_log_ratio(tokens.logp_BT, tokens.old_logp_BT, tokens.mask_BT)
    surrogate = clipped_surrogate(log_ratio_BT, tokens.advantage_BT, clip_low=.2, clip_high=.2)
    weight_BT = token_weights_sequence_mean(tokens.mask_BT)
    loss, metrics = policy_loss(tokens, surrogate, weight_BT, beta=.04, kl=k3)

| loss | ratio | bound | reduction | defaults |
|---|---|---|---|---|
| `grpo_loss` | token | clipped | sequence mean | 0.2, 0.2; β 0.04 |
| `output_grpo_loss` | whole output | clipped | sequence mean | 0.2, 0.2; β 0.04 |
| `dr_grpo_loss` | token | clipped | constant length | 0.2, 0.2; β 0 |
| `dapo_loss` | token | clipped | token mean | 0.2, 0.28; β 0 |
| `cispo_loss` | token | weight clipped | token mean | cap 5; β 0 |
| `gspo_loss` | sequence | clipped | sequence mean | 3e-4, 4e-4; β 0 |
| `gspo_token_loss` | sequence, token gradient | clipped | sequence mean | 3e-4, 4e-4; β 0 |
| `reinforce_loss` | none | none | sum of an output, mean over outputs | β 0 |

With a critic: `r1jax.rl.ppo`. From pairs of answers: `r1jax.rl.preference`.

**Arguments common to all.** `logp_BT`, `old_logp_BT`, `ref_logp_BT` [B, T]: log-probabilities of
the sampled tokens under the policy (differentiated), under the policy that sampled, and under the
reference; `ref_logp_BT=None` with `beta=0` leaves the KL out. On the first update after sampling
pass `logp_BT` itself as `old_logp_BT`: the gradient is stopped here. The advantage is [B], or [B,
T] to differ by token (a critic's, or weighed by `truncated_importance_weight`). `mask_BT` [B, T]
is true or non-zero on completion tokens, EOS included; what the other positions hold is never
looked at, not even -inf or NaN. `beta` weighs the KL and `kl` is its estimator. `weight_BT` [B, T]
replaces the reduction: compute it from the whole batch, pass slices, and the losses, gradients and
metrics of micro-batches add up to those of the batch.

Metrics are sums over tokens: see `r1jax.rl.policy`.
"""

import jax
import jax.numpy as jnp

from r1jax.rl.kl import KLEstimator, k2, k3
from r1jax.rl.policy import Metrics, policy_loss, policy_tokens
from r1jax.rl.ratio import (
    cispo_surrogate,
    clipped_surrogate,
    output_log_ratio,
    reinforce_surrogate,
    sequence_log_ratio,
    sequence_token_log_ratio,
    token_log_ratio,
)
from r1jax.rl.reduce import (
    mask_tokens,
    token_weights_constant_length,
    token_weights_sequence_mean,
    token_weights_token_mean,
    weighted_sum,
)


@jax.named_scope("grpo_objective")
def grpo_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.04,
    kl: KLEstimator = k3,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300, eq. 3).

    −1/B Σ_i 1/|o_i| Σ_t [ min(c·A, clip(c, 1 − low, 1 + high)·A) − β·KL ] with c the ratio of each
    token. R1 stage 1 uses `clip_high=10.0` and β 0.001.

    Args:
      logp_BT: log-probabilities under the policy [B, T].
      old_logp_BT: log-probabilities under the policy that sampled [B, T].
      ref_logp_BT: log-probabilities under the reference [B, T], or None with `beta=0`.
      advantage_B: [B], or [B, T] to differ by token.
      mask_BT: [B, T], true or non-zero on completion tokens.
      clip_low: distance of the lower bound of the ratio from 1.
      clip_high: distance of the upper bound of the ratio from 1.
      beta: weight of the KL.
      kl: KL estimator.
      weight_BT: replaces the sequence-mean weights [B, T].

    Returns:
      Scalar loss and metrics (sums). Gradient to `logp_BT` only: −w·c·A unclipped, 0 clipped, plus
      β·w·∇KL.
    """
    tokens = policy_tokens(logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT)
    log_ratio_BT = token_log_ratio(tokens.logp_BT, tokens.old_logp_BT, tokens.mask_BT)
    surrogate = clipped_surrogate(
        log_ratio_BT, tokens.advantage_BT, clip_low=clip_low, clip_high=clip_high
    )
    if weight_BT is None:
        weight_BT = token_weights_sequence_mean(tokens.mask_BT)
    return policy_loss(tokens, surrogate, weight_BT, beta=beta, kl=kl)


@jax.named_scope("output_grpo_objective")
def output_grpo_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.04,
    kl: KLEstimator = k3,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """GRPO with the ratio of whole outputs, as the R1 paper writes it (arXiv 2501.12948, eq. 1).

    −1/G Σ_i [ min(c_i·A_i, clip(c_i)·A_i) − β·KL ], c_i = π(o_i|q) / π_old(o_i|q). The ratio of a
    long output leaves any clip range at once; with one update per batch c = 1 and the gradient is
    |o_i| times that of `grpo_loss`.
    Deviation: the KL stays a mean over tokens, for the exponential of its sum over an output
      overflows.

    Args and returns as in `grpo_loss`.
    """
    tokens = policy_tokens(logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT)
    log_ratio_BT = output_log_ratio(tokens.logp_BT, tokens.old_logp_BT, tokens.mask_BT)
    surrogate = clipped_surrogate(
        log_ratio_BT, tokens.advantage_BT, clip_low=clip_low, clip_high=clip_high
    )
    if weight_BT is None:
        weight_BT = token_weights_sequence_mean(tokens.mask_BT)
    return policy_loss(tokens, surrogate, weight_BT, beta=beta, kl=kl)


@jax.named_scope("dr_grpo_objective")
def dr_grpo_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    kl: KLEstimator = k3,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """GRPO without its length bias (Dr. GRPO, arXiv 2503.20783): over a constant length.

    Belongs with `group_advantages(…, scale="none")`. The constant is T; for another budget pass
    `weight_BT=token_weights_constant_length(mask_BT, length=…)`.

    Args and returns as in `grpo_loss`.
    """
    if weight_BT is None:
        weight_BT = token_weights_constant_length(mask_BT)
    return grpo_loss(
        logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT,
        clip_low=clip_low, clip_high=clip_high, beta=beta, kl=kl, weight_BT=weight_BT,
    )  # fmt: skip


@jax.named_scope("dapo_objective")
def dapo_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta: float = 0.0,
    kl: KLEstimator = k3,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """DAPO's loss (arXiv 2503.14476, eq. 8): mean over all tokens, upper clip raised, no KL.

    The rest of DAPO happens before the loss: `informative_groups`, `overlong_penalty`.

    Args and returns as in `grpo_loss`.
    """
    if weight_BT is None:
        weight_BT = token_weights_token_mean(mask_BT)
    return grpo_loss(
        logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT,
        clip_low=clip_low, clip_high=clip_high, beta=beta, kl=kl, weight_BT=weight_BT,
    )  # fmt: skip


@jax.named_scope("cispo_objective")
def cispo_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    *,
    ratio_floor: float = 0.0,
    ratio_cap: float = 5.0,
    beta: float = 0.0,
    kl: KLEstimator = k3,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Clipped importance-sampling weights (CISPO of MiniMax-M1, arXiv 2506.13585).

    −1/Σ|o_i| Σ_i Σ_t sg[clip(c, floor, cap)]·A·logp: REINFORCE with a bounded weight; no token is
    dropped.

    Args:
      logp_BT: log-probabilities under the policy [B, T].
      old_logp_BT: log-probabilities under the policy that sampled [B, T].
      ref_logp_BT: log-probabilities under the reference [B, T], or None with `beta=0`.
      advantage_B: [B], or [B, T] to differ by token.
      mask_BT: [B, T], true or non-zero on completion tokens.
      ratio_floor: smallest weight; 0 is none, as in the paper.
      ratio_cap: largest weight, the bound itself.
      beta: weight of the KL.
      kl: KL estimator.
      weight_BT: replaces the token-mean weights [B, T].

    Returns:
      Scalar loss and metrics (sums). Gradient to `logp_BT` only: −w·sg[clip(c)]·A, plus β·w·∇KL.
    """
    tokens = policy_tokens(logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT)
    log_ratio_BT = token_log_ratio(tokens.logp_BT, tokens.old_logp_BT, tokens.mask_BT)
    surrogate = cispo_surrogate(
        tokens.logp_BT, log_ratio_BT, tokens.advantage_BT,
        ratio_floor=ratio_floor, ratio_cap=ratio_cap,
    )  # fmt: skip
    if weight_BT is None:
        weight_BT = token_weights_token_mean(tokens.mask_BT)
    return policy_loss(tokens, surrogate, weight_BT, beta=beta, kl=kl)


@jax.named_scope("gspo_objective")
def gspo_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    beta: float = 0.0,
    kl: KLEstimator = k3,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Group sequence policy optimisation (GSPO, arXiv 2507.18071, eq. 5): one ratio per sequence.

    −1/B Σ_i min(c_i·A_i, clip(c_i)·A_i), c_i = (π(o_i) / π_old(o_i))^(1/|o_i|). A sequence is
    clipped whole. The bounds are those of the paper, far tighter than GRPO's because the ratio is
    a geometric mean. The advantage is one per sequence; for one per token use `gspo_token_loss`.

    Args and returns as in `grpo_loss`.
    """
    tokens = policy_tokens(logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT)
    log_ratio_BT = sequence_log_ratio(tokens.logp_BT, tokens.old_logp_BT, tokens.mask_BT)
    surrogate = clipped_surrogate(
        log_ratio_BT, tokens.advantage_BT, clip_low=clip_low, clip_high=clip_high
    )
    if weight_BT is None:
        weight_BT = token_weights_sequence_mean(tokens.mask_BT)
    return policy_loss(tokens, surrogate, weight_BT, beta=beta, kl=kl)


@jax.named_scope("gspo_token_objective")
def gspo_token_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    beta: float = 0.0,
    kl: KLEstimator = k3,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """GSPO-token (arXiv 2507.18071, eq. 13): `gspo_loss` with each token's gradient and advantage.

    Equal to `gspo_loss` in value and gradient when every token of a row has the same advantage.

    Args and returns as in `grpo_loss`.
    """
    tokens = policy_tokens(logp_BT, old_logp_BT, ref_logp_BT, advantage_BT, mask_BT)
    log_ratio_BT = sequence_token_log_ratio(tokens.logp_BT, tokens.old_logp_BT, tokens.mask_BT)
    surrogate = clipped_surrogate(
        log_ratio_BT, tokens.advantage_BT, clip_low=clip_low, clip_high=clip_high
    )
    if weight_BT is None:
        weight_BT = token_weights_sequence_mean(tokens.mask_BT)
    return policy_loss(tokens, surrogate, weight_BT, beta=beta, kl=kl)


@jax.named_scope("reinforce_objective")
def reinforce_loss(
    logp_BT: jax.Array,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    *,
    ref_logp_BT: jax.Array | None = None,
    beta: float = 0.0,
    kl: KLEstimator = k2,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """REINFORCE: −1/B Σ_i Σ_t A·log π(o_t), for samples of the policy itself.

    RLOO (arXiv 2402.14740) is this with `leave_one_out_advantages`; REINFORCE++ (arXiv 2501.03262)
    with `reinforce_pp_advantages`, and its baseline variant with `k2` in the loss. With more than
    one update per batch the samples are no longer the policy's: use `ppo_policy_loss` or
    `output_grpo_loss` with the same advantages.

    Args:
      logp_BT: log-probabilities under the policy [B, T].
      advantage_B: [B], or [B, T] to differ by token.
      mask_BT: [B, T], true or non-zero on completion tokens.
      ref_logp_BT: log-probabilities under the reference [B, T], or None with `beta=0`.
      beta: weight of the KL in the loss.
      kl: KL estimator; k2 is the one with the exact gradient on policy.
      weight_BT: replaces the weights [B, T] of the plain policy gradient (1 / B each).

    Returns:
      Scalar loss and metrics (sums). Gradient to `logp_BT` only: −w·A, plus β·w·∇KL.
    """
    tokens = policy_tokens(logp_BT, logp_BT, ref_logp_BT, advantage_B, mask_BT)
    surrogate = reinforce_surrogate(tokens.logp_BT, tokens.advantage_BT)
    if weight_BT is None:
        weight_BT = token_weights_constant_length(tokens.mask_BT, length=1)
    return policy_loss(tokens, surrogate, weight_BT, beta=beta, kl=kl)


@jax.named_scope("sft_objective")
def sft_loss(
    logp_BT: jax.Array, mask_BT: jax.Array, *, weight_BT: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """Supervised fine-tuning: −Σ_i w_i · log P(o_i | q, o_<i) over completion tokens.

    Args:
      logp_BT: log-probabilities of the target tokens [B, T].
      mask_BT: [B, T], true or non-zero on completion tokens.
      weight_BT: the reduction [B, T]; None is the mean over all tokens,
        `token_weights_sum(mask_BT)` the plain sum of the formula.

    Returns:
      Scalar loss and metrics: `tokens`, and `nll` in nats, sums over unmasked tokens.
    """
    if weight_BT is None:
        weight_BT = token_weights_token_mean(mask_BT)
    nll_BT = -mask_tokens(logp_BT, mask_BT)
    metrics = {"tokens": jnp.sum(mask_BT != 0).astype(nll_BT.dtype), "nll": jnp.sum(nll_BT)}
    return weighted_sum(nll_BT, jnp.where(mask_BT != 0, weight_BT, 0)), jax.lax.stop_gradient(
        metrics
    )
