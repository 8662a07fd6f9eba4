# SPDX-License-Identifier: Apache-2.0
"""Code problems as the readers hand them over: reference programs pass, short cuts do not."""

import json
from pathlib import Path

import numpy as np
import pytest

from r1jax.data.datasets import QUESTIONS
from r1jax.rl.rewards import Sandbox, code_reward

DATA = Path(__file__).parents[3] / "shared" / "data"
CRUXEVAL = {"code": "def f(x, y=1):\n    return [x, y]", "input": "(1, 2)", "output": "[(1, 2), 1]"}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as box:
        yield box


def passed(sandbox, questions, completions):
    tests = [q.tests for q in questions]
    return code_reward([""] * len(tests), completions, tests, sandbox=sandbox)


def questions_of(name, file):
    if not (DATA / file).is_file():
        pytest.skip(f"{DATA / file} is not there")
    return QUESTIONS[name](DATA / file).items


def test_cruxeval_takes_the_value_and_not_the_call(sandbox, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(CRUXEVAL))
    (question,) = QUESTIONS["cruxeval"](path).items
    assert "f((1, 2))" in question.question
    right = ["[(1, 2), 1]", "It is\n```python\n[(1,2),1]\n```", "[\n (1, 2),\n 1]"]
    wrong = [
        "[(1, 2), 2]",
        "f((1, 2))",
        "1)\n#",
        "'",
        "(lambda x, y=1: [x, y])((1, 2))",
        "[*[(1, 2)], 1]",
    ]
    found = passed(sandbox, [question] * 9, right + wrong)
    assert found.tolist() == [1] * len(right) + [0] * len(wrong)


def test_scripts_are_run_on_every_case(sandbox, tmp_path):
    path = tmp_path / "rows.jsonl"
    cases = [{"input": "1 2", "output": "3"}, {"input": "5 5", "output": "10"}]
    path.write_text(json.dumps({"question": "Add.", "cases": cases}))
    (question,) = QUESTIONS["scripts"](path).items
    texts = ["print(sum(map(int, input().split())))", "print(3)"]
    assert passed(sandbox, [question] * 2, texts).tolist() == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "least"),
    [
        ("humaneval", "humaneval/HumanEval.jsonl.gz", 164),
        ("mbpp", "mbpp/mbpp.jsonl", 972),
        ("cruxeval", "cruxeval/cruxeval.jsonl", 800),
    ],
)
def test_references_pass(sandbox, name, file, least):
    questions = questions_of(name, file)
    assert passed(sandbox, questions, [q.answer for q in questions]).sum() >= least


@pytest.mark.slow
def test_calling_the_function_predicts_nothing(sandbox):
    questions = questions_of("cruxeval", "cruxeval/cruxeval.jsonl")
    calls = [q.question.partition("value of ")[2].partition("? Answer")[0] for q in questions]
    assert np.all(passed(sandbox, questions, calls) == 0)
