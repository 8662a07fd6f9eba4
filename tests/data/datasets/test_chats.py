# SPDX-License-Identifier: Apache-2.0
"""Conversations, preferences and labelled answers in the formats that people have."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.datasets import (
    Conversation,
    Labelled,
    Message,
    Preference,
    conversations,
    general,
    labelled,
    preferences,
)


def file_of(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(*said):
    """Turns of the user and the assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": s} for i, s in enumerate(said)]


def messages(*said):
    return tuple(Message(**turn) for turn in turns(*said))


SHARE_GPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("q", "a")},
        {"messages": PARTS},
        {"conversations": SHARE_GPT},
        {"prompt": "q", "completion": "a"},
        {"prompt": turns("q"), "completion": [{"role": "assistant", "content": "a"}]},
        {"question": "q", "solution": "a", "gold_answer": "3"},
        {"problem": "q", "generated_solution": "a"},
        {"messages": None, "prompt": "q", "response": "a"},
    ],
)
def test_one_conversation_in_every_writing(tmp_path, row):
    assert conversations(file_of(tmp_path, row)).items == (Conversation(messages("q", "a")),)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": []}, "'messages' must be a list of messages, got list"),
        ({"messages": "hello"}, "'messages' must be a list of messages, got str"),
        ({"messages": ["hello"]}, "'messages[0]' must be an object"),
        ({"messages": [{"content": "x"}]}, "'messages[0]' has no 'role'"),
        ({"messages": turns("q")}, "no turn of the assistant's"),
        ({"messages": turns("q", " ")}, "'messages[1].content' is empty"),
        (
            {"messages": turns("q", "a") + [{"role": "usr", "content": "x"}]},
            "must be one of system",
        ),
        ({"messages": [{"role": 3, "content": "x"}]}, "'messages[0].role' must be text, got 3"),
        ({"messages": [{"role": "user", "content": 3}]}, "'messages[0].content' must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part that is none"),
        ({"messages": [turns("q")[0] | {"tool_calls": [{}]}]}, "tool_calls"),
        ({"prompt": "q"}, "'completion' or 'response'"),
        ({"prompt": "q", "completion": turns("x", "y")}, "must end in one turn"),
        ({"other": 1}, "'messages' or 'conversations'"),
    ],
)
def test_a_conversation_that_is_none_is_named_by_line_and_field(tmp_path, row, field):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: ") as error:
        conversations(file_of(tmp_path, row))
    assert field in str(error.value)


def test_a_thought_is_what_stands_before_the_answer(tmp_path):
    row = {"question": "q", "solution": "so **A** or\n\n**A** 4"}
    (found,) = conversations(file_of(tmp_path, row), answer_from="**A**").items
    assert found.messages[1].content == "<think>\nso **A** or\n</think>\n\n**A** 4"
    for reply in ("4", "**A** 4"):
        with pytest.raises(ValueError, match="rows.jsonl:1: the reply has no thought before"):
            conversations(file_of(tmp_path, row | {"solution": reply}), answer_from="**A**")


HH = "\n\nHuman: q\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": turns("q"), "chosen": turns("q", "good")[1:], "rejected": turns("q", "bad")[1:]},
        {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad")},
        {"prompt": "q", "chosen": "good", "rejected": turns("q", "bad")},
        {"chosen": turns("q", "good"), "rejected": turns("q", "bad")},
        {"chosen": f"{HH}good", "rejected": f"{HH}bad"},
    ],
)
def test_one_preference_in_every_writing(tmp_path, row):
    expected = Preference(messages("q"), "good", "bad")
    assert preferences(file_of(tmp_path, row)).items == (expected,)


def test_what_both_conversations_begin_with_is_the_prompt(tmp_path):
    row = {"chosen": turns("q", "a", "r", "good"), "rejected": turns("q", "a", "r", "bad")}
    (found,) = preferences(file_of(tmp_path, row)).items
    assert found == Preference(messages("q", "a", "r"), "good", "bad")
    # A prompt that tells the last turn alone agrees with it.
    assert preferences(file_of(tmp_path, row | {"prompt": "r"})).items == (found,)
    text = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "
    row = {"chosen": f"{text}good", "rejected": f"{text}bad"}
    assert preferences(file_of(tmp_path, row)).items == (found,)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "'chosen' and 'rejected' are equal"),
        ({"chosen": turns("q", "x"), "rejected": turns("q", "x")}, "are equal"),
        ({"prompt": "q", "chosen": "x"}, "'rejected' is missing"),
        ({"prompt": "q", "chosen": "x", "rejected": ""}, "'rejected' is empty"),
        ({"chosen": "x y", "rejected": "x z"}, "'prompt' is missing"),
        ({"chosen": turns("q", "x"), "rejected": turns("r", "x")}, "begin with the same turns"),
        ({"chosen": turns("q", "a", "r", "x"), "rejected": turns("q", "y")}, "must end in one"),
        ({"chosen": turns("q"), "rejected": turns("q", "y")}, "'chosen' must end in one turn"),
        (
            {"prompt": "p", "chosen": turns("q", "x"), "rejected": turns("q", "y")},
            "'prompt' is not",
        ),
        ({"prompt": 3, "chosen": "x", "rejected": "y"}, "'prompt' must be a list of messages"),
    ],
)
def test_a_preference_that_is_none_is_named_by_line_and_field(tmp_path, row, field):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: ") as error:
        preferences(file_of(tmp_path, row))
    assert field in str(error.value)


@pytest.mark.parametrize(("label", "value"), [(True, 1.0), (False, 0.0), (0, 0.0), (0.25, 0.25)])
def test_labels(tmp_path, label, value):
    row = {"prompt": "q", "completion": "a", "label": label}
    assert labelled(file_of(tmp_path, row)).items == (Labelled(messages("q"), "a", value),)


@pytest.mark.parametrize("label", [None, "safe", 2, -0.5, [1]])
def test_labels_that_are_none(tmp_path, label):
    row = {"prompt": "q", "completion": "a", "label": label}
    with pytest.raises(ValueError, match="rows.jsonl:1: field 'label'"):
        labelled(file_of(tmp_path, row))


def tried(call):
    """(what a call returns, why it refused); any other error than ValueError is a failure."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner
        )
    ),
    max_leaves=8,
)
NAMES = ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "label"]


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1), min_size=1))
def test_no_row_at_all_escapes_as_another_error(tmp_path_factory, rows):
    path = file_of(tmp_path_factory.mktemp("x"), *rows)
    for reader in (conversations, preferences, labelled):
        found, refusal = tried(lambda reader=reader: reader(path, skip=True))
        if refusal:
            assert "holds no rows to use" in refusal
        else:
            assert len(found.items) + len(found.skipped) == len(rows)


def test_general_prompts(tmp_path):
    rows = [{"prompt": "hello"}, {"question": "a gun?", "kind": "safe"}, {"prompt": turns("x")}]
    found = general(file_of(tmp_path, *rows)).items
    assert [row.kind for row in found] == ["helpful", "safe", "helpful"]
    assert found[1].prompt == (Message("user", "a gun?"),)
    for bad, field in (({"kind": "safe"}, "prompt"), ({"prompt": "x", "kind": "mean"}, "kind")):
        with pytest.raises(ValueError, match=rf":1: .*'{field}'"):
            general(file_of(tmp_path, bad))
