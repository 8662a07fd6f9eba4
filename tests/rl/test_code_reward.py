# SPDX-License-Identifier: Apache-2.0
"""The code reward: what counts as the program, what the tests see, reference solutions."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from r1jax.data.template import PRIMER_SFT, R1
from r1jax.rl.rewards.code import (
    FunctionTests,
    ScriptTests,
    code_reward,
    cruxeval_tests,
    extract_code,
    humaneval_tests,
    mbpp_tests,
    program,
    submit_code,
)
from r1jax.rl.rewards.sandbox import Limits, Sandbox

ROOT = Path(__file__).resolve().parents[2]
if sys.platform != "linux":
    pytest.skip("the sandbox is built on Linux", allow_module_level=True)

BLOCK = "```python\nx = 1\n```"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(Limits(wall_seconds=60, cpu_seconds=20)) as pool:
        yield pool


def passes(sandbox, code, tests, **options):
    reward_B = code_reward([""], [code], [tests], sandbox=sandbox, **options)
    assert (reward_B.dtype, reward_B.shape) == (np.float32, (1,))
    return bool(reward_B[0])


def asserts(*lines, remote=("f",), **fields):
    return FunctionTests(tests="\n".join(lines), remote=remote, **fields)


@pytest.mark.parametrize(
    ("text", "template", "code"),
    [
        (BLOCK, R1, "x = 1\n"),
        (f"<think> a </think> so\n{BLOCK}\ndone <eos>", R1, "x = 1\n"),
        (f"<think> a </think> <answer>\n{BLOCK}\n</answer>", R1, "x = 1\n"),
        ("<think> a </think> <answer> x = 1 </answer>", R1, "x = 1"),
        (f"<think> a </think>\n```\nx = 0\n```\n{BLOCK}", R1, "x = 1\n"),
        (f"<think>\n{BLOCK}\n</think> no more", R1, ""),
        (f"<think>\n{BLOCK}\n", R1, ""),
        (f"<think> a </think> <answer> b </answer>\n{BLOCK}", R1, "b"),
        (f"<think> a </think> <answer>\n{BLOCK}", R1, ""),
        (f"<think> a </think>\n{BLOCK}\n```\nx = 2\n", R1, "x = 1\n"),  # the last never closed
        ("<think> a </think> x = 1", R1, ""),
        (f"<reasoning_process> a </reasoning_process> <summary>\n{BLOCK}\n</summary>", PRIMER_SFT,
         "x = 1\n"),
        ("    return 1\n", None, "    return 1\n"),
        (f"Sure:\n{BLOCK}\nThere.", None, "x = 1\n"),
        ("~~~py\nx = '```'\n~~~", None, "x = '```'\n"),
        ("````\n```\n````", None, "```\n"),
        ("  ```python\nx = 1\n  ```", None, "x = 1\n"),
        ("", None, ""),
        ("```" * 100_000, None, "```" * 100_000),
    ],
)  # fmt: skip
def test_the_program_is_the_last_block_outside_the_reasoning(text, template, code):
    assert extract_code(text, template) == code


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("def f(): return None", "assert f() is None"),
        ("def f(): return True", "assert f() is True"),
        ("def f(a): return a", "assert f(10 ** 5000) == 10 ** 5000"),
        ("def f(a): return a", "assert f(-0.0).hex() == (-0.0).hex()"),
        ("def f(a): return a", "assert f(float('inf')) > 1e308"),
        ("def f(a): return a", "assert f('é\\ud800\\n') == 'é\\ud800\\n'"),
        ("def f(a): return a", "assert f([(1, {2: {3}}, b'x', frozenset({4}))]) == "
         "[(1, {2: {3}}, b'x', frozenset({4}))]"),
        ("def f(a): return a", "assert type(f((1,))) is tuple and type(f([1])) is list"),
        ("def f(a): return a", "assert f(1 + 2j) == 1 + 2j and f(range(3)) == range(3)"),
        ("def f(a): return a", "import datetime, decimal\nd = datetime.date(2024, 2, 29)\n"
         "assert f(d) == d and f(decimal.Decimal('1.10')) == decimal.Decimal('1.10')"),
        ("import collections\ndef f(): return collections.Counter('aab')",
         "assert f() == {'a': 2, 'b': 1}"),
        ("def f(a, k): return isinstance(a, k)", "assert f(1, int) and not f(1, str)"),
        ("def f(a, *, b=0): return a - b", "assert f(3, b=1) == 2"),
        ("class N:\n def __init__(s, v): s.v = v\ndef f(n): return [m.v for m in n]",
         "assert f([N(1), N(2)]) == [1, 2]"),
        ("def f(): raise KeyError('a')", "try: f()\nexcept KeyError: pass\nelse: assert False"),
        ("n = 0\ndef f():\n global n\n n += 1\n return n", "assert f() == 1\nassert f() == 2"),
        ("def sum(a, b): return a * b", "assert sum(2, 3) == 6"),
        ("def f(x): return x", "assert math.isclose(f(0.5), 0.5)"),
        ("if __name__ == '__main__': input()\ndef f(): return 1", "assert f() == 1"),
        ("from dataclasses import dataclass\n@dataclass\nclass P: x: int\ndef f(): return P(1).x",
         "assert f() == 1"),
    ],
)  # fmt: skip
def test_plain_values_cross(sandbox, code, line):
    remote = ("sum",) if "sum" in code else ("f",)
    assert passes(sandbox, code, asserts(line, remote=remote))


@pytest.mark.parametrize(
    "line",
    ["assert f()", "assert not f()", "assert f() == f()", "assert f() != 1", "assert f() in [1]",
     "assert len(f())", "assert [f()] == [1]"],
)  # fmt: skip
def test_other_objects_are_never_compared(sandbox, line):
    assert not passes(sandbox, "def f(): return object()", asserts(line))


def test_a_body_continues_the_prompt_and_a_definition_replaces_it(sandbox):
    row = {
        "prompt": 'import math\n\ndef g(x):\n    return x\n\ndef f(x):\n    """Doc."""\n',
        "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate(4) == g(3) - 1.0\n",
    }
    tests = humaneval_tests(row)
    assert passes(sandbox, "    return math.sqrt(x)\n", tests)
    assert passes(sandbox, "```python\ndef f(x):\n    return math.sqrt(g(x))\n```", tests)
    assert not passes(sandbox, "    return x\n", tests)
    # The prompt's own functions, as the tests use them, are not the program's to change.
    assert not passes(sandbox, "    return 9.0\n\ndef g(x):\n    return 10.0\n", tests)
    assert program("def f_not(): pass", tests).endswith('"""\ndef f_not(): pass')


