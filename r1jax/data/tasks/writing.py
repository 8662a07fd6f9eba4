# SPDX-License-Identifier: Apache-2.0
"""The grammar that all tasks write and read: tries, verdicts, `wait`, and integers."""

import dataclasses
from collections.abc import Callable

import numpy as np

from r1jax.data.tasks.problem import Document, Problem, Trace, TraceMix

Step = tuple[int, str, int, int]  # left, operator, right, stated value

# No number that a task accepts is longer; a cap keeps `int` off megabyte literals.
_LONGEST_INTEGER = 6


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One proposed solution.

    Attributes:
      identity: equal for two candidates that a reader would call the same.
      proposal: the text after `try`.
      check: the text that checks the proposal, verdict `yes` or `no` last.
      answer: the answer text the proposal leads to.
      right: whether it solves the problem.
    """

    identity: tuple
    proposal: str
    check: str
    answer: str
    right: bool


def write_trace(
    rng: np.random.Generator,
    mix: TraceMix,
    *,
    right: Callable[[], Candidate],
    wrong: Callable[[set], Candidate | None],
) -> Trace:
    """Composes tries into a trace as the mix has it.

    Args:
      rng: source of randomness.
      mix: the probabilities.
      right: makes a right candidate.
      wrong: makes a wrong candidate whose identity is not in the given set, or None when there
        is no other; then the right one is taken.

    Returns:
      The trace; its answer is that of the last try, and the reasoning ends in `so` and the answer.
    """
    words, tried, chance = [], set(), mix.first_right
    for left in reversed(range(mix.max_tries)):
        candidate = None if rng.random() < chance else wrong(tried)
        candidate = right() if candidate is None else candidate
        tried.add(candidate.identity)
        words += ["try", candidate.proposal]
        if rng.random() >= mix.checked:
            break
        words.append(candidate.check)
        if candidate.right or not left or rng.random() >= mix.retry:
            break
        words.append("wait")
        chance = mix.retry_right
    words += ["so", candidate.answer]
    return Trace(reasoning=" ".join(words), answer=candidate.answer)


def write_fact(step: Step) -> Document:
    """`left operator right =` and the value, as a pre-training document."""
    left, operator, right, value = step
    return Document("", f"{left} {operator} {right} =", str(value))


def write_attempt(problem: Problem, candidate: Candidate, *, judged: bool = False) -> Document:
    """A problem, one try at it, its check and its conclusion: a pre-training document.

    Args:
      judged: the try is given, and only the check and what follows are learnt: how a model learns
        to find faults without learning to make them.
    """
    proposal, check = f"try {candidate.proposal}", f"{candidate.check} so {candidate.answer}"
    if judged:
        return Document(problem.question, proposal, check)
    return Document(problem.question, "", f"{proposal} {check}")


def read_tries(reasoning: str) -> list[list[str]]:
    """The words of each proposal in a reasoning text.

    A proposal runs from `try` to the first of `try`, `:`, `yes`, `no`, `wait`, `so` or the end.
    Linear in the length of the text.
    """
    tries, open_try = [], False
    for word in reasoning.split():
        if word == "try":
            tries.append([])
            open_try = True
        elif word in (":", "yes", "no", "wait", "so"):
            open_try = False
        elif open_try:
            tries[-1].append(word)
    return tries


def read_integer(word: str) -> int | None:
    """The integer a word spells (ASCII digits, perhaps a minus in front), else None."""
    digits = word[1:] if word.startswith("-") else word
    if len(digits) > _LONGEST_INTEGER or not (digits.isascii() and digits.isdecimal()):
        return None
    return int(word)


def read_steps(words: list[str]) -> list[Step] | None:
    """Parses `a op b = c , d op e = f …`.

    Returns:
      The steps as (left, operator, right, stated value), or None if the words are anything else.
    """
    if len(words) % 6 != 5 or any(word != "," for word in words[5::6]):
        return None
    steps = []
    for start in range(0, len(words), 6):
        left, operator, right, equals, value = words[start : start + 5]
        numbers = [read_integer(word) for word in (left, right, value)]
        if None in numbers or equals != "=" or operator not in ("+", "-", "*"):
            return None
        steps.append((numbers[0], operator, numbers[1], numbers[2]))
    return steps


def write_steps(steps: list[Step]) -> str:
    """The inverse of `read_steps`."""
    return " , ".join(f"{left} {op} {right} = {value}" for left, op, right, value in steps)


def calculate(left: int, operator: str, right: int) -> int:
    """`left operator right` for the operators `+`, `-` and `*`."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    raise ValueError(f"operator must be one of + - *, got {operator!r}")
