# SPDX-License-Identifier: Apache-2.0
"""The router against a loop that does what the paper says, and the rules that balance it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.ops.routing import balance_bias, expert_load, route, sequence_balance_loss

# Sums of up to 32 float32 numbers of order 1.
FLOAT32 = 2e-6
SCALE = 2.5

# (experts, groups, kept groups, experts a token)
SHAPES = [(4, 1, 1, 2), (8, 4, 2, 2), (8, 2, 1, 3), (12, 3, 2, 4), (6, 3, 3, 6), (8, 4, 4, 1)]
route_jit = jax.jit(
    route,
    static_argnames=("num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor"),
)


def routed(logits, bias, shape):
    _, n_group, topk_group, k = shape
    return route_jit(
        np.asarray(logits, np.float32),
        np.asarray(bias, np.float32),
        num_experts_per_tok=k,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=SCALE,
    )


def choose_by_loop(affinity, bias, shape):
    """Experts of one token, best first: groups by their two best, then experts; ties go left."""
    n_experts, n_group, topk_group, k = shape
    size = n_experts // n_group
    choice = affinity + bias
    groups = choice.reshape(n_group, size)
    score = [np.sort(g)[-1] + np.sort(g)[-2] for g in groups]
    kept = sorted(range(n_group), key=lambda g: (-score[g], g))[:topk_group]
    allowed = [e for e in range(n_experts) if e // size in kept]
    return sorted(allowed, key=lambda e: (-choice[e], e))[:k]


# A coarse grid makes ties common; the continuous draw makes them absent; 1e6 drowns the affinities.
LOGITS = {
    "tied": lambda rng, shape: rng.integers(-1, 2, shape),
    "spread": lambda rng, shape: rng.normal(size=shape),
    "saturated": lambda rng, shape: rng.choice([-20.0, 0.0, 20.0], shape),
}
BIASES = {
    "none": lambda rng, n: np.zeros(n),
    "negative": lambda rng, n: -rng.random(n),
    "very_negative": lambda rng, n: -10.0 - rng.random(n),
    "mixed": lambda rng, n: rng.choice([-0.25, 0.0, 0.25], n),
    "huge": lambda rng, n: rng.choice([-1e6, 0.0, 1e6], n),
}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from(SHAPES),
    logits=st.sampled_from(sorted(LOGITS)),
    bias=st.sampled_from(sorted(BIASES)),
)
def test_route_is_the_loop(seed, shape, logits, bias):
    rng = np.random.default_rng(seed)
    x = LOGITS[logits](rng, (5, shape[0])).astype(np.float32)
    b = BIASES[bias](rng, shape[0]).astype(np.float32)
    out = routed(x, b, shape)
    np.testing.assert_allclose(
        out.affinity_TE, 1 / (1 + np.exp(-x.astype(np.float64))), rtol=FLOAT32
    )
    affinity = np.asarray(out.affinity_TE)
    for t, row in enumerate(affinity):
        chosen = choose_by_loop(row, b, shape)
        assert out.index_TK[t].tolist() == chosen
        # Weighed by the affinities alone, whatever the bias did to the choice.
        expected = row[chosen] / (row[chosen].sum() + 1e-20) * SCALE
        np.testing.assert_allclose(out.weight_TK[t], expected, rtol=FLOAT32)
    np.testing.assert_allclose(out.weight_TK.sum(-1), SCALE, rtol=FLOAT32)
    assert out.index_TK.dtype == jnp.int32
    assert out.weight_TK.dtype == jnp.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_are_kept(shape):
    n_experts, n_group, topk_group, k = shape
    rng = np.random.default_rng(0)
    index = np.asarray(
        routed(rng.normal(size=(64, n_experts)), np.zeros(n_experts), shape).index_TK
    )
    groups = index // (n_experts // n_group)
    assert max(len(set(row)) for row in groups) <= topk_group
    assert all(len(set(row)) == k for row in index)


def test_a_bias_changes_the_choice_and_not_the_weights():
    shape, logits = (4, 1, 1, 2), np.array([[2.0, 1.0, 0.0, -1.0]])
    s = 1 / (1 + np.exp(-logits[0]))
    plain = routed(logits, np.zeros(4), shape)
    assert plain.index_TK.tolist() == [[0, 1]]
    pushed = routed(logits, [0, 0, 0, 1e4], shape)
    assert pushed.index_TK.tolist() == [[3, 0]]
    np.testing.assert_allclose(
        pushed.weight_TK[0], s[[3, 0]] / s[[3, 0]].sum() * SCALE, rtol=FLOAT32
    )
    # A bias too small to change the choice changes nothing at all.
    moved = routed(logits, [0.01, 0.02, 0.0, 0.0], shape)
    np.testing.assert_array_equal(moved.weight_TK, plain.weight_TK)


def test_groups_are_scored_by_their_two_best():
    """The best single expert is in group 0; the best pair is in group 1."""
    logits = np.array([[3.0, -3.0, 1.0, 1.0]])
    assert routed(logits, np.zeros(4), (4, 2, 1, 2)).index_TK.tolist() == [[2, 3]]


def test_gradients():
    """None to the bias; to the logits that of the weights with the choice held fixed."""
    rng = np.random.default_rng(1)
    n_experts, n_group, topk_group, k = shape = (8, 4, 2, 2)
    logits = rng.normal(size=(3, n_experts)).astype(np.float32)
    bias = rng.normal(size=n_experts).astype(np.float32)
    cotangent = rng.normal(size=(3, k)).astype(np.float32)
    index = routed(logits, bias, shape).index_TK

    def weights(logits, bias):
        out = route(
            logits,
            bias,
            num_experts_per_tok=k,
            n_group=n_group,
            topk_group=topk_group,
            routed_scaling_factor=SCALE,
        )
        return jnp.sum(out.weight_TK * cotangent) + jnp.sum(out.affinity_TE**2)

    def fixed(logits):
        s = jax.nn.sigmoid(logits)
        chosen = jnp.take_along_axis(s, index, axis=1)
        return jnp.sum(chosen / chosen.sum(1, keepdims=True) * SCALE * cotangent) + jnp.sum(s**2)

    to_logits, to_bias = jax.jit(jax.grad(weights, argnums=(0, 1)))(logits, bias)
    assert not to_bias.any()
    np.testing.assert_allclose(to_logits, jax.jit(jax.grad(fixed))(logits), rtol=1e-5, atol=FLOAT32)


def test_router_works_in_float32():
    out = routed(np.zeros((1, 4)), np.zeros(4), (4, 1, 1, 2))
    low = route(
        jnp.zeros((1, 4), jnp.bfloat16),
        jnp.zeros(4),
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=SCALE,
    )
    assert low.affinity_TE.dtype == low.weight_TK.dtype == jnp.float32
    np.testing.assert_array_equal(low.weight_TK, out.weight_TK)


# -------------------------------------------------------------------------------------- balance


@given(seed=st.integers(0, 2**16))
def test_expert_load_counts_real_tokens(seed):
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(5)[:2] for _ in range(7)])
    valid = rng.random(7) < 0.6
    load = expert_load(jnp.asarray(index), jnp.asarray(valid), 5)
    expected = [sum(valid[t] for t in range(7) if e in index[t]) for e in range(5)]
    assert load.tolist() == expected
    assert load.sum() == 2 * valid.sum()  # dropless: every real token is counted K times


def test_balance_bias_moves_against_the_load():
    bias = np.array([0.5, 0.0, -0.5, 0.0], np.float32)
    moved = balance_bias(bias, np.array([8.0, 0.0, 4.0, 4.0]), 0.001)
    np.testing.assert_allclose(moved - bias, [-0.001, 0.001, 0.0, 0.0], atol=1e-7)
    np.testing.assert_array_equal(balance_bias(bias, np.array([8.0, 0.0, 4.0, 4.0]), 0.0), bias)
    np.testing.assert_array_equal(balance_bias(bias, np.zeros(4), 0.1), bias)


def test_balance_bias_keeps_layers_apart():
    bias = np.zeros((2, 3), np.float32)
    load = np.array([[3.0, 0.0, 0.0], [1000.0, 1000.0, 1006.0]])
    moved = balance_bias(bias, load, 1.0)
    assert moved.tolist() == [[-1.0, 1.0, 1.0], [1.0, 1.0, -1.0]]


def test_the_bias_balances_a_skewed_router():
    """Expert 0 is liked by every token; the rule brings every load near its mean."""
    shape = n_experts, n_group, topk_group, k = (8, 4, 2, 2)
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(256, n_experts)) + np.linspace(2, -2, n_experts)
    logits = jnp.asarray(logits, jnp.float32)

    def load_of(bias):
        out = route(
            logits,
            bias,
            num_experts_per_tok=k,
            n_group=n_group,
            topk_group=topk_group,
            routed_scaling_factor=SCALE,
        )
        return expert_load(out.index_TK, jnp.ones(256), n_experts)

    @jax.jit
    def settle(bias):
        return jax.lax.fori_loop(0, 400, lambda _, b: balance_bias(b, load_of(b), 0.005), bias)

    before = load_of(jnp.zeros(n_experts))
    after = load_of(settle(jnp.zeros(n_experts)))
    mean = 256 * shape[3] / n_experts
    assert before.max() > 2.5 * mean
    assert after.max() < 1.25 * mean
    assert after.min() > 0.75 * mean
    assert before.sum() == after.sum() == 256 * k


def balance_by_loop(affinity, index, valid):
    """Equations 17-20, one row and one expert at a time."""
    n_experts, k = affinity.shape[-1], index.shape[-1]
    losses = []
    for s, chosen, real in zip(affinity.astype(np.float64), index, valid, strict=True):
        tokens = np.flatnonzero(real)
        loss = 0.0
        for e in range(n_experts):
            f = n_experts / (k * max(len(tokens), 1)) * sum(e in chosen[t] for t in tokens)
            p = sum(s[t, e] / s[t].sum() for t in tokens) / max(len(tokens), 1)
            loss += f * p
        losses.append(loss)
    return losses


@given(seed=st.integers(0, 2**16))
def test_sequence_balance_loss_is_the_loop(seed):
    rng = np.random.default_rng(seed)
    affinity = rng.random((3, 5, 4)).astype(np.float32)
    index = np.stack([rng.permutation(4)[:2] for _ in range(15)]).reshape(3, 5, 2)
    valid = rng.random((3, 5)) < 0.7
    valid[2] = False  # a row of padding
    loss = sequence_balance_loss(jnp.asarray(affinity), jnp.asarray(index), jnp.asarray(valid))
    np.testing.assert_allclose(loss, balance_by_loop(affinity, index, valid), rtol=1e-5)
    assert loss[2] == 0.0


def test_sequence_balance_loss_at_its_extremes():
    """1 when the load is perfectly even, E / K when all tokens and all affinity go to K experts."""
    even = np.stack([[t % 4, (t + 1) % 4] for t in range(8)])[None]
    flat = np.full((1, 8, 4), 0.3, np.float32)
    assert sequence_balance_loss(flat, even, np.ones((1, 8)))[0] == pytest.approx(1.0, rel=FLOAT32)
    greedy = np.tile([0, 1], (1, 8, 1))
    sharp = np.tile(np.array([0.5, 0.5, 0.0, 0.0], np.float32), (1, 8, 1))
    assert sequence_balance_loss(sharp, greedy, np.ones((1, 8)))[0] == pytest.approx(
        2.0, rel=FLOAT32
    )


def test_balance_loss_pushes_overused_experts_down():
    index = np.tile([0, 1], (1, 6, 1))
    s = np.full((1, 6, 4), 0.5, np.float32)
    loss = lambda s: sequence_balance_loss(s, index, np.ones((1, 6))).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(s)
    assert (gradient[..., :2] > 0).all()
    assert (gradient[..., 2:] < 0).all()
    # The normalised share is what counts, so scaling all affinities of a token is free.
    np.testing.assert_allclose((gradient * s).sum(-1), 0.0, atol=FLOAT32)
