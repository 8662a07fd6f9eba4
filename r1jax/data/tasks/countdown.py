# SPDX-License-Identifier: Apache-2.0
"""Countdown: reach a target from two to four numbers, each used once, with +, - and *.

    use 3 5 7 to make 26
    try 3 + 5 = 8 , 8 * 7 = 56 : 26 no wait try 3 * 7 = 21 , 21 + 5 = 26 : 26 yes
    ( 3 * 7 ) + 5

A try is a chain: every step after the first combines the running value with one more number. Each
step is true arithmetic; a wrong try misses the target, which the check says again beside it, and
nothing else. `Problem.given` holds the numbers in the order of the question, then the target.
"""

import functools

import numpy as np

from r1jax.data.tasks.problem import (
    DEFAULT_DIFFICULTY,
    HIGH,
    LOW,
    Difficulty,
    Document,
    Problem,
    Trace,
    TraceMix,
    drawn_from,
)
from r1jax.data.tasks.writing import (
    Candidate,
    Step,
    calculate,
    read_integer,
    read_steps,
    read_tries,
    write_attempt,
    write_fact,
    write_steps,
    write_trace,
)

NAME = "countdown"
_OPERATORS = ("+", "-", "*")
# An expression over n numbers has n - 1 operators and, fully bracketed, 2 (n - 1) brackets; twice
# that leaves room for needless brackets and keeps the parser off megabytes.
_LONGEST_EXPRESSION = 40
# A wrong try is drawn blindly; nearly every problem has one within a few draws.
_WRONG_DRAWS = 64


def sample(
    rng: np.random.Generator, *, split: str, difficulty: Difficulty = DEFAULT_DIFFICULTY
) -> Problem:
    """A problem that is reachable by construction; see `Task.sample`."""
    choices = difficulty.countdown_numbers

    def draw():
        count = choices[rng.integers(len(choices))]
        numbers = rng.integers(1, difficulty.countdown_largest + 1, size=count).tolist()
        steps = _draw_chain(rng, numbers)
        if steps is None or not 1 <= steps[-1][3] <= difficulty.countdown_target:
            return None
        return make(tuple(numbers), steps[-1][3])

    return drawn_from(split, draw)


def make(numbers: tuple[int, ...], target: int) -> Problem:
    """The problem of making `target` from `numbers`; its key forgets their order."""
    return Problem(
        task=NAME,
        question=f"use {' '.join(map(str, numbers))} to make {target}",
        key=f"{NAME} {' '.join(map(str, sorted(numbers)))} {target}",
        given=(*numbers, target),
    )


def cold_start(rng: np.random.Generator, problem: Problem, mix: TraceMix) -> Trace:
    """A worked solution; see `Task.cold_start`."""
    return write_trace(
        rng,
        mix,
        right=lambda: _right(rng, problem),
        wrong=lambda tried: _wrong(rng, problem, tried),
    )


def pretrain_text(
    rng: np.random.Generator,
    *,
    split: str = "train",
    difficulty: Difficulty = DEFAULT_DIFFICULTY,
) -> Document:
    """A fact, a try that is given and judged, or one that is made: half of them right."""
    problem = sample(rng, split=split, difficulty=difficulty)
    kind = rng.random()
    candidate = None if rng.random() < 0.5 else _wrong(rng, problem, set())
    candidate = _right(rng, problem) if candidate is None else candidate
    if kind < 0.25:
        steps = read_steps(candidate.proposal.split())
        return write_fact(steps[rng.integers(len(steps))])
    return write_attempt(problem, candidate, judged=kind < 0.55)


def verify(problem: Problem, answer: str) -> bool:
    """Whether the answer is an expression over exactly the given numbers worth the target."""
    if len(answer) > 8 * _LONGEST_EXPRESSION:
        return False
    parsed = evaluate(answer.split())
    if parsed is None:
        return False
    value, used = parsed
    return value == problem.given[-1] and sorted(used) == sorted(problem.given[:-1])


def attempts(problem: Problem, reasoning: str) -> list[bool]:
    """Whether each try uses the given numbers once, states true steps and ends at the target."""
    return [_reaches(problem, words) for words in read_tries(reasoning)]


def evaluate(words: list[str]) -> tuple[int, list[int]] | None:
    """Evaluates an expression of integers, + - * and brackets, with the usual precedence.

    Args:
      words: the tokens of the expression.

    Returns:
      (value, the integers used), or None where the words are no expression or too many.
    """
    if not words or len(words) > _LONGEST_EXPRESSION:
        return None
    value, used, end = _sum(words, 0)
    return None if value is None or end != len(words) else (value, used)


