# SPDX-License-Identifier: Apache-2.0
"""What every task shares: the problem, its trace, the mix of traces, and the split."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from r1jax.config import LARGEST_INTEGER, Difficulty, TraceMix

LOW, HIGH = -LARGEST_INTEGER, LARGEST_INTEGER
"""Every integer that a task ever writes lies in LOW..HIGH; the tokenizer has one token for each."""

_HELD_OUT_SHARE = 0.2
_DRAWS = 10_000  # in a row without a problem of the split, after which it counts as empty


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with a checkable answer.

    Attributes:
      task: name of the task, a key of `TASKS`.
      question: the words shown to the model.
      key: canonical identity; two questions with one key are the same problem in other clothes.
      given: the numbers of the problem, in the order the task documents.
    """

    task: str
    question: str
    key: str
    given: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """A worked solution: the reasoning text and the answer text, neither with tags."""

    reasoning: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Document:
    """A pre-training document: one that answers a question, or raw text.

    Attributes:
      question: stands between the marks of a turn; empty in raw text.
      given: what is drawn at random: one side of an equation, or a try that is to be judged.
      learnt: what follows from both.
    """

    question: str
    given: str
    learnt: str


DEFAULT_DIFFICULTY = Difficulty()


class Task(Protocol):
    """What a task module offers. All text is words separated by single spaces."""

    def sample(
        self, rng: np.random.Generator, *, split: str, difficulty: Difficulty = DEFAULT_DIFFICULTY
    ) -> Problem:
        """A problem of the split, "train" or "heldout"."""

    def cold_start(self, rng: np.random.Generator, problem: Problem, mix: TraceMix) -> Trace:
        """A worked solution in the writer's grammar, right or wrong as the mix has it."""

    def pretrain_text(
        self,
        rng: np.random.Generator,
        *,
        split: str = "train",
        difficulty: Difficulty = DEFAULT_DIFFICULTY,
    ) -> Document:
        """Raw text that teaches facts and checking, with no reflection and no tags."""

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the answer solves the problem; any text is safe to pass."""

    def attempts(self, problem: Problem, reasoning: str) -> list[bool]:
        """Whether each `try` of a reasoning text solves the problem, in order."""


def split_of(key: str) -> str:
    """The split a problem belongs to, from a hash of its key that is stable across runs.

    Args:
      key: `Problem.key`.

    Returns:
      "heldout" for about a fifth of all keys, else "train".
    """
    return "heldout" if zlib.crc32(key.encode()) % 1000 < 1000 * _HELD_OUT_SHARE else "train"


def drawn_from(split: str, draw: Callable[[], Problem | None]) -> Problem:
    """The first problem of the split that `draw` brings; its None are passed over.

    Raises:
      ValueError: no such split, or none of its problems among very many draws.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    for _ in range(_DRAWS):
        problem = draw()
        if problem is not None and split_of(problem.key) == split:
            return problem
    raise ValueError(f"no {split} problem in {_DRAWS} draws; widen tasks.difficulty")


__all__ = [
    "DEFAULT_DIFFICULTY",
    "HIGH",
    "LOW",
    "Difficulty",
    "Document",
    "Problem",
    "Task",
    "Trace",
    "TraceMix",
    "split_of",
]
