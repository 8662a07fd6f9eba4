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
from r1jax.nn.head import score
from r1jax.nn.param import specs
from r1jax.nn.stats import RouterStats
from r1jax.rl.objectives import sft_loss
from r1jax.sharding import automatic, local, spec
from r1jax.train.program import program
from r1jax.train.state import Controls, TrainState, accumulate, laid, update

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


INPUTS = ("tokens", "positions", "segments", "targets", "second_targets")  # of the model


def scores(model, inputs: Batch) -> tuple[tuple[jax.Array, ...], RouterStats]:
    """One device's part of the forward pass.

    Returns:
        (log P(target) [B, T], and with an MTP module log P(second target)); stats of all routers.
    """
    rows, targets = (inputs["positions"], inputs["segments"]), inputs["targets"]
    if not model.has_mtp:
        out = model(inputs["tokens"], *rows)
        return (score(out.hidden_BTD, model.output_head(), targets)[0],), out.stats
    out, second_BTD, own = model.predict_both(inputs["tokens"], targets, *rows)
    # Both heads are one pass over the vocabulary.
    hidden_BTD = jnp.concatenate([out.hidden_BTD, second_BTD], 1)
    targets = jnp.concatenate([targets, inputs["second_targets"]], 1)
    logp_BT = score(hidden_BTD, model.output_head(), targets)[0]
    stats = jax.tree.map(lambda *x: jnp.concatenate(x), out.stats, own)
    return tuple(jnp.split(logp_BT, 2, axis=1)), stats


def supervised_loss(model, batch: Batch, totals: Batch, *, mtp_weight: float):
    """Weighted sum of the three losses over one micro-batch, and metrics as sums.

    L = mean NLL + λ · mean NLL of the second next token (eq. 24, 25) + α · mean over rows of the
    balance loss (eq. 17); `totals` hold the whole batch's counts, so micro-batches add up.
    """
    targets_BT, mask_BT = shifted(batch)
    run = local(
        scores,
        (specs(model), {k: spec("batch", "length") for k in INPUTS}),
        (spec("batch", "length"), RouterStats(spec(), spec(None, "batch"), spec())),
    )
    logps, stats = run(model, {k: batch.get(k, targets_BT) for k in INPUTS})
    weight_BT = batch["mask"] / totals["mask"]
    loss, metrics = sft_loss(logps[0], batch["mask"], weight_BT=weight_BT)
    if isinstance(model.cfg, ModelConfig):
        if model.cfg.mtp_depth:
            mtp, mtp_metrics = sft_loss(logps[1], mask_BT, weight_BT=mask_BT / totals["second"])
            loss += mtp_weight * mtp
            metrics |= {f"mtp_{k}": v for k, v in mtp_metrics.items()}
        balance = stats.balance.sum() / totals["rows"]
        loss += model.cfg.moe.balance_loss_alpha * balance
        metrics |= {"balance": balance, "overflow": stats.overflow.sum()}
    return loss, metrics | {"load": stats.load}


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
        (state, metrics): loss (nats a token), mtp_loss, balance, tokens, grad_norm, skipped,
        overflow (pieces of tokens that were dispatched in several rounds) and load [L, E].
    """
    run = functools.partial(_step, optimizer=optimizer, mtp_weight=mtp_weight)
    return automatic(run, lambda state, *_: (laid(state), spec()))(state, batch, controls)


def _step(state, batch, controls, *, optimizer, mtp_weight):
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
        metrics |= {"balance": sums["balance"], "overflow": sums["overflow"]}
    return state, metrics


@functools.cache
def compile_supervised(optimizer: optax.GradientTransformation, *, mtp_weight: float):
    """`supervised_step` jitted, its state donated: one compilation for all stages of a model."""

    def step(state, batch, controls):
        return supervised_step(state, batch, controls, optimizer=optimizer, mtp_weight=mtp_weight)

    return program(step, donate_argnums=0)
