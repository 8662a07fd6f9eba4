# SPDX-License-Identifier: Apache-2.0
"""Questions out of the public formats of mathematics and code data sets.

Each reader takes a file and returns `Rows[Question]`; a row that does not fit is refused with its
line and field, or left out and listed where `skip` is set.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from r1jax.data.datasets import fields
from r1jax.data.datasets.files import Row, read
from r1jax.data.datasets.records import Question, Rows
from r1jax.rl.rewards.code import (
    CodeTests,
    FunctionTests,
    ScriptTests,
    humaneval_tests,
    mbpp_tests,
)
from r1jax.rl.rewards.math import MAX_ANSWER_CHARS, final_answer, last_boxed

Reader = Callable[..., Rows[Question]]

ASKED = ("problem", "question")
WORKED = ("solution", "generated_solution")
ANSWERED = ("answer", "final_answer", "gold_answer", "expected_answer")
LETTERS = "ABCDEFGHIJ"
GSM8K_ANSWER = re.compile(r"^####[ \t]*(\S.*)$", re.MULTILINE)


def gsm8k(path: str | Path, *, skip: bool = False) -> Rows[Question]:
    """GSM8K: `question`, `answer` (a worked solution whose last line is `#### N`)."""
    return read(path, _gsm8k, skip=skip)


def math(
    path: str | Path, *, skip: bool = False, leave_out: Collection[int] = ()
) -> Rows[Question]:
    r"""MATH: `problem`, `solution` (with its answer in the last `\boxed{…}`), perhaps `idx`.

    Args:
      path: of a file.
      skip: leave bad rows out.
      leave_out: values of `idx` that are not wanted; those of MATH-500 (`read_indices`) leave the
        4,500 of the test split that may be trained on.
    """
    rows = read(path, functools.partial(_math, leave_out=frozenset(leave_out)), skip=skip)
    return Rows(tuple(q for q in rows.items if q is not None), rows.skipped)


def read_indices(path: str | Path) -> frozenset[int]:
    """A JSON list of whole numbers, as the `idx` of MATH-500 among MATH's 5,000 test problems."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is no list of indices: {error}") from error
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        raise ValueError(f"{path}: must hold a JSON list of whole numbers")
    return frozenset(found)


def with_answers(path: str | Path, *, source: str, skip: bool = False) -> Rows[Question]:
    r"""Questions with answers to compare: MATH-500, AIME, AMC, Minerva, and data of your own.

    The question is `problem` or `question`; the reference is `answer` (a text or a number; also
    `final_answer`, `gold_answer`, `expected_answer`) or else the last `\boxed{…}` of `solution`.

    Args:
      path: of a file.
      source: name of the data set, kept in each question.
      skip: leave bad rows out.
    """
    return read(path, functools.partial(_with_answer, source=source), skip=skip)


def humaneval(path: str | Path, *, skip: bool = False) -> Rows[Question]:
    """HumanEval: `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`."""
    return read(path, _humaneval, skip=skip)


def mbpp(path: str | Path, *, skip: bool = False) -> Rows[Question]:
    """MBPP: `text` or `prompt`, `code`, `task_id`, and `test_list` or `test`."""
    return read(path, _mbpp, skip=skip)


def cruxeval(path: str | Path, *, skip: bool = False) -> Rows[Question]:
    """CRUXEval's output prediction: `code`, `input`, `output`.

    The reply is a Python literal; it is read and compared with `output` in the sandbox. No program
    is run, so a reply that computes the value, with a function of its own say, does not answer.
    """
    return read(path, _cruxeval, skip=skip)


def scripts(path: str | Path, *, skip: bool = False) -> Rows[Question]:
    """Programs from standard input to standard output: data of your own, APPS, TACO.

    `question` or `problem`, and `cases` (each with `input` and `output`), or `input_output` (a JSON
    object, or its text, with the lists `inputs` and `outputs`).
    """
    return read(path, _script, skip=skip)


def choices(path: str | Path, *, skip: bool = False) -> Rows[Question]:
    """Multiple choice: `question`, `options` or `choices`, `answer` (a letter, or a number from 0).

    Or GPQA's columns: `Question`, `Correct Answer`, `Incorrect Answer 1`, …; those are put in an
    order that follows from the question. The reference is the letter.
    """
    return read(path, _choice, skip=skip)


