# SPDX-License-Identifier: Apache-2.0
"""Tasks: problems, splits and verifiers, against brute force and against hostile text."""

import ast
import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.tasks import (
    HIGH,
    LOW,
    TASKS,
    Difficulty,
    TraceMix,
    arithmetic,
    countdown,
    mixture,
    quadratic,
    split_of,
)

NAMES = sorted(TASKS)
MEGABYTE = 1_000_000
# A linear scan of a megabyte takes about 50 ms; a quadratic one would take hours.
LINEAR_SECONDS = 5.0


def sampled(name, n, *, split="train", seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [TASKS[name].sample(rng, split=split, **kwargs) for _ in range(n)]


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_about_a_fifth_is_held_out(name):
    train = {p.key for p in sampled(name, 2000)}
    held_out = {p.key for p in sampled(name, 2000, split="heldout")}
    assert min(len(train), len(held_out)) > 50
    assert not train & held_out
    assert all(split_of(key) == "heldout" for key in held_out)
    shares = [split_of(f"{name} {n}") == "heldout" for n in range(20000)]
    assert abs(np.mean(shares) - 0.2) < 0.02


def test_the_split_is_the_same_in_every_process():
    # Written out, so that a change of the hash cannot move problems between the splits unseen.
    keys = ["quadratic -5 6", "countdown 3 5 7 26", "arithmetic 7 8 -3 5", "quadratic 2 1"]
    assert [split_of(key) for key in keys] == ["heldout", "heldout", "train", "train"]


def test_keys_forget_order():
    for numbers in itertools.permutations((3, 5, 7)):
        assert countdown.make(numbers, 26).key == "countdown 3 5 7 26"
    keys = {arithmetic.make(f, t).key for f in ((7, 8), (8, 7)) for t in ((5, -3), (-3, 5))}
    assert keys == {"arithmetic 7 8 -3 5"}


@pytest.mark.parametrize("name", NAMES)
def test_equal_generators_give_equal_problems(name):
    assert sampled(name, 50, seed=3) == sampled(name, 50, seed=3)
    assert sampled(name, 50, seed=3) != sampled(name, 50, seed=4)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_split_is_refused(name):
    with pytest.raises(ValueError, match="split"):
        TASKS[name].sample(np.random.default_rng(0), split="test")


def test_a_split_without_problems_is_refused_and_not_searched_for_ever():
    one = Difficulty(arithmetic_operations=(1,), arithmetic_largest=2)  # 2 * 2 and no other
    split = {"train": "heldout", "heldout": "train"}[split_of("arithmetic 2 2")]
    with pytest.raises(ValueError, match=f"no {split} problem in .*widen tasks.difficulty"):
        TASKS["arithmetic"].sample(np.random.default_rng(0), split=split, difficulty=one)


def test_questions_read_as_documented():
    assert quadratic.make(-5, 6).question == "solve x ^ 2 - 5 x + 6 = 0"
    assert quadratic.make(0, -25).question == "solve x ^ 2 - 25 = 0"
    assert quadratic.make(1, 0).question == "solve x ^ 2 + 1 x = 0"
    assert quadratic.make(0, 0).question == "solve x ^ 2 = 0"
    assert countdown.make((3, 5, 7), 26).question == "use 3 5 7 to make 26"
    assert arithmetic.make((7, 8), (5, -3)).question == "compute 7 * 8 + 5 - 3"


def test_difficulty_is_obeyed():
    small = Difficulty(
        countdown_numbers=(3,),
        countdown_largest=6,
        countdown_target=30,
        quadratic_root=4,
        arithmetic_operations=(2,),
        arithmetic_largest=5,
    )
    for problem in sampled("countdown", 200, difficulty=small):
        *numbers, target = problem.given
        assert len(numbers) == 3
        assert 1 <= min(numbers) <= max(numbers) <= 6
        assert 1 <= target <= 30
    for problem in sampled("quadratic", 200, difficulty=small):
        assert abs(problem.given[1]) <= 16
        assert abs(problem.given[0]) <= 8
    for problem in sampled("arithmetic", 200, difficulty=small):
        assert len(problem.given) == 3
        assert max(map(abs, problem.given)) <= 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("countdown_numbers", ()),
        ("countdown_numbers", (3, 5)),
        ("countdown_largest", 13),
        ("countdown_target", HIGH + 1),
        ("quadratic_root", 13),
        ("arithmetic_operations", (0,)),
        ("arithmetic_largest", 1),
    ],
)
def test_impossible_difficulty_names_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        Difficulty(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("first_right", 1.5), ("retry", -0.1)])
def test_impossible_mix_names_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        TraceMix(**{field: value})
    with pytest.raises(ValueError, match="max_tries"):
        TraceMix(max_tries=0)


def test_mixture():
    assert mixture(("countdown", "quadratic")) == (("countdown", "quadratic"), [0.5, 0.5])
    assert mixture({"countdown": 3, "arithmetic": 1}) == (("countdown", "arithmetic"), [0.75, 0.25])
    for bad in ((), ("sudoku",), ("countdown", "countdown"), {"countdown": 0.0}):
        with pytest.raises(ValueError, match="tasks"):
            mixture(bad)


# --- verifiers ---------------------------------------------------------------------------------


def python_value(text):
    """(value, sorted integers) of a +-* expression by Python's own parser, or None."""

    def walk(node):
        match node:
            case ast.Constant(value=int(value)):
                return value, [value]
            case ast.BinOp(left=left, op=op, right=right):
                (a, used_a), (b, used_b) = walk(left), walk(right)
                values = {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}
                return values[type(op)], used_a + used_b
        raise SyntaxError

    try:
        return walk(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError):
        return None


