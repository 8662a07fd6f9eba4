# SPDX-License-Identifier: Apache-2.0
"""Figures of completions that were written by hand."""

import numpy as np
import pytest

from r1jax.data import R1
from r1jax.data.tasks import arithmetic
from r1jax.eval.score import majority, score, summarise

PROBLEM = arithmetic.make((3, 5), (4,))  # 19
WORK = "try 3 * 5 = 15 , 15 + 4 = 19"


def figures(*reasoning_and_answers):
    texts = [
        f"<think> {reasoning} </think> <answer> {answer} </answer> <eos>"
        for reasoning, answer in reasoning_and_answers
    ]
    problems = [PROBLEM] * len(texts)
    lengths = np.array([len(text.split()) for text in texts])
    return summarise(score(problems, texts, lengths, R1), problems, len(texts))


def test_figures_by_hand():
    found = figures(
        (f"{WORK} so 19", 19),
        (f"try 18 : no wait {WORK} so 19", 19),
        ("try 18 : no so 18", 18),
        ("so 19", 19),  # no try: neither right nor wrong at first
    )
    assert found["pass_at_1"] == 0.75
    assert found["cons_at_4"] == 1.0
    assert found["format_rate"] == 1.0
    assert found["reflection_rate"] == 0.25
    assert found["first_try_rate"] == 0.25
    assert found["self_correction_rate"] == pytest.approx(0.5)


def test_without_a_wrong_first_try_there_is_nothing_to_correct():
    assert figures((f"{WORK} so 19", 19))["self_correction_rate"] is None


def test_the_majority_is_the_most_frequent_answer_and_the_first_of_equals():
    assert majority(["1", "2", "", "", ""]) == "1"
    assert majority(["1", "2", "2"]) == "2"
    assert majority(["", ""]) == ""