QUESTIONS: Mapping[str, Reader] = {
    "gsm8k": gsm8k,
    "math": math,
    "math500": functools.partial(with_answers, source="math500"),
    "aime": functools.partial(with_answers, source="aime"),
    "amc": functools.partial(with_answers, source="amc"),
    "minerva": functools.partial(with_answers, source="minerva"),
    "humaneval": humaneval,
    "mbpp": mbpp,
    "cruxeval": cruxeval,
    "questions": functools.partial(with_answers, source="questions"),
    "scripts": scripts,
    "choices": choices,
}
"""The readers by the names on a command line; the last three are for data of one's own."""


def evaluation_texts(path: str | Path) -> tuple[list[str], list[str]]:
    """(questions, reference solutions) of any evaluation file, to decontaminate against.

    Of each row the first text among `problem`, `question`, `prompt`, `text`, `Question` (GPQA) and
    `code` (CRUXEval); and all among `solution`, `answer`, `canonical_solution` and `code`.

    Raises:
      ValueError: a row that cannot be read or has no question: what is not read is not guarded.
    """
    pairs = read(path, _texts).items
    return [q for q, _ in pairs], [text for _, worked in pairs for text in worked]


def identity(source: str, question: str) -> str:
    """The name of a question without one: numbers in files name lines, not questions."""
    return f"{source}/{hashlib.sha256(question.encode()).hexdigest()[:16]}"


def _gsm8k(row: Row) -> Question:
    question, worked = fields.text(row, "question"), fields.text(row, "answer")
    found = GSM8K_ANSWER.findall(worked)
    if not found:
        raise ValueError("field 'answer' has no line '#### N'")
    answer = _reference(found[-1].replace(",", "").strip())
    name = identity("gsm8k", question)
    return Question(question, answer, "gsm8k", name, solution=worked)


def _math(row: Row, *, leave_out: frozenset[int]) -> Question | None:
    if leave_out:
        if type(row.get("idx")) is not int:
            raise ValueError("field 'idx' must be a whole number where some are to be left out")
        if row["idx"] in leave_out:
            return None
    question, worked = fields.text(row, *ASKED), fields.text(row, "solution")
    name = identity("math", question)
    return Question(question, _reference(_boxed(worked)), "math", name, solution=worked)


def _with_answer(row: Row, *, source: str) -> Question:
    question = fields.text(row, *ASKED)
    worked = next((row[n] for n in WORKED if isinstance(row.get(n), str)), "")
    if any(row.get(name) is not None for name in ANSWERED):
        answer = fields.text_or_number(row, *ANSWERED)
    else:
        name = fields.first_of(row, *ANSWERED, *WORKED)
        answer = _boxed(fields.text(row, name))
    named = row.get("unique_id")
    name = f"{source}/{named}" if isinstance(named, str) else identity(source, question)
    return Question(question, _reference(answer), source, name, solution=worked)


def _reference(answer: str) -> str:
    """The reference, if the judge of mathematics will find something to compare with in it."""
    read = len(final_answer(answer))
    if not read:
        raise ValueError(f"field 'answer' holds no answer: {answer[:20]!r}")
    if read > MAX_ANSWER_CHARS:
        raise ValueError(f"field 'answer' has {read} characters, more than {MAX_ANSWER_CHARS}")
    return answer


def _boxed(worked: str) -> str:
    r"""The answer of a solution. `\boxed 5`, without braces, stands in a few of MATH's."""
    answer = last_boxed(worked)
    if answer is None and (bare := re.findall(r"\\(?:boxed|fbox) +([^\s$.]+)", worked)):
        answer = bare[-1]
    if answer is None or not answer.strip():
        raise ValueError(r"field 'solution' has no \boxed{answer}")
    return answer.strip()


def _humaneval(row: Row) -> Question:
    texts = {
        name: fields.text(row, name)
        for name in ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    }
    return Question(
        texts["prompt"],
        texts["canonical_solution"],
        "humaneval",
        f"humaneval/{texts['task_id'].rpartition('/')[2]}",
        _tests(humaneval_tests, texts),
    )


def _mbpp(row: Row) -> Question:
    tests = fields.texts(row, "test_list", "test")
    asked, code = fields.text(row, "text", "prompt"), fields.text(row, "code")
    setup = fields.checked(row.get("test_setup_code") or "", "test_setup_code", blank=True)
    imports = fields.texts(row, "test_imports") if row.get("test_imports") else []
    task = fields.text_or_number(row, "task_id")
    given = {"code": code, "test_list": tests, "test_setup_code": setup, "test_imports": imports}
    question = f"{asked}\nYour code should pass these tests:\n\n" + "\n".join(tests)
    return Question(question, code, "mbpp", f"mbpp/{task}", _tests(mbpp_tests, given))


