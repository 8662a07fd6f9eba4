# SPDX-License-Identifier: Apache-2.0
"""The rules of a config: weights, what is not computed, and when a reward model counts."""

import numpy as np
import pytest

from r1jax.config import RewardConfig
from r1jax.data.datasets import General, Message
from r1jax.data.template import R1
from r1jax.train.judge import Rules
from r1jax.train.questions import Asked
from r1jax.train.reward_model import preferred
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


def test_a_language_that_is_not_known_is_refused_before_anything_is_sampled():
    with pytest.raises(ValueError, match="reward.target_language='fr' must be one of"):
        Rules(RewardConfig(language=1.0, target_language="fr"), R1, never, max_length=10)
    Rules(RewardConfig(target_language="fr"), R1, never, max_length=10)  # of no weight


def test_answers_of_no_weight_are_not_verified():
    found = judged(RewardConfig(accuracy=0.0), verify=never)
    np.testing.assert_array_equal(found.reward_B, [1.0, 0.0])
    assert "accuracy" not in found.shown


@pytest.mark.parametrize("template", [R1, None])
def test_a_reward_model_counts_from_its_step_on(template):
    """Alone, and before its step there is no reward at all."""
    cfg = RewardConfig(accuracy=0.0, format=0.0, model=2.0, model_path="m", model_from=3)
    one = lambda done: np.array([0.5, -1.0], np.float32)  # noqa: E731
    how = dict(template=template, verify=never, score=preferred({"helpful": one}, all_rows=True))
    np.testing.assert_array_equal(judged(cfg, step=2, **how).reward_B, [0.0, 0.0])
    np.testing.assert_array_equal(judged(cfg, step=3, **how).reward_B, [1.0, -2.0])


def general(kind="helpful"):
    return General((Message("user", "hello"),), kind)


def of_kinds(*answers, scorers, cfg):
    """The verdict on rows with these answers; every checkable answer is right."""
    asked = Asked(["?"] * len(answers), [[1]] * len(answers), list(answers))
    texts = [TEXTS[0] if i % 2 else "no tags" for i in range(len(answers))]
    done = Completions(None, texts, np.arange(len(answers)))
    right = lambda answers, texts: lambda: np.ones(len(texts), np.float32)  # noqa: E731
    score = preferred(scorers, all_rows=False)
    return Rules(cfg, R1, right, max_length=10, score=score)(5, asked, done)()


def test_each_kind_of_prompt_has_its_own_reward():
    """Rules for what can be checked, a reward model for what cannot, the format for all."""
    numbers = lambda sign: lambda done: sign * (1 + done.tokens_B).astype(np.float32)  # noqa: E731
    cfg = RewardConfig(accuracy=1.0, format=0.5, model=2.0, model_path="m", safe_path="s")
    rows = ("2", general(), general("safe"), "3")
    got = of_kinds(*rows, scorers={"helpful": numbers(1), "safe": numbers(-1)}, cfg=cfg)
    np.testing.assert_allclose(got.reward_B, [1.0, 2 * 2 + 0.5, 2 * -3, 1.0 + 0.5])
    assert got.shown["accuracy"] == 1.0  # of the rows that have an answer
    assert got.shown["model"] == (2 - 3) / 2
    only = of_kinds(general(), scorers={"helpful": numbers(1)}, cfg=cfg)
    assert "accuracy" not in only.shown
    none = of_kinds("2", scorers={"helpful": numbers(1)}, cfg=cfg)
    assert "model" not in none.shown
    np.testing.assert_allclose(none.reward_B, [1.0])


def test_a_verdict_that_is_not_a_number_stays_one():
    """The pool's choice for a late verifier: the advantages leave such a row out."""
    nan = lambda answers, texts: lambda: np.array([np.nan, 1], np.float32)  # noqa: E731
    np.testing.assert_array_equal(
        judged(RewardConfig(format=0.0), verify=nan).reward_B, [np.nan, 1]
    )
