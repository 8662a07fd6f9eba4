# SPDX-License-Identifier: Apache-2.0
"""Corpora from the tasks: pre-training text, cold-start traces, problems, prompts and batches."""

from collections.abc import Mapping, Sequence

import numpy as np

from r1jax.data.packing import Packed, example, pack
from r1jax.data.tasks import (
    DEFAULT_DIFFICULTY,
    TASKS,
    Difficulty,
    Document,
    Problem,
    TraceMix,
    mixture,
)
from r1jax.data.template import Template, completion, prompt
from r1jax.data.tokenizer import TaskTokenizer

Tasks = Sequence[str] | Mapping[str, float]

# One stream per use, so that equal seeds do not repeat each other's problems.
_PRETRAIN, _COLD_START, _PROBLEMS, _BATCHES = range(4)
# Draws in a row that bring no new problem before a task counts as used up.
_STALE_DRAWS = 3000


def pretrain_corpus(
    n: int,
    *,
    seed: int,
    tasks: Tasks,
    template: Template,
    tokenizer: TaskTokenizer,
    length: int,
    difficulty: Difficulty = DEFAULT_DIFFICULTY,
) -> Packed:
    """`n` raw task texts of the train split, packed; what is drawn at random is not learnt.

    A question's numbers cannot be predicted: as targets they are noise in the gradient.

    Args:
      n: number of texts.
      seed: the same seed gives the same corpus.
      tasks: names, or name -> weight.
      template: its turn marks stand around questions, its reasoning tags around tries; its answer
        tags appear nowhere.
      tokenizer: turns words into ids.
      length: ids in a packed row.
      difficulty: sizes of the problems.

    Returns:
      The packed rows.
    """
    rng = np.random.default_rng((seed, _PRETRAIN))
    examples = []
    for name in _draw_tasks(rng, n, tasks):
        given, learnt = pretrain_words(
            TASKS[name].pretrain_text(rng, difficulty=difficulty), template
        )
        examples.append(example(tokenizer.encode(given), tokenizer.encode(learnt)))
    return pack(examples, length=length, pad_id=tokenizer.pad_id)


def pretrain_words(text: Document, template: Template) -> tuple[str, str]:
    """What is given and what is learnt of a document, with the template's marks around them."""
    if not text.question:
        return f"{template.bos} {text.given}", f"{text.learnt} {template.eos}"
    question = prompt(text.question, template)
    learnt = f"{text.learnt} {template.think_close} {template.eos}"
    if text.given:
        return f"{question} {template.think_open} {text.given}", learnt
    return question, f"{template.think_open} {learnt}"


def cold_start_corpus(
    n: int,
    *,
    seed: int,
    tasks: Tasks,
    mix: TraceMix,
    template: Template,
    tokenizer: TaskTokenizer,
    length: int,
    difficulty: Difficulty = DEFAULT_DIFFICULTY,
) -> Packed:
    """`n` train problems with a trace each, packed; only the completions are learnt.

    Args as in `pretrain_corpus`, and:
      mix: how the traces are composed.
      template: the tags around them.
    """
    rng = np.random.default_rng((seed, _COLD_START))
    examples = []
    for name in _draw_tasks(rng, n, tasks):
        problem = TASKS[name].sample(rng, split="train", difficulty=difficulty)
        trace = TASKS[name].cold_start(rng, problem, mix)
        prompt_ids = tokenizer.encode(prompt(problem.question, template))
        examples.append(example(prompt_ids, tokenizer.encode(completion(trace, template))))
    return pack(examples, length=length, pad_id=tokenizer.pad_id)


def problems(
    n: int,
    *,
    seed: int,
    tasks: Tasks,
    split: str,
    unique: bool = False,
    difficulty: Difficulty = DEFAULT_DIFFICULTY,
) -> list[Problem]:
    """`n` problems of one split.

    Args:
      n: number of problems.
      seed: the same seed gives the same problems.
      tasks: names, or name -> weight.
      split: "train" or "heldout".
      unique: no two problems with one key, as an evaluation set wants.
      difficulty: sizes of the problems.

    Raises:
      ValueError: a task has too few distinct problems.
    """
    rng = np.random.default_rng((seed, _PROBLEMS))
    found, keys = [], set()
    for name in _draw_tasks(rng, n, tasks):
        for _ in range(_STALE_DRAWS if unique else 1):
            problem = TASKS[name].sample(rng, split=split, difficulty=difficulty)
            if not unique or problem.key not in keys:
                break
        else:
            have = sum(problem.task == name for problem in found)
            raise ValueError(
                f"task {name!r} has only {have} distinct problems in split {split!r}, too few for "
                f"its share of {n=}; ask for fewer, or enlarge its difficulty"
            )
        keys.add(problem.key)
        found.append(problem)
    return found


def left_padded(
    rows: Sequence[Sequence[int]], *, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts side by side, padded on the left.

    Args:
      rows: P prompts as ids.
      length: ids in a row.
      pad_id: id of the empty places.

    Returns:
      (tokens [P, length] int32, mask [P, length] bool, True at real tokens).

    Raises:
      ValueError: a prompt is empty, or longer than `length`.
    """
    tokens_PS = np.full((len(rows), length), pad_id, np.int32)
    mask_PS = np.zeros((len(rows), length), bool)
    for index, ids in enumerate(rows):
        if not 0 < len(ids) <= length:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, expected 1..prompt_length={length}; "
                f"set sampling.prompt_length to {max(len(ids), 1)} or more"
            )
        tokens_PS[index, length - len(ids) :] = ids
        mask_PS[index, length - len(ids) :] = True
    return tokens_PS, mask_PS


def batch_at(packed: Packed, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of a step, tokens, targets, positions, segments (int32) and mask (float32), each
    [B, length]: the rows of `rows_at`."""
    rows = rows_at(packed, step, batch_size=batch_size, seed=seed)
    return {name: array[rows] for name, array in columns(packed).items()}


def rows_at(packed: Packed, step: int, *, batch_size: int, seed: int) -> np.ndarray:
    """Numbers of the rows of a step: a pure function of its arguments, so a resumed run sees the
    same data, and so does each of several processes, whatever their number.

    Rows come in epochs, each shuffled anew; a batch may reach from one epoch into the next.

    Args:
      packed: the corpus, N rows.
      step: number of the step, from 0.
      batch_size: rows in a batch, B.
      seed: of the shuffles.

    Returns:
      [B] int64.
    """
    places = step * batch_size + np.arange(batch_size)
    epochs, places = np.divmod(places, packed.rows)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs).tolist():
        order = np.random.default_rng((seed, _BATCHES, epoch)).permutation(packed.rows)
        rows[epochs == epoch] = order[places[epochs == epoch]]
    return rows


def columns(packed: Packed) -> dict[str, np.ndarray]:
    """What a batch has of each row, [N, length]."""
    return {
        "tokens": packed.tokens_NT,
        "targets": packed.targets_NT,
        "positions": packed.positions_NT,
        "segments": packed.segments_NT,
        "mask": packed.mask_NT,
    }


def _draw_tasks(rng: np.random.Generator, n: int, tasks: Tasks) -> list[str]:
    names, probabilities = mixture(tasks)
    return [names[index] for index in rng.choice(len(names), size=n, p=probabilities)]
