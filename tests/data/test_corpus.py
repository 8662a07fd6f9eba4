# SPDX-License-Identifier: Apache-2.0
"""Corpora: reproducible, of the right split, and a data order that depends on the step alone."""

import re

import numpy as np
import pytest

from r1jax.data import (
    R1,
    TASKS,
    TraceMix,
    batch_at,
    cold_start_corpus,
    left_padded,
    parse,
    pretrain_corpus,
    problems,
    prompt,
    task_tokenizer,
)
from r1jax.data.tasks import split_of

TOKENIZER = task_tokenizer()
ALL = tuple(sorted(TASKS))


def pretrain(n=300, seed=0):
    return pretrain_corpus(n, seed=seed, tasks=ALL, template=R1, tokenizer=TOKENIZER, length=96)


def cold_start(n=200, seed=0, tasks=ALL):
    return cold_start_corpus(
        n, seed=seed, tasks=tasks, mix=TraceMix(), template=R1, tokenizer=TOKENIZER, length=288
    )


def documents(packed):
    for tokens, segments in zip(packed.tokens_NT, packed.segments_NT, strict=True):
        for segment in range(1, segments.max() + 1):
            yield tokens[segments == segment].tolist()


def test_pretraining_rows_hold_whole_texts():
    found = list(documents(pretrain()))
    assert len(found) == 300
    assert all(ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id for ids in found)


def learnt(packed):
    """How many tokens of each document are learnt."""
    for mask, segments in zip(packed.mask_NT, packed.segments_NT, strict=True):
        yield from (mask[segments == i].sum() for i in range(1, segments.max() + 1))


def test_pretraining_learns_what_is_not_drawn_and_no_slip():
    packed, judged = pretrain(), []
    for ids, count in zip(documents(packed), learnt(packed), strict=True):
        text = TOKENIZER.decode(ids)
        if "<|User|>" in text:  # the turn marks and the reasoning tags, and nothing of an answer
            _, _, after = text.partition("<|Assistant|> ")
            assert after.startswith("<think> try ")
            assert after.endswith(" </think> <eos>")
            assert "<answer>" not in text
            whole, given = len(after.split()), len(re.match("[^:]*", after)[0].split())
            if "to make" in text:  # countdown gives some tries, right and wrong ones
                assert count in (whole, whole - given)
                judged.append(count < whole)
            else:
                slip = re.match(r"<think> try (?=-?\d+ \*)[^:]* = (-?\d+) (?=:.* no )", after)
                assert count == whole - (given if slip else 0)
        else:
            assert count == 2  # the value and the end
    assert 0.2 < np.mean(judged) < 0.6


def test_cold_start_learns_exactly_the_completions():
    packed = cold_start()
    texts = [TOKENIZER.decode(ids) for ids in documents(packed)]
    assert len(texts) == 200
    learnt = 0
    for text in texts:
        before, mark, after = text.partition("<|Assistant|>")
        assert parse(after, R1).well_formed
        learnt += len(after.split())
    assert packed.mask_NT.sum() == learnt
    # The first learnt token of a document is the tag that opens the reasoning.
    first = packed.targets_NT[:, 1:][(packed.mask_NT[:, 1:] > 0) & (packed.mask_NT[:, :-1] == 0)]
    assert set(first.tolist()) == {TOKENIZER.id("<think>")}


def test_cold_start_asks_train_problems_only():
    held_out = {problem.question for problem in problems(500, seed=1, tasks=ALL, split="heldout")}
    texts = [TOKENIZER.decode(ids) for ids in documents(cold_start(500, tasks=("quadratic",)))]
    asked = {text.partition("<|User|> ")[2].partition(" <|Assistant|>")[0] for text in texts}
    assert len(asked) > 100
    assert len([question for question in held_out if question.startswith("solve")]) > 40
    assert not asked & held_out


