# SPDX-License-Identifier: Apache-2.0
"""Held-out evaluation of a policy: k samples at temperature 1 and one greedy answer a problem."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from r1jax.data.tasks import Problem
from r1jax.eval.score import Scores, score, summarise
from r1jax.train.sampler import Sampler
from r1jax.train.state import TrainState
from r1jax.train.words import Words


def evaluate(
    state: TrainState,
    sampler: Sampler,
    problems: Sequence[Problem],
    *,
    words: Words,
    samples: int,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures over all problems and by task, and the greedy answers.

    Returns:
        (figures, answers): figures as `eval.score.summarise` plus greedy and by_task; answers are
        dicts of question, text and correct, one a problem.
    """
    done = sampler(state, words.asked(problems).ids, (seed, 0), [1.0] * samples + [0.0])
    asked = [p for p in problems for _ in range(samples + 1)]
    every = score(asked, done.texts, done.tokens_B, words.template)
    is_greedy = np.arange(len(done.texts)) % (samples + 1) == samples
    sampled, greedy = _pick(every, ~is_greedy), _pick(every, is_greedy)
    repeated = [p for p in problems for _ in range(samples)]
    figures = summarise(sampled, repeated, samples) | {"greedy": float(greedy.correct.mean())}
    figures["by_task"] = {}
    for task in sorted({p.task for p in problems}):
        mine = np.array([p.task == task for p in repeated])
        own = [p for p in repeated if p.task == task]
        figures["by_task"][task] = summarise(_pick(sampled, mine), own, samples)
    texts = [t for t, g in zip(done.texts, is_greedy, strict=True) if g]
    answers = [
        {"question": p.question, "task": p.task, "text": t, "correct": bool(c)}
        for p, t, c in zip(problems, texts, greedy.correct, strict=True)
    ]
    return figures, answers


def _pick(scores: Scores, keep: np.ndarray) -> Scores:
    """The entries where `keep` is true."""
    answers = tuple(a for a, k in zip(scores.answers, keep, strict=True) if k)
    return Scores(*(x[keep] for x in scores[:-1]), answers)
