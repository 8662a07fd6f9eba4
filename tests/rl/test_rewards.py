# SPDX-License-Identifier: Apache-2.0
"""Rewards: what earns, what does not, and fractions that survive (SPEC properties 5 and 10)."""

import numpy as np
import pytest

from r1jax.data import PRIMER_RL, R1, TASKS, TraceMix, completion
from r1jax.data.tasks import arithmetic, countdown
from r1jax.rl.rewards import accuracy, combine, format_reward

PROBLEM = arithmetic.make((7, 8), (5, -3))
RIGHT = "<think> try 58 </think> <answer> 58 </answer> <eos>"

# Completions that try to earn without following the template.
FARMS = {
    "empty": "",
    "tags alone": "<think> </think> <answer> </answer>",
    "empty reasoning": "<think> </think> <answer> 58 </answer>",
    "repeated blocks": "<think> a </think> <answer> 58 </answer> " * 3,
    "repeated tags": "<think> " * 3 + "a" + " </think>" * 3 + " <answer> 58 </answer>",
    "nested": "<think> a <think> b </think> </think> <answer> 58 </answer>",
    "unclosed": "<think> a <answer> 58",
    "answer in reasoning": "<think> <answer> 58 </answer> </think>",
    "answer in reasoning and after": "<think> <answer> 58 </answer> </think> <answer> 58 </answer>",
    "several answers": "<think> a </think> <answer> 58 </answer> <answer> 57 </answer>",
    "backwards": "<answer> 58 </answer> <think> a </think>",
    "chatter": "<think> a </think> <answer> 58 </answer> yes yes yes",
}


@pytest.mark.parametrize("case", FARMS)
def test_format_cannot_be_farmed(case):
    reward_B = format_reward([FARMS[case], RIGHT], R1)
    assert reward_B.dtype == np.float32
    assert reward_B.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (RIGHT, 1.0),
        ("<think> a </think> <answer> 57 </answer>", 0.0),
        ("<answer> 58 </answer>", 1.0),  # malformed, yet answered
        ("<think> a </think> so <answer> 58 </answer> done", 1.0),
        ("<think> 58 </think> <answer> 57 </answer>", 0.0),
        (FARMS["answer in reasoning"], 0.0),
        (FARMS["answer in reasoning and after"], 0.0),
        (FARMS["several answers"], 0.0),
        (FARMS["unclosed"], 0.0),
        ("58", 0.0),
        ("<think> a </think> <answer> 58 , 57 , 56 </answer>", 0.0),
    ],
)
def test_accuracy_judges_the_answer_block_alone(text, reward):
    reward_B = accuracy([PROBLEM], [text], R1)
    assert (reward_B.dtype, reward_B.tolist()) == (np.float32, [reward])


@pytest.mark.parametrize("template", [R1, PRIMER_RL])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_traces_earn_what_they_deserve(name, template):
    rng, task = np.random.default_rng(0), TASKS[name]
    asked = [task.sample(rng, split="heldout") for _ in range(64)]
    for first_right in (0.0, 1.0):
        mix = TraceMix(first_right=first_right, retry=0.0)
        texts = [completion(task.cold_start(rng, problem, mix), template) for problem in asked]
        assert accuracy(asked, texts, template).tolist() == [first_right] * 64
        assert format_reward(texts, template).all()


def test_each_completion_is_judged_by_its_own_problem():
    problems = [PROBLEM, countdown.make((3, 5, 7), 26)]
    texts = [RIGHT, RIGHT.replace("58 </answer>", "3 * 7 + 5 </answer>")]
    assert accuracy(problems, texts, R1).tolist() == [1.0, 1.0]
    assert accuracy(problems, texts[::-1], R1).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="2 problems but 1 completions"):
        accuracy(problems, texts[:1], R1)


def test_fractions_survive():
    parts = np.array([True, False]), np.array([0.25, 0.125]), np.array([1, 2])
    total_B = combine((1.0, 0.5, 0.1), *parts)
    assert total_B.dtype == np.float32
    np.testing.assert_allclose(total_B, [1.225, 0.2625], rtol=1e-6)


def test_combine_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="one weight per reward"):
        combine((1.0,), np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="shape"):
        combine((1.0, 1.0), np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="one weight per reward"):
        combine(())
