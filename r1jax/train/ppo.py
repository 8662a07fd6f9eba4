# SPDX-License-Identifier: Apache-2.0
"""The PPO step: GAE, clipped policy and critic losses, gradients and updates in one compiled call.

With a critic of its own (`ppo_step`), or with a value head on the policy's trunk
(`shared_ppo_step`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from r1jax.config import PPOUpdateConfig
from r1jax.nn.param import RouterBias
from r1jax.rl.kl import k1
from r1jax.rl.ppo import PPOBatch, explained_variance, ppo_batch, ppo_policy_loss, value_loss
from r1jax.rl.reduce import token_weights_token_mean
from r1jax.rl.returns import token_rewards
from r1jax.rl.rollout import Rollout
from r1jax.sharding import automatic, spec
from r1jax.train.forward import completion_both, completion_logp, completion_values
from r1jax.train.grpo import (
    Metrics,
    by_piece,
    in_updates,
    report_of,
    rows_to_train,
    sampling_sums,
    still_logp,
    weighed,
)
from r1jax.train.program import program
from r1jax.train.state import Controls, TrainState, accumulate, laid, update


class ActorCritic(NamedTuple):
    """The policy and the critic of its own, or what steers the updates of each."""

    actor: TrainState | Controls
    critic: TrainState | Controls


def policy_of(state: TrainState) -> TrainState:
    """The policy inside a state whose model is `nn.value.Valued`, without the optimizer."""
    parts = nnx.split(state.model().decoder, nnx.Param, RouterBias)
    graphdef, params, router = parts
    return TrainState(state.step, params, router, (), graphdef, state.load)


def ppo_step(
    both: ActorCritic,
    ref_params: nnx.State | None,
    rollout: Rollout,
    reward_B: jax.Array,
    controls: ActorCritic,
    *,
    temperature: jax.Array | float,
    cfg: PPOUpdateConfig,
    optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
) -> tuple[ActorCritic, Metrics]:
    """One batch with a critic of its own (PPO, arXiv 1707.06347): GAE, then the updates of both.

    The KL is in the reward. A completion that the length limit cut counts as one that ended.

    Args:
        both: donated by the caller; the critic's model is an `nn.value.Valued`.
        ref_params: the reference policy, or None where `cfg.beta` is 0.
        rollout: B completions.
        reward_B: [B] raw rewards; NaN marks a row whose reward is unknown.
        controls: learning rate and γ of each.
        temperature: of the sampler.

    Returns:
        (both, metrics): those of `grpo.report_of` for the policy, reward, and value_loss,
        explained_variance, value_grad_norm, value_clip for the critic.
    """
    how = dict(cfg=cfg, optimizer=optimizer, value_optimizer=value_optimizer)
    run = automatic(
        functools.partial(_own, **how), lambda both, *_: (ActorCritic(*map(laid, both)), spec())
    )
    return run(both, ref_params, (rollout, reward_B, temperature), controls)


def _own(both, ref_params, sampled, controls, *, cfg, **optimizers):
    rollout, reward_B, temperature = sampled
    batch, pieces = rows_to_train(rollout), cfg.minibatches * cfg.micro_batches
    batch |= still_logp(both.actor, ref_params, batch, temperature, pieces=pieces, old=True)
    model = both.critic.model()
    value = by_piece(lambda rows: completion_values(model, rows)[0], batch, pieces)
    batch |= estimates(batch, value.reshape(batch["mask"].shape), reward_B, cfg)

    def one_update(both, minibatch):
        minibatch = weighed(minibatch, token_weights_token_mean)

        def actor_loss(params, micro):
            model = both.actor.model(params)
            logp_BT, entropy_BT, load_LE = completion_logp(model, micro, temperature)
            loss, sums = _policy_loss(logp_BT, entropy_BT, micro, cfg)
            return loss, sums | {"loss": loss, "load": load_LE}

        def critic_loss(params, micro):
            value_BT, load_LE = completion_values(both.critic.model(params), micro)
            loss, sums = _value_loss(value_BT, micro, cfg)
            return loss, sums | {"value_load": load_LE}

        grads, sums = accumulate(actor_loss, both.actor.params, minibatch)
        value_grads, value_sums = accumulate(critic_loss, both.critic.params, minibatch)
        actor, report = update(
            both.actor, grads, sums["load"], controls.actor, optimizers["optimizer"]
        )
        critic, value_report = update(
            both.critic, value_grads, value_sums.pop("value_load"), controls.critic,
            optimizers["value_optimizer"],
        )  # fmt: skip
        sums |= value_sums | {"value_grad_norm": value_report["grad_norm"]} | report
        sums["skipped"] += value_report["skipped"]
        return ActorCritic(actor, critic), sums

    both, sums = in_updates(one_update, both, batch, cfg)
    return both, _report(sums, reward_B)


def shared_ppo_step(
    state: TrainState,
    ref_params: nnx.State | None,
    rollout: Rollout,
    reward_B: jax.Array,
    controls: Controls,
    *,
    temperature: jax.Array | float,
    cfg: PPOUpdateConfig,
    optimizer: optax.GradientTransformation,
    value_weight: float,
) -> tuple[TrainState, Metrics]:
    """`ppo_step` with the critic's head on the policy's trunk: L = L_policy + c1·L_value (eq. 9).

    Args:
        state: of an `nn.value.Valued` policy.
        ref_params: parameters of such a model, or None; the value head is not looked at.
        value_weight: c1.
    """
    how = dict(cfg=cfg, optimizer=optimizer, value_weight=value_weight)
    run = automatic(functools.partial(_shared, **how), lambda state, *_: (laid(state), spec()))
    return run(state, ref_params, (rollout, reward_B, temperature), controls)


def _shared(state, ref_params, sampled, controls, *, cfg, optimizer, value_weight):
    rollout, reward_B, temperature = sampled
    batch, pieces = rows_to_train(rollout), cfg.minibatches * cfg.micro_batches
    before = policy_of(state)
    reference = None if ref_params is None else policy_of(_with(state, ref_params)).params
    batch |= still_logp(before, reference, batch, temperature, pieces=pieces, old=True)
    model = state.model()
    value = by_piece(lambda rows: completion_values(model, rows)[0], batch, pieces)
    batch |= estimates(batch, value.reshape(batch["mask"].shape), reward_B, cfg)

    def one_update(state, minibatch):
        minibatch = weighed(minibatch, token_weights_token_mean)

        def loss_fn(params, micro):
            found = completion_both(state.model(params), micro, temperature)
            logp_BT, entropy_BT, value_BT, load_LE = found
            loss, sums = _policy_loss(logp_BT, entropy_BT, micro, cfg)
            critic, value_sums = _value_loss(value_BT, micro, cfg)
            return loss + value_weight * critic, sums | value_sums | {"loss": loss, "load": load_LE}

        grads, sums = accumulate(loss_fn, state.params, minibatch)
        state, report = update(state, grads, sums["load"], controls, optimizer)
        return state, sums | report

    state, sums = in_updates(one_update, state, batch, cfg)
    return state, _report(sums, reward_B)


def _with(state: TrainState, params: nnx.State) -> TrainState:
    return TrainState(state.step, params, state.router, (), state.graphdef)


def estimates(
    batch: dict[str, jax.Array], value_BT: jax.Array, reward_B: jax.Array, cfg: PPOUpdateConfig
) -> dict[str, jax.Array]:
    """Advantages, targets and old values of a rollout, before its first update."""
    mask_BT, old_BT = batch["mask"], batch["old_logp"]
    kl_BT = k1(old_BT, batch["ref_logp"]) if "ref_logp" in batch else jnp.zeros_like(old_BT)
    reward_BT = token_rewards(reward_B, kl_BT, mask_BT, beta=cfg.beta)
    made: PPOBatch = ppo_batch(old_BT, value_BT, reward_BT, mask_BT, gamma=cfg.gamma, lam=cfg.lam)
    return {
        "advantage": made.advantage_BT,
        "target": made.target_BT,
        "old_value": made.old_value_BT,
        "kl": jnp.where(mask_BT > 0, kl_BT, 0.0),
    }


def _policy_loss(logp_BT, entropy_BT, micro, cfg: PPOUpdateConfig):
    loss, sums = ppo_policy_loss(
        logp_BT, micro["old_logp"], None, micro["advantage"], micro["mask"],
        clip_low=cfg.clip_low, clip_high=cfg.clip_high, weight_BT=micro["weight"],
    )  # fmt: skip
    sums |= sampling_sums(micro, micro["old_logp"], entropy_BT)
    return loss, sums | {"kl": micro["kl"].sum()}


def _value_loss(value_BT, micro, cfg: PPOUpdateConfig):
    loss, sums = value_loss(
        value_BT, micro["old_value"], micro["target"], micro["mask"],
        clip=cfg.value_clip, weight_BT=micro["weight"],
    )  # fmt: skip
    del sums["tokens"]  # the policy's sums have them
    return loss, sums | {"value_loss": loss}


def _report(sums: Metrics, reward_B: jax.Array) -> Metrics:
    """Metrics of all updates [epochs, minibatches, ...] as one set."""
    total = {name: sums[name].sum() for name in sums if name != "load"}
    found = report_of(sums) | {
        "reward": jnp.mean(reward_B, where=jnp.isfinite(reward_B)),
        "value_loss": sums["value_loss"].mean(),
        "explained_variance": explained_variance(total),
        "value_clip": total["value_clip"] / jnp.maximum(total["tokens"], 1.0),
    }
    if "value_grad_norm" in sums:
        found["value_grad_norm"] = sums["value_grad_norm"].mean()
    return found


@functools.cache
def compile_ppo(
    cfg: PPOUpdateConfig,
    optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
):
    """`ppo_step` jitted, its states donated; `temperature` is a keyword of the call."""
    step = functools.partial(
        ppo_step, cfg=cfg, optimizer=optimizer, value_optimizer=value_optimizer
    )
    return program(step, donate_argnums=0)


@functools.cache
def compile_shared_ppo(
    cfg: PPOUpdateConfig, optimizer: optax.GradientTransformation, value_weight: float
):
    """`shared_ppo_step` jitted, its state donated."""
    step = functools.partial(
        shared_ppo_step, cfg=cfg, optimizer=optimizer, value_weight=value_weight
    )
    return program(step, donate_argnums=0)
