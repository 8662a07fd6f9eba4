# SPDX-License-Identifier: Apache-2.0
"""Which of the sampled completions become training data, and the statistics of the choice."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from r1jax.data.template import Template, parse
from r1jax.data.text import BROKEN
from r1jax.rl import rejection
from r1jax.rl.rejection import Filtered, NGrams

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
_THOUGHT_END = "</think>"
_EXAMPLES = 5


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is kept of right completions.

    Attributes:
        keep: most of one question.
        template: the tags that a completion must follow to the letter; None: none.
        language: that a completion must be in, a key of `rewards.language.SCRIPTS`; None: any one.
        least_language: share of its words that must be.
        longest_paragraph: in words.
        shares: of sources among what is kept; None: as they come.
        seed: of the draw where shares leave some out.
    """

    keep: int = 4
    template: Template | None = None
    language: str | None = None
    least_language: float = 0.9
    longest_paragraph: int = 400
    shares: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("keep", "longest_paragraph"):
            if (value := vars(self)[name]) < 1:
                raise ValueError(f"{name}={value} must be at least 1")


class Chosen(NamedTuple):
    """A mask [B] over the rows, and what was counted."""

    keep: np.ndarray
    statistics: dict[str, Any]


def choose(
    rows: Sequence[Mapping[str, Any]],
    items: Sequence[Any],
    choice: Choice,
    evaluation: NGrams | None,
) -> Chosen:
    """The rows to keep.

    Args:
        rows: of samples: item (an index), text, tokens, ended, reward.
        items: the questions, each with source, identity and code.
        choice: what is kept.
        evaluation: what no kept text may share words with.
    """
    texts = [row["text"] for row in rows]
    of = [items[row["item"]] for row in rows]
    prose = [prose_of(t, code=item.code) for t, item in zip(texts, of, strict=True)]
    filters: dict[str, Filtered] = {
        "wrong": rejection.keep_correct([row["reward"] for row in rows]),
        "cut_off": _mask([row["ended"] for row in rows]),
        # No text, or bytes that make no character: nothing that could be written and read again.
        "unreadable": _mask([bool(text.strip()) and BROKEN not in text for text in texts]),
    }
    if choice.template is not None:
        filters["malformed"] = _mask([parse(t, choice.template).well_formed for t in texts])
    filters |= {
        "mixed_languages": rejection.one_language(
            prose, language=choice.language, least=choice.least_language
        ),
        "long_paragraphs": rejection.short_paragraphs(prose, longest=choice.longest_paragraph),
        "code_blocks": rejection.without_code(prose),
    }
    if evaluation is not None:
        filters["overlap"] = rejection.clean(texts, evaluation)
    names = [item.identity for item in of]
    left = rejection.funnel(filters).keep
    filters["repeats"] = rejection.distinct(texts, names, among=left)
    left = filters["repeats"].keep
    filters["over_cap"] = rejection.capped(names, choice.keep, among=left)
    left = filters["over_cap"].keep
    if choice.shares is not None:
        sources = [item.source for item in of]
        filters["out_of_balance"] = rejection.balanced(
            sources, choice.shares, among=left, seed=choice.seed
        )
    funnel = rejection.funnel(filters)
    dropped = {name: {k: int(n) for k, n in step.items()} for name, step in funnel.steps.items()}
    return Chosen(
        funnel.keep,
        {
            "sampled": len(rows),
            "dropped": dropped,
            "kept": int(funnel.keep.sum()),
            "by_source": by_source(rows, of, funnel.keep),
            "overlaps": _overlaps(texts, evaluation),
        },
    )


def by_source(
    rows: Sequence[Mapping[str, Any]], of: Sequence[Any], keep: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Figures of each source: questions, how many were ever right, pass rate, tokens, kept."""
    found = {}
    for source in sorted({item.source for item in of}):
        places = [i for i, item in enumerate(of) if item.source == source]
        right = [i for i in places if rows[i]["reward"] >= 1]
        kept = [i for i in places if keep[i]]
        found[source] = {
            "questions": len({of[i].identity for i in places}),
            "questions_solved": len({of[i].identity for i in right}),
            "questions_kept": len({of[i].identity for i in kept}),
            "sampled": len(places),
            "pass_rate": len(right) / len(places),
            "mean_tokens": float(np.mean([rows[i]["tokens"] for i in places])),
            "kept": len(kept),
            "kept_mean_tokens": float(np.mean([rows[i]["tokens"] for i in kept])) if kept else None,
        }
    return found


def prose_of(text: str, *, code: bool) -> str:
    """What the filters of style look at: all of a text; of one that answers with a program, the
    thought with its code blocks and what follows it without."""
    if not code:
        return text
    thought, closed, answer = text.rpartition(_THOUGHT_END)
    bare = _without_blocks(answer)
    return f"{thought}\n\n{bare}" if closed else bare


def _without_blocks(text: str) -> str:
    """A text without its fenced blocks; one that is never closed stays. Linear in its length."""
    kept, held, mark = [], [], ""
    for line in text.splitlines(keepends=True):
        if mark:
            held.append(line)
            fence = line.strip()
            if fence.startswith(mark) and not fence.strip(mark[0]):
                held, mark = [], ""
        elif found := _FENCE.match(line):
            held, mark = [line], found[1]
        else:
            kept.append(line)
    return "".join([*kept, *held])


def _overlaps(texts: Sequence[str], evaluation: NGrams | None) -> list[str]:
    """The first few words that were found in evaluation sets, for people to judge."""
    if evaluation is None:
        return []
    found = (rejection.overlap(text, evaluation) for text in texts)
    return [words for words, _ in zip((w for w in found if w), range(_EXAMPLES), strict=False)]


def _mask(keep: Sequence[bool]) -> Filtered:
    return Filtered(np.array(keep, bool), {})
