# SPDX-License-Identifier: Apache-2.0
"""What is measured of completions: right, well formed, how long, reflecting, self-correcting."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from r1jax.data.tasks import TASKS, Problem
from r1jax.data.template import Template, parse

REFLECTION_WORDS = frozenset(
    ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
)
"""The words that the R1 paper counts as reflection (arXiv 2501.12948, supplementary analysis)."""


_WORD = re.compile(r"[a-z]+")


def reflects(reasoning: str) -> bool:
    """Whether a chain of thought holds a reflection word."""
    return not REFLECTION_WORDS.isdisjoint(_WORD.findall(reasoning.lower()))


class Scores(NamedTuple):
    """One entry a completion.

    Attributes:
        correct: bool, its answer solves the problem.
        well_formed: bool, it follows the template to the letter.
        tokens: int, its length, the end-of-sequence token included.
        reflects: bool, its reasoning holds a reflection word.
        first_right: bool, its reasoning holds a try and the first one is right.
        first_wrong: bool, its reasoning holds a try and the first one is wrong.
        answers: text of its answer, "" if none.
    """

    correct: np.ndarray
    well_formed: np.ndarray
    tokens: np.ndarray
    reflects: np.ndarray
    first_right: np.ndarray
    first_wrong: np.ndarray
    answers: tuple[str, ...]


def score(
    problems: Sequence[Problem],
    completions: Sequence[str],
    tokens_B: np.ndarray,
    template: Template,
) -> Scores:
    """Reads B completions of B problems; `tokens_B` are their lengths in tokens."""
    parsed = [parse(text, template) for text in completions]
    pairs = list(zip(problems, parsed, strict=True))
    tries = [TASKS[p.task].attempts(p, read.reasoning) for p, read in pairs]
    return Scores(
        np.array([TASKS[p.task].verify(p, read.answer) for p, read in pairs], bool),
        np.array([read.well_formed for read in parsed], bool),
        np.asarray(tokens_B),
        np.array([reflects(r.reasoning) for r in parsed], bool),
        np.array([bool(t) and t[0] for t in tries], bool),
        np.array([bool(t) and not t[0] for t in tries], bool),
        tuple(" ".join(read.answer.split()) for read in parsed),
    )


def majority(answers: Sequence[str]) -> str:
    """The most frequent non-empty answer; the first to appear wins a tie; "" if there is none."""
    counts = Counter(a for a in answers if a)
    return counts.most_common(1)[0][0] if counts else ""


def summarise(scores: Scores, problems: Sequence[Problem], samples: int) -> dict[str, float | None]:
    """Figures of P problems × `samples` sampled completions, rows of a problem side by side.

    pass_at_1 is the mean over all samples (R1 paper, section 3); cons_at_k the share of problems
    whose majority answer is right; self_correction_rate P(final right | first try wrong), None if
    no first try was wrong.
    """
    groups = range(0, len(scores.answers), samples)
    won = [
        TASKS[problems[i].task].verify(problems[i], majority(scores.answers[i : i + samples]))
        for i in groups
    ]
    wrong = scores.first_wrong
    return {
        "pass_at_1": float(scores.correct.mean()),
        f"cons_at_{samples}": float(np.mean(won)),
        "format_rate": float(scores.well_formed.mean()),
        "mean_tokens": float(scores.tokens.mean()),
        "reflection_rate": float(scores.reflects.mean()),
        "first_try_rate": float(scores.first_right.mean()),
        "self_correction_rate": float(scores.correct[wrong].mean()) if wrong.any() else None,
    }
