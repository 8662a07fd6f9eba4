# SPDX-License-Identifier: Apache-2.0
"""Cold-start traces and pre-training text: true arithmetic, the promised mix and words."""

import re

import numpy as np
import pytest

from r1jax.data.tasks import HIGH, LOW, TASKS, TraceMix, countdown, quadratic, split_of

NAMES = sorted(TASKS)
STEP = re.compile(r"(-?\d+) ([-+*]) (-?\d+) = (-?\d+)")
TRACES = 3000
# One false alarm in 16,000 fair checks; the seeds are fixed, so a green run stays green.
DEVIATIONS = 4


def traces(name, mix, n, seed=0):
    rng = np.random.default_rng(seed)
    task = TASKS[name]
    for _ in range(n):
        problem = task.sample(rng, split="train")
        yield problem, task.cold_start(rng, problem, mix)


def documents(name, n, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [TASKS[name].pretrain_text(rng, **kwargs) for _ in range(n)]


def texts(name, n, seed=0, **kwargs):
    return [" ".join(parts(d)) for d in documents(name, n, seed, **kwargs)]


def parts(document):
    return [part for part in (document.question, document.given, document.learnt) if part]


def is_true(step):
    left, operator, right, value = step
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b}[operator] == int(value)


def agrees(draws, share):
    """Whether the share of true draws is within chance of what it should be."""
    return abs(np.mean(draws) - share) <= DEVIATIONS * np.sqrt(share * (1 - share) / len(draws))


def tries_of(reasoning):
    return [part.split() for part in reasoning.split("try ")[1:]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "mix",
    [
        TraceMix(first_right=0.35, checked=0.5, retry=0.15, retry_right=0.5),
        TraceMix(first_right=0.2, checked=0.9, retry=0.9, retry_right=0.3),
        TraceMix(first_right=0.35, checked=0.5, retry=0.0),
    ],
    ids=["few retries", "many retries", "none"],
)
def test_traces_follow_the_mix(name, mix):
    first, checked, noticed, retried = [], [], [], []
    for problem, trace in traces(name, mix, TRACES):
        right = TASKS[name].attempts(problem, trace.reasoning)
        tries = tries_of(trace.reasoning)
        assert 1 <= len(right) == len(tries) <= mix.max_tries
        assert TASKS[name].verify(problem, trace.answer) == right[-1]
        assert not any(right[:-1])
        first.append(right[0])
        retried += right[1:]
        for number, (words, good) in enumerate(zip(tries, right, strict=True), start=1):
            verdict = "yes" in words or "no" in words
            checked.append(verdict)
            assert ("yes" in words) == (verdict and good)
            if verdict and not good and number < mix.max_tries:
                noticed.append(words[-1] == "wait")
    assert agrees(first, mix.first_right)
    assert agrees(checked, mix.checked)
    assert len(noticed) > 400
    assert agrees(noticed, mix.retry)
    if mix.retry:
        assert len(retried) > 100
        assert agrees(retried, mix.retry_right)
    else:
        assert not retried


@pytest.mark.parametrize("name", NAMES)
def test_no_candidate_is_proposed_twice(name):
    mix = TraceMix(first_right=0.0, checked=1.0, retry=1.0, retry_right=0.0, max_tries=5)
    for _, trace in traces(name, mix, 500):
        ends = [
            re.split(r" (?::|yes|no)\b", " ".join(words))[0] for words in tries_of(trace.reasoning)
        ]
        assert len(set(ends)) == len(ends)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_true_even_in_wrong_tries(name):
    found = [trace.reasoning for _, trace in traces(name, TraceMix(retry=0.9, checked=0.9), 1000)]
    found += [text.split(" = 0 ")[-1] for text in texts(name, 1000)]  # less the equation asked
    steps = [step for text in found for step in STEP.findall(text)]
    assert len(steps) > 2000
    assert all(map(is_true, steps))


