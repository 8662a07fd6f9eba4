# SPDX-License-Identifier: Apache-2.0
"""Tokens of records, by the checkpoint's own chat template; answers end in the end of sequence.

What is learnt is what the model will have to write: the reply as it stands behind the template's
generation prompt, and the end-of-sequence token after it. Everything else has weight 0.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from r1jax.data.datasets.records import (
    Conversation,
    Labelled,
    Message,
    Preference,
    Rows,
    Skipped,
    settled,
)
from r1jax.data.packing import Example, example
from r1jax.data.text import TextTokenizer

R, T = TypeVar("R"), TypeVar("T")
THOUGHT, THOUGHT_END = "<think>", "</think>"


class PreferenceIds(NamedTuple):
    """The two answers end in the end of sequence."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class LabelledIds(NamedTuple):
    """The completion ends in the end of sequence."""

    prompt: list[int]
    completion: list[int]
    label: float


def end_of(tokenizer: TextTokenizer) -> int:
    """The token that ends an answer; ValueError if the tokenizer names none."""
    name = tokenizer.config["eos_token"]
    if name is not None:
        return tokenizer.tokenizer.token_to_id(name)
    if not tokenizer.eos_ids:
        raise ValueError("the tokenizer names no eos_token, so no answer would ever end")
    return tokenizer.eos_ids[0]


def encode_prompt(messages: Sequence[Message], tokenizer: TextTokenizer) -> list[int]:
    """The ids after which the assistant's next turn begins.

    A tokenizer without a chat template (a base model's) takes one user's turn as it is.

    Raises:
      ValueError: the template refuses the conversation, or there is none and more than one turn.
    """
    if tokenizer.chat_template is not None:
        return tokenizer.chat_ids(_plain(messages))
    if [m.role for m in messages] != ["user"]:
        raise ValueError(
            "the tokenizer has no chat_template, so a prompt is one turn of the user's, "
            f"got {', '.join(m.role for m in messages) or 'none'}"
        )
    return tokenizer.encode(messages[0].content)


def opened_thought(tokenizer: TextTokenizer) -> str:
    """What of a thought the generation prompt has written already, such as `<think>` and a line
    end; "" where the model opens its thoughts itself."""
    if tokenizer.chat_template is None:
        return ""
    try:
        start = tokenizer.chat([{"role": "user", "content": "?"}])
    except ValueError:  # it refuses a lone question: so it will the real ones, and say why
        return ""
    before, found, blank = start.rpartition(THOUGHT)
    return found + blank if found and not blank.strip() else ""


def encode_question(
    question: str, tokenizer: TextTokenizer, *, system: str = "", instruction: str = ""
) -> list[int]:
    """The prompt ids of a question.

    Args:
      question: what is asked.
      tokenizer: with a chat template the question is a user's turn, without it stands as it is.
      system: a system turn before it; DeepSeek-R1's own advice is to have none.
      instruction: put after the question, behind an empty line.
    """
    asked = f"{question}\n\n{instruction}" if instruction else question
    before = [Message("system", system)] if system else []
    return encode_prompt([*before, Message("user", asked)], tokenizer)


def encode_conversation(messages: Sequence[Message], tokenizer: TextTokenizer) -> Example:
    """(ids, mask) of a conversation: 1 on the assistant's turns and the end of sequence after each.

    Turns after the assistant's last are left out.

    Raises:
      ValueError: no turn of the assistant's; an answer that cannot be encoded (`encode_turns`); or
        a template that shows earlier turns otherwise than they were written (DeepSeek-R1's leaves
        their reasoning out), so that one row cannot teach all of them: use `encode_turns`.
    """
    found = encode_turns(messages, tokenizer)
    if len(found) > 1:
        raise ValueError(
            f"the chat template rewrites earlier turns: {len(found)} rows are needed, not one"
        )
    return found[0]


def encode_turns(messages: Sequence[Message], tokenizer: TextTokenizer) -> list[Example]:
    """As `encode_conversation`, in as many rows as the template needs.

    An earlier turn is learnt in the row that shows it as it was written, with what stood before it;
    in the rows after, where the template has rewritten it, it is context.

    Raises:
      ValueError: no turn of the assistant's, the template refuses the conversation, an answer holds
        the end of sequence, or an answer lacks the end of a thought that the template opens.
    """
    rows, ids, mask = [], [], []
    for place, turn in enumerate(messages):
        if turn.role != "assistant":
            continue
        prompt, reply = encode_reply(messages[:place], turn.content, tokenizer)
        if ids and prompt[: len(ids)] != ids:
            rows.append((ids, mask))
            ids, mask = [], []
        new = example(prompt[len(ids) :], reply)
        ids, mask = [*ids, *new[0]], [*mask, *new[1]]
    if not ids:
        raise ValueError("the conversation has no turn of the assistant's, so nothing to learn")
    return [*rows, (ids, mask)]


