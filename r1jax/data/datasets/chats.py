# SPDX-License-Identifier: Apache-2.0
"""Conversations, preferences and labelled answers out of the formats in common use."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from r1jax.data.datasets import fields
from r1jax.data.datasets.files import Row, read
from r1jax.data.datasets.records import (
    Conversation,
    General,
    Labelled,
    Message,
    Messages,
    Preference,
    Rows,
)

# (prompt, completion) in the names of chat, worked-solution and trace files.
PROMPTS = ("prompt", "question", "problem")
COMPLETIONS = ("completion", "response", "solution", "generated_solution")
# How Anthropic's helpful-harmless pairs write a conversation as one text.
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_SPEAKER = {"Human": "user", "Assistant": "assistant"}


def conversations(
    path: str | Path, *, skip: bool = False, answer_from: str = ""
) -> Rows[Conversation]:
    """Conversations to learn from.

    A row has `messages` (each with `role` and `content`), or `conversations` (each with `from` and
    `value`), or a prompt (`prompt`, `question` or `problem`) with its completion (`completion`,
    `response`, `solution` or `generated_solution`). Content may be a list of text parts.

    Args:
      path: of a file.
      skip: leave bad rows out instead of refusing the file.
      answer_from: words that the assistant's answers begin with, such as `**Final Answer**` in
        traces that R1's students wrote; what stands before their last place becomes the thought,
        between `<think>` tags. "" leaves replies as they are.

    Raises:
      ValueError: bad rows, each by file, line and field; no row; or the file cannot be read.
    """
    return read(path, functools.partial(_conversation, answer_from=answer_from), skip=skip)


def with_thought(text: str, answer_from: str) -> str:
    """A reply with all before the last `answer_from` as its thought; ValueError if that is none."""
    thought, found, answer = text.rpartition(answer_from)
    if not (found and thought.strip()):
        raise ValueError(f"the reply has no thought before {answer_from!r}")
    return f"<think>\n{thought.strip()}\n</think>\n\n{answer_from}{answer}"


def preferences(path: str | Path, *, skip: bool = False) -> Rows[Preference]:
    r"""Pairs of answers, the better and the worse.

    A row has `chosen` and `rejected`, and perhaps `prompt`. With a prompt (a text, or messages) the
    two are texts, or one message each, or whole conversations. Without, they are conversations
    (lists of messages, or one text of `\n\nHuman: … \n\nAssistant: …`), and what they have in
    common is the prompt. Args and errors as `conversations`.
    """
    return read(path, _preference, skip=skip)


def labelled(path: str | Path, *, skip: bool = False) -> Rows[Labelled]:
    """Answers with a mark each: `prompt`, `completion` (or `response`), `label` (or `is_safe`).

    The label is true or false, or a number in [0, 1]. Args and errors as `conversations`.
    """
    return read(path, _labelled, skip=skip)


def general(path: str | Path, *, skip: bool = False) -> Rows[General]:
    """Prompts for reward models: `prompt`, `question` or `problem` (a text or messages), `kind`.

    The kind is "helpful", also where none is given, or "safe". Args and errors as `conversations`.
    """
    return read(path, _general, skip=skip)


def _general(row: Row) -> General:
    kind = row.get("kind", "helpful")
    if kind not in ("helpful", "safe"):
        raise ValueError(f"field 'kind' must be 'helpful' or 'safe', got {kind!r}")
    return General(fields.prompt(row, *PROMPTS), kind)


def _conversation(row: Row, *, answer_from: str) -> Conversation:
    turns = _written(row)
    if not answer_from:
        return Conversation(turns)
    replies = [
        dataclasses.replace(turn, content=with_thought(turn.content, answer_from))
        if turn.role == "assistant"
        else turn
        for turn in turns
    ]
    return Conversation(tuple(replies))


def _written(row: Row) -> Messages:
    name = fields.first_of(row, "messages", "conversations", *PROMPTS)
    if name in PROMPTS:
        end = fields.first_of(row, *COMPLETIONS)
        reply = Message("assistant", fields.answer(row[end], end))
        return (*fields.prompt(row, name), reply)
    turns = fields.messages(row[name], name)
    if all(turn.role != "assistant" for turn in turns):
        raise ValueError(f"field {name!r} has no turn of the assistant's, so nothing to learn")
    return turns


def _preference(row: Row) -> Preference:
    pair = {name: row[fields.first_of(row, name)] for name in ("chosen", "rejected")}
    given = row.get("prompt") is not None
    if given and not all(map(_is_whole, pair.values())):
        prompt = fields.prompt(row, "prompt")
        chosen, rejected = (fields.answer(v, name, after=prompt) for name, v in pair.items())
    else:
        both = [_turns(value, name) for name, value in pair.items()]
        same = common(*both)
        prompt = both[0][:same]
        if not prompt:
            raise ValueError("fields 'chosen' and 'rejected' do not begin with the same turns")
        if both[0] == both[1]:
            raise ValueError("fields 'chosen' and 'rejected' are equal: nothing is preferred")
        if given and fields.prompt(row, "prompt")[-1] != prompt[-1]:
            raise ValueError("field 'prompt' is not what 'chosen' and 'rejected' answer")
        ends = zip(both, pair, strict=True)
        chosen, rejected = (fields.last(turns[same:], name) for turns, name in ends)
    if chosen == rejected:
        raise ValueError("fields 'chosen' and 'rejected' are equal: nothing is preferred")
    return Preference(prompt, chosen, rejected)


def _is_whole(value: object) -> bool:
    """Whether an answer is a conversation with its prompt: it begins with another's turn."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    role = value[0].get("role", value[0].get("from"))
    return len(value) > 1 and role not in ("assistant", "gpt")


def _labelled(row: Row) -> Labelled:
    name = fields.first_of(row, "completion", "response")
    return Labelled(
        fields.prompt(row, "prompt"),
        fields.answer(row[name], name),
        fields.share(row, "label", "is_safe"),
    )


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items at the start of two sequences are equal."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _turns(value: object, name: str) -> Messages:
    if not isinstance(value, str):
        return fields.messages(value, name)
    before, *parts = _TURN.split(fields.checked(value, name))
    if before.strip() or not parts:
        raise ValueError(
            f"field 'prompt' is missing, and {name!r} is a text that is no conversation of "
            r"'\n\nHuman: … \n\nAssistant: …'"
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(_SPEAKER[who], said.strip()) for who, said in turns)
