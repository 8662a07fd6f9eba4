# SPDX-License-Identifier: Apache-2.0
"""The GRPO step: from rollouts and raw rewards to a new state, in one compiled function."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from r1jax.config import UpdateConfig
from r1jax.ops.alike import pieces
from r1jax.rl.advantages import informative_groups
from r1jax.rl.ratio import truncated_importance_weight
from r1jax.rl.rollout import Rollout, rows_of
from r1jax.sharding import automatic, spec
from r1jax.train.forward import completion_logp
from r1jax.train.objective import Objective, objective_of
from r1jax.train.program import program
from r1jax.train.state import Controls, TrainState, accumulate, laid, update

Metrics = dict[str, jax.Array]


def micro_batch_loss(
    model,
    micro: dict[str, jax.Array],
    objective: Objective,
    *,
    temperature: jax.Array | float,
    importance_cap: float | None,
) -> tuple[jax.Array, Metrics]:
    """The objective's loss of one micro-batch with its minibatch's token weights; metrics are sums.

    Without `old_logp` in it the update is the only one, and the policy is its own old policy.
    """
    logp_BT, entropy_BT, load_LE = completion_logp(model, micro, temperature)
    old_BT = micro.get("old_logp", jax.lax.stop_gradient(logp_BT))
    advantage, mask_BT = micro["advantage"], micro["mask"]
    corrected = {}
    if importance_cap is not None:
        advantage = jnp.broadcast_to(advantage.reshape(len(advantage), -1), mask_BT.shape)
        weight_BT = truncated_importance_weight(
            old_BT, micro["behaviour_logp"], mask_BT, cap=importance_cap
        )
        advantage *= weight_BT
        corrected = {
            "importance": (weight_BT * mask_BT).sum(),
            "truncated": ((weight_BT >= importance_cap) * mask_BT).sum(),
        }
    loss, sums = objective.loss(
        logp_BT, old_BT, micro.get("ref_logp"), advantage, mask_BT, weight_BT=micro["weight"]
    )
    sums |= {"loss": loss, "load": load_LE} | sampling_sums(micro, old_BT, entropy_BT) | corrected
    return loss, sums


def sampling_sums(micro: dict[str, jax.Array], old_BT, entropy_BT) -> Metrics:
    """Sums over completion tokens of the entropy and of the sampler's squared error."""
    masked = lambda x_BT: jnp.where(micro["mask"] > 0, x_BT, 0.0).sum()  # noqa: E731
    return {
        "entropy": masked(entropy_BT),
        "sampler_square_error": masked((old_BT - micro["sampler_logp"]) ** 2),
    }


