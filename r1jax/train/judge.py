# SPDX-License-Identifier: Apache-2.0
"""From completions to the rewards of a step: the rules of a config, judged while the device works.

A judge is asked twice: first with the completions, when workers begin; then its answer is called,
which waits for them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from r1jax.config import RewardConfig
from r1jax.data.datasets import General
from r1jax.data.template import Template, parse
from r1jax.eval.score import reflects
from r1jax.rl.advantages import overlong_penalty
from r1jax.rl.rewards import (
    Sandbox,
    WorkerPool,
    accuracy,
    combine,
    format_reward,
    language_reward,
    repetition_penalty,
    submit_code,
    submit_math,
)
from r1jax.train.questions import Asked
from r1jax.train.sampler import Completions


class Verdict(NamedTuple):
    """What a judge says of B completions.

    Attributes:
        reward_B: float32.
        shown: means for the metrics.
        counts: how many completions a mean is of, where it is not all of them.
    """

    reward_B: np.ndarray
    shown: dict[str, float]
    counts: Mapping[str, int] = {}


class Judge(Protocol):
    """What a stage gets its rewards from."""

    def __call__(self, step: int, asked: Asked, done: Completions) -> Callable[[], Verdict]:
        """Begins to judge B completions of B questions; the function returned waits."""


Score = Callable[[Asked, Completions], np.ndarray]
"""The reward models' scores [B] of the completions that have a text here, a masked array: masked
where none of them judges."""

Verify = Callable[[Sequence[Any], Sequence[str]], Callable[[], np.ndarray]]
"""(answers, completions) -> a function that waits and returns 1 where right, else 0."""


def by_task(template: Template) -> Verify:
    """Each answer is a task's problem, which knows what solves it."""

    def verify(answers, texts):
        right_B = accuracy(answers, texts, template)
        return lambda: right_B

    return verify


def by_math(pool: WorkerPool, template: Template | None) -> Verify:
    """Answers are compared as mathematics."""
    return lambda answers, texts: submit_math(texts, answers, pool=pool, template=template).collect


def by_tests(sandbox: Sandbox, template: Template | None) -> Verify:
    """Answers are unit tests."""
    return lambda answers, texts: (
        submit_code(texts, answers, sandbox=sandbox, template=template).result
    )


class Rules:
    """The weighted sum of a config's rewards."""

    def __init__(
        self,
        cfg: RewardConfig,
        template: Template | None,
        verify: Verify,
        *,
        max_length: int,
        score: Score | None = None,
    ):
        """Args: weights; the tags of completions, None for text without; the verifier; the length
        limit in tokens, for `overlong`; reward models, for `model`."""
        self.cfg, self.template, self.verify = cfg, template, verify
        self.max_length, self.score = max_length, score

    def __call__(self, step: int, asked: Asked, done: Completions) -> Callable[[], Verdict]:
        """See `Judge`. Answers are needed only where accuracy has a weight."""
        wait = self._accuracy(asked, done) if self.cfg.accuracy else None
        found = self._rules(step, asked, done)

        def verdict() -> Verdict:
            parts = ({} if wait is None else {"accuracy": wait()}) | found
            weights = [vars(self.cfg)[name] for name in parts]
            # Where a row cannot have a reward it is masked: no part of its sum, nor of the mean.
            shown = {name: float(x_B.mean()) for name, x_B in parts.items() if np.ma.count(x_B)}
            given = [np.ma.filled(x_B, 0.0) for x_B in parts.values()]
            # Before `model_from` there may be none.
            none_B = np.zeros(len(done.texts), np.float32)
            reward_B = combine([1.0, *weights], none_B, *given)
            counts = {name: int(np.ma.count(x_B)) for name, x_B in parts.items()}
            return Verdict(reward_B, shown | self._seen(done), counts)

        return verdict

    def _accuracy(self, asked: Asked, done: Completions) -> Callable[[], np.ndarray]:
        """Begins to verify the rows that have an answer; the others' accuracy is masked."""
        rows = [i for i, answer in enumerate(asked.answers) if not isinstance(answer, General)]
        pending = self.verify([asked.answers[i] for i in rows], [done.texts[i] for i in rows])

        def accuracy_B() -> np.ndarray:
            right_B = np.ma.masked_all(len(done.texts), np.float32)
            right_B[rows] = pending()
            return right_B

        return accuracy_B

    def _rules(self, step: int, asked: Asked, done: Completions) -> dict[str, np.ndarray]:
        """The rewards that nobody has to wait for."""
        cfg, template = self.cfg, self.template
        given = asked.prompts, done.texts, asked.answers
        found = {} if template is None else {"format": format_reward(done.texts, template)}
        if cfg.language:
            found["language"] = language_reward(
                *given, language=cfg.target_language, template=template
            )
        if cfg.overlong:
            buffer = min(cfg.overlong_buffer, self.max_length)
            found["overlong"] = overlong_penalty(
                done.tokens_B, max_length=self.max_length, buffer=buffer
            )
        if cfg.repetition:
            found["repetition"] = repetition_penalty(*given)
        if cfg.model and step >= cfg.model_from:
            found["model"] = self.score(asked, done)
        return found

    def _seen(self, done: Completions) -> dict[str, float]:
        if not done.texts:  # all are other processes'
            return {}
        reflecting = [reflects(self.reasoning(text)) for text in done.texts]
        return {
            "mean_tokens": float(done.tokens_B.mean()),
            "reflection": float(np.mean(reflecting)),
        }

    def reasoning(self, text: str) -> str:
        """The chain of thought of a completion; all of it where there are no tags."""
        return text if self.template is None else parse(text, self.template).reasoning

    def well_formed(self, texts: Sequence[str]) -> np.ndarray:
        """1 for each text that follows the template [B]; text without tags always does."""
        if self.template is None:
            return np.ones(len(texts), np.float32)
        return format_reward(texts, self.template)
