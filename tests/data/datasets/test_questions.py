# SPDX-License-Identifier: Apache-2.0
"""Questions out of the public formats, each with a wrong row; and the sets themselves, counted."""

import json
from pathlib import Path

import pytest

from r1jax.data.datasets import (
    QUESTIONS,
    conversations,
    evaluation_texts,
    math,
    read_indices,
    read_rows,
)
from r1jax.rl.rewards import FunctionTests, ScriptTests

DATA = Path(__file__).parents[4] / "shared" / "data"

GSM8K = {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004 "}
MATH = {"problem": "Find $x$.", "solution": r"It is $\boxed{\frac{1}{2}}$.", "idx": 3}
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(f):\n    assert f(1) == 1\n",
}
MBPP = {"text": "Add.", "code": "def add(a, b): return a + b", "task_id": 5}
MBPP |= {"test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""}
CRUXEVAL = {"code": "def f(x):\n    return x + 1", "input": "1", "output": "2"}


def file_of(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(tmp_path, name, row):
    (found,) = QUESTIONS[name](file_of(tmp_path, row)).items
    return found


def test_gsm8k(tmp_path):
    found = one(tmp_path, "gsm8k", GSM8K)
    assert (found.question, found.answer, found.source) == ("How many?", "1004", "gsm8k")
    assert found.solution == GSM8K["answer"]
    assert found.tests is None


def test_math_and_what_is_left_out_of_it(tmp_path):
    assert one(tmp_path, "math", MATH).answer == r"\frac{1}{2}"
    bare = MATH | {"problem": "Find $y$.", "solution": r"Thus $y = \boxed 5$.", "idx": 4}
    path = file_of(tmp_path, MATH, bare)
    assert [q.answer for q in math(path).items] == [r"\frac{1}{2}", "5"]
    assert [q.answer for q in math(path, leave_out={3}).items] == ["5"]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: field 'idx'"):
        math(file_of(tmp_path, {k: v for k, v in MATH.items() if k != "idx"}), leave_out={3})


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "p", "answer": "204", "solution": r"\boxed{1}"}, "204"),
        ({"question": "p", "answer": 27.0}, "27"),
        ({"question": "p", "answer": 0.125}, "0.125"),
        ({"question": "p", "answer": 10**40}, str(10**40)),
        ({"problem": "p", "solution": r"\boxed{70}"}, "70"),
        ({"problem": "p", "answer": None, "generated_solution": r"\boxed{8}"}, "8"),
        ({"question": "p", "gold_answer": "432", "solution": "long"}, "432"),
    ],
)
def test_answers_wherever_they_stand(tmp_path, row, answer):
    assert one(tmp_path, "questions", row).answer == answer


def test_the_same_question_has_the_same_identity_and_another_another(tmp_path):
    """Numbers of rows name rows: two files may both have a row 0."""
    a = one(tmp_path, "questions", {"id": 0, "question": "1 + 1", "answer": 2})
    b = one(tmp_path, "questions", {"id": 0, "question": "1 + 2", "answer": 3})
    again = one(tmp_path, "questions", {"id": 9, "question": "1 + 1", "answer": "2"})
    assert a.identity == again.identity != b.identity


def test_code_problems_come_with_their_tests(tmp_path):
    assert one(tmp_path, "humaneval", HUMANEVAL).identity == "humaneval/7"
    for name, row in (("humaneval", HUMANEVAL), ("mbpp", MBPP), ("cruxeval", CRUXEVAL)):
        found = one(tmp_path, name, row)
        assert isinstance(found.tests, FunctionTests)
        assert found.source == name
    assert "assert add(1, 2) == 3" in one(tmp_path, "mbpp", MBPP).question
    other = {"prompt": "Add.", "test": MBPP["test_list"], "code": MBPP["code"], "task_id": "5"}
    assert one(tmp_path, "mbpp", other) == one(tmp_path, "mbpp", MBPP)


CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "", "output": "0"}]
APPS = {"inputs": ["1 2\n", ""], "outputs": ["3\n", "0"]}
GPQA = {"Question": "Which?", "Correct Answer": "iron", "Incorrect Answer 1": "gold"}
GPQA |= {"Incorrect Answer 2": "tin", "Incorrect Answer 3": "lead"}