def grpo_step(
    state: TrainState,
    ref_params: nnx.State | None,
    rollout: Rollout,
    reward_B: jax.Array,
    controls: Controls,
    *,
    temperature: jax.Array | float,
    cfg: UpdateConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Advantages, clipped ratio, KL, gradient, clip, AdamW, router bias and metrics of one batch.

    GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3), or another objective of `train.objective`. The old
    log-probabilities are the trainer's own from before the first update: the sampler's differ by
    another program's rounding, in bfloat16 by more than the clip range; `sampler_error` tells how
    far. Groups stay whole in advantages; minibatches interleave rows, so each sees all prompts.

    Args:
        state: donated by the caller.
        ref_params: the reference policy π_ref, the router bias is the policy's own; or None where
            `cfg.beta` is 0.
        rollout: B = P · G completions.
        reward_B: [B] raw rewards; NaN marks a row whose reward is unknown.
        controls: learning rate and γ.
        temperature: of the sampler.

    Returns:
        (state, metrics): those of `report_of`, reward, dead_groups (share without a signal).
    """
    run = functools.partial(_step, cfg=cfg, optimizer=optimizer)
    whole = automatic(run, lambda state, *_: (laid(state), spec()))
    return whole(state, ref_params, (rollout, reward_B, temperature), controls)


def _step(state, ref_params, sampled, controls, *, cfg, optimizer):
    rollout, reward_B, temperature = sampled
    group_size = rollout.tokens_BT.shape[0] // rollout.prompt_PS.shape[0]
    objective, batch = objective_of(cfg), rows_to_train(rollout)
    old = cfg.minibatches * cfg.epochs > 1 or (objective.kl_in_reward and cfg.beta > 0)
    pieces = cfg.minibatches * cfg.micro_batches
    batch |= still_logp(state, ref_params, batch, temperature, pieces=pieces, old=old)
    batch["advantage"] = objective.advantages(reward_B, batch, group_size)
    cap = cfg.importance_cap

    def one_update(state, minibatch):
        minibatch = weighed(minibatch, objective.weights)

        def loss_fn(params, micro):
            model = state.model(params)
            return micro_batch_loss(
                model, micro, objective, temperature=temperature, importance_cap=cap
            )

        grads, sums = accumulate(loss_fn, state.params, minibatch)
        state, report = update(state, grads, sums["load"], controls, optimizer)
        return state, sums | report

    state, sums = in_updates(one_update, state, batch, cfg)
    live_P = informative_groups(reward_B, group_size=group_size)
    return state, report_of(sums) | {
        "reward": jnp.mean(reward_B, where=jnp.isfinite(reward_B)),
        "dead_groups": 1.0 - live_P.astype(jnp.float32).mean(),
    }


def rows_to_train(rollout: Rollout) -> dict[str, jax.Array]:
    """What a pass over the rows of a rollout needs, and what the sampler said of them."""
    tokens, positions, segments = rows_of(rollout)
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": segments,
        "completion": rollout.tokens_BT,
        "mask": rollout.mask_BT,
        "sampler_logp": rollout.logp_BT,
        "behaviour_logp": rollout.behaviour_logp_BT,
    }


def still_logp(
    state: TrainState, ref_params, batch, temperature, *, pieces: int, old: bool
) -> dict[str, jax.Array]:
    """Log-probabilities that no update moves: of the reference if there is one, and, where `old`,
    of the policy before the first update."""
    found = {}
    if ref_params is not None:
        with jax.named_scope("reference"):
            found["ref_logp"] = _frozen_logp(state.model(ref_params), batch, temperature, pieces)
    if old:
        with jax.named_scope("old_policy"):
            found["old_logp"] = _frozen_logp(state.model(), batch, temperature, pieces)
    return found


def _frozen_logp(model, batch, temperature, pieces: int) -> jax.Array:
    """[B, T] log-probabilities under a policy that is not updated, piece by piece."""
    logp = by_piece(lambda rows: completion_logp(model, rows, temperature)[0], batch, pieces)
    return logp.reshape(batch["mask"].shape)


def by_piece(fn, batch: dict[str, jax.Array], pieces: int) -> jax.Array:
    """[pieces, B / pieces, ...] of `fn` on one piece of the rows after the other."""
    if pieces == 1:
        return fn(batch)[None]
    return jax.lax.map(
        fn, jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch)
    )


def in_updates(one_update, carry, batch: dict[str, jax.Array], cfg):
    """Scans `one_update(carry, minibatch) -> (carry, metrics)` over minibatches, epoch by epoch.

    Args:
        batch: [B, ...] arrays; minibatches are [micro_batches, B', ...].
        cfg: has minibatches, epochs and micro_batches.

    Returns:
        (carry, metrics [epochs, minibatches, ...]).
    """
    shape = (cfg.minibatches, cfg.micro_batches)
    batch = jax.tree.map(lambda x: interleave(x, *shape), batch)
    if cfg.minibatches * cfg.epochs == 1:  # XLA would find out, and copy what the loops carry
        carry, metrics = one_update(carry, jax.tree.map(lambda x: x[0], batch))
        return carry, jax.tree.map(lambda x: x[None, None], metrics)

    def one_epoch(carry, _):
        return jax.lax.scan(one_update, carry, batch)

    return jax.lax.scan(one_epoch, carry, None, length=cfg.epochs)


def weighed(minibatch: dict[str, jax.Array], weights) -> dict[str, jax.Array]:
    """The minibatch with the reduction of all its rows as weights, for its micro-batches."""
    mask = minibatch["mask"]
    return minibatch | {"weight": weights(mask.reshape(-1, mask.shape[-1])).reshape(mask.shape)}


def interleave(x: jax.Array, minibatches: int, micro_batches: int) -> jax.Array:
    """[B, ...] → [minibatches, micro_batches, B', ...], rows dealt out like cards to minibatches.

    Row i goes to minibatch i mod `minibatches`: with no more of them than samples in a group, each
    has some of every prompt, into however many micro-batches it is cut.
    """
    x = x.reshape(-1, micro_batches, minibatches, *x.shape[1:])
    return jnp.moveaxis(x, (2, 1), (0, 1))


def report_of(sums: Metrics) -> Metrics:
    """Metrics of all updates [epochs, minibatches, ...] as one set.

    loss, kl, ratio, ratio_error, clip_fraction, entropy (nats a token), sampler_error (root mean
    square difference of log-probabilities), grad_norm, skipped, load [L, E]; where the sampler is
    corrected for, importance (mean weight of a token) and truncated (share of tokens at the cap).
    """
    means = ("kl", "ratio", "entropy", "importance", "truncated")
    found = {name: sums[name] for name in means if name in sums}
    found["clip_fraction"] = sums["clip_low"] + sums["clip_high"]
    roots = {f"{name}_error": sums[f"{name}_square_error"] for name in ("ratio", "sampler")}
    # As one vector: by itself each of them would be a program of its own to XLA:CPU.
    total_k = jnp.stack([x.sum() for x in (*found.values(), *roots.values())])
    mean_k = total_k / jnp.maximum(sums["tokens"].sum(), 1.0)
    mean_k = jnp.where(jnp.arange(len(mean_k)) < len(found), mean_k, jnp.sqrt(mean_k))
    return dict(zip((*found, *roots), pieces(mean_k), strict=True)) | {
        "loss": sums["loss"].mean(),
        "grad_norm": sums["grad_norm"].mean(),
        "skipped": sums["skipped"].sum(),
        "load": sums["load"].sum((0, 1)),
    }


@functools.cache
def compile_grpo(cfg: UpdateConfig, optimizer: optax.GradientTransformation):
    """`grpo_step` jitted, its state donated; `temperature` is a keyword of the call."""
    return program(functools.partial(grpo_step, cfg=cfg, optimizer=optimizer), donate_argnums=0)
