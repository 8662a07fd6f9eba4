# SPDX-License-Identifier: Apache-2.0
"""Held-out figures: every question counts once, and greedy answers apart from sampled ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1jax.config import PairsConfig, RewardConfig
from r1jax.data.template import R1
from r1jax.train.answers import Answers
from r1jax.train.judge import Rules
from r1jax.train.measure import _compare, measure
from r1jax.train.questions import Asked
from r1jax.train.sampler import Completions
from tests.parallel.test_rebalance import CFG, skewed
from tests.train import tiny

QUESTIONS, SAMPLES = 10, 3
ASKED = Asked([f"q{i}" for i in range(QUESTIONS)], [[i] for i in range(QUESTIONS)], [*range(10)])


def right(question, sample):
    """Which samples are right; sample 3 is the greedy one."""
    return (question + 2 * sample) % 3 == 0 if sample < SAMPLES else question >= 9


def sampler(calls):
    """Answers by rule: sample g of question q has q + g tokens, and odd questions no tags."""

    def sample(state, ids, noise, temperatures):
        calls.append((len(ids), noise, temperatures))
        rows = [(row[0], g) for row in ids for g in range(len(temperatures))]
        texts = [
            f"{q} {g}" if q % 2 else f"<think> wait {q} </think> <answer> {q} {g} </answer>"
            for q, g in rows
        ]
        return Completions(None, texts, np.array([q + g for q, g in rows]))

    return sample


def verify(answers, texts):
    words = [text.replace("</answer>", "").split()[-2:] for text in texts]
    assert [int(q) for q, _ in words] == answers, "each text is judged by its own question"
    return lambda: np.array([right(int(q), int(g)) for q, g in words], np.float32)


def test_every_question_counts_once():
    """Ten questions in batches of eight: what fills up the second is asked and not counted."""
    calls, rules = [], Rules(RewardConfig(), R1, verify, max_length=9)
    found = measure(
        None, sampler(calls), ASKED, rules, samples=SAMPLES, temperature=0.6, seed=5
    )  # fmt: skip
    assert [rows for rows, _, _ in calls] == [8, 8]
    assert all(t == [0.6] * SAMPLES + [0.0] for _, _, t in calls)
    assert len({noise for _, noise, _ in calls}) == 2
    sampled = [(q, g) for q in range(QUESTIONS) for g in range(SAMPLES)]
    assert found == pytest.approx(
        {
            "pass_at_1": np.mean([right(q, g) for q, g in sampled]),
            "greedy": 0.1,
            "format_rate": 0.5,
            "mean_tokens": np.mean([q + g for q, g in sampled]),
            "reflection_rate": 0.5,
        }
    )


def test_the_reference_is_judged_with_its_own_router():
    """The policy's experts may have been dealt out anew: the same function, in another order."""
    start = skewed(tiny.state(CFG))
    bigger = jax.tree.map(lambda x: x * 1.3, start.params)
    trained = dataclasses.replace(start, params=bigger)
    turned = dataclasses.replace(trained, **_turned({"params": bigger, "router": start.router}))
    tokens = np.random.default_rng(0).integers(1, CFG.vocab_size, (64, 2, 10)).astype(np.int32)
    lengths = np.stack([np.full((64, 2), 3), np.full((64, 2), 10)], -1)
    batch = Answers(tokens, lengths, None).rows(np.arange(64), np.ones(64, np.float32))
    compare = _compare(PairsConfig(batch_size=64, length=10, loss="dpo"))
    one, other = (np.asarray(compare(state, start, batch)) for state in (trained, turned))
    assert 0 < one.mean() < 1
    np.testing.assert_array_equal(one, other)


def _turned(tree):
    """The groups of experts in the opposite order."""
    order = np.array([6, 7, 4, 5, 2, 3, 0, 1])

    def one(variable):
        axes = variable.out_sharding
        for name in {"expert", "routed"} & set(axes):
            variable = variable.replace(jnp.take(variable[...], order, axis=axes.index(name)))
        return variable

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
