# SPDX-License-Identifier: Apache-2.0
"""Arithmetic chains: a product, then sums and differences, checked backwards.

    compute 7 * 8 + 5 - 3
    try 60 : 60 + 3 = 63 , 63 - 5 = 58 , 7 * 8 = 56 no wait
    try 7 * 8 = 56 , 56 + 5 = 61 , 61 - 3 = 58 : 58 + 3 = 61 , 61 - 5 = 56 , 7 * 8 = 56 yes
    58

A right try works the chain out; a wrong one is a guess, near the value. Every equation is true: the
check undoes the sums from the proposed value back and compares what is left with the product, so it
finds every wrong guess. `Problem.given` is the two factors, then the signed terms.
"""

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

NAME = "arithmetic"
_SLIPS = (-10, -2, -1, 1, 2, 10)

_FACTS = 0.45  # share of pre-training texts that are one fact
_GUESSED = 0.3  # share of pre-training tries that are guesses, half of them right
_SLIPPED = 0.3  # share of them that work out a miscopied chain: these are judged, never learnt


def sample(
    rng: np.random.Generator, *, split: str, difficulty: Difficulty = DEFAULT_DIFFICULTY
) -> Problem:
    """A chain whose values all lie in LOW..HIGH; see `Task.sample`."""
    choices, largest = difficulty.arithmetic_operations, difficulty.arithmetic_largest

    def draw():
        count = choices[rng.integers(len(choices))]
        factors = rng.integers(2, largest + 1, size=2).tolist()
        terms = rng.integers(1, largest + 1, size=count - 1) * rng.choice((-1, 1), size=count - 1)
        problem = make(tuple(factors), tuple(terms.tolist()))
        return problem if _in_range(_steps(problem.given)) else None

    return drawn_from(split, draw)


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
        right=lambda: _worked(problem),
        wrong=lambda tried: _wrong(rng, problem, tried),
    )


def pretrain_text(
    rng: np.random.Generator,
    *,
    split: str = "train",
    difficulty: Difficulty = DEFAULT_DIFFICULTY,
) -> Document:
    """A fact, or a checked try: worked out, a guess that is right as often as wrong, or a slip.

    Facts are taken from all chains: a held-out chain is a new question, not a new addition table.
    """
    fact = rng.random() < _FACTS
    if fact:
        split = "train" if rng.random() < 0.8 else "heldout"
    problem = sample(rng, split=split, difficulty=difficulty)
    wrong = _wrong(rng, problem, set()) if rng.random() < 0.5 else None
    guess = wrong or _guess(problem, _value(problem))
    if fact:
        steps = [*_steps(problem.given), *_undo(problem.given, guess.identity[0])]
        return write_fact(steps[rng.integers(len(steps))])
    kind = rng.random()
    if kind < _GUESSED:
        return write_attempt(problem, guess)
    if kind < _GUESSED + _SLIPPED:
        return write_attempt(problem, _slipped(rng, problem, difficulty), judged=True)
    return write_attempt(problem, _worked(problem))


def verify(problem: Problem, answer: str) -> bool:
    """Whether the answer is the one integer that the chain is worth."""
    return len(answer) <= 64 and read_integer(answer.strip()) == _value(problem)


def attempts(problem: Problem, reasoning: str) -> list[bool]:
    """Whether each try, a lone integer or a chain of steps, ends at the right value."""
    return [_proposed(words) == _value(problem) for words in read_tries(reasoning)]


def _proposed(words: list[str]) -> int | None:
    if len(words) == 1:
        return read_integer(words[0])
    chain = read_steps(words)
    return None if chain is None else chain[-1][3]


def _value(problem: Problem) -> int:
    first, second, *terms = problem.given
    return first * second + sum(terms)


def _steps(given: tuple[int, ...]) -> list[Step]:
    """The chain worked forwards."""
    value, steps = given[0], []
    for index, number in enumerate(given[1:]):
        operator = "*" if index == 0 else "+" if number > 0 else "-"
        steps.append((value, operator, abs(number), calculate(value, operator, abs(number))))
        value = steps[-1][3]
    return steps


def _undo(given: tuple[int, ...], value: int) -> list[Step]:
    """The check of `value`: every sum undone from the last one back, then the product once more."""
    first, second, *terms = given
    back = []
    for term in reversed(terms):
        operator = "-" if term > 0 else "+"
        back.append((value, operator, abs(term), value - term))
        value -= term
    return [*back, (first, "*", second, first * second)]


def _in_range(steps: list[Step]) -> bool:
    return all(LOW <= step[3] <= HIGH for step in steps)


def _worked(problem: Problem) -> Candidate:
    return _candidate(problem, write_steps(_steps(problem.given)), _value(problem))


def _slipped(rng: np.random.Generator, problem: Problem, difficulty: Difficulty) -> Candidate:
    """A worked try with one number miscopied, or the right one where none can be."""
    right, given = _value(problem), problem.given
    numbers = range(1, difficulty.arithmetic_largest + 1)
    options = []
    for place, old in enumerate(given):
        for number in numbers[1:] if place < 2 else (*numbers, *(-n for n in numbers)):
            steps = _steps((*given[:place], number, *given[place + 1 :]))
            value = steps[-1][3]
            if number != old and value != right and _in_range([*steps, *_undo(given, value)]):
                options.append(steps)
    steps = options[rng.integers(len(options))] if options else _steps(given)
    return _candidate(problem, write_steps(steps), steps[-1][3])


def _guess(problem: Problem, value: int) -> Candidate:
    return _candidate(problem, str(value), value)


def _wrong(rng: np.random.Generator, problem: Problem, tried: set) -> Candidate | None:
    """A guess off by a slip that was not tried before, None if there is no other."""
    values = [
        value
        for slip in _SLIPS
        if (value := _value(problem) + slip) not in {v for (v,) in tried}
        and LOW <= value <= HIGH
        and _in_range(_undo(problem.given, value))
    ]
    return _guess(problem, values[rng.integers(len(values))]) if values else None


def _candidate(problem: Problem, proposal: str, value: int) -> Candidate:
    right = value == _value(problem)
    return Candidate(
        identity=(value,),
        proposal=proposal,
        check=f": {write_steps(_undo(problem.given, value))} {'yes' if right else 'no'}",
        answer=str(value),
        right=right,
    )
