# SPDX-License-Identifier: Apache-2.0
"""What a policy is asked: prompts as text and as ids, with the answers that judges compare with."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Asked(NamedTuple):
    """Some questions, entry by entry.

    Attributes:
        prompts: the questions as text.
        ids: their prompts as token ids, template and all.
        answers: what the right answer is known by, into which only the verifier looks; or
            `General`, where there is none and a reward model judges.
    """

    prompts: list[str]
    ids: list[list[int]]
    answers: list[Any]

    def repeated(self, n: int) -> "Asked":
        """Each question `n` times in a row, as the samples of a group lie."""
        return Asked(*([x for x in field for _ in range(n)] for field in self))

    def at(self, rows: Sequence[int]) -> "Asked":
        """Some of the questions."""
        return Asked(*([field[i] for i in rows] for field in self))

    def part(self, start: int, stop: int) -> "Asked":
        """The questions start … stop − 1."""
        return Asked(*(field[start:stop] for field in self))


class Questions(Protocol):
    """Where a stage gets its questions: a pure function, so that a resumed run asks the same."""

    def __call__(self, index: int, n: int, step: int) -> Asked:
        """The `n` questions of batch `index`, asked in training step `step`."""
