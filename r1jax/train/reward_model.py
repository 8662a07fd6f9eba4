# SPDX-License-Identifier: Apache-2.0
"""A trained reward model as a reward: one score a completion."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.config import StartConfig
from r1jax.data.text import TextTokenizer
from r1jax.io.outdir import MARKER
from r1jax.nn.value import trunk_of, valued
from r1jax.rl.rollout import Rollout, rows_of
from r1jax.train.pairs import last_token
from r1jax.train.program import program
from r1jax.train.sampler import Completions
from r1jax.train.start import open_start, read_value_head, state_of
from r1jax.train.state import TrainState
from r1jax.train.trained import MODEL


def open_scorer(path: str, tokenizer: TextTokenizer) -> Callable[[Completions], np.ndarray]:
    """The reward model of a folder as a function from completions to scores [B] float32.

    `path` is of the model, or of the run that trained it.

    Raises:
        ValueError: it is no reward model of r1jax, or another vocabulary than the policy's.
    """
    folder = Path(path, MODEL) if Path(path, MARKER).is_file() else Path(path)
    head = read_value_head(folder)
    start = open_start(StartConfig(path=str(folder), remat=False))
    theirs, ours = (t.tokenizer.get_vocab(True) for t in (start.tokenizer, tokenizer))
    if theirs != ours:
        raise ValueError(
            f"reward.model_path={path}: its tokenizer has {len(theirs)} tokens that are not the "
            f"policy's {len(ours)}; train the reward model from a model of the same vocabulary"
        )
    model = valued(trunk_of(start.model.module), jax.random.key(0), std=0.0)
    model.value_head = model.value_head.replace(jnp.asarray(head["weight"]))
    model.value_bias = model.value_bias.replace(jnp.asarray(head["bias"]))
    state, run = state_of(model), program(scores)
    return lambda done: np.asarray(run(state, done.rollout))


def scores(state: TrainState, rollout: Rollout) -> jax.Array:
    """[B] score of each completion, read at its last token."""
    model, rows = state.model(), rows_of(rollout)
    hidden_BTD = model(*rows).hidden_BTD
    last_B1 = last_token(rows.segments_BL)[:, None]
    hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B1[..., None], axis=1)
    return model.values(hidden_B1D)[:, 0]
