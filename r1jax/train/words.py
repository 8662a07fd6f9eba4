# SPDX-License-Identifier: Apache-2.0
"""The language of a run on generated tasks: its problems, its words, and how they are asked."""

from collections.abc import Sequence
from typing import NamedTuple

from r1jax.config import TaskConfig
from r1jax.data import corpus
from r1jax.data.tasks import Problem
from r1jax.data.template import PRIMER_RL, R1, Template, prompt
from r1jax.data.tokenizer import TaskTokenizer
from r1jax.train.questions import Asked
from r1jax.train.sampler import Ending


class Words(NamedTuple):
    """The language of a run: its tasks, its tokenizer and its template."""

    tasks: TaskConfig
    tokenizer: TaskTokenizer
    template: Template

    def mixture(self) -> dict[str, float]:
        """Task names and their shares."""
        return dict(zip(self.tasks.names, self.tasks.weights, strict=True))

    def asked(self, problems: Sequence[Problem]) -> Asked:
        """The problems as questions; each is its own answer."""
        texts = [p.question for p in problems]
        ids = [self.tokenizer.encode(prompt(text, self.template)) for text in texts]
        return Asked(texts, ids, list(problems))

    def ending(self) -> Ending:
        """What the sampler has to know of the tokenizer."""
        words = self.tokenizer
        return Ending((words.eos_id,), words.pad_id, words.decode)

    def problems(self, n: int, seed: int, split: str, *, unique: bool = False) -> list[Problem]:
        """`n` problems of the split, drawn by the run's mixture."""
        return corpus.problems(
            n,
            seed=seed,
            tasks=self.mixture(),
            split=split,
            unique=unique,
            difficulty=self.tasks.difficulty,
        )


def template_of(cfg: TaskConfig) -> Template:
    """The template that `tasks.template` names."""
    return {"r1": R1, "primer": PRIMER_RL}[cfg.template]
