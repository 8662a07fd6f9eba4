# SPDX-License-Identifier: Apache-2.0
"""Fields of a row, checked: each function returns a value or raises a ValueError with the field."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from r1jax.data.datasets.records import Message, Messages

# The names that chat formats give to the same three speakers.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
SPEAKERS = ("system", "developer", "user", "assistant", "tool")


def first_of(row: Mapping[str, Any], *names: str) -> str:
    """The first of some names that the row has a value for; ValueError if none."""
    for name in names:
        if row.get(name) is not None:
            return name
    raise ValueError(f"field {' or '.join(map(repr, names))} is missing")


def text(row: Mapping[str, Any], *names: str) -> str:
    """The text in the first of some fields that the row has, not blank."""
    name = first_of(row, *names)
    return checked(row[name], name)


def checked(value: Any, name: str, *, blank: bool = False) -> str:
    """`value` as text that can be written and read again."""
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be text, got {_shown(value)}")
    if not (blank or value.strip()):
        raise ValueError(f"field {name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"field {name!r} holds half a character (a lone surrogate)") from error
    return value


def text_or_number(row: Mapping[str, Any], *names: str) -> str:
    """As `text`, where a number will do as well; 27.0 is written 27."""
    name = first_of(row, *names)
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return checked(value, name)
    if not math.isfinite(value):
        raise ValueError(f"field {name!r} must be a finite number, got {value}")
    return str(int(value) if value == int(value) else value)


def texts(row: Mapping[str, Any], *names: str) -> list[str]:
    """A list of texts, at least one."""
    name = first_of(row, *names)
    return [checked(item, name) for item in listed(row, name)]


def listed(row: Mapping[str, Any], name: str) -> list[Any]:
    """A list with at least one item."""
    value = row[first_of(row, name)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name!r} must be a list with something in it, got {_shown(value)}")
    return value


def share(row: Mapping[str, Any], *names: str) -> float:
    """A truth value, 0 or 1, or a number between them."""
    name = first_of(row, *names)
    value = row[name]
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise ValueError(
            f"field {name!r} must be true, false or a number in [0, 1], got {_shown(value)}"
        )
    return float(value)


def messages(value: Any, name: str) -> Messages:
    """A conversation: objects with `role` and `content`, or with `from` and `value`."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"field {name!r} must be a list of messages, got {_shown(value)}")
    return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(value))


def prompt(row: Mapping[str, Any], *names: str) -> Messages:
    """The turns before an answer: a list of messages, or a text, which is a user's turn."""
    name = first_of(row, *names)
    if isinstance(row[name], str):
        return (Message("user", checked(row[name], name)),)
    return messages(row[name], name)


def answer(value: Any, name: str, *, after: Messages = ()) -> str:
    """One answer: a text, or messages of which one is left, the assistant's, after the prompt.

    Args:
      value: of the field.
      name: of the field.
      after: the prompt; messages may repeat it.
    """
    if isinstance(value, str):
        return checked(value, name)
    turns = messages(value, name)
    return last(turns[len(after) :] if turns[: len(after)] == after else turns, name)


def last(turns: Messages, name: str) -> str:
    """What the assistant says in the one turn that is left."""
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = ", ".join(turn.role for turn in turns) or "nothing"
        raise ValueError(
            f"field {name!r} must end in one turn of the assistant's after the prompt, got {roles}"
        )
    if not turns[0].content.strip():
        raise ValueError(f"field {name!r} is empty")
    return turns[0].content


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise ValueError(f"field {name!r} must be an object, got {_shown(item)}")
    who, what = ("role", "content") if item.get("role") is not None else ("from", "value")
    if item.get(who) is None:
        raise ValueError(f"field {name!r} has no 'role'")
    role = checked(item[who], f"{name}.{who}")
    role = ROLES.get(role, role)
    if role not in SPEAKERS:  # a template would leave the turn out, or fail in its own words
        raise ValueError(f"field '{name}.{who}' must be one of {', '.join(SPEAKERS)}, got {role!r}")
    if item.get("tool_calls"):
        raise ValueError(f"field {name!r} has tool_calls, which no template here can render")
    content = _content(item.get(what), f"{name}.{what}")
    if role == "assistant" and not content.strip():
        raise ValueError(f"field '{name}.{what}' is empty, so there is nothing to learn")
    return Message(role, content)


def _content(value: Any, name: str) -> str:
    """Text, or parts of it one after the other."""
    if not isinstance(value, list):
        return checked(value, name, blank=True)
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise ValueError(f"field {name!r} must be text, got a part that is none")
    return "".join(checked(part.get("text"), name, blank=True) for part in value)


def _shown(value: Any) -> str:
    """The kind of a value, and the value where it is short."""
    kind = "nothing" if value is None else type(value).__name__
    # Numbers alone: the text of a nested value may be endless, that of a huge integer refused.
    small = isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**18)
    return f"{value!r}" if small else kind
