# SPDX-License-Identifier: Apache-2.0
"""From questions to what is sampled: prompts as tokens, and which questions are left out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from r1jax.data.corpus import problems
from r1jax.data.datasets import Message, Question, encode_prompt
from r1jax.data.tasks import Difficulty
from r1jax.data.text import TextTokenizer
from r1jax.rl.rejection import NGrams, overlap
from r1jax.train.rejection import Item


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a question is put to the model.

    Attributes:
        system: a system turn before it, "" for none.
        instruction: text behind the question and an empty line, "" for none.
    """

    system: str = ""
    instruction: str = ""

    def messages(self, question: str) -> tuple[Message, ...]:
        """The prompt of a question."""
        asked = f"{question}\n\n{self.instruction}" if self.instruction else question
        before = (Message("system", self.system),) if self.system else ()
        return (*before, Message("user", asked))


@dataclasses.dataclass(frozen=True)
class Room:
    """What a question must fit into.

    Attributes:
        prompt: most tokens of a prompt.
        questions: most questions, drawn with `seed` if there are more; None: all.
        seed: of the draw.
    """

    prompt: int
    questions: int | None = None
    seed: int = 0


def items_of(
    questions: Sequence[Question],
    tokenizer: TextTokenizer,
    wording: Wording,
    *,
    room: Room,
    evaluation: NGrams | None,
) -> tuple[list[Item], dict[str, int]]:
    """(what is sampled, what became of the questions, by name).

    Left out: a question that shares words with evaluation sets, one that came before (by its
    identity), and one whose prompt is too long.
    """
    counts = {
        "read": len(questions),
        "overlapping": 0,
        "repeated": 0,
        "too_long": 0,
        "not_drawn": 0,
    }
    items, seen = [], set()
    for question in questions:
        if evaluation is not None and overlap(question.question, evaluation) is not None:
            counts["overlapping"] += 1
        elif question.identity in seen:
            counts["repeated"] += 1
        else:
            seen.add(question.identity)
            item = _item(question, tokenizer, wording)
            fits = len(item.ids) <= room.prompt
            counts["too_long"] += not fits
            items += [item] if fits else []
    return _drawn(items, room, counts)


def task_items(
    name: str, n: int, tokenizer: TextTokenizer, *, difficulty: Difficulty, seed: int
) -> list[Item]:
    """`n` distinct train problems of a task; ValueError if it has fewer."""
    found = problems(n, seed=seed, tasks=(name,), split="train", unique=True, difficulty=difficulty)
    items = []
    for problem in found:
        prompt = (Message("user", problem.question),)
        ids = encode_prompt(prompt, tokenizer)
        items.append(Item(prompt, ids, problem, f"task:{name}", f"{name}/{problem.key}", ""))
    return items


def _item(question: Question, tokenizer: TextTokenizer, wording: Wording) -> Item:
    prompt = wording.messages(question.question)
    answer: Any = question.answer if question.tests is None else question.tests
    return Item(
        prompt,
        encode_prompt(prompt, tokenizer),
        answer,
        question.source,
        question.identity,
        question.answer,
        code=question.tests is not None,
    )


def _drawn(items: list[Item], room: Room, counts: dict[str, int]):
    if room.questions is not None and room.questions < len(items):
        order = np.random.default_rng(room.seed).permutation(len(items))
        chosen = np.sort(order[: room.questions]).tolist()
        counts["not_drawn"] = len(items) - len(chosen)
        items = [items[i] for i in chosen]
    counts["sampled"] = len(items)
    return items, counts
