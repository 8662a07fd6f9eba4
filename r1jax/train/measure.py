# SPDX-License-Identifier: Apache-2.0
"""Held-out measurement of a run's policy, and of what DPO and reward models prefer."""

import functools
from typing import Any

import jax
import numpy as np

from r1jax.config import REWARD_LOSSES, PairsConfig
from r1jax.eval.score import reflects
from r1jax.parallel import hosts
from r1jax.rl.preference import mean_logp, summed_logp
from r1jax.train.answers import Answers
from r1jax.train.judge import Rules
from r1jax.train.pairs import answer_logp, answer_scores
from r1jax.train.program import program
from r1jax.train.questions import Asked
from r1jax.train.sampler import Completions, Sampler
from r1jax.train.state import TrainState


def measure(
    state: TrainState,
    sampler: Sampler,
    heldout: Asked,
    judge: Rules,
    *,
    samples: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Figures of held-out questions: pass@1 is the mean over all samples (R1 paper, section 3).

    A batch has as many rows as 8 questions need; the last is filled up with questions again.
    """
    size, group = min(8, len(heldout.ids)), samples + 1
    figures: list[list[float]] = []
    for number, begin in enumerate(range(0, len(heldout.ids), size)):
        part = heldout.part(begin, begin + size)
        count = len(part.ids)
        if count < size:
            part = Asked(*(a + b[: size - count] for a, b in zip(part, heldout, strict=True)))
        noise = (seed + 1, 2**31 + number)
        done = sampler(state, part.ids, noise, [temperature] * samples + [0.0])
        figures += _judged(done, part.repeated(group), judge, count * group)
    right_B, formed_B, tokens_B, reflecting_B, greedy_B = np.array(
        [(*of, row % group == samples) for row, *of in figures]
    ).T
    sampled_B = greedy_B == 0
    return {
        "pass_at_1": float(right_B[sampled_B].mean()),
        "greedy": float(right_B[~sampled_B].mean()),
        "format_rate": float(formed_B[sampled_B].mean()),
        "mean_tokens": float(tokens_B[sampled_B].mean()),
        "reflection_rate": float(reflecting_B[sampled_B].mean()),
    }


def _judged(done: Completions, asked: Asked, judge: Rules, count: int) -> list[list[float]]:
    """Row, right, well formed, tokens and reflecting of the first `count` rows; of several
    processes each judges its own."""
    rows = range(len(asked.ids)) if done.rows is None else done.rows.tolist()
    right_B = judge.verify(asked.at(rows).answers, done.texts)()
    formed_B = judge.well_formed(done.texts)
    reflecting_B = [reflects(judge.reasoning(text)) for text in done.texts]
    columns = (rows, right_B, formed_B, done.tokens_B, reflecting_B)
    mine = [[float(x) for x in one] for one in zip(*columns, strict=True)]
    said = [one for each in hosts.exchanged(mine) for one in each]
    return sorted(one for one in said if one[0] < count)


def pair_accuracy(
    state: TrainState, reference: TrainState | None, rows: Answers, cfg: PairsConfig
) -> float:
    """Share of held-out answers that are ranked, or labelled, as they should be.

    Args:
        reference: the policy that training began with; None for a reward model. Its router biases
            are its own: those of `state` may be of experts in another order.
    """
    size = cfg.batch_size // cfg.micro_batches
    total = 0.0
    compare = _compare(cfg)
    for begin in range(0, len(rows.tokens), size):
        places = np.arange(begin, begin + size)
        real = places < len(rows.tokens)
        batch = rows.rows(places % len(rows.tokens), real.astype(np.float32))
        total += float((hosts.read(compare(state, reference, batch)) * real).sum())
    return total / len(rows.tokens)


@functools.cache
def _compare(cfg: PairsConfig):
    """(state, reference, batch) -> [B], 1 where right, ½ where undecided."""
    total = mean_logp if cfg.loss == "ipo" else summed_logp

    def right(state: TrainState, reference: TrainState | None, batch) -> jax.Array:
        if cfg.loss not in REWARD_LOSSES:
            ours, theirs = (answer_logp(one.model(), batch, total)[0] for one in (state, reference))
            margin_B = (ours - theirs)[:, 0] - (ours - theirs)[:, 1]
        else:
            score_Bn, _ = answer_scores(state.model(), batch)
            if cfg.loss == "pairwise":
                margin_B = score_Bn[:, 0] - score_Bn[:, 1]
            else:
                margin_B = score_Bn[:, 0] * (2 * batch["label"] - 1)
        return 0.5 * (1 + jax.numpy.sign(margin_B))

    return program(right)
