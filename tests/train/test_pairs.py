# SPDX-License-Identifier: Apache-2.0
"""Steps on given answers: against losses written out, in micro-batches, with padding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1jax.config import PairsConfig
from r1jax.data.datasets import PreferenceIds
from r1jax.nn.param import RouterBias
from r1jax.nn.value import trunk_of, valued
from r1jax.train.answers import of_pairs
from r1jax.train.forward import last_token
from r1jax.train.pairs import dpo_step, reward_model_step
from r1jax.train.state import Controls, TrainState
from tests.nn import tiny as models
from tests.train import tiny

PAIRS, LENGTH = 4, 7
RIGHT = np.array([[7, 4], [5, 7], [6, 3], [4, 6]])  # lengths of chosen and rejected
PROMPT = np.array([3, 2, 2, 1])
STILL = Controls(np.float32(0), np.float32(0))
# Sums of the same float32 numbers in another order; whole logits instead of chunks.
SUMS, FLOAT32 = 1e-6, 1e-4


def pairs(micro=1, answers=2, weight=None):
    """[M, B, n, L] rows of one prompt and one answer each, padded on the right."""
    place = np.arange(LENGTH)
    lengths = RIGHT[:, :answers]
    segments = (place < lengths[..., None]).astype(np.int32)
    mask = segments * (place >= PROMPT[:, None, None])
    tokens = models.tokens(3, PAIRS * answers, LENGTH).reshape(PAIRS, answers, LENGTH) * segments
    batch = {
        "tokens": tokens.astype(np.int32),
        "positions": (place * segments).astype(np.int32),
        "segments": segments,
        "mask": mask.astype(np.float32),
        "weight": np.full(PAIRS, 1 / PAIRS, np.float32) if weight is None else weight,
    }
    if answers == 1:
        batch["label"] = np.array([1, 0, 0, 1], np.float32)
    return {k: v.reshape(micro, -1, *v.shape[1:]) for k, v in batch.items()}


@functools.cache
def step(cfg):
    run = dpo_step if cfg.loss in ("dpo", "ipo", "cdpo") else reward_model_step
    return jax.jit(tiny.traced_once(functools.partial(run, cfg=cfg, optimizer=tiny.KEEP_GRADIENT)))


def dpo(loss="dpo", *, reference=None, micro=1, batch=None):
    reference = tiny.state(seed=1).params if reference is None else reference
    cfg = PairsConfig(loss=loss, beta=0.3, label_smoothing=0.2)
    return step(cfg)(tiny.state(), reference, batch or pairs(micro), STILL)


@jax.jit
def whole_logp(model, batch):
    """[B, 2] summed log-probabilities of the answers, from whole logits; and their lengths."""
    rows = {k: batch[k].reshape(-1, LENGTH) for k in ("tokens", "positions", "segments", "mask")}
    out = model(rows["tokens"], rows["positions"], rows["segments"])
    logp = jax.nn.log_softmax(out.hidden_BTD[:, :-1] @ model.head_DN())
    each = jnp.take_along_axis(logp, rows["tokens"][:, 1:, None], -1)[..., 0]
    return (each * rows["mask"][:, 1:]).sum(1).reshape(-1, 2)


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cdpo", "ipo"))]
)
def test_the_step_is_the_loss_written_out(name):
    state, metrics = dpo(name)
    policy, reference = tiny.state(), tiny.state(seed=1).params
    counts = RIGHT - PROMPT[:, None]

    def loss(params):
        logp, ref = (whole_logp(policy.model(p), pairs()) for p in (params, reference))
        if name == "ipo":
            h = ((logp - ref) / counts) @ jnp.array([1.0, -1.0])
            return jnp.square(h - 1 / (2 * 0.3)).mean()
        h = 0.3 * ((logp - ref) @ jnp.array([1.0, -1.0]))
        wrong = 0.2 if name == "cdpo" else 0.0
        return -((1 - wrong) * jax.nn.log_sigmoid(h) + wrong * jax.nn.log_sigmoid(-h)).mean()

    value, grads = jax.value_and_grad(loss)(policy.params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=FLOAT32)
    chex.assert_trees_all_close(state.opt.trace, grads, rtol=FLOAT32, atol=FLOAT32)


def test_a_policy_at_its_reference_knows_nothing():
    _, metrics = dpo(reference=tiny.state().params)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-5)
    assert (metrics["accuracy"], metrics["margin"]) == (0.5, 0.0)


@pytest.mark.slow
def test_micro_batches_are_one_batch():
    chex.assert_trees_all_close(dpo(micro=2), dpo(), rtol=SUMS, atol=SUMS)


def test_padding_pairs_do_nothing():
    """A pair of weight 0, whatever it holds, changes neither gradient nor figures."""
    weight = np.array([1, 1, 1, 0], np.float32) / 3
    one, other = pairs(weight=weight), pairs(weight=weight)
    other["tokens"][0, 3] = 1
    other["mask"][0, 3] = 0
    first, second = dpo(batch=one), dpo(batch=other)
    loads = [found[1].pop("load") for found in (first, second)]
    assert loads[0].shape == loads[1].shape
    chex.assert_trees_all_close(first, second, rtol=SUMS, atol=SUMS)
    assert first[1]["accuracy"] * 3 % 1 == pytest.approx(0, abs=1e-5)


def reward_model(loss, batch):
    model = valued(trunk_of(models.model(tiny.DEEPSEEK)), jax.random.key(0), std=0.3)
    graphdef, params, router = nnx.split(model, nnx.Param, RouterBias)
    state = TrainState(jnp.int32(0), params, router, tiny.KEEP_GRADIENT.init(params), graphdef)
    return state, step(PairsConfig(loss=loss))(state, batch, STILL)


@pytest.mark.parametrize("name", ["pairwise", pytest.param("pointwise", marks=pytest.mark.slow)])
def test_reward_models_learn_from_the_last_token(name):
    answers = 2 if name == "pairwise" else 1
    batch = pairs(answers=answers)
    before, (state, metrics) = reward_model(name, batch)
    last = jnp.asarray(RIGHT[:, :answers].reshape(-1) - 1)
    rows = [batch[k].reshape(-1, LENGTH) for k in ("tokens", "positions", "segments")]

    def loss(params):
        model = before.model(params)
        hidden = model(*rows).hidden_BTD[jnp.arange(len(last)), last]
        score = (hidden @ model.value_head[...] + model.value_bias[...]).reshape(-1, answers)
        if name == "pairwise":
            return -jax.nn.log_sigmoid(score[:, 0] - score[:, 1]).mean()
        sign = 2 * batch["label"][0] - 1
        return -jax.nn.log_sigmoid(sign * score[:, 0]).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(before.params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=FLOAT32)
    chex.assert_trees_all_close(state.opt.trace, grads, rtol=FLOAT32, atol=FLOAT32)
    assert "head" not in before.params["decoder"]


def test_the_rows_of_given_answers():
    """Prompt and answer side by side, padded on the right; the answer alone is learnt, its end too.

    Over an epoch every pair comes once, chosen first.
    """
    items = [PreferenceIds([5] * p, [10 + p, 1], [20, 20 + p, 1]) for p in (1, 2, 3)]
    batch = of_pairs(items, length=7).batch(0, 3, 1, seed=0)
    assert {k: v.shape for k, v in batch.items()} == (
        dict.fromkeys(("tokens", "positions", "segments", "mask"), (1, 3, 2, 7))
        | {"weight": (1, 3)}
    )
    learnt = set()
    for b in range(3):
        row = {k: batch[k][0, b] for k in ("tokens", "positions", "segments", "mask")}
        prompt = int((row["tokens"][0] == 5).sum())
        for n, answer in enumerate(items[prompt - 1][1:]):
            end = prompt + len(answer)
            assert row["tokens"][n].tolist() == [5] * prompt + answer + [0] * (7 - end)
            assert row["mask"][n].tolist() == [0] * prompt + [1] * len(answer) + [0] * (7 - end)
            assert row["segments"][n].tolist() == [1] * end + [0] * (7 - end)
            assert row["positions"][n].tolist() == [*range(end)] + [0] * (7 - end)
        learnt.add(prompt)
    assert learnt == {1, 2, 3}


def test_the_last_token_of_a_row():
    segments = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]])
    assert last_token(segments).tolist() == [1, 2, 0, 1]