def encode_preference(preference: Preference, tokenizer: TextTokenizer) -> PreferenceIds:
    """Prompt and both answers; ValueError as `encode_turns`, or if their ids are the same."""
    prompt, chosen = encode_reply(preference.prompt, preference.chosen, tokenizer)
    _, rejected = encode_reply(preference.prompt, preference.rejected, tokenizer)
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same tokens: nothing is preferred")
    return PreferenceIds(prompt, chosen, rejected)


def encode_labelled(item: Labelled, tokenizer: TextTokenizer) -> LabelledIds:
    """Prompt, completion and label; ValueError as `encode_turns`."""
    return LabelledIds(*encode_reply(item.prompt, item.completion, tokenizer), item.label)


def encode_reply(
    before: Sequence[Message], content: str, tokenizer: TextTokenizer
) -> tuple[list[int], list[int]]:
    """(prompt ids, reply ids): a turn of the assistant's after others, its end included.

    White space around the reply is the template's, where it renders the reply as it is. Where it
    does not (it leaves out reasoning), the reply stands as it was written; a `<think>` that the
    generation prompt has opened is not repeated.
    """
    end, ends = end_of(tokenizer), tokenizer.eos_ids
    prompt = encode_prompt(before, tokenizer)
    content = content.removesuffix(tokenizer.config["eos_token"] or "\0")
    if not set(ends).isdisjoint(tokenizer.encode(content, bos=False)):
        raise ValueError("an answer holds the end-of-sequence token; take it out of the text")
    reply = tokenizer.encode(_as_written(before, content, tokenizer), bos=False)
    stop = next((place for place, token in enumerate(reply) if token in ends), None)
    return prompt, [*reply, end] if stop is None else reply[: stop + 1]


def conversation_examples(
    conversations: Iterable[Conversation],
    tokenizer: TextTokenizer,
    *,
    length: int,
    skip: bool = False,
    places: Sequence[str] = (),
) -> Rows[Example]:
    """What `pack` takes, of all conversations.

    Args:
      conversations: the records.
      tokenizer: with the chat template.
      length: most ids in an example.
      skip: leave out what cannot be encoded or is longer, instead of refusing all.
      places: where each stands, for the errors; else they are numbered.

    Raises:
      ValueError: items that cannot be encoded or are too long (the first few are named), or none.
    """

    def encode(conversation: Conversation) -> Iterator[Example]:
        yield from encode_turns(conversation.messages, tokenizer)

    size = lambda e: len(e[0])  # noqa: E731
    return encoded(conversations, encode, size=size, length=length, skip=skip, places=places)


def preference_examples(
    preferences: Iterable[Preference],
    tokenizer: TextTokenizer,
    *,
    length: int,
    skip: bool = False,
    places: Sequence[str] = (),
) -> Rows[PreferenceIds]:
    """As `conversation_examples`, of pairs; `length` bounds the prompt with the longer answer."""

    def encode(preference: Preference) -> Iterator[PreferenceIds]:
        yield encode_preference(preference, tokenizer)

    def size(ids: PreferenceIds) -> int:
        return len(ids.prompt) + max(len(ids.chosen), len(ids.rejected))

    return encoded(preferences, encode, size=size, length=length, skip=skip, places=places)


def encoded(
    items: Iterable[T],
    encode: Callable[[T], Iterable[R]],
    *,
    size: Callable[[R], int],
    length: int,
    skip: bool = False,
    places: Sequence[str] = (),
) -> Rows[R]:
    """What `encode` makes of each item, where all of it has at most `length` tokens.

    Raises:
      ValueError: as `conversation_examples`.
    """
    found, bad = [], []
    for number, item in enumerate(items, 1):
        try:
            rows = list(encode(item))
            longest = max(map(size, rows), default=0)
            if longest > length:
                raise ValueError(f"has {longest} tokens, expected at most {length=}")
            found += rows
        except ValueError as error:
            where = places[number - 1] if places else f"item {number}"
            bad.append(Skipped(where, str(error)))
    return settled(found, bad, of="the data", skip=skip)


def _as_written(before: Sequence[Message], content: str, tokenizer: TextTokenizer) -> str:
    """What follows the generation prompt in a conversation that has this reply."""
    if tokenizer.chat_template is None:
        return content
    turns = _plain(before)
    start = tokenizer.chat(turns)
    reply = {"role": "assistant", "content": content}
    whole = tokenizer.chat([*turns, reply], add_generation_prompt=False)
    rest = whole.removeprefix(start)
    # What the template puts before it (Qwen3's empty thought) is the model's to write as well.
    if whole.startswith(start) and content.strip() in rest:
        return rest
    if not start.rstrip().endswith(THOUGHT):
        return content
    if THOUGHT_END not in content:
        raise ValueError(
            f"the chat template opens a thought ({THOUGHT}) that the answer never closes; "
            f"answers must hold {THOUGHT_END}"
        )
    bare = content.lstrip()
    return bare.removeprefix(THOUGHT).lstrip("\n") if bare.startswith(THOUGHT) else content


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]
