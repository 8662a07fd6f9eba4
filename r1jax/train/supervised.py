# SPDX-License-Identifier: Apache-2.0
"""The supervised step: next-token loss, MTP loss and balance loss, over packed rows, in one call.

Pre-training, cold-start SFT and distillation all run it; they differ in data and loss mask only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.config import ModelConfig
from r1jax.ops.loss import token_logp
from r1jax.rl.objectives import sft_loss
from r1jax.train.program import program
from r1jax.train.state import Controls, TrainState, accumulate, update

Batch = dict[str, jax.Array]  # tokens, targets, positions, segments, mask: [B, T]


def micro_batched(batch: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """[B, ...] → [n, B / n, ...]."""
    return {k: v.reshape(n, v.shape[0] // n, *v.shape[1:]) for k, v in batch.items()}


def shifted(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Targets and mask of the second next token, which never lies in another document.

    Returns:
        (targets_BT int32, mask_BT float32): position i is taught t_{i+2}; 0 where i + 1 is the last
        position, belongs to another document, or is not taught itself.
    """
    ahead = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    same = batch["segments"] == ahead(batch["segments"])
    return ahead(batch["targets"]), ahead(batch["mask"]) * same


def supervised_loss(model, batch: Batch, totals: Batch, *, mtp_weight: float):
    """Weighted sum of the three losses over one micro-batch, and metrics as sums.

    L = mean NLL + λ · mean NLL of the second next token (eq. 24, 25) + α · mean over rows of the
    balance loss (eq. 17); `totals` hold the whole batch's counts, so micro-batches add up.
    """
    out = model(batch["tokens"], batch["positions"], batch["segments"])
    head_DN = model.head_DN()
    logp_BT, _ = token_logp(out.hidden_BTD, head_DN, batch["targets"])
    weight_BT = batch["mask"] / totals["mask"]
    loss, metrics = sft_loss(logp_BT, batch["mask"], weight_BT=weight_BT)
    load_LE, balance = out.stats
    if isinstance(model.cfg, ModelConfig):
        if model.cfg.mtp_depth:
            targets_BT, mask_BT = shifted(batch)
            hidden_BTD, stats = model.predict_second(
                out.hidden_BTD, batch["targets"], batch["positions"], batch["segments"]
            )
            logp_BT, _ = token_logp(hidden_BTD, head_DN, targets_BT)
            mtp, mtp_metrics = sft_loss(logp_BT, mask_BT, weight_BT=mask_BT / totals["second"])
            loss += mtp_weight * mtp
            metrics |= {f"mtp_{k}": v for k, v in mtp_metrics.items()}
            load_LE = jnp.concatenate([load_LE, stats.load])
            balance = jnp.concatenate([balance, stats.balance])
        loss += model.cfg.moe.balance_loss_alpha * balance.sum() / totals["rows"]
        metrics["balance"] = balance.sum() / totals["rows"]
    return loss, metrics | {"load": load_LE}


def supervised_step(
    state: TrainState,
    batch: Batch,
    controls: Controls,
    *,
    optimizer: optax.GradientTransformation,
    mtp_weight: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from micro-batches [M, B, T]: gradient, clip, AdamW, router bias, metrics.

    Returns:
        (state, metrics): loss (nats a token), mtp_loss, balance, tokens, grad_norm, skipped and
        load [L, E].
    """
    flat = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()}
    totals = {
        "mask": jnp.maximum(batch["mask"].sum(), 1.0),
        "second": jnp.maximum(shifted(flat)[1].sum(), 1.0),
        "rows": jnp.float32(flat["tokens"].shape[0]),
    }

    def loss_fn(params, micro):
        return supervised_loss(state.model(params), micro, totals, mtp_weight=mtp_weight)

    grads, sums = accumulate(loss_fn, state.params, batch)
    state, report = update(state, grads, sums["load"], controls, optimizer)
    metrics = {
        "loss": sums["nll"] / totals["mask"],
        "tokens": sums["tokens"],
        "load": sums["load"],
        **report,
    }
    if "mtp_nll" in sums:
        metrics["mtp_loss"] = sums["mtp_nll"] / totals["second"]
    if "balance" in sums:
        metrics["balance"] = sums["balance"]
    return state, metrics


@functools.cache
def compile_supervised(optimizer: optax.GradientTransformation, *, mtp_weight: float):
    """`supervised_step` jitted, its state donated: one compilation for all stages of a model."""

    def step(state, batch, controls):
        return supervised_step(state, batch, controls, optimizer=optimizer, mtp_weight=mtp_weight)

    return program(step, donate_argnums=0)
