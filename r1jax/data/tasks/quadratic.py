# SPDX-License-Identifier: Apache-2.0
"""Quadratics with integer roots: propose two roots, check their product and their sum.

    solve x ^ 2 - 5 x + 6 = 0
    try 1 , 6 : 1 * 6 = 6 , 1 + 6 = 7 no wait try 2 , 3 : 2 * 3 = 6 , 2 + 3 = 5 yes
    2 , 3

The coefficient of x is always written, 1 included, and a vanishing term is left out:
`x ^ 2 - 1 x - 6 = 0`, `x ^ 2 - 25 = 0`, `x ^ 2 = 0`. A double root is named twice: `3 , 3`. Traces
name the smaller root first; the verifier takes either order. `Problem.given` is (b, c) of
x² + b x + c.
"""

import numpy as np

from r1jax.data.tasks.problem import (
    DEFAULT_DIFFICULTY,
    Difficulty,
    Document,
    Problem,
    Trace,
    TraceMix,
    drawn_from,
)
from r1jax.data.tasks.writing import (
    Candidate,
    calculate,
    read_integer,
    read_tries,
    write_attempt,
    write_fact,
    write_steps,
    write_trace,
)

NAME = "quadratic"
_LARGEST_ROOT = 12


def sample(
    rng: np.random.Generator, *, split: str, difficulty: Difficulty = DEFAULT_DIFFICULTY
) -> Problem:
    """A problem with two integer roots; see `Task.sample`."""
    bound = difficulty.quadratic_root

    def draw():
        first, second = rng.integers(-bound, bound + 1, size=2).tolist()
        return make(-(first + second), first * second)

    return drawn_from(split, draw)


def make(b: int, c: int) -> Problem:
    """The problem of solving x² + b x + c = 0."""
    words = ["solve x ^ 2"]
    if b:
        words.append(f"{'+' if b > 0 else '-'} {abs(b)} x")
    if c:
        words.append(f"{'+' if c > 0 else '-'} {abs(c)}")
    words.append("= 0")
    return Problem(task=NAME, question=" ".join(words), key=f"{NAME} {b} {c}", given=(b, c))


def cold_start(rng: np.random.Generator, problem: Problem, mix: TraceMix) -> Trace:
    """A worked solution; see `Task.cold_start`."""
    return write_trace(
        rng,
        mix,
        right=lambda: _candidate(problem, _roots(problem)),
        wrong=lambda tried: _wrong(rng, problem, tried),
    )


def pretrain_text(
    rng: np.random.Generator,
    *,
    split: str = "train",
    difficulty: Difficulty = DEFAULT_DIFFICULTY,
) -> Document:
    """A fact, or a checked try, half of them right."""
    kind = rng.random()
    if kind < 0.3:  # of any two roots: a held-out equation is a new question, not a new table
        first, second = rng.integers(
            -difficulty.quadratic_root, difficulty.quadratic_root + 1, size=2
        ).tolist()
        operator = "*" if rng.random() < 0.5 else "+"
        return write_fact((first, operator, second, calculate(first, operator, second)))
    problem = sample(rng, split=split, difficulty=difficulty)
    candidate = None if rng.random() < 0.5 else _wrong(rng, problem, set())
    candidate = _candidate(problem, _roots(problem)) if candidate is None else candidate
    return write_attempt(problem, candidate)


def verify(problem: Problem, answer: str) -> bool:
    """Whether the answer is `r , s` with r and s the two roots, in either order."""
    pair = _read_pair(answer.split()) if len(answer) <= 64 else None
    return pair is not None and _solves(problem, pair)


def attempts(problem: Problem, reasoning: str) -> list[bool]:
    """Whether each try proposes the two roots."""
    pairs = [_read_pair(words) for words in read_tries(reasoning)]
    return [pair is not None and _solves(problem, pair) for pair in pairs]


def _read_pair(words: list[str]) -> tuple[int, int] | None:
    if len(words) != 3 or words[1] != ",":
        return None
    first, second = read_integer(words[0]), read_integer(words[2])
    return None if first is None or second is None else (first, second)


def _solves(problem: Problem, pair: tuple[int, int]) -> bool:
    # Product and sum fix the pair: it is the multiset of roots.
    b, c = problem.given
    return pair[0] * pair[1] == c and pair[0] + pair[1] == -b


def _roots(problem: Problem) -> tuple[int, int]:
    b, c = problem.given
    for first in range(-_LARGEST_ROOT, _LARGEST_ROOT + 1):
        second = -b - first
        if first <= second and first * second == c:
            return first, second
    raise ValueError(f"{problem.question!r} has no integer roots in +-{_LARGEST_ROOT}")


def _wrong(rng: np.random.Generator, problem: Problem, tried: set) -> Candidate | None:
    """Half the time a pair with the right product, else (or when none is left) a near miss."""
    roots, (_, c) = _roots(problem), problem.given
    bound = range(-_LARGEST_ROOT, _LARGEST_ROOT + 1)
    factors = [(p, c // p) for p in bound if p and c % p == 0 and p <= c // p <= _LARGEST_ROOT]
    near = [
        tuple(sorted((roots[i] + shift, roots[1 - i])))
        for i in (0, 1)
        for shift in (-2, -1, 1, 2)
        if abs(roots[i] + shift) <= _LARGEST_ROOT
    ]
    groups = [factors, near] if rng.random() < 0.5 else [near, factors]
    for group in groups:
        free = sorted({pair for pair in group if pair != roots and pair not in tried})
        if free:
            return _candidate(problem, free[rng.integers(len(free))])
    return None


def _candidate(problem: Problem, pair: tuple[int, int]) -> Candidate:
    first, second = pair
    right = _solves(problem, pair)
    facts = write_steps(
        [(first, "*", second, first * second), (first, "+", second, first + second)]
    )
    return Candidate(
        identity=pair,
        proposal=f"{first} , {second}",
        check=f": {facts} {'yes' if right else 'no'}",
        answer=f"{first} , {second}",
        right=right,
    )
