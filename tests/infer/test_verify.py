# SPDX-License-Identifier: Apache-2.0
"""The rule that judges drafts, by itself: the tokens are distributed as the target's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.infer.speculative import verify, verify_greedy
from tests.infer.counting import chi_square_bound


def random_distributions(rng, *shape):
    p = rng.dirichlet(np.full(shape[-1], 0.7), size=shape[:-1])
    return p.astype(np.float32)


@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_a_verified_token_is_the_targets(horizon):
    """First token after the rule, drafts drawn from q: frequencies against p, 40,000 rows."""
    rng, n, rows = np.random.default_rng(0), 5, 40_000
    p, q = random_distributions(rng, 3, n), random_distributions(rng, 2, n)
    draft = np.stack([rng.choice(n, rows, p=q[t] / q[t].sum()) for t in range(2)], 1)
    tile = lambda x: np.broadcast_to(x, (rows, *x.shape))  # noqa: E731
    horizon_B = np.full(rows, horizon)
    out = jax.jit(verify)(tile(p), tile(q), draft.astype(np.int32), horizon_B, jax.random.key(1))
    accepted = np.asarray(out.accepted_B)
    assert accepted.max() == horizon
    first = np.where(accepted > 0, draft[:, 0], np.asarray(out.token_B))
    found = np.bincount(first, minlength=n)
    assert ((found - rows * p[0]) ** 2 / (rows * p[0])).sum() < chi_square_bound(n)
    if horizon:  # and the rate of acceptance is Σ min(p, q)
        expected = np.minimum(p[0], q[0]).sum()
        assert (accepted > 0).mean() == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(rows))


@given(seed=st.integers(0, 10_000), same=st.booleans())
def test_what_the_target_cannot_say_is_never_said(seed, same):
    rng, n = np.random.default_rng(seed), 6
    p, q = random_distributions(rng, 1, 3, n), random_distributions(rng, 1, 2, n)
    p[..., rng.integers(n)] = 0
    p /= p.sum(-1, keepdims=True)
    if same:
        q = p[:, :2].copy()
    draft = rng.integers(0, n, (1, 2)).astype(np.int32)
    out = verify(p, q, draft, np.array([2]), jax.random.key(seed))
    a = int(out.accepted_B[0])
    assert all(p[0, t, draft[0, t]] > 0 for t in range(a))
    assert p[0, a, int(out.token_B[0])] > 0


def test_equal_distributions_accept_all():
    rng = np.random.default_rng(3)
    p = np.repeat(random_distributions(rng, 1, 3, 7), 500, 0)
    draft = np.stack([rng.choice(7, 500, p=p[0, t] / p[0, t].sum()) for t in range(2)], 1)
    out = verify(p, p[:, :2], draft.astype(np.int32), np.full(500, 2), jax.random.key(0))
    assert (np.asarray(out.accepted_B) == 2).all()


@given(seed=st.integers(0, 10_000), t=st.integers(0, 3))
def test_greedy_drafts_are_judged_as_distributions_with_one_token_are(seed, t):
    rng, n, rows = np.random.default_rng(seed), 3, 4
    best, draft = rng.integers(0, n, (rows, t + 1)), rng.integers(0, n, (rows, t))
    horizon = rng.integers(0, t + 1, rows)
    draft = np.where(rng.random((rows, t)) < 0.7, best[:, :t], draft).astype(np.int32)
    one_hot = np.eye(n, dtype=np.float32)
    expected = verify(one_hot[best], one_hot[draft], draft, horizon, jax.random.key(seed))
    found = verify_greedy(jnp.asarray(best, jnp.int32), jnp.asarray(draft), jnp.asarray(horizon))
    np.testing.assert_array_equal(found.accepted_B, expected.accepted_B)
    np.testing.assert_array_equal(found.token_B, expected.token_B)
