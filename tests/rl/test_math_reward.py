# SPDX-License-Identifier: Apache-2.0
"""The mathematics reward against math-verify's own cases, labelled solutions and attacks."""

import functools
import json
import os
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from r1jax.data import PRIMER_RL, R1
from r1jax.rl.rewards import (
    WorkerLimits,
    combine,
    final_answer,
    math_pool,
    math_reward,
    repetition_penalty,
    submit_math,
)
from r1jax.rl.rewards.math import MAX_ANSWER_CHARS
from tests.rl.adversarial_math import boxed, entries

DATA = Path(__file__).parents[3] / "shared" / "data"
CASES = DATA / "graders" / "math_verify_cases.jsonl"
SOLUTIONS = DATA / "gsm8k" / "example_model_solutions.jsonl"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
# A busy machine must not turn a slow comparison into a wrong one.
PATIENT = WorkerLimits(deadline_s=30.0)
# The bar is 200 completions a second on two idle cores; tests share theirs.
COMPLETIONS_PER_SECOND = 100
DEADLINE, RESTART = 1.0, 5.0


@pytest.fixture(scope="module")
def pool():
    with math_pool(workers=2, limits=PATIENT) as pool:
        yield pool


def rows(path: Path) -> list[dict]:
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{\text{a}\{2\}}", r"\text{a}\{2\}"),
        (r"\boxed{3", r"\boxed{3"),
        ("5 + 6 = <<5+6=11>>11\n#### 1,100", "1,100"),
        ("first A: 3\nA: 18", "18"),
        ("<think> \\boxed{1} </think> It is 2.", "It is 2"),
        ("<think> \\boxed{1}", "1"),
        ("", ""),
        (r"\boxed{}", ""),
        (" 7 ", "7"),
    ],
)
def test_final_answer_of_free_text(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("template", [R1, PRIMER_RL])
def test_with_a_template_only_the_answer_block_counts(pool, template):
    t = template
    right = f"{t.think_open} a {t.think_close} {t.answer_open} {{}} {t.answer_close} {t.eos}"
    completions = {
        right.format("58"): 1,
        right.format(r"\boxed{\frac{116}{2}}"): 1,
        right.format("The total is $58$."): 1,
        right.format("58.0"): 1,
        right.format("57"): 0,
        right.format("57, 58"): 0,
        right.format(""): 0,
        right.format("58") + right.format("58"): 0,
        f"{t.think_open} \\boxed{{58}} {t.think_close}": 0,
        f"{t.think_open} {t.answer_open} 58 {t.answer_close} {t.think_close}": 0,
        "58": 0,
        "": 0,
    }
    reward = functools.partial(math_reward, pool=pool, template=template)
    reward_B = reward([""] * len(completions), list(completions), ["58"] * len(completions))
    assert reward_B.dtype == np.float32
    assert dict(zip(completions, reward_B.tolist(), strict=True)) == completions


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        (r"\frac{1}{2}", "0.5", 1),
        ("1/2", r"\dfrac12", 1),
        ("1,234", "1234", 1),
        ("1000000", "1,000,000.0", 1),
        (r"x^2+2x+1", r"(x+1)^2", 1),
        (r"\{1,2\}", "2, 1", 1),
        ("12", "12 apples", 1),
        ("3", "1 + 2", 1),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        ("Evelyn", r"\text{Evelyn}", 1),
        (r"\text{(C)}", r"\text{(C)}", 1),
        ("0.333333", "1/3", 1),
        ("2", "3", 0),
        ("12", "1, 2", 0),
        ("2^{10}", "1025", 0),
        ("7", "٧", 0),
        (r"x+1", r"y+1", 0),
    ],
)
def test_equality_is_mathematical(pool, gold, answer, score):
    assert math_reward([""], [boxed(answer)], [boxed(gold)], pool=pool).tolist() == [score]


def test_equal_answers_are_asked_about_once(pool):
    before = pool.counts().get("ok", 0)
    reward_B = math_reward([""] * 6, ["4", "4", "5", "4", "", "5"], ["2+2"] * 6, pool=pool)
    assert reward_B.tolist() == [1, 1, 0, 1, 0, 0]
    assert pool.counts()["ok"] - before == 2