def test_a_wrong_arithmetic_try_is_a_guess_that_its_check_finds_out():
    wrong = 0
    for problem, trace in traces("arithmetic", TraceMix(retry=0.9, checked=1.0), 1000):
        right = TASKS["arithmetic"].attempts(problem, trace.reasoning)
        for words, good in zip(tries_of(trace.reasoning), right, strict=True):
            proposal, check = " ".join(words).split(" : ")
            assert bool(re.fullmatch(r"-?\d+", proposal)) == (not good)
            # The check comes back to the product only where the proposal was right.
            value = int(proposal.split()[-1])
            product = problem.given[0] * problem.given[1]
            undone = STEP.findall(check)
            assert int(undone[-1][3]) == product
            start = int(undone[-2][3]) if len(undone) > 1 else value
            assert (start == product) == good
            wrong += not good
    assert wrong > 300


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_ends_in_the_answer(name):
    for _, trace in traces(name, TraceMix(), 300):
        assert trace.reasoning.endswith(f" so {trace.answer}")


@pytest.mark.parametrize("name", NAMES)
def test_every_integer_has_a_token(name):
    mix = TraceMix(retry=0.9, checked=0.9)
    found = [f"{p.question} {t.reasoning} {t.answer}" for p, t in traces(name, mix, 1000)]
    numbers = {int(n) for text in found + texts(name, 1000) for n in re.findall(r"-?\d+", text)}
    assert min(numbers) >= LOW
    assert max(numbers) <= HIGH


def test_countdown_answers_say_what_their_steps_say():
    for problem, trace in traces("countdown", TraceMix(checked=0.0, first_right=0.0), 500):
        value, used = countdown.evaluate(trace.answer.split())
        assert value == int(STEP.findall(trace.reasoning)[-1][3]) != problem.given[-1]
        assert sorted(used) == sorted(problem.given[:-1])


def test_countdown_checks_put_the_target_beside_what_was_made():
    mix = TraceMix(first_right=0.5, checked=1.0, retry=1.0, max_tries=3)
    for problem, trace in traces("countdown", mix, 300):
        for words in tries_of(trace.reasoning):
            made, target, verdict = re.search(r"(\S+) : (\S+) (yes|no)", " ".join(words)).groups()
            assert int(target) == problem.given[-1]
            assert (verdict == "yes") == (made == target)


def test_countdown_judges_tries_it_does_not_make():
    judged = [d for d in documents("countdown", 3000) if d.question and d.given]
    assert agrees([True] * len(judged) + [False] * (3000 - len(judged)), 0.3)
    for d in judged:
        assert countdown.attempts(problem_of(d.question), d.given) == [" yes so " in d.learnt]


def test_quadratic_wrong_tries_are_of_both_kinds():
    products = []
    for problem, trace in traces("quadratic", TraceMix(first_right=0.0, checked=0.0), 500):
        first, second = map(int, trace.answer.split(" , "))
        products.append(first * second == problem.given[1])
        assert not quadratic.verify(problem, trace.answer)
    assert 0.25 < np.mean(products) < 0.75


def problem_of(text):
    """The problem that a text asks, None where it asks nothing."""
    numbers = list(map(int, re.findall(r"-?\d+", text.split(" try ")[0].replace("- ", "-"))))
    if text.startswith("use "):
        return countdown.make(tuple(numbers[:-1]), numbers[-1])
    if text.startswith("compute "):
        return TASKS["arithmetic"].make(tuple(numbers[:2]), tuple(numbers[2:]))
    if text.startswith("solve "):
        terms = text.split(" = 0")[0].replace("- ", "-").split()[4:]
        b = next((int(n) for n, x in zip(terms, terms[1:], strict=False) if x == "x"), 0)
        free = [
            int(n) for i, n in enumerate(terms) if n not in "x+" and terms[i + 1 : i + 2] != ["x"]
        ]
        return quadratic.make(b, sum(free))
    return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pretraining_asks_only_problems_of_its_split(name, split):
    asked = [d.question for d in documents(name, 2000, split=split) if d.question]
    keys = [problem_of(question).key for question in asked]
    assert len(keys) > 500
    assert {split_of(key) for key in keys} == {split}


