# SPDX-License-Identifier: Apache-2.0
"""The filters of rejection sampling: what they drop, what they leave, and what they count."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.datasets import QUESTIONS, evaluation_texts, math, read_indices
from r1jax.rl.rejection import (
    Filtered,
    balanced,
    capped,
    clean,
    distinct,
    funnel,
    keep_correct,
    ngrams_of,
    normal_words,
    one_language,
    overlap,
    short_paragraphs,
    without_code,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
ENGLISH, CHINESE = "we add the two numbers and get four", "我们把两个数加起来得到四"


def kept(filtered):
    return np.flatnonzero(filtered.keep).tolist()


def test_correct():
    assert kept(keep_correct([1, 0, 0.5, float("nan"), 2])) == [0, 4]
    assert kept(keep_correct([1, 0, 0.5], least=0.5)) == [0, 2]
    assert keep_correct([1, 0]).counts == {"correct": 1}


def test_mixed_languages():
    texts = [ENGLISH, CHINESE, f"{ENGLISH} {CHINESE}", "$x + y = 4$", f"{ENGLISH} `变量`"]
    found = one_language(texts)
    assert kept(found) == [0, 1, 3, 4], "formulas and code are no language"
    assert found.counts == {"mixed": 1}
    assert kept(one_language(texts, language="zh")) == [1, 3]
    assert kept(one_language(texts, least=0)) == [0, 1, 2, 3, 4]
    japanese = "これは二つの数を足すことです"
    assert kept(one_language([japanese])) == [0], "kana and kanji are one language together"
    assert kept(one_language(["שלום עולם טוב", f"שלום {ENGLISH[:2]} עולם"])) == [0]
    with pytest.raises(ValueError, match="language='xx'"):
        one_language(texts, language="xx")


def test_long_paragraphs_and_code():
    texts = ["a " * 20, "a " * 10 + "\n \n" + "b " * 10, "数" * 20, "x\n```python\n1\n```", "~~~"]
    assert kept(short_paragraphs(texts, longest=10)) == [1, 3, 4]
    assert kept(without_code([*texts, "inline ``` is none"])) == [0, 1, 2, 5]


def test_repeats_are_dropped_within_their_question():
    texts = ["A b.", "A b.", "a  B.", "A b.", "A c.", "1 + 1", "1 - 1"]
    found = distinct(texts, [0, 0, 0, 1, 0, 0, 0])
    assert kept(found) == [0, 3, 4, 5, 6]
    assert found.counts == {"exact": 1, "normalised": 1}
    among = np.array([False, *[True] * 6])
    assert kept(distinct(texts, [0] * 7, among=among)) == [1, 4, 5, 6], "what is out hides nothing"


EVALUATION = (
    "Janet's ducks lay sixteen eggs per day, and she eats three of them for breakfast. "
    "How many are left?"
)
WORDS = st.sampled_from([f"w{i}" for i in range(400)])


@given(
    st.lists(WORDS, max_size=20), st.lists(WORDS, max_size=20), st.integers(0, 8), st.integers(0, 3)
)
def test_ten_words_in_a_row_are_found_wherever_they_stand(before, after, start, case):
    """In other letters, punctuation and layout too; nine words are not enough."""
    dress = (str, str.upper, lambda t: t.replace(" ", ",\n "), lambda t: f"**{t}**")[case]
    words = EVALUATION.split()
    index = ngrams_of([EVALUATION])
    # "Janet's" is two words here.
    planted = " ".join([*before, dress(" ".join(words[start + 1 : start + 11])), *after])
    assert overlap(planted, index) is not None
    assert kept(clean([planted], index)) == []
    short = " ".join([*before, *words[start + 1 : start + 10], *after])
    assert overlap(short, index) is None


@given(st.lists(WORDS, max_size=60), st.lists(st.lists(WORDS, max_size=60), max_size=4))
def test_disjoint_words_are_never_found(text, evaluation):
    others = [" ".join(f"e{word}" for word in words) for words in evaluation]
    index = ngrams_of(others, others)
    assert kept(clean([" ".join(text)], index)) == [0]


@given(st.lists(WORDS, max_size=25), st.lists(st.lists(WORDS, max_size=25), max_size=4))
def test_overlap_is_what_a_naive_search_finds(text, evaluation):
    """Few distinct words, so that windows meet often."""
    small = [[w[:2] for w in words] for words in (text, *evaluation)]
    text, *evaluation = small
    n = 3

    def windows(words):
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    naive = any(windows(text) & windows(e) for e in evaluation)
    naive |= 0 < len(text) < n and text in evaluation
    index = ngrams_of([" ".join(e) for e in evaluation], n=n)
    assert (overlap(" ".join(text), index) is not None) == naive


def test_short_questions_are_found_whole_and_short_solutions_not_at_all():
    index = ngrams_of(["Compute $\\sin 60^\\circ$."], ["It is 12."])
    texts = ["compute sin 60 circ", "We compute sin 60 circ first.", "It is 12.", ""]
    assert kept(clean(texts, index)) == [1, 2, 3]


def test_words_are_compared_plainly():
    assert normal_words("Ｆｕｌｌ-width ﬁne_x² 数学 ABC") == [
        *["full", "width", "fine", "x2", "数", "学", "abc"]
    ]


def test_caps_and_balance():
    groups, among = list("aaabbc"), np.array([1, 0, 1, 1, 1, 1], bool)
    found = capped(groups, 1, among=among)
    assert kept(found) == [0, 3, 5]
    assert found.counts == {"over_cap": 2}
    sources, every = ["x"] * 10 + ["y"] * 4, np.ones(14, bool)
    found = balanced(sources, {"x": 1, "y": 2}, among=every, seed=1)
    names = [sources[i] for i in kept(found)]
    assert (names.count("x"), names.count("y")) == (2, 4)
    assert found.counts == {"out_of_balance": 8}
    assert kept(found) == kept(balanced(sources, {"x": 0.5, "y": 1}, among=every, seed=1))
    assert kept(found) != kept(balanced(sources, {"x": 1, "y": 2}, among=every, seed=2))
    assert kept(balanced(sources, {"x": 1, "y": 1}, among=np.arange(14) < 10)) == []
    with pytest.raises(ValueError, match="source 'y' has no share"):
        balanced(sources, {"x": 1}, among=every)
    with pytest.raises(ValueError, match="positive"):
        balanced(sources, {"x": 1, "y": 0}, among=every)


def test_a_funnel_counts_a_text_at_the_first_filter_that_drops_it():
    a = Filtered(np.array([1, 1, 0, 0], bool), {"wrong": 2})
    b = Filtered(np.array([1, 0, 0, 1], bool), {})
    found = funnel({"a": a, "b": b})
    assert kept(found) == [0]
    assert found.steps == {
        "a": {"seen": 4, "dropped": 2, "dropped_of_all": 2, "wrong": 2},
        "b": {"seen": 2, "dropped": 1, "dropped_of_all": 2},
    }
    assert a.keep.tolist() == [True, True, False, False], "masks are not written to"


def at_hand(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there")
    return DATA / name


def test_overlaps_of_gsm8k_and_math_with_their_test_sets():
    """The figures of experiments/log/013; and all of MATH-500 is found in MATH's test split."""
    train = QUESTIONS["gsm8k"](at_hand("gsm8k/train.jsonl")).items
    index = ngrams_of(evaluation_texts(at_hand("gsm8k/test.jsonl"))[0])
    assert clean([q.question for q in train], index).counts == {"overlapping": 11}
    whole = math(at_hand("math/test_5000.jsonl")).items
    out = read_indices(at_hand("math/math500_idx_in_test5000.json"))
    rest = {q.question for q in math(DATA / "math/test_5000.jsonl", leave_out=out).items}
    index = ngrams_of(evaluation_texts(at_hand("math500/test.jsonl"))[0])
    found = clean([q.question for q in whole], index)
    held_out = np.array([q.question not in rest for q in whole])
    assert not found.keep[held_out].any()
    assert int((~found.keep[~held_out]).sum()) == 209
