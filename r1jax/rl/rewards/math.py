# SPDX-License-Identifier: Apache-2.0
"""The mathematics reward: is the final answer equal to the reference, as mathematics."""

import re
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from r1jax.data.template import Template, parse
from r1jax.rl.rewards.pool import Limits, Outcome, WorkerPool

JUDGE = Path(__file__).with_name("math_judge.py")
# An answer longer than this is refused unread; no answer of MATH or GSM8K has 200 characters.
MAX_ANSWER_CHARS = 20_000
BOXED = r"\boxed"
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
# The last line of GSM8K's reference solutions and of its sampled ones.
FINAL_LINE = re.compile(r"^[ \t]*(?:####|A:)[ \t]*(\S.*)$", re.MULTILINE)
THOUGHT_END = "</think>"


def math_pool(*, workers: int = 2, limits: Limits | None = None) -> WorkerPool:
    r"""Workers that compare answers with math-verify; a context manager."""
    return WorkerPool(JUDGE, workers=workers, limits=limits)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}`, braces matched; None if there is none that closes.

    A box of more than `MAX_ANSWER_CHARS` is cut behind that many: too long is all there is to know.
    """
    start = text.rfind(BOXED + "{")
    if start < 0:
        return None
    start += len(BOXED) + 1
    depth = 1
    end = start + MAX_ANSWER_CHARS + 1
    for brace in BRACES.finditer(text, start, end):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return text[start : brace.start()]
    return text[start:end] if end <= len(text) else None


def final_answer(text: str, template: Template | None = None) -> str:
    r"""The part of a completion that answers.

    With a template: the only answer block, as `parse` has it, and "" if there is none: an answer in
    the reasoning does not count. Without: what follows the last `</think>`, if there is one. In
    that part the last of `\boxed{…}`; else the last line `#### …` or `A: …` (GSM8K); else all
    of it. Linear in the length of the text.

    Args:
      text: a completion, or a reference solution.
      template: the tags of the completion.

    Returns:
      The answer without the white space and full stop around it, "" if there is none.
    """
    part = parse(text, template).answer if template else text.rpartition(THOUGHT_END)[2]
    if (boxed := last_boxed(part)) is not None:
        part = boxed
    elif lines := FINAL_LINE.findall(part):
        part = lines[-1]
    return part.strip().rstrip(".;:").strip()


class PendingRewards:
    """Rewards under way; the device may work meanwhile."""

    def __init__(self, futures: Sequence["Future[Outcome] | None"]):
        self._futures = futures

    def collect(self) -> np.ndarray:
        """Waits for the workers. float32 [B]; 0 where there was nothing to ask about."""
        scores = [0.0 if f is None else f.result().score for f in self._futures]
        return np.array(scores, np.float32)


def submit_math(
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    pool: WorkerPool,
    template: Template | None = None,
) -> PendingRewards:
    """`math_reward` without waiting: the workers begin, `collect()` of the result waits for them.

    Equal answers to the same problem are asked about once. An answer that is empty or longer than
    `MAX_ANSWER_CHARS` earns 0 and reaches no worker.
    """
    if len(completions) != len(answers):
        raise ValueError(f"got {len(completions)} completions but {len(answers)} answers")
    golds = {text: final_answer(text) for text in set(answers)}
    for text, gold in golds.items():
        if not 0 < len(gold) <= MAX_ANSWER_CHARS:
            raise ValueError(
                f"a reference answer must have 1 to {MAX_ANSWER_CHARS} characters, "
                f"got {len(gold)} in {text[:80]!r}"
            )
    asked: dict[tuple[str, str], Future[Outcome]] = {}
    futures: list[Future[Outcome] | None] = []
    for completion, text in zip(completions, answers, strict=True):
        pair = golds[text], final_answer(completion, template)
        if not 0 < len(pair[1]) <= MAX_ANSWER_CHARS:
            futures.append(None)
            continue
        if pair not in asked:
            asked[pair] = pool.submit({"gold": pair[0], "answer": pair[1]})
        futures.append(asked[pair])
    return PendingRewards(futures)


def math_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    pool: WorkerPool,
    template: Template | None = None,
) -> np.ndarray:
    r"""1 where the final answer of a completion equals the reference as mathematics, else 0.

    DeepSeek-R1 (2501.12948), section 2.2.2, "accuracy rewards". Equality is math-verify's: numbers
    to six decimals, expressions by simplification, sets, intervals, equations, matrices. A
    comparison that does not end by the pool's deadline, or whose worker dies, earns the pool's
    `failed_score`; on a machine that is too busy that may befall a right answer.

    Args:
      prompts: B prompts; not read.
      completions: B texts.
      answers: B references: an answer, or a solution with `\boxed{…}` or a line `#### …`.
      pool: from `math_pool`.
      template: the tags of the completions; None for text without.

    Returns:
      float32 [B].

    Raises:
      ValueError: the numbers of the three differ, or a reference is empty.
      RuntimeError: no worker can be started; math-verify is not installed, say.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(prompts)} prompts but {len(completions)} completions")
    return submit_math(completions, answers, pool=pool, template=template).collect()
