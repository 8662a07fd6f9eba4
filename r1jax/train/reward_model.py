# SPDX-License-Identifier: Apache-2.0
"""Trained reward models as a reward: one score a completion."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.config import QuestionData, RewardConfig, StartConfig
from r1jax.data.datasets import General, general
from r1jax.data.text import TextTokenizer
from r1jax.io.outdir import MARKER
from r1jax.nn.value import trunk_of, valued
from r1jax.parallel import hosts
from r1jax.rl.rollout import Rollout, rows_of
from r1jax.train.forward import WHOLE, row_value
from r1jax.train.judge import Score
from r1jax.train.program import program
from r1jax.train.questions import Asked
from r1jax.train.sampler import Completions
from r1jax.train.start import open_start, read_value_head, state_of
from r1jax.train.state import TrainState
from r1jax.train.trained import MODEL


def open_judges(reward: RewardConfig, data: QuestionData, tokenizer: TextTokenizer) -> Score:
    """The reward models of a run, each for its kind of prompts (R1, section 2.3.4).

    Raises:
        ValueError: a folder is no reward model of r1jax, or another vocabulary than the policy's;
            or general prompts are of a kind that none judges.
    """
    fields = {"helpful": "model_path"} | ({"safe": "safe_path"} if reward.safe_path else {})
    if data.general:
        kinds = {row.kind for row in general(data.general, skip=data.skip).items}
        if kinds - fields.keys():
            raise ValueError(
                f"{data.general} has prompts of the kind 'safe', but reward.safe_path names no "
                "reward model for them"
            )
    scorers = {
        kind: open_scorer(vars(reward)[name], tokenizer, field=f"reward.{name}")
        for kind, name in fields.items()
    }
    return preferred(scorers, all_rows=not data.general)


def open_scorer(
    path: str, tokenizer: TextTokenizer, *, field: str
) -> Callable[[Completions], np.ndarray]:
    """The reward model of a folder as a function from completions to scores [B] float32, of those
    that have a text on this process.

    Args:
        path: of the model, or of the run that trained it.
        tokenizer: the policy's.
        field: of the config that holds the path, for the errors.

    Raises:
        ValueError: it is no reward model of r1jax, or another vocabulary than the policy's.
    """
    folder = Path(path, MODEL) if Path(path, MARKER).is_file() else Path(path)
    head = read_value_head(folder, field=field)
    start = open_start(StartConfig(path=str(folder), remat=False))
    theirs, ours = (t.tokenizer.get_vocab(True) for t in (start.tokenizer, tokenizer))
    if theirs != ours:
        raise ValueError(
            f"{field}={path}: its tokenizer has {len(theirs)} tokens that are not the "
            f"policy's {len(ours)}; train the reward model from a model of the same vocabulary"
        )
    model = valued(trunk_of(start.model.module), jax.random.key(0), std=0.0)
    model.value_head = model.value_head.replace(jnp.asarray(head["weight"]))
    model.value_bias = model.value_bias.replace(jnp.asarray(head["bias"]))
    state, run = state_of(model), program(scores)

    def score(done: Completions) -> np.ndarray:
        score_B = hosts.read(run(state, done.rollout))
        return score_B if done.rows is None else score_B[done.rows]

    return score


def preferred(
    scorers: Mapping[str, Callable[[Completions], np.ndarray]], *, all_rows: bool
) -> Score:
    """The reward of each row by the reward model of its kind.

    Args:
        scorers: of the kinds of general prompts.
        all_rows: questions with an answer are scored too, by the helpful one; else they have none.
    """

    def score(asked: Asked, done: Completions) -> np.ndarray:
        kinds = np.array([kind_of(answer) for answer in asked.answers])
        score_B = np.ma.masked_all(len(kinds), np.float32)
        here = set().union(*hosts.exchanged(sorted({*kinds})))
        for kind in (kind for kind in scorers if kind in here):
            # All rows, for one compiled shape; those of its kind are kept.
            score_B[kinds == kind] = scorers[kind](done)[kinds == kind]
        return score_B

    def kind_of(answer) -> str:
        return answer.kind if isinstance(answer, General) else "helpful" * all_rows

    return score


def scores(state: TrainState, rollout: Rollout) -> jax.Array:
    """[B] score of each completion, read at its last token."""
    rows = dict(zip(WHOLE, rows_of(rollout), strict=True))
    return row_value(state.model(), rows)[0]
