# SPDX-License-Identifier: Apache-2.0
"""The verifier of questions of any kind: each answer says what checks it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from r1jax.data.tasks import Problem
from r1jax.data.template import R1, Template
from r1jax.rl.rewards import FunctionTests, Sandbox, ScriptTests, math_pool
from r1jax.train.judge import Verify, by_math, by_task, by_tests


@contextlib.contextmanager
def verifier(answers: Sequence[Any], template: Template | None) -> Iterator[Verify]:
    """A verifier for answers like these, with the workers that it needs and no others.

    Args:
        answers: problems of tasks, unit tests, or references to compare as mathematics.
        template: the tags of completions; None for text without. Problems of tasks need one: R1's
            where None.

    Yields:
        `Verify`; its workers live until the context ends.
    """
    kinds = {kind_of(answer) for answer in answers}
    with contextlib.ExitStack() as stack:
        of: dict[type, Verify] = {}
        if Problem in kinds:
            of[Problem] = by_task(template or R1)
        if FunctionTests in kinds:
            of[FunctionTests] = by_tests(stack.enter_context(Sandbox()), template)
        if str in kinds:
            of[str] = by_math(stack.enter_context(math_pool()), template)
        yield _by_kind(of)


def kind_of(answer: Any) -> type:
    """`Problem`, `FunctionTests` (of both forms of tests) or `str`."""
    if isinstance(answer, FunctionTests | ScriptTests):
        return FunctionTests
    return Problem if isinstance(answer, Problem) else str


def _by_kind(of: dict[type, Verify]) -> Verify:
    def verify(answers: Sequence[Any], texts: Sequence[str]) -> Callable[[], np.ndarray]:
        kinds = [kind_of(answer) for answer in answers]
        places = {k: [i for i, kind in enumerate(kinds) if kind is k] for k in set(kinds)}
        pending = {
            k: of[k]([answers[i] for i in where], [texts[i] for i in where])
            for k, where in places.items()
        }

        def collect() -> np.ndarray:
            right_B = np.zeros(len(texts), np.float32)
            for kind, wait in pending.items():
                right_B[places[kind]] = wait()
            return right_B

        return collect

    return verify