def test_rewards_run_while_the_device_works(pool):
    began = time.monotonic()
    pending = submit_math([boxed(f"{i}x+3") for i in range(50)], ["3+x"] * 50, pool=pool)
    submitted = time.monotonic() - began
    reward_B = pending.collect()
    assert submitted < time.monotonic() - began
    assert reward_B.sum() == reward_B[1] == 1
    repeated_B = repetition_penalty([""] * 50, ["a"] * 50, [""] * 50)
    assert combine((0.5, 1.0), reward_B, repeated_B)[1] == 0.5


def test_bad_input_is_named(pool):
    with pytest.raises(ValueError, match="1 completions but 2 answers"):
        math_reward([""], ["1"], ["1", "2"], pool=pool)
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        math_reward(["", ""], ["1"], ["1"], pool=pool)
    with pytest.raises(ValueError, match="a reference answer must have 1 to"):
        math_reward([""], ["1"], [r"\boxed{}"], pool=pool)


def test_oversized_answers_are_refused_unread(pool):
    before = pool.counts()
    texts = ["9" * (MAX_ANSWER_CHARS + 1), boxed("9" * 10**6), boxed("{" * 10**6), "a b " * 10**6]
    began = time.process_time()
    assert math_reward([""] * 4, texts, ["9"] * 4, pool=pool).tolist() == [0] * 4
    assert time.process_time() - began < 1.0
    assert pool.counts() == before


@pytest.mark.slow
def test_math_verify_reads_as_it_does_alone(pool):
    """Every one of its cases, those it fails included: nothing changed by what is replaced."""
    cases = rows(CASES)
    items = []
    for case in cases:
        keys = ["gold", "precision", "strict", "allow_set_relation_comp"]
        keys += ["match_types"] if case["match_types"] != "default_parse" else []
        items.append({key: case[key] for key in keys} | {"answer": case["pred"], "raw": True})
    outcomes = pool.map(items)
    assert {outcome.status for outcome in outcomes} == {"ok"}
    scores = [outcome.score for outcome in outcomes]
    assert scores == [case["math_verify_0_9_0"] for case in cases]
    passed = sum(s == case["expected"] for s, case in zip(scores, cases, strict=True))
    assert (len(cases), passed) == (269, 267)


@pytest.mark.slow
def test_labelled_solutions_of_gsm8k(pool):
    """1,319 problems × 4 solutions of models, labelled right or wrong by their authors."""
    solved = [row | {"by": row[model]} for row in rows(SOLUTIONS) for model in MODELS]
    completions = [row["by"]["solution"] for row in solved]
    labels = np.array([row["by"]["is_correct"] for row in solved])
    began = time.monotonic()
    answers = [row["ground_truth"] for row in solved]
    reward_B = math_reward([""] * len(solved), completions, answers, pool=pool)
    rate = len(solved) / (time.monotonic() - began)
    assert len(labels) == 5276
    assert ((reward_B == 1) == labels).mean() >= 0.995
    assert rate > COMPLETIONS_PER_SECOND, f"{rate:.0f} completions/s"


def worker_megabytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.slow
def test_attacks_are_answered_and_the_pool_lives():
    pairs = entries()
    assert len(pairs) >= 100
    completions, answers = zip(*pairs, strict=True)
    limits = WorkerLimits(deadline_s=DEADLINE)
    with math_pool(workers=2, limits=limits) as pool:
        assert math_reward([""], ["1"], ["1"], pool=pool) == 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        reward_B = math_reward([""] * len(pairs), completions, answers, pool=pool)
        took = time.monotonic() - began
        counts = Counter(pool.counts())
        earned = [pair for pair, reward in zip(pairs, reward_B, strict=True) if reward]
        assert [(text[:60], gold[:60]) for text, gold in earned] == []
        failed = counts["late"] + counts["died"]
        assert took < failed * (DEADLINE + RESTART) + len(pairs) * DEADLINE
        assert math_reward([""], ["1"], ["1"], pool=pool) == 1
        replaced_by = time.monotonic() + RESTART
        while len(pool.pids()) < 2 and time.monotonic() < replaced_by:
            time.sleep(0.1)  # the last attack's worker is being replaced
        assert len(pool.pids()) == 2
        assert all(worker_megabytes(pid) < limits.resident_bytes >> 20 for pid in pool.pids())
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 64 << 10, f"{grown >> 10} MiB more here"
    assert not Path("/tmp/r1jax_was_here").exists()
