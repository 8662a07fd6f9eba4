# SPDX-License-Identifier: Apache-2.0
"""Re-ranking keeps the likeliest of the drafted continuations, and the caches stay right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.infer import rerank
from r1jax.infer.generate import Generation, Sampling, generate
from r1jax.infer.multitoken import Rules, extend_mtp, probabilities, start_drafter
from r1jax.infer.prompts import feed
from r1jax.infer.rerank import mean_log_probability, propose
from r1jax.infer.sample import draw
from tests.nn import tiny

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1], [2]]


def model():
    return tiny.model(tiny.model_config())


def greedy_next(rows):
    """The main model's best next token of each row, by a full forward pass."""
    longest = max(map(len, rows))
    padded = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
    best_BT = np.asarray(tiny.logits(model(), *tiny.whole_rows(padded))).argmax(-1)
    return [int(best_T[len(row) - 1]) for row, best_T in zip(rows, best_BT, strict=True)]


def test_the_score_is_the_mean_until_the_end_of_sequence():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.5, 0.25]]]))
    logits = jnp.repeat(logits, 2, axis=0)
    draft = jnp.array([[0, 1, 1], [2, 0, 1]])
    found = mean_log_probability(logits, draft, (1,))
    wanted = [np.log([0.5, 0.75]).mean(), np.log([0.25, 0.125, 0.5]).mean()]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(
        mean_log_probability(logits, draft, ())[0], np.log([0.5, 0.75, 0.5]).mean(), rtol=1e-6
    )


def test_with_every_token_among_the_candidates_the_best_is_greedy(monkeypatch):
    """One-token continuations, every token of the vocabulary among them: re-ranking is greedy."""
    plain = generate(model(), PROMPTS, Sampling(temperature=0.0, max_tokens=20))

    def every(p, key):
        return jnp.arange(len(p)) % tiny.VOCAB if len(p) > len(PROMPTS) else draw(p, key)

    monkeypatch.setattr(rerank, "draw", every)
    sampling = Sampling(temperature=0.0, max_tokens=20, drafts=1, rerank=tiny.VOCAB)
    assert generate(model(), PROMPTS, sampling) == plain


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [2, 3])
def test_the_token_after_the_drafts_is_the_main_models(drafts):
    """Every (drafts + 1)-th token follows from a full pass over all that is before it, so the cache
    holds what the chosen continuation left; a row stops at its end and at its limit."""
    sampling = Sampling(temperature=0.0, max_tokens=18, drafts=drafts, rerank=4, eos_ids=(12,))
    generation = Generation(model(), PROMPTS, sampling)
    rows = [[] for _ in PROMPTS]
    for new in generation:
        for row, tokens in zip(rows, new, strict=True):
            row += tokens
    checked = 0
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.index(12) == len(row) - 1 if 12 in row else len(row) == 18
        places = range(0, len(row), drafts + 1)
        assert greedy_next([prompt + row[:i] for i in places]) == [row[i] for i in places]
        checked += len(places)
    assert checked > len(PROMPTS)
    assert generation.counts.drafted == 4 * generation.counts.accepted > 0


@pytest.mark.slow
def test_the_candidates_come_from_the_modules_own_distribution():
    """Candidates beside a shared cache are drafted as by feeding each to a cache of its own."""
    module, rules = model(), Rules(drafts=3, rerank=5)
    cache, own, hidden_BD, _ = feed(module, PROMPTS, mtp=True)
    length_B = jnp.asarray([len(p) - 1 for p in PROMPTS], jnp.int32)
    token_B = jnp.array([3, 1, 2], jnp.int32)
    drafter = start_drafter(own, length_B, hidden_BD, token_B, width=8, most=3, depth=3)
    temperature_B = jnp.array([0.7, 1.0, 0.0])
    draft_XT, q_XTN, after = propose(module, drafter, temperature_B, jax.random.key(0), rules=rules)
    assert (after.length_B == length_B + 1).all()
    assert (after.pending_B == 0).all()
    assert len({tuple(map(int, row)) for row in draft_XT[:5]}) > 1
    temperature_B = temperature_B.at[2].set(1.0)  # greedy rows draft at 1
    for x in range(15):
        b = x // 5
        one = tuple(e[:, b : b + 1] for e in own)
        hidden, token = hidden_BD[b][None, None], token_B[b][None, None]
        for t in range(3):
            hidden, one = extend_mtp(module, hidden, token, one, length_B[b][None] + t)
            q = probabilities(module, hidden, temperature_B[b][None], rules)[0, 0]
            np.testing.assert_allclose(q_XTN[x, t], q, rtol=2e-4, atol=1e-5)
            token = draft_XT[x, t][None, None]


@pytest.mark.slow
def test_the_seed_makes_the_text():
    runs = [
        generate(model(), PROMPTS, Sampling(1.0, max_tokens=12, drafts=2, rerank=2, seed=s))
        for s in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(rerank=1, drafts=1), "2..64"),
        (dict(rerank=4), "set draft"),
        (dict(rerank=-1), "2..64"),
    ],
)
def test_impossible(changes, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**changes)