def test_scripts_from_standard_input_to_output(tmp_path):
    expected = ScriptTests((("1 2\n", "3\n"), ("", "0")))
    for more in ({"cases": CASES}, {"input_output": APPS}, {"input_output": json.dumps(APPS)}):
        assert one(tmp_path, "scripts", {"question": "Add."} | more).tests == expected


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", 1, "1"])
def test_multiple_choice(tmp_path, answer):
    row = {"question": "Which?", "options": ["gold", "iron"], "answer": answer}
    found = one(tmp_path, "choices", row)
    assert found.answer == "B"
    assert "A. gold\nB. iron" in found.question


def test_gpqa_hides_where_the_answer_stands(tmp_path):
    asked = [GPQA | {"Question": f"Which {i}?"} for i in range(40)]
    found = QUESTIONS["choices"](file_of(tmp_path, *asked)).items
    assert {q.answer for q in found} == set("ABCD")
    assert all(f"{q.answer}. iron" in q.question for q in found)
    assert found == QUESTIONS["choices"](file_of(tmp_path, *asked)).items


@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("scripts", {"question": "q", "cases": []}, "'cases' must be a list with something"),
        ("scripts", {"question": "q", "cases": [{"input": "1"}]}, "'cases[0].output' must be text"),
        ("scripts", {"question": "q", "cases": ["1"]}, "'cases[0]' must be an object"),
        ("scripts", {"question": "q"}, "'cases' or 'input_output' is missing"),
        ("scripts", {"question": "q", "input_output": "{"}, "'input_output' is not JSON"),
        ("scripts", {"question": "q", "input_output": APPS | {"fn_name": "f"}}, "no fn_name"),
        ("scripts", {"question": "q", "input_output": APPS | {"inputs": ["1"]}}, "has 1 inputs"),
        ("choices", {"question": "q", "options": ["a", "b"], "answer": "C"}, "one of 2 different"),
        ("choices", {"question": "q", "options": ["a", "a"], "answer": "A"}, "one of 2 different"),
        ("choices", {"question": "q", "options": ["a", "b"], "answer": "AB"}, "one of 2 different"),
        ("choices", {"question": "q", "options": ["a", "b"]}, "'answer' is missing"),
        ("choices", GPQA | {"Incorrect Answer 1": "iron"}, "one of 4 different"),
        ("gsm8k", GSM8K | {"answer": "four"}, "'answer' has no line '#### N'"),
        ("gsm8k", {"answer": "#### 4"}, "'question' is missing"),
        ("math", MATH | {"solution": "unboxed"}, r"'solution' has no \boxed"),
        ("math", MATH | {"solution": r"\boxed{ }"}, r"'solution' has no \boxed"),
        ("aime", {"problem": "p"}, "'answer'"),
        ("amc", {"problem": "p", "answer": True}, "'answer' must be text, got True"),
        ("amc", {"problem": "p", "answer": 1e999}, "Infinity is no JSON value"),
        ("minerva", {"problem": "p", "answer": ""}, "'answer' is empty"),
        ("minerva", {"problem": "p", "answer": "..."}, "'answer' holds no answer"),
        ("questions", {"problem": "p", "answer": r"\boxed{.}"}, "'answer' holds no answer"),
        ("gsm8k", GSM8K | {"answer": "#### ."}, "'answer' holds no answer"),
        ("math", MATH | {"solution": r"\boxed{:}"}, "'answer' holds no answer"),
        ("questions", {"problem": "p", "answer": "1" * 20_001}, "has 20001 characters"),
        ("humaneval", HUMANEVAL | {"test": ""}, "'test' is empty"),
        ("mbpp", MBPP | {"test_list": []}, "'test_list' must be a list with something"),
        ("mbpp", MBPP | {"test_list": ["assert add(1"]}, "are no Python"),
        ("cruxeval", CRUXEVAL | {"output": None}, "'output' is missing"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_line_and_field(tmp_path, name, row, field):
    with pytest.raises(ValueError, match=r"^1 of 1 rows cannot be used: .*rows.jsonl:1: ") as error:
        QUESTIONS[name](file_of(tmp_path, row))
    assert field in str(error.value)


def test_what_evaluation_files_say(tmp_path):
    rows = [GSM8K, MATH, HUMANEVAL, MBPP, CRUXEVAL]
    questions, solutions = evaluation_texts(file_of(tmp_path, *rows))
    expected = ["How many?", "Find $x$.", "def f(x):\n", "Add.", CRUXEVAL["code"]]
    assert questions == expected
    assert solutions == [
        GSM8K["answer"],
        MATH["solution"],
        HUMANEVAL["canonical_solution"],
        MBPP["code"],
    ]
    with pytest.raises(ValueError, match="is missing"):
        evaluation_texts(file_of(tmp_path, {"other": "x"}))


# As the sets' own papers count them.
COUNTED = {
    "gsm8k/train.jsonl": ("gsm8k", 7473),
    "gsm8k/test.jsonl": ("gsm8k", 1319),
    "math/test_5000.jsonl": ("math", 5000),
    "math500/test.jsonl": ("math500", 500),
    "aime2024/test.jsonl": ("aime", 30),
    "aime2025/test.jsonl": ("aime", 30),
    "amc23/test.jsonl": ("amc", 40),
    "minerva_math/test.jsonl": ("minerva", 272),
    "humaneval/HumanEval.jsonl.gz": ("humaneval", 164),
    "mbpp/mbpp.jsonl": ("mbpp", 974),
    "mbpp/mbpp_test.jsonl": ("mbpp", 500),
    "cruxeval/cruxeval.jsonl": ("cruxeval", 800),
    "cot/limo_r1_distill_qwen_32b_291.jsonl": ("questions", 291),
    "cot/openmathinstruct2_100.jsonl": ("questions", 100),
}
WORKED = {
    "cot/limo_r1_distill_qwen_32b_291.jsonl": 291,
    "cot/limo_qwen2.5_32b_instruct_497.jsonl": 497,
    "cot/aime_o1_journey_685.jsonl": 685,
    "cot/openmathinstruct2_100.jsonl": 100,
}
ROWS = {"graders/math_verify_cases.jsonl": 269, "gsm8k/example_model_solutions.jsonl": 1319}


def at_hand(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there")
    return DATA / name


@pytest.mark.parametrize("name", COUNTED)
def test_every_row_of_the_public_sets_is_read(name):
    reader, count = COUNTED[name]
    found = QUESTIONS[reader](at_hand(name))
    assert len(found.items) == len({q.identity for q in found.items}) == count
    assert found.skipped == ()


@pytest.mark.parametrize("name", WORKED)
def test_every_worked_solution_is_read(name):
    assert len(conversations(at_hand(name)).items) == WORKED[name]


def test_r1s_traces_have_a_thought_and_an_answer():
    path = at_hand("cot/limo_r1_distill_qwen_32b_291.jsonl")
    found = conversations(path, answer_from="**Final Answer**")
    assert len(found.items) == 291


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_other_files_is_read(name):
    assert sum(isinstance(row, dict) for _, row in read_rows(at_hand(name))) == ROWS[name]


def test_math_without_math_500():
    path = at_hand("math/test_5000.jsonl")
    indices = read_indices(at_hand("math/math500_idx_in_test5000.json"))
    rest = {q.question for q in math(path, leave_out=indices).items}
    held_out = {q.question for q in QUESTIONS["math500"](at_hand("math500/test.jsonl")).items}
    assert len(indices) == len(held_out) == 500
    assert len(rest) == 4500
    assert rest.isdisjoint(held_out)


def test_the_answers_of_math_500_are_those_in_its_solutions():
    found = QUESTIONS["math500"](at_hand("math500/test.jsonl")).items
    by_question = {q.question: q.answer for q in math(at_hand("math/test_5000.jsonl")).items}
    plain = [(q.answer.replace(" ", ""), by_question[q.question].replace(" ", "")) for q in found]
    assert sum(a == b for a, b in plain) >= 490, "a few are written otherwise (\\dfrac, \\text)"
