# SPDX-License-Identifier: Apache-2.0
"""The code reward: does the program in a completion pass the unit tests of its problem.

DeepSeek-R1 (2501.12948), section 2.2.2: "a compiler can be used to generate feedback based on
predefined test cases". Two forms:

- Functions (HumanEval, MBPP, CRUXEval, any asserts): the tests run in a process of their own and
  call the program's functions by pipe; arguments and results cross as plain values. The program
  never holds a test or an expected value, so there is no verdict for it to forge: patched builtins,
  objects equal to everything, exit codes, early exits and frames to inspect all end at the pipe.
- Scripts: standard input to standard output, one process for each case. The whole output must equal
  the expected one, white space at the end of lines and empty lines at the end aside; the exit
  status must be 0. The expected output never enters the sandbox.

What a program can still do: answer from memory (the arguments of a call are shown to it, and a
test whose answers it knows by heart it passes), and pass tests that are themselves too weak. What
tests of functions cannot see: changes a function makes to its arguments, results that are no plain
values (functions, open files, instances of the program's own classes). See `sandbox` for what the
sandbox does not protect against.
"""

import ast
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from r1jax.data.template import Template, parse
from r1jax.rl.rewards.sandbox import Limits, Run, Sandbox


@dataclasses.dataclass(frozen=True)
class FunctionTests:
    """Tests that call functions.

    Attributes:
      tests: source of the tests, trusted: it passes by raising nothing.
      remote: names that mean the program's functions. Names of the tests that nothing else defines
        are taken for the program's as well.
      given: source run before the tests, in their process: what the prompt defines.
      before: source put before the program.
      after: source put after the program.
      continues: a function whose head `before` ends with; a completion that does not define it
        anew is its body.
      as_text: the completion's code is not run: it stands as a text in quotes between `before` and
        `after`, which read it.
    """

    tests: str
    remote: tuple[str, ...] = ()
    given: str = ""
    before: str = ""
    after: str = ""
    continues: str = ""
    as_text: bool = False

    def __post_init__(self):
        if not self.tests.strip():
            raise ValueError("tests must not be empty: any program would pass")


@dataclasses.dataclass(frozen=True)
class ScriptTests:
    """Pairs of (standard input, the whole expected standard output)."""

    cases: tuple[tuple[str, str], ...]

    def __post_init__(self):
        if not self.cases:
            raise ValueError("cases must not be empty: any program would pass")


CodeTests = FunctionTests | ScriptTests


def humaneval_tests(row: Mapping[str, str]) -> FunctionTests:
    """The tests of a row of HumanEval: task_id, prompt, entry_point, canonical_solution, test."""
    entry = row["entry_point"]
    return FunctionTests(
        tests=f"{row['test']}\n\ncheck({entry})\n",
        remote=(entry,),
        given=row["prompt"],
        before=row["prompt"],
        continues=entry,
    )


def mbpp_tests(row: Mapping[str, object]) -> FunctionTests:
    """The tests of a row of MBPP: code, task_id, test_list and test_setup_code or test_imports.

    The setup goes before the program, unless it uses what the reference solution defines (rows 367
    and 927 build trees of the program's own nodes).
    """
    setup = "\n".join([str(row.get("test_setup_code") or ""), *row.get("test_imports", ())]).strip()
    defined = _defined(str(row["code"]))
    after = bool(setup) and bool(defined & _names(setup))
    return FunctionTests(
        tests="\n".join(row["test_list"]),
        remote=tuple(sorted(defined & _names("\n".join(row["test_list"])))),
        given="" if after else setup,
        before="" if after else f"{setup}\n",
        after=f"\n{setup}\n" if after else "",
    )


def cruxeval_tests(row: Mapping[str, str]) -> FunctionTests:
    """The test of a row of CRUXEval: f(input) == output, for a program that defines f.

    The input is no secret and may name what the program defines, so the call stands with it.
    """
    after = f"\n\ndef f_of_input():\n    return f({row['input']})\n"
    return FunctionTests(
        tests=f"assert f_of_input() == {row['output']}", remote=("f_of_input",), after=after
    )


def extract_code(completion: str, template: Template | None = None) -> str:
    """The program of a completion: its last fenced block outside the reasoning.

    Fences are lines of three or more back-ticks or tildes with at most three spaces before; a block
    that is never closed does not count. With a template, reasoning that is not closed hides what
    follows, and if there are answer tags, their one block is what is searched; an answer block
    without fences is taken whole.

    Args:
      completion: what the model wrote after the prompt.
      template: the tags of the completion; None: no reasoning, and a text without fences is taken
        whole (a base model continuing HumanEval).

    Returns:
      the source, "" where there is none.
    """
    body, whole = completion, template is None
    if template is not None:
        body = completion.removesuffix(template.eos)
        if body.count(template.think_open) > body.count(template.think_close):
            return ""
        body = body.rpartition(template.think_close)[2]
        if template.answer_open in body or template.answer_close in body:
            body, whole = parse(completion, template).answer, True
    blocks = list(_fenced(body))
    return blocks[-1] if blocks else body if whole else ""


