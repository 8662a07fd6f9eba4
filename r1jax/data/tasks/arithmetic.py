# SPDX-License-Identifier: Apache-2.0
"""Arithmetic chains: a product, then sums and differences, checked backwards.

    compute 7 * 8 + 5 - 3
    try 7 * 8 = 56 , 56 + 5 = 61 , 61 - 3 = 58 : 58 + 3 = 61 , 61 - 5 = 56 , 7 * 8 = 56 yes
    58

A wrong try slips in exactly one step and goes on truly from the slipped value. The check undoes the
sums from the last value back and compares what is left with the product, so it is true arithmetic
and finds every single slip. `Problem.given` is the two factors, then the signed terms.
"""

import numpy as np

from r1jax.data.tasks.problem import (
    DEFAULT_DIFFICULTY,
    HIGH,
    LOW,
    Difficulty,
    Problem,
    Trace,
    TraceMix,
    check_split,
    split_of,
)
from r1jax.data.tasks.writing import (
    Candidate,
    calculate,
    read_integer,
    read_steps,
    read_tries,
    write_answer,
    write_attempt,
    write_steps,
    write_trace,
)

NAME = "arithmetic"
_SLIPS = (-10, -2, -1, 1, 2, 10)

Step = tuple[int, str, int, int]
_FACTS = 0.45  # share of pre-training texts that are one fact
_FALSE = 0.25  # share of pre-training chains with a slip: more of them hides the facts


def sample(
    rng: np.random.Generator, *, split: str, difficulty: Difficulty = DEFAULT_DIFFICULTY
) -> Problem:
    """A chain whose values all lie in LOW..HIGH; see `Task.sample`."""
    check_split(split)
    choices, largest = difficulty.arithmetic_operations, difficulty.arithmetic_largest
    while True:
        count = choices[rng.integers(len(choices))]
        factors = rng.integers(2, largest + 1, size=2).tolist()
        terms = rng.integers(1, largest + 1, size=count - 1) * rng.choice((-1, 1), size=count - 1)
        problem = make(tuple(factors), tuple(terms.tolist()))
        if split_of(problem.key) == split and _in_range(_steps(problem.given)):
            return problem


def make(factors: tuple[int, int], terms: tuple[int, ...]) -> Problem:
    """The problem of computing the product of `factors` plus the signed `terms`.

    Its key forgets the order of the factors and of the terms.
    """
    tail = [f"{'+' if term > 0 else '-'} {abs(term)}" for term in terms]
    return Problem(
        task=NAME,
        question=" ".join([f"compute {factors[0]} * {factors[1]}", *tail]),
        key=" ".join([NAME, *map(str, sorted(factors)), *map(str, sorted(terms))]),
        given=(*factors, *terms),
    )


def cold_start(rng: np.random.Generator, problem: Problem, mix: TraceMix) -> Trace:
    """A worked solution; see `Task.cold_start`."""
    return write_trace(
        rng,
        mix,
        right=lambda: _candidate(problem, _steps(problem.given)),
        wrong=lambda tried: _wrong(rng, problem, tried),
    )


def pretrain_text(
    rng: np.random.Generator,
    *,
    split: str = "train",
    difficulty: Difficulty = DEFAULT_DIFFICULTY,
) -> str:
    """A true fact, a checked try (a quarter of them with a slip), or a chain and its answer."""
    kind = rng.random()
    if kind < _FACTS:
        return write_steps([_fact(rng, difficulty)])
    problem = sample(rng, split=split, difficulty=difficulty)
    steps = _steps(problem.given)
    candidate = _wrong(rng, problem, set()) if rng.random() < _FALSE else None
    candidate = _candidate(problem, steps) if candidate is None else candidate
    if kind < 0.9:
        return write_attempt(problem.question, candidate)
    return write_answer(candidate)


def _fact(rng: np.random.Generator, difficulty: Difficulty) -> Step:
    """A product, or a sum or difference in the range that chains and their checks reach.

    Facts are drawn from all chains: a held-out chain is a new question, not a new addition table.
    """
    largest = difficulty.arithmetic_largest
    if rng.random() < 0.2:
        first, second = rng.integers(2, largest + 1, size=2).tolist()
        return first, "*", second, first * second
    reach = largest * max(max(difficulty.arithmetic_operations) - 1, 1)
    while True:
        first = int(rng.integers(4 - reach, largest**2 + reach + 1))
        operator, second = "+-"[rng.integers(2)], int(rng.integers(1, largest + 1))
        value = calculate(first, operator, second)
        if LOW <= first <= HIGH and LOW <= value <= HIGH:
            return first, operator, second, value


def verify(problem: Problem, answer: str) -> bool:
    """Whether the answer is the one integer that the chain is worth."""
    return len(answer) <= 64 and read_integer(answer.strip()) == _value(problem)


def attempts(problem: Problem, reasoning: str) -> list[bool]:
    """Whether each try, read as a chain of steps, ends at the right value."""
    chains = [read_steps(words) for words in read_tries(reasoning)]
    return [chain is not None and chain[-1][3] == _value(problem) for chain in chains]


def _value(problem: Problem) -> int:
    first, second, *terms = problem.given
    return first * second + sum(terms)


def _steps(given: tuple[int, ...], slip_at: int = -1, slip: int = 0) -> list[Step]:
    """The forward steps, with the value of step `slip_at` off by `slip`."""
    value, steps = given[0], []
    for index, number in enumerate(given[1:]):
        operator = "*" if index == 0 else "+" if number > 0 else "-"
        result = calculate(value, operator, abs(number)) + (slip if index == slip_at else 0)
        steps.append((value, operator, abs(number), result))
        value = result
    return steps


def _undo(steps: list[Step]) -> list[Step]:
    """The check: every sum undone from the last value back, then the product once more."""
    value, back = steps[-1][3], []
    for _, operator, number, _ in reversed(steps[1:]):
        inverse = "-" if operator == "+" else "+"
        back.append((value, inverse, number, calculate(value, inverse, number)))
        value = back[-1][3]
    left, _, right, _ = steps[0]
    return [*back, (left, "*", right, left * right)]


def _in_range(steps: list[Step]) -> bool:
    return all(LOW <= step[3] <= HIGH for step in (*steps, *_undo(steps)))


def _wrong(rng: np.random.Generator, problem: Problem, tried: set) -> Candidate | None:
    slips = [slip for slip in _SLIPS if (_value(problem) + slip,) not in tried]
    places = [
        (slip, steps)
        for slip in slips
        for at in range(len(problem.given) - 1)
        if _in_range(steps := _steps(problem.given, at, slip))
    ]
    return _candidate(problem, places[rng.integers(len(places))][1]) if places else None


def _candidate(problem: Problem, steps: list[Step]) -> Candidate:
    value = steps[-1][3]
    right = value == _value(problem)
    return Candidate(
        identity=(value,),
        proposal=write_steps(steps),
        check=f": {write_steps(_undo(steps))} {'yes' if right else 'no'}",
        answer=str(value),
        right=right,
    )
