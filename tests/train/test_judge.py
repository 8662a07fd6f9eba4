# SPDX-License-Identifier: Apache-2.0
"""The rules of a config: weights, what is not computed, and when a reward model counts."""

import numpy as np
import pytest

from r1jax.config import RewardConfig
from r1jax.data.template import R1
from r1jax.train.judge import Rules
from r1jax.train.questions import Asked
from r1jax.train.sampler import Completions

TEXTS = ["<think> so it is </think> <answer> 2 </answer>", "<think> 1 </think>"]
DONE = Completions(None, TEXTS, np.array([9, 3]))
ASKED = Asked(["1 + 1"] * 2, [[1]] * 2, ["2"] * 2)


def never(answers, texts):
    raise AssertionError("an answer of no weight is verified")


def right_first(answers, texts):
    return lambda: np.array([1.0, 0.0], np.float32)


def judged(cfg, *, step=0, template=R1, verify=right_first, score=None):
    rules = Rules(cfg, template, verify, max_length=10, score=score)
    return rules(step, ASKED, DONE)()


def test_the_reward_is_the_weighted_sum_and_fractions_survive():
    cfg = RewardConfig(accuracy=1.0, format=0.25, language=0.5, overlong=2.0, overlong_buffer=4)
    found = judged(cfg)
    # 9 of 10 tokens are three quarters into the buffer; "1" is no word of any language.
    np.testing.assert_allclose(found.reward_B, [1 + 0.25 + 0.5 - 2 * 0.75, 0.0])
    assert found.reward_B.dtype == np.float32
    assert (found.shown["accuracy"], found.shown["format"]) == (0.5, 0.5)
    assert found.shown["mean_tokens"] == 6


def test_answers_of_no_weight_are_not_verified():
    found = judged(RewardConfig(accuracy=0.0), verify=never)
    np.testing.assert_array_equal(found.reward_B, [1.0, 0.0])
    assert "accuracy" not in found.shown


@pytest.mark.parametrize("template", [R1, None])
def test_a_reward_model_counts_from_its_step_on(template):
    """Alone, and before its step there is no reward at all."""
    cfg = RewardConfig(accuracy=0.0, format=0.0, model=2.0, model_path="m", model_from=3)
    score = lambda done: np.array([0.5, -1.0], np.float32)  # noqa: E731
    how = dict(template=template, verify=never, score=score)
    np.testing.assert_array_equal(judged(cfg, step=2, **how).reward_B, [0.0, 0.0])
    np.testing.assert_array_equal(judged(cfg, step=3, **how).reward_B, [1.0, -2.0])
