# SPDX-License-Identifier: Apache-2.0
"""What every task shares: the problem, its trace, the mix of traces, and the split."""

import dataclasses
import zlib
from typing import Protocol

import numpy as np

from r1jax.config import LARGEST_INTEGER, Difficulty, TraceMix

LOW, HIGH = -LARGEST_INTEGER, LARGEST_INTEGER
"""Every integer that a task ever writes lies in LOW..HIGH; the tokenizer has one token for each."""

_HELD_OUT_SHARE = 0.2


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
    """A pre-training document.

    Attributes:
      given: what is drawn at random: a question, or one side of an equation.
      learnt: what follows from it.
      asked: whether `given` is a question, which stands between the marks of a turn.
    """

    given: str
    learnt: str
    asked: bool


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


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of the two names, so that a loop over it can end."""
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')


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