@pytest.mark.parametrize("name", NAMES)
def test_pretraining_teaches_checking_but_not_reflection(name):
    found = documents(name, 3000)
    assert not any("wait" in part or "<" in part for d in found for part in parts(d))
    asked = [d for d in found if d.question]
    assert len(asked) > 1000
    assert all(problem_of(d.question) for d in asked)
    right = []
    for d in asked:
        text = f"{d.given} {d.learnt}".strip()
        assert text.startswith("try ")
        assert text.count("try") == 1
        tried, _, answer = text.partition(" so ")
        right.append({"yes": True, "no": False}[tried.split()[-1]])
        assert TASKS[name].verify(problem_of(d.question), answer) == right[-1]
    # Of arithmetic's tries 0.3 are guesses, half of them right, and 0.3 slips.
    assert agrees(right, 0.55 if name == "arithmetic" else 0.5)


def test_a_slip_is_judged_but_not_learnt():
    judged = [d for d in documents("arithmetic", 3000) if d.question and d.given]
    assert agrees([True] * len(judged) + [False] * (3000 - len(judged)), 0.55 * 0.3)
    for d in judged:
        problem = problem_of(d.question)
        assert TASKS["arithmetic"].attempts(problem, d.given) == [False]
        written = [int(n) for step in STEP.findall(d.given) for n in (step[0], step[2])]
        shown = [written[0], *written[1::2]]
        assert sum(a != abs(b) for a, b in zip(shown, problem.given, strict=True)) <= 1
        assert d.learnt.startswith(": ")
        assert " no so " in d.learnt


@pytest.mark.parametrize("name", NAMES)
def test_a_fact_is_learnt_by_its_value_alone(name):
    facts = [d for d in documents(name, 3000) if not d.question]
    assert 0.2 < len(facts) / 3000 < 0.5
    for d in facts:
        assert d.given.endswith(" =")
        assert is_true(STEP.fullmatch(f"{d.given} {d.learnt}").groups())


@pytest.mark.parametrize("name", NAMES)
def test_attempts_judge_by_the_candidate_and_not_by_the_verdict(name):
    reasoning, problem, expected = {
        "countdown": (
            "try 3 * 7 = 26 yes wait try 3 * 7 = 21 , 21 + 5 = 26 no try 3 * 7 = 21 , 21 + 7 = 28 "
            "try 3 * 7 = 21 try 5 + 21 = 26 try 7 * 3 = 21 , 5 + 21 = 26 try "
            "try 3 * 7 = 21 , 21 + 5",
            countdown.make((3, 5, 7), 26),
            [False, True, False, False, False, True, False, False],
        ),
        "quadratic": (
            "try 2 , 4 : yes try 3 , 2 no try 2 3 try 2 , 3 , 6 try",
            quadratic.make(-5, 6),
            [False, True, False, False, False],
        ),
        "arithmetic": (
            "try 7 * 8 = 56 , 56 + 5 = 61 , 61 - 3 = 58 no try 7 * 8 = 58 : yes "
            "try 58 try 57 : yes try 7 * 8 = 56 try x try so 58",
            TASKS["arithmetic"].make((7, 8), (5, -3)),
            [True, True, True, False, False, False, False],
        ),
    }[name]
    assert TASKS[name].attempts(problem, reasoning) == expected


def test_a_try_that_leaves_a_number_over_is_wrong():
    problem = countdown.make((3, 5, 7), 8)
    assert countdown.attempts(problem, "try 3 + 5 = 8 yes") == [False]
    assert countdown.attempts(countdown.make((3, 5), 8), "try 3 + 5 = 8") == [True]
