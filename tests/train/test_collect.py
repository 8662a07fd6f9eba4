# SPDX-License-Identifier: Apache-2.0
"""The batch of a step: pieces, refills, and that every group's rows stay together."""

import dataclasses

import numpy as np
import pytest

from r1jax.rl.rollout import Rollout
from r1jax.train.collect import Collector
from r1jax.train.judge import Verdict
from r1jax.train.questions import Asked
from r1jax.train.sampler import Completions
from tests.train import tiny

PROMPTS, GROUP, LENGTH = 4, 2, 3
CFG = dataclasses.replace(tiny.recipe().rl_1, prompts=PROMPTS, group_size=GROUP)


def questions(index, n, step):
    """Question p of batch i is the number 100·i + p, as text, ids and answer."""
    numbers = [100 * index + p for p in range(n)]
    return Asked([str(x) for x in numbers], [[x] for x in numbers], numbers)


class Echo:
    """A sampler whose completions are the question's number, the sample's, and the noise's step."""

    def __init__(self):
        self.noise = []

    def draw(self, state, ids, noise, temperatures):
        self.noise.append(noise)
        prompt_PS = np.array(ids, np.int32)
        tokens = [[row[0], g, noise[1]] for row in ids for g in range(len(temperatures))]
        tokens_BT = np.array(tokens, np.int32)
        ones_BT = np.ones(tokens_BT.shape, np.float32)
        valid_PS, ended_B = np.ones(prompt_PS.shape, bool), np.ones(len(tokens), bool)
        return Rollout(prompt_PS, valid_PS, tokens_BT, ones_BT, -ones_BT, -ones_BT, ended_B)

    def read(self, rollout):
        rows = rollout.tokens_BT
        return Completions(rollout, [str(row[0]) for row in rows], np.full(len(rows), LENGTH))


def judge_where(live):
    """Samples of question x differ in reward where `live(x)`."""

    def judge(step, asked, done):
        assert [str(x) for x in asked.answers] == done.texts  # each row with its own question
        sample_B = done.rollout.tokens_BT[:, 1]
        reward = [s if live(x) else 1.0 for x, s in zip(asked.answers, sample_B, strict=True)]
        shown = {"accuracy": float(np.mean(reward))}
        return lambda: Verdict(np.array(reward, np.float32), shown)

    return judge


def collected(live, *, pieces=1, refill=0, drawn=0):
    sampler = Echo()
    cfg = dataclasses.replace(CFG, pieces=pieces, refill=refill)
    collector = Collector(cfg, sampler, questions, judge_where(live), seed=7)
    collect = collector.refilled if refill else collector.batch
    return collect(None, 0, drawn), sampler.noise


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_pieces_are_one_batch(pieces):
    """Same rows in the same order, each piece with noise of its own."""
    got, noise = collected(lambda x: True, pieces=pieces, drawn=3)
    numbers = np.repeat(300 + np.arange(PROMPTS), GROUP)
    np.testing.assert_array_equal(got.rollout.tokens_BT[:, 0], numbers)
    np.testing.assert_array_equal(got.rollout.prompt_PS[:, 0], 300 + np.arange(PROMPTS))
    np.testing.assert_array_equal(got.reward_B, [0, 1] * PROMPTS)
    assert noise == [(7, 3 * pieces + i) for i in range(pieces)]
    assert got.drawn == 4


def test_dead_groups_are_replaced_by_live_ones_of_further_batches():
    """Even numbers have contrast: two of a batch. Two batches fill the step, whole groups only."""
    got, noise = collected(lambda x: x % 2 == 0, refill=3)
    assert got.rollout.prompt_PS[:, 0].tolist() == [0, 2, 100, 102]
    assert got.rollout.tokens_BT[:, 0].tolist() == [0, 0, 2, 2, 100, 100, 102, 102]
    assert got.rollout.tokens_BT[:, 1].tolist() == [0, 1] * PROMPTS
    assert got.reward_B.tolist() == [0, 1] * PROMPTS
    assert (got.drawn, len(noise)) == (2, 2)
    assert (got.shown["batches"], got.shown["live_groups"]) == (2, 0.5)


def test_no_more_batches_than_allowed_and_dead_groups_fill_what_is_left():
    got, noise = collected(lambda x: x == 101, refill=2)
    assert got.rollout.prompt_PS[:, 0].tolist() == [101, 0, 1, 2]
    assert got.reward_B.tolist() == [0, 1] + [1.0] * 6
    assert (got.drawn, len(noise)) == (3, 3)


def test_a_batch_with_contrast_everywhere_is_taken_as_it_is():
    got, noise = collected(lambda x: True, refill=2)
    assert (got.drawn, len(noise), got.shown["batches"]) == (1, 1, 1)


def test_a_reward_that_is_not_a_number_makes_no_contrast():
    def judge(step, asked, done):
        return lambda: Verdict(np.array([np.nan, 1.0] * PROMPTS, np.float32), {})

    cfg = dataclasses.replace(CFG, refill=1)
    got = Collector(cfg, Echo(), questions, judge, seed=0).refilled(None, 0, 0)
    assert got.drawn == 2
    assert got.shown["live_groups"] == 0
