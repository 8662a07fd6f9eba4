# SPDX-License-Identifier: Apache-2.0
"""Answers of several kinds in one batch: each is judged by its own verifier, in its own place."""

import numpy as np

from r1jax.config import Difficulty
from r1jax.data.corpus import problems
from r1jax.data.template import R1
from r1jax.rl.rewards import ScriptTests
from r1jax.train.verifying import verifier


def test_kinds_may_be_mixed():
    easy = Difficulty(arithmetic_operations=(1,))
    first, second = problems(2, seed=0, tasks=("arithmetic",), split="train", difficulty=easy)
    adds = ScriptTests((("1 2", "3"),))
    program = "print(sum(map(int, input().split())))"
    rows = [
        ("1/2", "0.5", 1),
        (adds, f"```python\n{program}\n```", 1),
        (first, "none", 0),
        ("3", "4", 0),
        (adds, "```python\nprint(4)\n```", 0),
        (second, "x", 0),
        ("x+1", "1+x", 1),
    ]
    answers = [answer for answer, _, _ in rows]
    texts = [f"<think> so </think> <answer> {text} </answer>" for _, text, _ in rows]
    texts = [t.replace("> ```", ">\n```").replace("``` <", "```\n<") for t in texts]
    with verifier(answers, R1) as verify:
        np.testing.assert_array_equal(verify(answers, texts)(), [right for _, _, right in rows])