def _sum(words: list[str], start: int) -> tuple[int | None, list[int], int]:
    """Parses `product (+|- product)*` from `start`: (value, integers used, where it stopped)."""
    value, used, at = _product(words, start)
    while value is not None and at < len(words) and words[at] in ("+", "-"):
        operator = words[at]
        right, more, at = _product(words, at + 1)
        if right is None:
            return None, used, at
        value, used = calculate(value, operator, right), used + more
    return value, used, at


def _product(words: list[str], start: int) -> tuple[int | None, list[int], int]:
    """Parses `atom (* atom)*`, returning as `_sum` does."""
    value, used, at = _atom(words, start)
    while value is not None and at < len(words) and words[at] == "*":
        right, more, at = _atom(words, at + 1)
        if right is None:
            return None, used, at
        value, used = value * right, used + more
    return value, used, at


def _atom(words: list[str], start: int) -> tuple[int | None, list[int], int]:
    """Parses an integer or `( sum )`, returning as `_sum` does."""
    if start >= len(words):
        return None, [], start
    if words[start] == "(":
        value, used, at = _sum(words, start + 1)
        if value is None or at >= len(words) or words[at] != ")":
            return None, [], at
        return value, used, at + 1
    number = read_integer(words[start])
    return number, [] if number is None else [number], start + 1


def _reaches(problem: Problem, words: list[str]) -> bool:
    steps = read_steps(words)
    if steps is None:
        return False
    pool = list(problem.given[:-1])
    for left, operator, right, value in steps:
        for number in (left, right):
            if number not in pool:
                return False
            pool.remove(number)
        if calculate(left, operator, right) != value:
            return False
        pool.append(value)
    return pool == [problem.given[-1]]


def _draw_chain(rng: np.random.Generator, numbers: list[int]) -> list[Step] | None:
    """A random chain over all the numbers, or None if a value leaves LOW..HIGH."""
    order = rng.permutation(numbers).tolist()
    draws = rng.integers(6, size=len(order) - 1).tolist()
    value, steps = order[0], []
    for number, draw in zip(order[1:], draws, strict=True):
        operator = _OPERATORS[draw % 3]
        left, right = value, number
        # The running value stands first, as people write a chain, save where a difference is
        # turned round.
        if operator == "-" and draw >= 3:
            left, right = number, value
        value = calculate(left, operator, right)
        if not LOW <= value <= HIGH:
            return None
        steps.append((left, operator, right, value))
    return steps


@functools.lru_cache(maxsize=1 << 13)
def _chains(numbers: tuple[int, ...], target: int) -> tuple[tuple[Step, ...], ...]:
    """All chains over the sorted numbers that end at the target, found backwards from it."""
    if not LOW <= target <= HIGH:
        return ()
    if len(numbers) == 1:
        return ((),) if numbers[0] == target else ()
    found = []
    for last in sorted(set(numbers)):
        rest = list(numbers)
        rest.remove(last)
        rest = tuple(rest)
        options = [(target - last, "+"), (target + last, "-")]
        if target % last == 0:
            options.append((target // last, "*"))
        for before, operator in options:
            step = (before, operator, last, target)
            found += [(*chain, step) for chain in _chains(rest, before)]
        # The running value stands second in a difference turned round. Of two numbers none is
        # running yet: the other turn of the loop already finds that difference.
        if len(rest) > 1:
            step = (last, "-", last - target, target)
            found += [(*chain, step) for chain in _chains(rest, last - target)]
    return tuple(found)


def _right(rng: np.random.Generator, problem: Problem) -> Candidate:
    *numbers, target = problem.given
    chains = _chains(tuple(sorted(numbers)), target)
    return _candidate(problem, list(chains[rng.integers(len(chains))]))


def _wrong(rng: np.random.Generator, problem: Problem, tried: set) -> Candidate | None:
    *numbers, target = problem.given
    for _ in range(_WRONG_DRAWS):
        steps = _draw_chain(rng, numbers)
        if steps is None or steps[-1][3] == target:
            continue
        candidate = _candidate(problem, steps)
        if candidate.identity not in tried:
            return candidate
    return None


def _candidate(problem: Problem, steps: list[Step]) -> Candidate:
    target = problem.given[-1]
    right = steps[-1][3] == target
    identity = tuple(
        (operator, left, other) if operator == "-" else (operator, *sorted((left, other)))
        for left, operator, other, _ in steps
    )
    return Candidate(
        identity=identity,
        proposal=write_steps(steps),
        check=f": {target} {'yes' if right else 'no'}",
        answer=_expression(steps),
        right=right,
    )


def _expression(steps: list[Step]) -> str:
    """The chain as one bracketed expression."""
    (left, operator, right, value), *later = steps
    text = f"{left} {operator} {right}"
    for left, operator, right, result in later:
        first = left == value
        text = f"( {text} ) {operator} {right}" if first else f"{left} {operator} ( {text} )"
        value = result
    return text