def test_setup_goes_where_it_can_run(sandbox):
    after = {"code": "class N: pass\ndef f(x): return 1", "test_setup_code": "r = N()"}
    before = {"code": "def f(x): return x", "test_setup_code": "k = 1"}
    before["test_list"], after["test_list"] = ["assert f(1) == k"], ["assert f(r) == 1"]
    tests = mbpp_tests(after)
    assert passes(sandbox, "class N: pass\ndef f(x): return 1 if type(x) is N else 0", tests)
    assert passes(sandbox, "def f(x, y=k): return x * y", mbpp_tests(before))


def test_whole_output_is_compared(sandbox):
    tests = ScriptTests((("2 3\n", "5\n"), ("4 5", "9")))
    assert passes(sandbox, "print(sum(map(int, input().split())), ' ')\nprint()", tests)
    assert not passes(sandbox, "print(5)", tests)
    assert not passes(sandbox, "print(sum(map(int, input().split()))); print(1)", tests)
    assert not passes(sandbox, "print('\\n', sum(map(int, input().split())))", tests)
    long = ScriptTests((("x\n" * 100_000, "x\n" * 100_000),))
    assert passes(sandbox, "import sys\nsys.stdout.write(sys.stdin.read())", long)


def test_rewards_keep_their_order_and_come_later(sandbox):
    tests = [asserts(f"assert f() == {i}") for i in range(12)]
    codes = [f"import time\ntime.sleep({(12 - i) / 50})\ndef f(): return {i}" for i in range(12)]
    codes[7] = "def f(): return 0"
    assert submit_code(codes, tests, sandbox=sandbox).result().tolist() == [1] * 7 + [0] + [1] * 4


def test_bad_input_is_refused(sandbox):
    with pytest.raises(ValueError, match="2 completions but 1 answers"):
        submit_code(["", ""], [asserts("assert f()")], sandbox=sandbox)
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        code_reward([""], ["", ""], [], sandbox=sandbox)
    with pytest.raises(ValueError, match="tests must not be empty"):
        FunctionTests(tests=" ")
    with pytest.raises(ValueError, match="cases must not be empty"):
        ScriptTests(())
    with pytest.raises(ValueError, match="limits.cpu_seconds must be > 0"):
        Limits(cpu_seconds=0)
    assert not passes(sandbox, "", asserts("assert True"))


def rows_of(name):
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here")
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.splitlines()]


# file, tests of a row, its reference solution, rows, rows that may fail
DATASETS = {
    "humaneval": ("humaneval/HumanEval.jsonl.gz", humaneval_tests, "canonical_solution", 164, 0),
    "mbpp": ("mbpp/mbpp.jsonl", mbpp_tests, "code", 974, 2),
    "cruxeval": ("cruxeval/cruxeval.jsonl", cruxeval_tests, "code", 800, 0),
}


def failures(name, sandbox, every=1):
    file, tests_of, solution, count, _ = DATASETS[name]
    rows = rows_of(file)
    assert len(rows) == count
    special = [row for row in rows if row.get("task_id") in (367, 927)]
    rows = rows[::every] + (special if every > 1 else [])
    pending = submit_code(
        [row[solution] for row in rows], [tests_of(row) for row in rows], sandbox=sandbox
    )
    reward_B = pending.result()
    return [row for row, reward in zip(rows, reward_B, strict=True) if not reward]


@pytest.mark.parametrize("name", DATASETS)
def test_a_sample_of_reference_solutions_passes(name, sandbox):
    assert failures(name, sandbox, every=20) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_reference_solutions_pass(name, sandbox):
    assert len(failures(name, sandbox)) <= DATASETS[name][4]


@pytest.mark.slow
def test_wrong_solutions_fail(sandbox):
    """Another row's body in place of the right one; a few rows of HumanEval ask for the same."""
    rows = rows_of(DATASETS["humaneval"][0])
    wrong = [row["canonical_solution"] for row in rows[1:] + rows[:1]]
    tests = [humaneval_tests(row) for row in rows]
    assert submit_code(wrong, tests, sandbox=sandbox).result().sum() <= 2
