# SPDX-License-Identifier: Apache-2.0
"""The questions of a run, from generated tasks or from files, by the model's own chat template."""

import functools
import math
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from r1jax.config import QuestionData
from r1jax.data.corpus import problems
from r1jax.data.datasets import (
    QUESTIONS,
    Message,
    Question,
    encode_prompt,
    encode_question,
    general,
    shuffled,
)
from r1jax.data.text import TextTokenizer
from r1jax.parallel import hosts
from r1jax.train.progress import Progress
from r1jax.train.questions import Asked, Questions

TASK = "task:"


def training_questions(
    cfg: QuestionData,
    tokenizer: TextTokenizer,
    *,
    longest: int,
    seed: int,
    progress: Progress,
    general_from: int = 0,
) -> Questions:
    """What the policy is asked: train problems of a task, or a file's questions in epochs.

    Args:
        longest: most tokens of a prompt.
        general_from: the step from which general prompts take the place of questions.

    Raises:
        ValueError: a file cannot be used, or a prompt is too long and `cfg.skip` is off.
    """
    if cfg.dataset.startswith(TASK):

        def checked(index: int, n: int, step: int) -> Asked:
            # Far enough apart for one number a batch: two runs share no batch.
            return _of_task(cfg, tokenizer, n, longest, seed=seed * 1_000_000 + index)
    else:
        asked = _of_file(cfg, cfg.path, tokenizer, longest, progress)

        def checked(index: int, n: int, step: int) -> Asked:
            return asked.at(shuffled(len(asked.ids), index * n, n, seed=seed))

    if not cfg.general:
        return checked
    prompts = _general(cfg, tokenizer, longest, progress)
    return mixed(checked, prompts, share=cfg.general_share, begin=general_from, seed=seed)


def mixed(
    questions: Questions, prompts: Asked, *, share: float, begin: int, seed: int
) -> Questions:
    """Questions of which, from step `begin` on, a share gives its place to general prompts.

    Of the places of all batches in order, number k goes to prompt ⌊k · share⌋, counted over
    shuffled epochs, wherever that number rises; so each batch has its share to within one.
    """

    def batch(index: int, n: int, step: int) -> Asked:
        asked = questions(index, n, step)
        if step < begin:
            return asked
        places = range(index * n, (index + 1) * n)
        taken = [i for i, k in enumerate(places) if rise(k, share)]
        first = math.floor(places[0] * share)
        chosen = shuffled(len(prompts.ids), first, len(taken), seed=seed)
        for ours, theirs in zip(asked, prompts.at(chosen), strict=True):
            for i, x in zip(taken, theirs, strict=True):
                ours[i] = x
        return asked

    return batch


def rise(place: int, share: float) -> bool:
    """Whether ⌊k · share⌋ rises behind k."""
    return math.floor((place + 1) * share) > math.floor(place * share)


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
    return asked.at(places)


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
    progress.message(f"{path}: {len(rows.items):,} questions")
    if rows.skipped:
        progress.message(f"{path}: {len(rows.skipped)} rows skipped, the first {rows.skipped[0]}")
    answers = [_answer(q) for q in rows.items]
    asked = _asked([q.question for q in rows.items], answers, cfg, tokenizer)
    check_alike(path, asked.ids)
    tell_unknown(progress, path, tokenizer, asked.ids)
    return _fitting(asked, path, longest, skip=cfg.skip, progress=progress)


def _general(cfg: QuestionData, tokenizer, longest: int, progress: Progress) -> Asked:
    rows = general(cfg.general, skip=cfg.skip)
    if rows.skipped:
        progress.message(
            f"{cfg.general}: {len(rows.skipped)} rows skipped, the first {rows.skipped[0]}"
        )
    before = (Message("system", cfg.system),) if cfg.system else ()
    try:
        ids = [encode_prompt([*before, *row.prompt], tokenizer) for row in rows.items]
    except ValueError as error:  # the chat template, or the want of one
        raise ValueError(f"data.general={cfg.general}: {error}") from error
    texts = [row.prompt[-1].content for row in rows.items]
    asked = Asked(texts, ids, list(rows.items))
    check_alike(cfg.general, ids)
    tell_unknown(progress, cfg.general, tokenizer, ids)
    return _fitting(asked, cfg.general, longest, skip=cfg.skip, progress=progress)


def _fitting(asked: Asked, path: str, longest: int, *, skip: bool, progress: Progress) -> Asked:
    fits = [len(ids) <= longest for ids in asked.ids]
    if all(fits):
        return asked
    if not skip:
        raise ValueError(
            f"{path}: {fits.count(False)} of {len(fits)} prompts are longer than "
            f"sampling.prompt_length={longest}, the longest has {max(map(len, asked.ids))} tokens; "
            "raise it, or set data.skip to leave them out"
        )
    if not any(fits):
        raise ValueError(f"{path}: no prompt fits into sampling.prompt_length={longest}")
    progress.message(f"{path}: {fits.count(False)} prompts of more than {longest} tokens skipped")
    return asked.at([i for i, fit in enumerate(fits) if fit])


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


def check_alike(path: str, rows: Iterable[Sequence[int]]) -> None:
    """Refuses data that is not the same for all processes, each of which reads it by itself: a
    batch would be of both.

    Raises:
        ValueError: on all of them.
    """
    if hosts.several():
        ids = b"".join(np.asarray([len(row), *row], np.int32).tobytes() for row in rows)
        hosts.check_same(zlib.crc32(ids), path)


def _answer(question: Question):
    return question.answer if question.tests is None else question.tests


def _asked(texts: Sequence[str], answers, cfg: QuestionData, tokenizer: TextTokenizer) -> Asked:
    encode = functools.partial(
        encode_question, tokenizer=tokenizer, system=cfg.system, instruction=cfg.instruction
    )
    return Asked(list(texts), [encode(text) for text in texts], list(answers))
