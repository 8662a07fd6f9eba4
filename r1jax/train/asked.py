# SPDX-License-Identifier: Apache-2.0
"""The questions of a run, from generated tasks or from files, by the model's own chat template."""

import functools
from collections.abc import Iterable, Sequence

from r1jax.config import QuestionData
from r1jax.data.corpus import problems
from r1jax.data.datasets import QUESTIONS, Question, encode_question, shuffled
from r1jax.data.text import TextTokenizer
from r1jax.train.progress import Progress
from r1jax.train.questions import Asked, Questions

TASK = "task:"


def training_questions(
    cfg: QuestionData, tokenizer: TextTokenizer, *, longest: int, seed: int, progress: Progress
) -> Questions:
    """What the policy is asked: train problems of a task, or a file's questions in epochs.

    Args:
        longest: most tokens of a prompt.

    Raises:
        ValueError: the file cannot be used, or a prompt is too long and `cfg.skip` is off.
    """
    if cfg.dataset.startswith(TASK):
        return lambda index, n: _of_task(cfg, tokenizer, n, longest, seed=seed + index)
    asked = _of_file(cfg, cfg.path, tokenizer, longest, progress)
    count = len(asked.ids)

    def batch(index: int, n: int) -> Asked:
        places = shuffled(count, index * n, n, seed=seed)
        return Asked(*([field[i] for i in places] for field in asked))

    return batch


def heldout_questions(
    cfg: QuestionData, tokenizer: TextTokenizer, n: int, *, longest: int, progress: Progress
) -> Asked:
    """What is measured: the same at every seed. Empty where the config names no file for it."""
    if cfg.dataset.startswith(TASK):
        try:
            return _of_task(cfg, tokenizer, n, longest, seed=0, split="heldout")
        except ValueError as error:
            raise ValueError(f"measure.questions={n}: {error}") from error
    if not cfg.heldout:
        return Asked([], [], [])
    asked = _of_file(cfg, cfg.heldout, tokenizer, longest, progress)
    places = sorted(shuffled(len(asked.ids), 0, min(n, len(asked.ids)), seed=0))
    return Asked(*([field[i] for i in places] for field in asked))


def _of_task(
    cfg: QuestionData, tokenizer, n: int, longest: int, *, seed: int, split: str = "train"
) -> Asked:
    name = cfg.dataset.removeprefix(TASK)
    heldout = split == "heldout"
    found = problems(
        n, seed=seed, tasks=(name,), split=split, unique=heldout, difficulty=cfg.difficulty
    )
    asked = _asked([p.question for p in found], found, cfg, tokenizer)
    most = max(map(len, asked.ids))
    if most > longest:
        raise ValueError(
            f"data.dataset={cfg.dataset}: a prompt has {most} tokens, more than "
            f"sampling.prompt_length={longest}; raise it"
        )
    return asked


def _of_file(cfg: QuestionData, path: str, tokenizer, longest: int, progress: Progress) -> Asked:
    rows = QUESTIONS[cfg.dataset](path, skip=cfg.skip)
    if rows.skipped:
        progress.message(f"{path}: {len(rows.skipped)} rows skipped, the first {rows.skipped[0]}")
    answers = [_answer(q) for q in rows.items]
    asked = _asked([q.question for q in rows.items], answers, cfg, tokenizer)
    tell_unknown(progress, path, tokenizer, asked.ids)
    fits = [len(ids) <= longest for ids in asked.ids]
    if all(fits):
        return asked
    if not cfg.skip:
        raise ValueError(
            f"{path}: {fits.count(False)} of {len(fits)} prompts are longer than "
            f"sampling.prompt_length={longest}, the longest has {max(map(len, asked.ids))} tokens; "
            "raise it, or set data.skip to leave them out"
        )
    if not any(fits):
        raise ValueError(f"{path}: no prompt fits into sampling.prompt_length={longest}")
    progress.message(f"{path}: {fits.count(False)} prompts of more than {longest} tokens skipped")
    kept = [i for i, fit in enumerate(fits) if fit]
    return Asked(*([field[i] for i in kept] for field in asked))


def tell_unknown(
    progress: Progress, path: str, tokenizer: TextTokenizer, rows: Iterable[Sequence[int]]
) -> None:
    """Says how much of the data a model has no words for, if it is anything."""
    unknown = tokenizer.unk_id
    counts = [(len(ids), list(ids).count(unknown)) for ids in rows]
    total, lost = (sum(column) for column in zip(*counts, strict=True))
    if unknown is not None and lost:
        progress.message(
            f"warning: {path}: {lost:,} of {total:,} tokens are {tokenizer.config['unk_token']}, "
            "text that the model's tokenizer has no words for"
        )


def _answer(question: Question):
    return question.answer if question.tests is None else question.tests


def _asked(texts: Sequence[str], answers, cfg: QuestionData, tokenizer: TextTokenizer) -> Asked:
    encode = functools.partial(
        encode_question, tokenizer=tokenizer, system=cfg.system, instruction=cfg.instruction
    )
    return Asked(list(texts), [encode(text) for text in texts], list(answers))
