# SPDX-License-Identifier: Apache-2.0
"""What data sets hold: questions, conversations, preferences, labelled completions."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from r1jax.rl.rewards.code import CodeTests

T = TypeVar("T")
_NAMED = 3  # bad rows that an error names; it counts the others


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Messages = tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question whose answer can be checked.

    Attributes:
      question: what is asked.
      answer: the reference: an answer, or the reference program of a problem with tests.
      source: name of the data set.
      identity: name of this question, the same wherever the question turns up again.
      tests: of a problem that a program answers, ready for `rl.rewards.code_reward`; None: the
        answer is compared.
      solution: the worked solution, "" if there is none.
    """

    question: str
    answer: str
    source: str
    identity: str
    tests: CodeTests | None = None
    solution: str = ""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns in order, at least one of them the assistant's."""

    messages: Messages


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to the same conversation, the first the better."""

    prompt: Messages
    chosen: str
    rejected: str


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An answer with a mark of its own, as a pointwise (safety) reward model is trained on.

    Attributes:
      prompt: the turns before.
      completion: the answer.
      label: in [0, 1]; 1 is good (safe).
    """

    prompt: Messages
    completion: str
    label: float


@dataclasses.dataclass(frozen=True)
class General:
    """A prompt whose answer cannot be checked: a reward model judges (R1, section 2.3.4).

    Attributes:
      prompt: the turns.
      kind: which reward model, "helpful" or "safe".
    """

    prompt: Messages
    kind: str = "helpful"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A row that was left out.

    Attributes:
      where: `file:line`, or `file item 3` and `file row 3` where there are no lines.
      reason: names the field.
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Rows(Generic[T]):
    """What a reader returns.

    Attributes:
      items: the rows, in order.
      skipped: those left out, in order; empty unless skipping was asked for.
      places: where each of the items stands, as in `Skipped`; empty where that is not known.
    """

    items: tuple[T, ...]
    skipped: tuple[Skipped, ...] = ()
    places: tuple[str, ...] = dataclasses.field(default=(), compare=False)


def settled(items: Sequence[T], bad: Sequence[Skipped], *, of: str | os.PathLike, skip: bool):
    """`Rows`, if bad rows may be left out or there are none.

    Args:
      items: the good rows.
      bad: the others.
      of: what was read, for the errors.
      skip: leave bad rows out instead of refusing the whole.

    Raises:
      ValueError: bad rows (the first few are named, all counted), or no row at all.
    """
    if bad and not skip:
        # A fault that many rows have is named once.
        once: dict[str, Skipped] = {}
        for row in bad:
            once.setdefault(row.reason, row)
        named = list(once.values())[:_NAMED]
        more = f"; and {len(bad) - len(named)} more" if len(bad) > len(named) else ""
        raise ValueError(
            f"{len(bad)} of {len(items) + len(bad)} rows cannot be used: "
            f"{'; '.join(map(str, named))}{more}; "
            "mend them, or leave them out (data.skip=true, --skip-bad-rows)"
        )
    if not items:
        why = f": all {len(bad)} were skipped, the first {bad[0]}" if bad else ""
        raise ValueError(f"{of}: holds no rows to use{why}")
    return Rows(tuple(items), tuple(bad))


def joined(parts: Iterable[Rows[T]]) -> Rows[T]:
    """The rows of several files as those of one."""
    parts = tuple(parts)
    return Rows(
        tuple(item for part in parts for item in part.items),
        tuple(row for part in parts for row in part.skipped),
    )