@given(st.lists(st.sampled_from([*"(())++--**", "1", "2", "3", "10"]), min_size=1, max_size=14))
def test_expressions_agree_with_python_on_random_words(words):
    assert countdown.evaluate(words) == python_value(" ".join(words))


def expressions(numbers):
    """Every fully bracketed expression over all the numbers, as (text, value)."""
    if len(numbers) == 1:
        yield str(numbers[0]), numbers[0]
        return
    for size in range(1, len(numbers)):
        for left in itertools.combinations(range(len(numbers)), size):
            first = [numbers[i] for i in left]
            second = [n for i, n in enumerate(numbers) if i not in left]
            for (a, x), (b, y) in itertools.product(expressions(first), expressions(second)):
                yield f"( {a} + {b} )", x + y
                yield f"( {a} - {b} )", x - y
                yield f"( {a} * {b} )", x * y


@pytest.mark.parametrize("problem", sampled("countdown", 12), ids=lambda p: p.key)
def test_countdown_verifier_agrees_with_enumeration(problem):
    *numbers, target = problem.given
    every = list(itertools.islice(expressions(numbers), 4000))
    assert all(countdown.verify(problem, text) == (value == target) for text, value in every)


@pytest.mark.parametrize("numbers", [(1, 2, 3), (5, 5, 5), (2, 7, 11), (1, 4, 6, 9)])
def test_every_chain_that_exists_is_found(numbers):
    reachable = {}
    for order in itertools.permutations(numbers):
        values = {order[0]}
        for n in order[1:]:
            steps = {w for v in values for w in (v + n, v - n, n - v, v * n)}
            values = {v for v in steps if LOW <= v <= HIGH}
        for value in values:
            reachable.setdefault(value, order)
    rng, mix = np.random.default_rng(0), TraceMix(first_right=1.0)
    for target in reachable:
        problem = countdown.make(numbers, target)
        assert countdown.verify(problem, countdown.cold_start(rng, problem, mix).answer)


def test_countdown_accepts_any_form_of_a_solution():
    problem = countdown.make((3, 5, 7), 26)
    for answer in ("3 * 7 + 5", "5 + ( 3 * 7 )", "( ( 5 ) ) + 7 * 3", "( 5 + 7 * 3 )"):
        assert countdown.verify(problem, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "26",
        "3 * 7",
        "3 * 7 + 5 + 5 - 5",
        "3 * 7 + 5 = 26",
        "( 3 * 7 + 5",
        "3 * 7 + 5 )",
        "3 * 7 + + 5",
        "3 7 * 5 +",
        "* 3 7 + 5",
        "13 * 2",
        "3 * 7 - -5",
        "(3 * 7) + 5",
        "( ) 3 * 7 + 5",
        "3 ** 7 + 5",
        "__import__ ( 'os' )",
        "\u0663 * 7 + 5",
        "\u00b3 * 7 + 5",
        "3 * 7 + 5\x00",
        "3 * 7 + 5 , 3 * 7 + 5",
    ],
)
def test_countdown_rejects(answer):
    assert not countdown.verify(countdown.make((3, 5, 7), 26), answer)


def test_quadratic_verifier_agrees_with_evaluating_the_polynomial():
    pairs = list(itertools.product(range(-13, 14), repeat=2))
    for problem in sampled("quadratic", 30) + [quadratic.make(0, 0), quadratic.make(-6, 9)]:
        b, c = problem.given
        roots = [x for x in range(-200, 201) if x * x + b * x + c == 0]
        expected = {(roots[0], roots[-1]), (roots[-1], roots[0])}
        assert {p for p in pairs if quadratic.verify(problem, f"{p[0]} , {p[1]}")} == expected


@pytest.mark.parametrize(
    "answer",
    ["", "2", "2 3", "2 , 3 , 2", "2,3", "2 , ", ", 3", "2 , 3.0", "x , 3", "2 , 4", "² , 3"],
)
def test_quadratic_rejects(answer):
    assert not quadratic.verify(quadratic.make(-5, 6), answer)


def test_arithmetic_verifier_accepts_the_value_alone():
    for problem in sampled("arithmetic", 50):
        value, _ = python_value(problem.question.removeprefix("compute "))
        right = [n for n in range(LOW - 20, HIGH + 20) if arithmetic.verify(problem, f" {n} ")]
        assert right == [value]
    problem = arithmetic.make((7, 8), (5, -3))
    for answer in ("", "58 58", "58.0", "+58", "5 8", "7 * 8 + 5 - 3", "\u0665\u0668", "--58"):
        assert not arithmetic.verify(problem, answer)


# --- hostile text ------------------------------------------------------------------------------

WORDS = [
    "try",
    "yes",
    "no",
    "wait",
    "so",
    *":,=+-*()",
    "2",
    "3",
    "7",
    "26",
    "-5",
    "x",
    "²",
    "<think>",
]


@pytest.mark.parametrize("name", NAMES)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(WORDS)).map(" ".join)))
def test_no_text_raises(name, text):
    problem = sampled(name, 1)[0]
    assert TASKS[name].verify(problem, text) in (True, False)
    # Everything that splits a text counts as a space between words.
    assert len(TASKS[name].attempts(problem, text)) == text.split().count("try")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "unit", ["( ", "9", "try ", "try 3 * 7 = 21 , ", "1 + ", "- ", " ", "wait "]
)
def test_a_megabyte_is_read_in_linear_time(name, unit):
    problem = sampled(name, 1)[0]
    text = unit * (MEGABYTE // len(unit))
    began = time.perf_counter()
    assert not TASKS[name].verify(problem, text)
    assert not any(TASKS[name].attempts(problem, text))
    assert time.perf_counter() - began < LINEAR_SECONDS
