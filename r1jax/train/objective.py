# SPDX-License-Identifier: Apache-2.0
"""The objectives that GRPO's step can train with, each a sentence over the parts of `r1jax.rl`.

| name | advantages | ratio, bound | clip low, high | reduction | KL |
|---|---|---|---|---|---|
| grpo | group | token, clipped | 0.2, 0.2 | sequence mean | loss |
| output_grpo | group | whole output, clipped | 0.2, 0.2 | sequence mean | loss |
| dr_grpo | group, no deviation | token, clipped | 0.2, 0.2 | constant length | loss |
| dapo | group | token, clipped | 0.2, 0.28 | token mean | loss |
| gspo | group | sequence, clipped | 3e-4, 4e-4 | sequence mean | loss |
| gspo_token | group | sequence, gradient by token | 3e-4, 4e-4 | sequence mean | loss |
| cispo | group | token, weight clipped | 1, 4 | token mean | loss |
| rloo | leave one out | whole output, clipped | 0.2, 0.2 | sequence mean | reward |
| reinforce_pp | returns over the batch | token, clipped | 0.2, 0.2 | token mean | reward |
| reinforce_pp_baseline | group, over the batch | token, clipped | 0.2, 0.2 | token mean | loss |

The clips stand where the config names none. A ratio of sequences is a geometric mean: GRPO's clip
would never touch it. CISPO's weights lie between 1 − low and 1 + high.

With `importance_cap` each token's gradient is weighed by itself, in gspo as in gspo_token. Where
the ratio is that of a whole output, a row is weighed by the mean of its tokens' weights.

On the first update of a batch every ratio is 1, and the gradient of `rloo` and of the two others of
its kind is REINFORCE's.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from r1jax import rl
from r1jax.config import UpdateConfig

Batch = Mapping[str, Any]  # mask, ref_logp, old_logp: [B, T]

ESTIMATORS: dict[str, rl.KLEstimator] = {
    "k1": rl.k1,
    "k2": rl.k2,
    "k3": rl.k3,
    "k3_corrected": rl.ratio_corrected(rl.k3),
}


class Objective(NamedTuple):
    """What an update is made of.

    Attributes:
        advantages: (reward_B, batch, group_size) -> [B], or [B, T] to differ by token.
        weights: mask [B, T] of a whole minibatch -> the reduction as weights [B, T].
        loss: (logp, old_logp, ref_logp or None, advantage, mask, *, weight_BT) -> (loss, metrics).
        kl_in_reward: whether `advantages` wants `old_logp` and `ref_logp` of the batch.
    """

    advantages: Callable[[jax.Array, Batch, int], jax.Array]
    weights: Callable[[jax.Array], jax.Array]
    loss: Callable[..., tuple[jax.Array, rl.Metrics]]
    kl_in_reward: bool = False


def objective_of(cfg: UpdateConfig) -> Objective:
    """The objective that `cfg.objective` names, with the settings of `cfg`."""
    return OBJECTIVES[cfg.objective](cfg)


def _clip(cfg: UpdateConfig, low: float, high: float) -> tuple[float, float]:
    """The clip of `cfg`; each side where it has none the one given."""
    return (
        low if cfg.clip_low is None else cfg.clip_low,
        high if cfg.clip_high is None else cfg.clip_high,
    )


def _clipped(loss: Callable, cfg: UpdateConfig, low: float = 0.2, high: float = 0.2) -> Callable:
    """A loss of the family with the clip and the KL of `cfg`."""
    low, high = _clip(cfg, low, high)
    return functools.partial(
        loss, clip_low=low, clip_high=high, beta=cfg.beta, kl=ESTIMATORS[cfg.kl]
    )


def _group(cfg: UpdateConfig) -> Callable:
    def advantages(reward_B, batch, group_size):
        del batch
        return rl.group_advantages(
            reward_B, group_size=group_size, scale=cfg.scale, ddof=cfg.ddof, eps=cfg.eps
        )

    return advantages


def _grpo(cfg: UpdateConfig) -> Objective:
    return Objective(_group(cfg), rl.token_weights_sequence_mean, _clipped(rl.grpo_loss, cfg))


def _output_grpo(cfg: UpdateConfig) -> Objective:
    loss = _clipped(rl.output_grpo_loss, cfg)
    return Objective(_group(cfg), rl.token_weights_sequence_mean, loss)


def _dr_grpo(cfg: UpdateConfig) -> Objective:
    def advantages(reward_B, batch, group_size):
        del batch
        return rl.group_advantages(reward_B, group_size=group_size, scale="none")

    return Objective(advantages, rl.token_weights_constant_length, _clipped(rl.grpo_loss, cfg))


def _dapo(cfg: UpdateConfig) -> Objective:
    loss = _clipped(rl.dapo_loss, cfg, high=0.28)
    return Objective(_group(cfg), rl.token_weights_token_mean, loss)


def _gspo(cfg: UpdateConfig) -> Objective:
    # Corrected for the sampler each token has an advantage of its own; else the two are one.
    by_token = cfg.importance_cap is not None
    loss = _clipped(rl.gspo_token_loss if by_token else rl.gspo_loss, cfg, 3e-4, 4e-4)
    return Objective(_group(cfg), rl.token_weights_sequence_mean, loss)


def _gspo_token(cfg: UpdateConfig) -> Objective:
    loss = _clipped(rl.gspo_token_loss, cfg, 3e-4, 4e-4)
    return Objective(_group(cfg), rl.token_weights_sequence_mean, loss)


def _cispo(cfg: UpdateConfig) -> Objective:
    low, high = _clip(cfg, 1.0, 4.0)
    loss = functools.partial(
        rl.cispo_loss,
        ratio_floor=max(0.0, 1.0 - low),
        ratio_cap=1.0 + high,
        beta=cfg.beta,
        kl=ESTIMATORS[cfg.kl],
    )
    return Objective(_group(cfg), rl.token_weights_token_mean, loss)


def _rloo(cfg: UpdateConfig) -> Objective:
    def advantages(reward_B, batch, group_size):
        reward_B = jnp.asarray(reward_B, jnp.float32)
        if cfg.beta:
            kl_BT = rl.k1(batch["old_logp"], batch["ref_logp"])
            reward_B = rl.kl_penalised_reward(reward_B, kl_BT, batch["mask"], beta=cfg.beta)
        return rl.leave_one_out_advantages(reward_B, group_size=group_size)

    loss = _without_kl(rl.output_grpo_loss, cfg)
    return Objective(advantages, rl.token_weights_sequence_mean, loss, kl_in_reward=True)


def _reinforce_pp(cfg: UpdateConfig) -> Objective:
    def advantages(reward_B, batch, group_size):
        del group_size
        mask_BT = batch["mask"]
        kl_BT = jnp.zeros(mask_BT.shape)
        if cfg.beta:
            kl_BT = rl.k1(batch["old_logp"], batch["ref_logp"])
        reward_BT = rl.token_rewards(reward_B, kl_BT, mask_BT, beta=cfg.beta)
        return rl.reinforce_pp_advantages(reward_BT, mask_BT, ddof=cfg.ddof, eps=cfg.eps)

    loss = _without_kl(rl.grpo_loss, cfg)
    return Objective(advantages, rl.token_weights_token_mean, loss, kl_in_reward=True)


def _reinforce_pp_baseline(cfg: UpdateConfig) -> Objective:
    def advantages(reward_B, batch, group_size):
        # Whitening over tokens would give a group of equal rewards an advantage: left out of it.
        live_P = rl.informative_groups(reward_B, group_size=group_size)
        mask_BT = batch["mask"] * jnp.repeat(live_P, group_size)[:, None]
        return rl.reinforce_pp_baseline_advantages(
            reward_B, mask_BT, group_size=group_size, ddof=cfg.ddof, eps=cfg.eps
        )

    return Objective(advantages, rl.token_weights_token_mean, _clipped(rl.grpo_loss, cfg))


def _without_kl(loss: Callable, cfg: UpdateConfig) -> Callable:
    """The KL is in the reward: the loss reports it and adds nothing."""
    low, high = _clip(cfg, 0.2, 0.2)
    return functools.partial(loss, clip_low=low, clip_high=high, beta=0.0, kl=rl.k3)


OBJECTIVES: dict[str, Callable[[UpdateConfig], Objective]] = {
    "grpo": _grpo,
    "output_grpo": _output_grpo,
    "dr_grpo": _dr_grpo,
    "dapo": _dapo,
    "gspo": _gspo,
    "gspo_token": _gspo_token,
    "cispo": _cispo,
    "rloo": _rloo,
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
}
