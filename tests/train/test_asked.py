# SPDX-License-Identifier: Apache-2.0
"""The questions of a run: each once an epoch, none of them held out; general prompts among them."""

import collections
import json

import pytest

from r1jax.config import Difficulty, QuestionData
from r1jax.data.template import R1
from r1jax.parallel import hosts
from r1jax.train.asked import check_alike, heldout_questions, mixed, training_questions
from r1jax.train.progress import Silent
from r1jax.train.questions import Asked
from r1jax.train.trained import task_words

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


HOW = dict(longest=32, progress=Silent())


def test_what_is_measured_is_never_asked_in_training():
    data = QuestionData(difficulty=Difficulty(arithmetic_operations=(1, 2)))
    heldout = heldout_questions(data, task_words(R1), 64, **HOW)
    assert len({problem.key for problem in heldout.answers}) == 64
    batch = training_questions(data, task_words(R1), seed=0, **HOW)
    asked = [problem.key for i in range(20) for problem in batch(i, 64, i).answers]
    assert {problem.key for problem in heldout.answers}.isdisjoint(asked)
    assert len(set(asked)) > 64


def test_questions_of_a_file_come_once_an_epoch(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"question": f"compute {i} + 1", "answer": str(i + 1)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = QuestionData(dataset="questions", path=str(path), heldout=str(path))
    batch = training_questions(data, task_words(R1), seed=0, **HOW)
    batches = [batch(i, 4, i) for i in range(6)]  # four epochs; a batch reaches into the next
    drawn = [prompt for asked in batches for prompt in asked.prompts]
    epochs = [tuple(drawn[k : k + 6]) for k in range(0, 24, 6)]
    assert all(set(epoch) == {row["question"] for row in rows} for epoch in epochs)
    assert len(set(epochs)) > 1
    for asked in batches:
        assert asked.answers == [str(int(p.split()[1]) + 1) for p in asked.prompts]
    heldout = heldout_questions(data, task_words(R1), 4, **HOW)
    assert len(set(heldout.prompts)) == 4


def test_data_of_another_process_that_is_another_is_refused(monkeypatch):
    monkeypatch.setattr(hosts, "several", lambda: True)
    said = []
    monkeypatch.setattr(hosts, "exchanged", lambda x: said.append(x) or [said[0], x])
    check_alike("q.jsonl", [[1, 2], [3]])
    check_alike("q.jsonl", [[1, 2], [3]])
    for other in ([[3], [1, 2]], [[1], [2, 3]], [[1, 2]]):
        with pytest.raises(ValueError, match=r"q\.jsonl of process 1 is another than process 0's"):
            check_alike("q.jsonl", other)