_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*")


def _fenced(text: str) -> Iterator[str]:
    mark, lines = "", []
    for line in text.splitlines():
        found = _FENCE.fullmatch(line)
        if not mark:
            mark, lines = (found[1], []) if found else ("", lines)
        elif found and not found[2] and found[1].startswith(mark):
            yield "\n".join(lines) + "\n"
            mark = ""
        else:
            lines.append(line)


@dataclasses.dataclass(frozen=True)
class PendingRewards:
    """Rewards that are being computed: `result()` waits for them."""

    futures: tuple[tuple[Future[Run], ...], ...]
    expected: tuple[tuple[str, ...], ...]

    def result(self) -> np.ndarray:
        """float32 [B] in the order of the completions."""
        return np.array(
            [self._passed(i, futures) for i, futures in enumerate(self.futures)], np.float32
        )

    def _passed(self, i: int, futures: tuple[Future[Run], ...]) -> bool:
        """Cases after a failed one are not waited for and, if not begun, not run."""
        passed = bool(futures)
        for k, future in enumerate(futures):
            if not passed:
                future.cancel()
                continue
            run, expected = future.result(), self.expected[i]
            passed = same_output(run, expected[k]) if expected else run.passed
        return passed


def same_output(run: Run, expected: str) -> bool:
    """Whether a script ended well and its whole output is the expected one.

    White space at the end of a line and empty lines at the end do not count; all else does.
    """
    if run.status != "finished" or run.exit_status != 0:
        return False
    return _stripped(run.stdout.decode("utf-8", "replace")) == _stripped(expected)


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def submit_code(
    completions: Sequence[str],
    answers: Sequence[CodeTests],
    *,
    sandbox: Sandbox,
    template: Template | None = None,
    limits: Limits | None = None,
) -> PendingRewards:
    """Begins the runs that `code_reward` waits for, so that the device may work meanwhile.

    Args:
      completions: B texts.
      answers: B tests, `answers[i]` for `completions[i]`.
      sandbox: where programs run.
      template: the tags of the completions, see `extract_code`.
      limits: of each run, in place of the sandbox's.

    Returns:
      `PendingRewards`.

    Raises:
      ValueError: completions and answers differ in number.
    """
    if len(completions) != len(answers):
        raise ValueError(f"got {len(completions)} completions but {len(answers)} answers")
    futures, expected = [], []
    for text, tests in zip(completions, answers, strict=True):
        code = extract_code(text, template)
        runs, outputs = (), ()
        if not code.strip():
            pass  # nothing to run, nothing earned
        elif isinstance(tests, ScriptTests):
            runs = tuple(sandbox.submit(code, stdin=case[0], limits=limits) for case in tests.cases)
            outputs = tuple(case[1] for case in tests.cases)
        else:
            checker = {"given": tests.given, "remote": tests.remote, "tests": tests.tests}
            runs = (sandbox.submit(program(code, tests), checker=checker, limits=limits),)
        futures.append(runs)
        expected.append(outputs)
    return PendingRewards(tuple(futures), tuple(expected))


def code_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    answers: Sequence[CodeTests],
    *,
    sandbox: Sandbox,
    template: Template | None = None,
    limits: Limits | None = None,
) -> np.ndarray:
    """1 where the program of a completion passes its tests, else 0.

    Args:
      prompts: B texts; what the tests need of them is in `answers`.
      completions: B texts.
      answers: B tests.
      sandbox: where programs run.
      template: the tags of the completions, see `extract_code`.
      limits: of each run, in place of the sandbox's.

    Returns:
      float32 [B].

    Raises:
      ValueError: prompts, completions and answers differ in number.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(prompts)} prompts but {len(completions)} completions")
    pending = submit_code(completions, answers, sandbox=sandbox, template=template, limits=limits)
    return pending.result()


def program(code: str, tests: FunctionTests) -> str:
    """The source that runs: what stands before, the completion's code, what stands after.

    The code is never parsed here, in the trainer's process: whether it defines the function anew is
    a search for a line.
    """
    anew = bool(tests.continues) and re.search(
        rf"^(async[ \t]+)?def[ \t]+{re.escape(tests.continues)}\b", code, re.MULTILINE
    )
    gap = "\n" if anew else ""
    return f"{tests.before}{gap}{ascii(code) if tests.as_text else code}{tests.after}"


def _defined(source: str) -> set[str]:
    """Names that trusted source defines at top level; none if it does not parse."""
    try:
        body = _parse(source).body
    except SyntaxError:
        return set()
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    named = {node.name for node in body if isinstance(node, kinds)}
    assigned = [node for node in body if isinstance(node, ast.Assign)]
    targets = [target for node in assigned for target in node.targets]
    return named | {target.id for target in targets if isinstance(target, ast.Name)}


def _names(source: str) -> set[str]:
    """Names that trusted source mentions."""
    return {node.id for node in ast.walk(_parse(source)) if isinstance(node, ast.Name)}


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dataset's stray back-slashes are not ours to report
        return ast.parse(source.replace("\r\n", "\n"))
