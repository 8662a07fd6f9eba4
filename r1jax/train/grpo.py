# SPDX-License-Identifier: Apache-2.0
"""The GRPO step: from rollouts and raw rewards to a new state, in one compiled function."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from r1jax.config import UpdateConfig
from r1jax.nn.head import score
from r1jax.nn.param import specs
from r1jax.rl.advantages import group_advantages, informative_groups
from r1jax.rl.objectives import grpo_loss
from r1jax.rl.reduce import token_weights_sequence_mean
from r1jax.rl.rollout import Rollout, rows_of
from r1jax.sharding import automatic, gather, local, spec
from r1jax.train.program import program
from r1jax.train.state import Controls, TrainState, accumulate, laid, update

Metrics = dict[str, jax.Array]


def completion_logp(model, rows: dict[str, jax.Array], temperature: jax.Array | float):
    """Log-probabilities and entropies of completion tokens, and the expert loads of the pass.

    Args:
        rows: tokens, positions, segments [B, S + T]; completion [B, T].
        temperature: the sampler's; 0 (greedy) is scored at 1.

    Returns:
        (logp_BT, entropy_BT, load_LE), float32, in nats and tokens.
    """
    inputs = {name: rows[name] for name in ("tokens", "positions", "segments", "completion")}
    lies = {name: spec("batch", "length") for name in inputs} | {"completion": spec("batch", None)}
    out = (spec("batch", None), spec("batch", None), spec())
    return local(_scores, (specs(model), lies, spec()), out)(model, inputs, temperature)


def _scores(model, inputs: dict[str, jax.Array], temperature: jax.Array | float):
    out = model(inputs["tokens"], inputs["positions"], inputs["segments"])
    length = inputs["completion"].shape[1]
    hidden_BTD = gather(out.hidden_BTD, "batch", "length", None, along="length")
    hidden_BTD = hidden_BTD[:, -length - 1 : -1]  # token t is predicted one place before it
    temperature = jnp.where(temperature > 0, temperature, 1.0)
    found = score(hidden_BTD, model.head_DN(), inputs["completion"], temperature=temperature)
    return *found, out.stats.load


def micro_batch_loss(
    model, micro: dict[str, jax.Array], *, temperature: jax.Array | float, cfg: UpdateConfig
) -> tuple[jax.Array, Metrics]:
    """`rl.grpo_loss` of one micro-batch with its minibatch's token weights; metrics are sums.

    Without `old_logp` in it the update is the only one, and the policy is its own old policy.
    """
    logp_BT, entropy_BT, load_LE = completion_logp(model, micro, temperature)
    old_BT = micro.get("old_logp", jax.lax.stop_gradient(logp_BT))
    loss, sums = grpo_loss(
        logp_BT,
        old_BT,
        micro["ref_logp"],
        micro["advantage"],
        micro["mask"],
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        beta=cfg.beta,
        weight_BT=micro["weight"],
    )
    masked = lambda x_BT: jnp.where(micro["mask"] > 0, x_BT, 0.0).sum()  # noqa: E731
    sums |= {
        "loss": loss,
        "entropy": masked(entropy_BT),
        "sampler_square_error": masked((old_BT - micro["sampler_logp"]) ** 2),
        "load": load_LE,
    }
    return loss, sums


def grpo_step(
    state: TrainState,
    ref_params: nnx.State,
    rollout: Rollout,
    reward_B: jax.Array,
    controls: Controls,
    *,
    temperature: jax.Array | float,
    cfg: UpdateConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Advantages, clipped ratio, KL, gradient, clip, AdamW, router bias and metrics of one batch.

    The B rows are split into `cfg.minibatches` updates, gone over `cfg.epochs` times; every update
    is summed over `cfg.micro_batches` with whole-minibatch weights. The old log-probabilities are
    the trainer's own from before the first update: the sampler's differ by another program's
    rounding, in bfloat16 by more than the clip range; `sampler_error` tells how far. Groups stay
    whole in advantages; minibatches interleave rows so that each sees all prompts.

    Args:
        state: donated by the caller.
        ref_params: the reference policy π_ref; the router bias is the policy's own.
        rollout: B = P · G completions.
        reward_B: [B] raw rewards; NaN marks a row whose reward is unknown.
        controls: learning rate and γ.
        temperature: of the sampler.

    Returns:
        (state, metrics): loss, kl, ratio, ratio_error, clip_fraction, entropy (nats a token),
        sampler_error (root mean square difference of log-probabilities), grad_norm, skipped,
        reward, dead_groups (share of groups without a signal), load [L, E].
    """
    run = functools.partial(_step, cfg=cfg, optimizer=optimizer)
    whole = automatic(run, lambda state, *_: (laid(state), spec()))
    return whole(state, ref_params, rollout, reward_B, controls, temperature)


