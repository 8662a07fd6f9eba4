# SPDX-License-Identifier: Apache-2.0
"""The sampler: which tokens may be drawn, how often they are, and the log-probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from r1jax.infer.sample import sample, truncate

# A log-softmax over 7 float32 logits.
FLOAT32 = 2e-6
# A float32 cumulative sum of 7 probabilities may fall on the wrong side of a limit this close.
EDGE = 1e-5
# The 1 - 1e-4 quantiles of chi-square by degrees of freedom: one run in 10,000 exceeds them by
# chance, and the keys are fixed.
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74}
N = 7


def allowed(logits, **rules):
    """The set of token ids that truncation leaves."""
    return set(
        np.flatnonzero(np.isfinite(truncate(jnp.asarray(logits)[None], **rules)[0])).tolist()
    )


def nucleus(probabilities, top_p):
    """The shortest prefix, in falling order, of mass at least top_p."""
    order = np.argsort(-probabilities)
    mass = np.cumsum(probabilities[order])
    return set(order[: int(np.argmax(mass >= top_p)) + 1].tolist())


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


@given(
    seed=st.integers(0, 2**16),
    top_p=st.floats(0.05, 0.99),
    top_k=st.sampled_from([None, 1, 3, N, N + 5]),
)
def test_truncation_leaves_the_right_tokens(seed, top_p, top_k):
    logits = np.random.default_rng(seed).normal(size=N).astype(np.float32) * 2
    best = np.argsort(-logits)[:top_k]
    assert allowed(logits, top_k=top_k, top_p=None) == set(best.tolist())
    p = softmax(logits)
    p[np.setdiff1d(np.arange(N), best)] = 0.0  # top-k first, then top-p of what is left
    p /= p.sum()
    assume(np.abs(np.cumsum(np.sort(p)[::-1]) - top_p).min() > EDGE)
    assert allowed(logits, top_k=top_k, top_p=top_p) == nucleus(p, top_p)


def test_truncation_by_hand():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert allowed(logits, top_k=None, top_p=0.5) == {1, 3}
    assert allowed(logits, top_k=2, top_p=0.5) == {1}  # 0.4 of 0.7 is more than half
    assert allowed(logits, top_k=None, top_p=1e-6) == {1}  # never empty
    assert allowed(logits, top_k=None, top_p=1.0) == {0, 1, 2, 3}
    assert allowed(logits, top_k=None, top_p=None) == {0, 1, 2, 3}
    kept = truncate(logits[None], top_k=3, top_p=None)[0]
    np.testing.assert_array_equal(kept[1:], logits[1:])  # what stays is not touched


def test_ties_at_the_edge_stay():
    logits = np.array([1.0, 0.0, 1.0, -1.0], np.float32)
    assert allowed(logits, top_k=1, top_p=None) == {0, 2}
    assert allowed(logits, top_k=None, top_p=0.1) == {0, 2}


draw = functools.partial(jax.jit, static_argnames=("top_k", "top_p"))(sample)
LOGITS = np.array([0.5, -1.0, 1.5, 0.0, 0.7, -0.3], np.float32)
ROWS = 20_000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.6, None, None), (2.0, None, 0.8), (1.0, 3, None), (0.7, 4, 0.9)],
)
def test_frequencies(temperature, top_k, top_p):
    """Chi-square of 20,000 draws against the truncated softmax; nothing else is ever drawn."""
    rows, temperatures = np.tile(LOGITS, (ROWS, 1)), np.full(ROWS, temperature, np.float32)
    out = draw(rows, jax.random.key(7), temperatures, top_k=top_k, top_p=top_p)
    p = softmax(LOGITS / temperature)
    best = np.argsort(-p)[:top_k]
    p[np.setdiff1d(np.arange(p.size), best)] = 0.0
    p /= p.sum()
    if top_p is not None:
        p[sorted(set(range(p.size)) - nucleus(p, top_p))] = 0.0
        p /= p.sum()
    counts = np.bincount(out.token_B, minlength=p.size)
    live = p > 0
    assert counts[~live].sum() == 0
    statistic = ((counts[live] - ROWS * p[live]) ** 2 / (ROWS * p[live])).sum()
    assert statistic < CHI_SQUARE[int(live.sum()) - 1]
    # Both log-probabilities, of every row.
    untruncated = np.log(softmax(LOGITS / temperature))[out.token_B]
    np.testing.assert_allclose(out.logp_B, untruncated, atol=FLOAT32)
    np.testing.assert_allclose(out.behaviour_logp_B, np.log(p[out.token_B]), atol=FLOAT32)


def test_without_truncation_both_log_probabilities_agree():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, N)).astype(np.float32)
    out = draw(logits, jax.random.key(1), np.full(64, 0.8, np.float32))
    np.testing.assert_array_equal(out.logp_B, out.behaviour_logp_B)
    assert out.token_B.dtype == jnp.int32
    cut = draw(logits, jax.random.key(1), np.full(64, 0.8, np.float32), top_p=0.9)
    assert (cut.behaviour_logp_B >= cut.logp_B).all()
    assert (cut.behaviour_logp_B > cut.logp_B + 0.1).any()


def test_temperature_zero_is_greedy_beside_rows_that_are_not():
    """Its behaviour log-probability is 0; the other is at temperature 1, as a trainer scores it."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(64, N)).astype(np.float32)
    temperatures = np.where(np.arange(64) % 2, 0.0, 1.0).astype(np.float32)
    out = draw(logits, jax.random.key(3), temperatures, top_p=0.9)
    greedy = temperatures == 0
    best = logits.argmax(-1)
    np.testing.assert_array_equal(out.token_B[greedy], best[greedy])
    assert (np.asarray(out.token_B)[~greedy] != best[~greedy]).mean() > 0.2
    np.testing.assert_array_equal(out.behaviour_logp_B[greedy], 0.0)
    at_one = np.log([softmax(row).max() for row in logits])
    np.testing.assert_allclose(out.logp_B[greedy], at_one[greedy], atol=FLOAT32)


def test_extreme_logits_give_numbers():
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], np.float32)
    for temperature in (0.0, 0.01, 1.0):
        out = draw(logits, jax.random.key(0), np.full(2, temperature, np.float32), top_p=0.9)
        assert out.token_B[0] == 0
        assert np.isfinite(out.logp_B).all()
        assert np.isfinite(out.behaviour_logp_B).all()


def test_rows_draw_their_own_noise_and_keys_matter():
    rows, ones = np.zeros((64, N), np.float32), np.ones(64, np.float32)
    a, b, c = (draw(rows, jax.random.key(k), ones).token_B for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.5
    assert len(set(a.tolist())) == N


def test_the_first_of_equal_bests_is_taken_and_nan_still_names_a_token():
    logits = np.array([[0, 3, 3, 1], [2, 2, 2, 2], [np.nan] * 4, [-np.inf, -np.inf, 0, -1]])
    out = draw(logits.astype(np.float32), jax.random.key(0), np.zeros(4, np.float32))
    assert np.asarray(out.token_B)[[0, 1, 3]].tolist() == [1, 0, 2]
    assert 0 <= out.token_B[2] < 4
