# SPDX-License-Identifier: Apache-2.0
"""Held-out figures: every question counts once, and greedy answers apart from sampled ones."""

import numpy as np
import pytest

from r1jax.config import RewardConfig
from r1jax.data.template import R1
from r1jax.train.judge import Rules
from r1jax.train.measure import measure
from r1jax.train.questions import Asked
from r1jax.train.sampler import Completions

QUESTIONS, SAMPLES = 10, 3
ASKED = Asked([f"q{i}" for i in range(QUESTIONS)], [[i] for i in range(QUESTIONS)], [*range(10)])


def right(question, sample):
    """Which samples are right; sample 3 is the greedy one."""
    return (question + 2 * sample) % 3 == 0 if sample < SAMPLES else question >= 9


def sampler(calls):
    """Answers by rule: sample g of question q has q + g tokens, and odd questions no tags."""

    def sample(state, ids, noise, temperatures):
        calls.append((len(ids), noise, temperatures))
        rows = [(row[0], g) for row in ids for g in range(len(temperatures))]
        texts = [
            f"{q} {g}" if q % 2 else f"<think> wait {q} </think> <answer> {q} {g} </answer>"
            for q, g in rows
        ]
        return Completions(None, texts, np.array([q + g for q, g in rows]))

    return sample


def verify(answers, texts):
    words = [text.replace("</answer>", "").split()[-2:] for text in texts]
    assert [int(q) for q, _ in words] == answers, "each text is judged by its own question"
    return lambda: np.array([right(int(q), int(g)) for q, g in words], np.float32)


def test_every_question_counts_once():
    """Ten questions in batches of eight: what fills up the second is asked and not counted."""
    calls, rules = [], Rules(RewardConfig(), R1, verify, max_length=9)
    found = measure(
        None, sampler(calls), ASKED, rules, samples=SAMPLES, temperature=0.6, seed=5
    )  # fmt: skip
    assert [rows for rows, _, _ in calls] == [8, 8]
    assert all(t == [0.6] * SAMPLES + [0.0] for _, _, t in calls)
    assert len({noise for _, noise, _ in calls}) == 2
    sampled = [(q, g) for q in range(QUESTIONS) for g in range(SAMPLES)]
    assert found == pytest.approx(
        {
            "pass_at_1": np.mean([right(q, g) for q, g in sampled]),
            "greedy": 0.1,
            "format_rate": 0.5,
            "mean_tokens": np.mean([q + g for q, g in sampled]),
            "reflection_rate": 0.5,
        }
    )