@pytest.mark.parametrize("make", [pretrain, cold_start])
def test_a_seed_is_a_corpus(make):
    assert (make().tokens_NT == make().tokens_NT).all()
    other = make(seed=1)
    assert (
        other.tokens_NT.shape != make().tokens_NT.shape
        or (other.tokens_NT != make().tokens_NT).any()
    )


def test_weights_of_tasks():
    found = problems(2000, seed=0, tasks={"countdown": 3, "arithmetic": 1}, split="train")
    share = np.mean([problem.task == "countdown" for problem in found])
    assert abs(share - 0.75) < 0.04  # four standard deviations


def test_problems_are_of_their_split():
    for split in ("train", "heldout"):
        found = problems(300, seed=0, tasks=ALL, split=split)
        assert {split_of(problem.key) for problem in found} == {split}
    assert problems(9, seed=5, tasks=ALL, split="train") == problems(
        9, seed=5, tasks=ALL, split="train"
    )


def test_unique_problems():
    found = problems(60, seed=0, tasks=("quadratic",), split="heldout", unique=True)
    assert len({problem.key for problem in found}) == 60
    # -12..12 has 325 pairs of roots, of which about a fifth is held out.
    with pytest.raises(ValueError, match="'quadratic' has only (5|6|7)[0-9] distinct"):
        problems(200, seed=0, tasks=("quadratic",), split="heldout", unique=True)


def test_prompts_are_padded_on_the_left():
    asked = problems(8, seed=0, tasks=ALL, split="train")
    ids = [TOKENIZER.encode(prompt(problem.question, R1)) for problem in asked]
    tokens_PT, mask_PT = left_padded(ids, length=16, pad_id=TOKENIZER.pad_id)
    assert tokens_PT.shape == mask_PT.shape == (8, 16)
    assert (tokens_PT.dtype, mask_PT.dtype) == (np.int32, bool)
    for tokens, mask, problem in zip(tokens_PT, mask_PT, asked, strict=True):
        assert TOKENIZER.decode(tokens[mask]) == prompt(problem.question, R1)
        assert mask[-1]
        assert (np.diff(mask.astype(int)) >= 0).all()
        assert (tokens[~mask] == TOKENIZER.pad_id).all()
    with pytest.raises(ValueError, match="prompt_length=5"):
        left_padded(ids, length=5, pad_id=TOKENIZER.pad_id)
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        left_padded([ids[0], []], length=16, pad_id=0)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_batches_are_a_pure_function_of_the_step_and_visit_every_row(batch_size):
    packed = pretrain()
    rows = {tuple(row): index for index, row in enumerate(packed.tokens_NT.tolist())}
    assert len(rows) == packed.rows
    steps = -(-3 * packed.rows // batch_size)
    order = [
        rows[tuple(row)]
        for step in range(steps)
        for row in batch_at(packed, step, batch_size=batch_size, seed=0)["tokens"].tolist()
    ]
    epochs = [order[e * packed.rows : (e + 1) * packed.rows] for e in range(3)]
    assert all(sorted(epoch) == list(range(packed.rows)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    late = batch_at(packed, steps - 1, batch_size=batch_size, seed=0)
    again = batch_at(packed, steps - 1, batch_size=batch_size, seed=0)
    assert sorted(late) == ["mask", "positions", "segments", "targets", "tokens"]
    assert all((late[key] == again[key]).all() for key in late)
    assert [late[key].shape for key in late] == [(batch_size, 96)] * 5


def test_batches_keep_the_arrays_of_a_row_together_and_differ_by_seed():
    packed = pretrain()
    batch = batch_at(packed, 3, batch_size=8, seed=0)
    inside = (batch["segments"][:, :-1] == batch["segments"][:, 1:]) & (
        batch["segments"][:, 1:] > 0
    )
    assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:])[inside].all()
    other = batch_at(packed, 3, batch_size=8, seed=1)
    assert (batch["tokens"] != other["tokens"]).any()
