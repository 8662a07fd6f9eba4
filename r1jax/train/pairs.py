# SPDX-License-Identifier: Apache-2.0
"""Steps that learn from answers already given: DPO and its kin, and reward models.

A batch of pairs has rows [M, B, 2, L], M micro-batches, chosen first; one of labelled answers has
rows [M, B, 1, L]. Everything of a batch is one compiled call, and every micro-batch carries weights
of the whole batch, so they add up.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from r1jax.config import PairsConfig
from r1jax.rl.policy import Metrics
from r1jax.rl.preference import (
    cdpo_loss,
    dpo_loss,
    ipo_loss,
    mean_logp,
    pairwise_reward_loss,
    pointwise_reward_loss,
    summed_logp,
)
from r1jax.train.forward import row_logp, row_value
from r1jax.train.program import program
from r1jax.train.state import Controls, TrainState, accumulate, update

Batch = dict[str, jax.Array]  # tokens, positions, segments int32, mask: [M, B, n, L]; weight [M, B]


def answer_logp(model, micro: Batch, total: Callable) -> tuple[jax.Array, jax.Array]:
    """`total` (a sum or a mean) of the answers' token log-probabilities [B, n]; expert loads."""
    rows = _flat(micro)
    logp_BT, load_LE = row_logp(model, rows)
    return total(logp_BT, rows["mask"][:, 1:]).reshape(micro["tokens"].shape[:2]), load_LE


def answer_scores(model, micro: Batch) -> tuple[jax.Array, jax.Array]:
    """Scores of a reward model at the last token of each row [B, n], and expert loads."""
    value_B, load_LE = row_value(model, _flat(micro))
    return value_B.reshape(micro["tokens"].shape[:2]), load_LE


def _flat(micro: Batch) -> Batch:
    """[B, n, L] → [B · n, L], of what has a value for each token."""
    return {k: x.reshape(-1, x.shape[-1]) for k, x in micro.items() if x.ndim == 3}


def dpo_step(
    state: TrainState,
    ref_params: nnx.State,
    batch: Batch,
    controls: Controls,
    *,
    cfg: PairsConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """One update from pairs of answers (DPO, arXiv 2305.18290; IPO, 2310.12036; cDPO).

    Args:
        state: of the policy, donated by the caller.
        ref_params: the reference policy; the router bias is the policy's own.
        batch: pairs; a pair of weight 0 is padding.
        controls: learning rate and γ.

    Returns:
        (state, metrics): loss, accuracy, margin, reward_chosen, reward_rejected (means over pairs,
        reward per nat), grad_norm, skipped, load [L, E].
    """
    total = mean_logp if cfg.loss == "ipo" else summed_logp
    frozen = state.model(ref_params)
    with jax.named_scope("reference"):
        ref = jax.lax.map(lambda micro: answer_logp(frozen, micro, total)[0], batch)

    def loss_fn(params, micro):
        logp_B2, load_LE = answer_logp(state.model(params), micro, total)
        loss, sums = _preference(cfg)(
            logp_B2[:, 0], logp_B2[:, 1], micro["ref"][:, 0], micro["ref"][:, 1],
            weight_B=micro["weight"],
        )  # fmt: skip
        return loss, sums | {"loss": loss, "load": load_LE}

    return _updated(state, loss_fn, batch | {"ref": ref}, controls, optimizer)


def _preference(cfg: PairsConfig) -> Callable:
    losses = {
        "dpo": dpo_loss,
        "ipo": ipo_loss,
        "cdpo": functools.partial(cdpo_loss, label_smoothing=cfg.label_smoothing),
    }
    return functools.partial(losses[cfg.loss], beta=cfg.beta)


def reward_model_step(
    state: TrainState,
    batch: Batch,
    controls: Controls,
    *,
    cfg: PairsConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """One update of a reward model: pairwise (helpfulness) or pointwise (safety), R1 section 2.3.4.

    Args:
        state: of an `nn.value.Valued`, donated by the caller.
        batch: pairs, or labelled answers with `label` [M, B].
        controls: learning rate and γ.

    Returns:
        (state, metrics): loss, accuracy and the other means of the loss, grad_norm, skipped, load.
    """

    def loss_fn(params, micro):
        score_Bn, load_LE = answer_scores(state.model(params), micro)
        weight_B = micro["weight"]
        if cfg.loss == "pairwise":
            loss, sums = pairwise_reward_loss(score_Bn[:, 0], score_Bn[:, 1], weight_B=weight_B)
        else:
            loss, sums = pointwise_reward_loss(score_Bn[:, 0], micro["label"], weight_B=weight_B)
        return loss, sums | {"loss": loss, "load": load_LE}

    return _updated(state, loss_fn, batch, controls, optimizer)


def _updated(state, loss_fn, batch: Batch, controls, optimizer) -> tuple[TrainState, Metrics]:
    grads, sums = accumulate(loss_fn, state.params, batch)
    state, report = update(state, grads, sums["load"], controls, optimizer)
    number = sums.pop("pairs", None)
    number = jnp.maximum(sums.pop("answers") if number is None else number, 1.0)
    whole = ("loss", "load")
    means = {k: v if k in whole else v / number for k, v in sums.items()}
    return state, means | report


@functools.cache
def compile_dpo(cfg: PairsConfig, optimizer: optax.GradientTransformation):
    """`dpo_step` jitted, its state donated."""
    step = functools.partial(dpo_step, cfg=cfg, optimizer=optimizer)
    return program(step, donate_argnums=0)


@functools.cache
def compile_reward_model(cfg: PairsConfig, optimizer: optax.GradientTransformation):
    """`reward_model_step` jitted, its state donated."""
    step = functools.partial(reward_model_step, cfg=cfg, optimizer=optimizer)
    return program(step, donate_argnums=0)
