# SPDX-License-Identifier: Apache-2.0
"""Templates: what they write is well formed, and no attack on them is."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data import PRIMER_RL, PRIMER_SFT, R1, Trace, completion, parse, prompt
from r1jax.data.tokenizer import SPECIAL_TOKENS

TEMPLATES = [R1, PRIMER_SFT, PRIMER_RL]

# (completion, the answer that may still be judged)
MALFORMED = {
    "nothing": ("", ""),
    "blank": (" \n ", ""),
    "no tags": ("58", ""),
    "answer alone": ("<answer> 58 </answer>", "58"),
    "reasoning alone": ("<think> try 58 </think>", ""),
    "empty reasoning": ("<think> </think> <answer> 58 </answer>", "58"),
    "empty answer": ("<think> a </think> <answer> </answer>", ""),
    "order": ("<answer> 58 </answer> <think> a </think>", ""),
    "text before": ("well <think> a </think> <answer> 58 </answer>", "58"),
    "text between": ("<think> a </think> so <answer> 58 </answer>", "58"),
    "text after": ("<think> a </think> <answer> 58 </answer> done", "58"),
    "text after eos": ("<think> a </think> <answer> 58 </answer> <eos> a", "58"),
    "two eos": ("<think> a </think> <answer> 58 </answer> <eos> <eos>", "58"),
    "eos between": ("<think> a </think> <eos> <answer> 58 </answer>", "58"),
    "eos inside": ("<think> a <eos> </think> <answer> 58 </answer>", "58"),
    "padding after": ("<think> a </think> <answer> 58 </answer> <eos> <pad>", "58"),
    "reasoning never opened": ("a </think> <answer> 58 </answer>", "58"),
    "reasoning never closed": ("<think> a <answer> 58 </answer>", ""),
    "answer never opened": ("<think> a </think> 58 </answer>", ""),
    "answer never closed": ("<think> a </think> <answer> 58", ""),
    "closed before opened": ("<think> a </think> </answer> 58 <answer>", ""),
    "reasoning twice": ("<think> a </think> <think> b </think> <answer> 58 </answer>", "58"),
    "reasoning again after": ("<think> a </think> <answer> 58 </answer> <think> b </think>", ""),
    "reasoning nested": ("<think> <think> a </think> </think> <answer> 58 </answer>", "58"),
    "nested, one left open": ("<think> <think> a </think> <answer> 58 </answer>", ""),
    "closing twice": ("<think> a </think> </think> <answer> 58 </answer>", "58"),
    "answer in reasoning": ("<think> <answer> 58 </answer> </think>", ""),
    "answer in both": ("<think> <answer> 58 </answer> </think> <answer> 58 </answer>", ""),
    "reasoning in answer": ("<answer> <think> a </think> 58 </answer>", ""),
    "several answers": ("<think> a </think> <answer> 57 </answer> <answer> 58 </answer>", ""),
    "answer nested": ("<think> a </think> <answer> <answer> 58 </answer> </answer>", ""),
    "interleaved": ("<think> a <answer> </think> 58 </answer>", ""),
    "foreign tag": ("<think> a <summary> </think> <answer> 58 </answer>", "58"),
    "turn mark": ("<think> a <|User|> </think> <answer> 58 </answer>", "58"),
    "unknown token": ("<think> <unk> </think> <answer> 58 </answer>", "58"),
    "primer tags": ("<reasoning_process> a </reasoning_process> <answer> 58 </answer>", "58"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_written_is_read_back(template):
    text = completion(Trace("try 7 * 8 = 56 yes", "56"), template)
    parsed = parse(text, template)
    assert (parsed.reasoning, parsed.answer, parsed.well_formed) == (
        "try 7 * 8 = 56 yes",
        "56",
        True,
    )
    assert text.endswith(" <eos>")
    others = [t for t in TEMPLATES if t != template]
    assert not any(parse(text, other).well_formed for other in others)


def test_prompt():
    assert prompt("compute 7 * 8", R1) == "<bos> <|User|> compute 7 * 8 <|Assistant|>"


@pytest.mark.parametrize(
    "text",
    [
        "<think> a </think> <answer> 58 </answer> <eos>",
        "<think> a </think> <answer> 58 </answer>",
        "<think>a</think><answer>58</answer><eos>",
        "\n<think>\na\n</think>\n\n<answer>\n58\n</answer>\n<eos>\n",
    ],
)
def test_white_space_and_one_eos_are_free(text):
    parsed = parse(text, R1)
    assert (parsed.reasoning, parsed.answer, parsed.well_formed) == ("a", "58", True)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case):
    text, answer = MALFORMED[case]
    parsed = parse(text, R1)
    assert not parsed.well_formed
    assert parsed.answer == answer


def test_reasoning_of_a_malformed_completion_is_still_read():
    assert parse("<think> try 1 no wait", R1).reasoning == "try 1 no wait"
    assert parse("try 1 <answer> 2 </answer>", R1).reasoning == "try 1"
    assert parse("try 1 </think> x", R1).reasoning == "try 1"


def reference_well_formed(text):
    """The rule over words: an independent reading of the same sentence."""
    words = text.split()
    if words[-1:] == ["<eos>"]:
        words.pop()
    tags = [word for word in words if word in SPECIAL_TOKENS]
    if tags != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    a, b, c, d = (words.index(tag) for tag in tags)
    return a == 0 and b > 1 and c == b + 1 and d > c + 1 and d == len(words) - 1


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
NEAR = st.lists(st.sampled_from([*TAGS, "a", "58", "<eos>", "<summary>"]), max_size=3)


@given(st.tuples(NEAR, NEAR, NEAR, NEAR, NEAR), st.permutations(TAGS), st.booleans())
def test_random_words_agree_with_the_reference(gaps, order, keep):
    tags = TAGS if keep else order
    words = [w for gap, tag in zip(gaps, [*tags, ""], strict=True) for w in (*gap, tag)]
    text = " ".join(words)
    assert parse(text, R1).well_formed == reference_well_formed(text)


PLAIN = st.lists(st.sampled_from(["a", "58", "try", ","]), min_size=1, max_size=3)
MAYBE = st.one_of(st.just([]), NEAR)


@given(MAYBE, PLAIN, MAYBE, PLAIN, st.sampled_from([[], ["<eos>"], ["<eos>", "<eos>"], ["a"]]))
def test_near_misses_agree_with_the_reference(before, reasoning, between, answer, after):
    parts = [*before, "<think>", *reasoning, "</think>", *between, "<answer>", *answer, "</answer>"]
    text = " ".join([*parts, *after])
    assert parse(text, R1).well_formed == reference_well_formed(text)
    if not before and not between and after in ([], ["<eos>"]):
        assert parse(text, R1).well_formed


@given(st.text())
def test_no_text_raises(text):
    assert not parse(text, R1).well_formed


@pytest.mark.parametrize(
    "unit", ["<think> ", "<", "</think>", "<answer> 58 </answer>", " ", "<eos>", "a"]
)
def test_a_megabyte_is_read_in_linear_time(unit):
    text = unit * (1_000_000 // len(unit))
    began = time.perf_counter()
    assert not parse(text, R1).well_formed
    assert not parse(f"<think> {text} </think> <answer> {text}", R1).well_formed
    assert time.perf_counter() - began < 2.0  # about 30 ms on an idle core
