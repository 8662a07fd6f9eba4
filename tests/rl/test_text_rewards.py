# SPDX-License-Identifier: Apache-2.0
"""Language consistency, repetition and length: rewards that read the text alone."""

import functools
import time

import numpy as np
import pytest

from r1jax.data import PRIMER_RL, R1
from r1jax.rl import overlong_penalty
from r1jax.rl.rewards import (
    combine,
    language_reward,
    language_share,
    overlong_reward,
    repeated_share,
    repetition_penalty,
)


@pytest.mark.parametrize(
    ("text", "english", "chinese"),
    [
        ("", 0, 0),
        ("42 + 17 = 59.", 0, 0),
        ("$x^2$ and `print(1)`", 1, 0),
        ("We add the numbers.", 1, 0),
        ("我们把数相加。", 0, 1),
        ("so 答案 is 八", 2 / 5, 3 / 5),
        ("don't stop well-known rules", 1, 0),
        ("I see a cat", 1, 0),
        ("令 x = 3, 则 y = 4", 0, 1),  # single letters are variables
        ("设 $f(\\text{two words})=1$ 那么", 0, 1),
        ("由 \\( g(x) \\) 得 \\[ h \\text{ is } 1 \\\\[2pt] \\] 证毕", 0, 1),
        ("\\frac{1}{2} 是 \\alpha", 0, 1),
        ("```python\nfor row in table: pass\n``` 完", 0, 1),
        ("café naïve Ünïcode", 1, 0),
        ("привет мир", 0, 0),
        ("ひらがな and カタカナ", 1 / 9, 0),
        ("x答案y", 2 / 4, 2 / 4),
        ("١٢٣ ①② 🙂🙂", 0, 0),
        ("https://example.com/some/words 好", 0, 1),
    ],
)
def test_share_of_words_by_script(text, english, chinese):
    assert language_share(text, "en") == pytest.approx(english)
    assert language_share(text, "zh") == pytest.approx(chinese)


@pytest.mark.parametrize("template", [R1, PRIMER_RL])
def test_only_the_chain_of_thought_counts(template):
    def text(thought, answer):
        return (
            f"{template.think_open} {thought} {template.think_close} "
            f"{template.answer_open} {answer} {template.answer_close}"
        )

    texts = [text("two words", "答案"), text("两 words", "x"), text(" ", "two words"), "", "no tag"]
    reward = functools.partial(language_reward, language="en", template=template)
    reward_B = reward([""] * 5, texts, [""] * 5)
    assert reward_B.dtype == np.float32
    np.testing.assert_allclose(reward_B, [1, 0.5, 0, 0, 1])


def test_an_unknown_language_is_named():
    with pytest.raises(ValueError, match="language='fr' must be one of"):
        language_reward([""], ["a"], [""], language="fr", template=R1)


@pytest.mark.parametrize(
    "text",
    ["`" * 200_000, "\\(" * 100_000, "\\[" * 100_000, "$" * 200_001, "<a" * 100_000]
    + ["a" * 200_000, "a-" * 100_000, "\u0301" * 200_000, "http://" * 30_000, "汉" * 200_000],
    ids=lambda text: repr(text[:3]),
)
def test_the_time_is_linear(text):
    began = time.process_time()
    assert 0 <= language_share(text, "en") <= 1
    assert -1 <= repetition_penalty([""], [text], [""])[0] <= 0
    assert time.process_time() - began < 5.0


def test_repeated_share_by_hand():
    # a b a b a: bigrams ab ba ab ba, two of four distinct
    assert repeated_share("ababa", 2) == 0.5
    assert repeated_share("abcd", 2) == 0.0
    assert repeated_share("aaaa", 1) == 0.75
    assert repeated_share("ab", 2) == repeated_share("", 3) == 0.0  # fewer than two n-grams


def test_repetition_penalty():
    honest = " ".join(f"step {i} gives {i * i}" for i in range(60))
    loop = "wait let me check that again and then once more " * 40
    circle = "让我再想一想这个问题然后我们再来看一看所有的数字" * 20
    reward_B = repetition_penalty([""] * 4, [honest, loop, circle, ""], [""] * 4, n=10)
    assert reward_B.dtype == np.float32
    assert reward_B[0] == reward_B[3] == 0
    assert (reward_B[1:3] < -0.9).all()
    assert (reward_B >= -1).all()
    # free = 0 and n = 1 are the plain share: a a a a, three of four repeated
    np.testing.assert_allclose(repetition_penalty([""], ["a a a a"], [""], n=1, free=0), [-0.75])
    for bad in ({"n": 0}, {"free": 1.0}, {"free": -0.1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            repetition_penalty([""], [""], [""], **bad)


def test_overlong_is_the_pure_penalty():
    texts = ["w " * n for n in (0, 5, 8, 10, 30)]
    settings = {"max_length": 10, "buffer": 4}
    reward_B = overlong_reward([""] * 5, texts, [""] * 5, length=lambda t: t.count("w"), **settings)
    np.testing.assert_array_equal(
        reward_B, overlong_penalty(np.array([0, 5, 8, 10, 30]), **settings)
    )
    np.testing.assert_allclose(reward_B, [0, 0, -0.5, -1, -1])
    assert reward_B.dtype == np.float32
    total_B = combine((1.0, 0.5), np.ones(5), reward_B)
    np.testing.assert_allclose(total_B, [1, 1, 0.75, 0.5, 0.5])