def _step(state, ref_params, rollout, reward_B, controls, temperature, *, cfg, optimizer):
    group_size = rollout.tokens_BT.shape[0] // rollout.prompt_PS.shape[0]
    batch = _batch(rollout, group_advantages(reward_B, group_size=group_size))
    batch |= _still_logp(state, ref_params, batch, temperature, cfg=cfg)
    shape = (cfg.minibatches, cfg.micro_batches)
    batch = jax.tree.map(lambda x: _interleave(x, *shape), batch)

    def one_update(state, minibatch):
        weight = token_weights_sequence_mean(
            minibatch["mask"].reshape(-1, minibatch["mask"].shape[-1])
        )
        minibatch = minibatch | {"weight": weight.reshape(minibatch["mask"].shape)}

        def loss_fn(params, micro):
            return micro_batch_loss(state.model(params), micro, temperature=temperature, cfg=cfg)

        grads, sums = accumulate(loss_fn, state.params, minibatch)
        state, report = update(state, grads, sums["load"], controls, optimizer)
        return state, sums | report

    def one_epoch(state, _):
        return jax.lax.scan(one_update, state, batch)

    state, sums = jax.lax.scan(one_epoch, state, None, length=cfg.epochs)
    live_P = informative_groups(reward_B, group_size=group_size)
    return state, _report(sums) | {
        "reward": jnp.mean(reward_B, where=jnp.isfinite(reward_B)),
        "dead_groups": 1.0 - live_P.astype(jnp.float32).mean(),
    }


def _batch(rollout: Rollout, advantage_B: jax.Array) -> dict[str, jax.Array]:
    tokens, positions, segments = rows_of(rollout)
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": segments,
        "completion": rollout.tokens_BT,
        "mask": rollout.mask_BT,
        "sampler_logp": rollout.logp_BT,
        "advantage": advantage_B,
    }


def _still_logp(state: TrainState, ref_params, batch, temperature, *, cfg) -> dict[str, jax.Array]:
    """Log-probabilities that no update moves: the reference's, and the old policy's if needed."""
    with jax.named_scope("reference"):
        found = {"ref_logp": _frozen_logp(state.model(ref_params), batch, temperature, cfg)}
    if cfg.minibatches * cfg.epochs > 1:
        with jax.named_scope("old_policy"):
            found["old_logp"] = _frozen_logp(state.model(), batch, temperature, cfg)
    return found


def _frozen_logp(model, batch, temperature, cfg: UpdateConfig) -> jax.Array:
    """[B, T] log-probabilities under a policy that is not updated, micro-batch by micro-batch."""
    n = cfg.minibatches * cfg.micro_batches
    pieces = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)
    logp = jax.lax.map(lambda rows: completion_logp(model, rows, temperature)[0], pieces)
    return logp.reshape(batch["mask"].shape)


def _interleave(x: jax.Array, minibatches: int, micro_batches: int) -> jax.Array:
    """[B, ...] → [minibatches, micro_batches, B', ...], rows dealt out like cards."""
    x = x.reshape(-1, minibatches * micro_batches, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(minibatches, micro_batches, *x.shape[1:])


def _report(sums: Metrics) -> Metrics:
    """Metrics of all updates [epochs, minibatches, ...] as one set of means."""
    tokens = jnp.maximum(sums["tokens"].sum(), 1.0)
    per_token = {
        name: sums[key].sum() / tokens
        for name, key in {"kl": "kl", "ratio": "ratio", "entropy": "entropy"}.items()
    }
    return per_token | {
        "ratio_error": jnp.sqrt(sums["ratio_square_error"].sum() / tokens),
        "sampler_error": jnp.sqrt(sums["sampler_square_error"].sum() / tokens),
        "clip_fraction": (sums["clip_low"].sum() + sums["clip_high"].sum()) / tokens,
        "loss": sums["loss"].mean(),
        "grad_norm": sums["grad_norm"].mean(),
        "skipped": sums["skipped"].sum(),
        "load": sums["load"].sum((0, 1)),
    }


@functools.cache
def compile_grpo(cfg: UpdateConfig, optimizer: optax.GradientTransformation):
    """`grpo_step` jitted, its state donated; `temperature` is a keyword of the call."""
    return program(functools.partial(grpo_step, cfg=cfg, optimizer=optimizer), donate_argnums=0)
