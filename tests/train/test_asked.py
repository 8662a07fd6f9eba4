# SPDX-License-Identifier: Apache-2.0
"""General prompts among questions: from which step, how many, each once an epoch."""

import collections

import pytest

from r1jax.train.asked import mixed
from r1jax.train.questions import Asked

GENERAL = Asked([f"p{i}" for i in range(7)], [[-i] for i in range(7)], list("abcdefg"))


def questions(index, n, step):
    numbers = list(range(index * n, (index + 1) * n))
    return Asked([str(x) for x in numbers], [[x] for x in numbers], list(numbers))


@pytest.mark.parametrize("share", [0.5, 0.3, 0.05])
@pytest.mark.parametrize("n", [1, 4, 10])
def test_general_prompts_take_their_share_and_their_turn(share, n):
    batch = mixed(questions, GENERAL, share=share, begin=0, seed=3)
    rows = [row for i in range(40) for row in zip(*batch(i, n, i), strict=True)]
    drawn = [text for text, _, _ in rows if text.startswith("p")]
    assert abs(len(drawn) - share * 40 * n) < 1
    for text, ids, answer in rows:  # a row stays together
        number = int(text.removeprefix("p"))
        assert (ids, answer) == (
            ([-number], "abcdefg"[number]) if text[0] == "p" else ([number], number)
        )
    # A question keeps its place, and every prompt comes once before any comes again.
    assert all(int(text) == k for k, (text, _, _) in enumerate(rows) if text[0] != "p")
    for begin in range(0, len(drawn) - len(drawn) % 7, 7):
        assert set(collections.Counter(drawn[begin : begin + 7]).values()) == {1}


def test_there_are_none_before_their_step():
    batch = mixed(questions, GENERAL, share=0.5, begin=2, seed=0)
    assert batch(5, 4, 1) == questions(5, 4, 1)
    assert batch(5, 4, 2) != questions(5, 4, 2)
    assert batch(5, 4, 2) == batch(5, 4, 9)  # a resumed run asks the same