def _cruxeval(row: Row) -> Question:
    code, output = fields.text(row, "code"), fields.text(row, "output")
    # One of the 800 functions takes nothing.
    given = fields.checked(row[fields.first_of(row, "input")], "input", blank=True)
    question = (
        f"What is the value of f({given})? Answer with a Python literal alone.\n\n"
        f"```python\n{code}\n```"
    )
    tests = FunctionTests(
        tests=f"assert predicted() == {output}",
        remote=("predicted",),
        before="import ast\n\n\ndef predicted():\n    return ast.literal_eval(",
        after=".strip())\n",
        as_text=True,
    )
    return Question(question, output, "cruxeval", identity("cruxeval", question), tests)


def _script(row: Row) -> Question:
    question = fields.text(row, *ASKED)
    if row.get("cases") is not None:
        pairs = [_case(case, i) for i, case in enumerate(fields.listed(row, "cases"))]
    else:
        pairs = _input_output(row[fields.first_of(row, "cases", "input_output")])
    solution = next((row[n] for n in WORKED if isinstance(row.get(n), str)), "")
    name = identity("scripts", question)
    return Question(question, solution, "scripts", name, ScriptTests(tuple(pairs)))


def _case(case: Any, number: int) -> tuple[str, str]:
    if not isinstance(case, Mapping):
        raise ValueError(f"field 'cases[{number}]' must be an object with 'input' and 'output'")
    given = fields.checked(case.get("input"), f"cases[{number}].input", blank=True)
    return given, fields.checked(case.get("output"), f"cases[{number}].output")


def _input_output(value: Any) -> list[tuple[str, str]]:
    """The cases of APPS and TACO; those that call a function by name are of another form."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("field 'input_output' is not JSON") from error
    if not isinstance(value, Mapping) or value.get("fn_name"):
        raise ValueError("field 'input_output' must hold inputs and outputs, and no fn_name")
    inputs, outputs = fields.listed(value, "inputs"), fields.listed(value, "outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"field 'input_output' has {len(inputs)} inputs, {len(outputs)} outputs")
    cases = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    return [_case(case, number) for number, case in enumerate(cases)]


def _choice(row: Row) -> Question:
    question = fields.text(row, "question", "Question", "problem")
    if row.get("Correct Answer") is not None:
        wrong = [n for n in row if n.startswith("Incorrect Answer") and row[n] is not None]
        options = [fields.text_or_number(row, n).strip() for n in ("Correct Answer", *wrong)]
        # An order of its own for each question, the same for everybody.
        order = sorted(
            options, key=lambda text: hashlib.sha256(f"{question}{text}".encode()).digest()
        )
        place = order.index(options[0])
        options = order
    else:
        options = fields.texts(row, "options", "choices")
        place = _place(fields.text_or_number(row, "answer"))
    if not 0 <= place < len(options) <= len(LETTERS) or len(set(options)) < len(options):
        raise ValueError(f"field 'answer' must be one of {len(options)} different options")
    lines = [f"{LETTERS[i]}. {text}" for i, text in enumerate(options)]
    asked = "\n".join([question, "", *lines, "", "Answer with the letter alone."])
    return Question(asked, LETTERS[place], "choices", identity("choices", question))


def _place(answer: str) -> int:
    """0 for `A`, `a` or `0`; −1 for what is none."""
    letter = answer.strip().strip("().").upper()
    if letter.isascii() and letter.isdigit():
        return int(letter[:3])
    return LETTERS.find(letter) if len(letter) == 1 else -1


def _tests(make: Callable[[Any], CodeTests], row: Mapping[str, Any]) -> CodeTests:
    """The tests of a row; ValueError where its own program or tests are no Python."""
    try:
        return make(row)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the program or its tests are no Python: {error}") from error


def _texts(row: Row) -> tuple[str, list[str]]:
    asked = fields.first_of(row, *ASKED, "prompt", "text", "Question", "code")
    worked = ("solution", "answer", "canonical_solution", "code")
    found = [row[n] for n in worked if n != asked and isinstance(row.get(n), str)]
    return fields.text(row, asked), found
