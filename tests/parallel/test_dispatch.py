# SPDX-License-Identifier: Apache-2.0
"""Experts over a mesh equal a loop over tokens, in value and gradient, at any load."""

import collections
import functools
import itertools

import jax
import numpy as np
import pytest

from r1jax.config import MeshConfig
from r1jax.ops.experts import experts
from r1jax.ops.linear import FP8
from r1jax.parallel import dispatch as D
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.weights import crossed, cut_of
from r1jax.sharding import gather, local, spec

# Sums of the same float32 numbers in another order.
FLOAT32 = 2e-5
TOKENS, DIM, HIDDEN, EXPERTS, K = 320, 3, 4, 8, 2
RANKS = 4
# E4M3 rounds by a sixteenth at most. Tiles of two values of a token, and of two rows.
RECIPE, TILES = FP8(2, False), 0.1


def drawn(dim=DIM):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = (draw(EXPERTS, dim, HIDDEN), draw(EXPERTS, dim, HIDDEN), draw(EXPERTS, HIDDEN, dim))
    return draw(TOKENS, dim), np.abs(draw(TOKENS, K)), weights, draw(TOKENS, dim)


def loads(name):
    """[T, K] experts of each token; the tests below say which of them overflow."""
    rng = np.random.default_rng(1)
    even = np.stack([rng.permutation(EXPERTS)[:K] for _ in range(TOKENS)])
    skewed = np.broadcast_to(np.array([5, 4]), (TOKENS, K))  # both on rank 2
    nowhere = np.where(rng.random((TOKENS, 1)) < 0.5, EXPERTS, even)
    # Tokens 27 to 53 of each rank, the second of three pieces, are skewed; the third is empty.
    place = (np.arange(TOKENS) % (TOKENS // RANKS))[:, None]
    mixed = np.where(place < 27, even, np.where(place < 54, skewed, EXPERTS))
    return dict(even=even, skewed=skewed, nowhere=nowhere, mixed=mixed)[name].astype(np.int32)


def by_hand(x, index, weight, weights):
    """float64, token by token."""
    gate, up, down = (w.astype(np.float64) for w in weights)
    out = np.zeros(x.shape)
    for t, k in np.ndindex(index.shape):
        if (e := index[t, k]) < EXPERTS:
            g = x[t] @ gate[e]
            out[t] += weight[t, k] * ((g / (1 + np.exp(-g)) * (x[t] @ up[e])) @ down[e])
    return out


@functools.cache
def program(sparse, pieces=1, fp8=None):
    """(y, overflow), and the gradient of Σ y·given to tokens, mixing weights and experts."""

    def run(index, given, x, weight, weights):
        rows, held = spec("batch", None), (spec("expert", None, None),) * 3

        def one(x, index, weight, weights):
            how = dict(reach=K, slack=1.5, sparse=sparse, pieces=pieces, fp8=fp8)
            return D.dispatch(x, index, weight, weights, **how)

        cut = local(one, (rows, rows, rows, held), (rows, spec()))
        y, over = cut(x, index, weight, weights)
        return (y * given).sum(), (y, over)

    return jax.jit(jax.grad(run, argnums=(2, 3, 4), has_aux=True))


def found(load, sparse, pieces=1, fp8=None, ranks=RANKS):
    x, weight, weights, given = drawn()
    with jax.set_mesh(make_mesh(MeshConfig(expert=ranks), jax.devices()[:ranks])):
        grads, (y, over) = program(sparse, pieces, fp8)(loads(load), given, x, weight, weights)
    return jax.tree.map(np.asarray, (y, grads, over))


@functools.cache
def expected_grads(load):
    """By the dense implementation on one device, which is tested against loops elsewhere."""
    x, weight, weights, given = drawn()

    def run(x, weight, weights):
        y = experts(x, loads(load), weight, weights, implementation="dense")
        return (y * given).sum()

    return jax.jit(jax.grad(run, argnums=(0, 1, 2)))(x, weight, weights)


@pytest.mark.parametrize("load", ["even", "skewed", "nowhere"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "gathered"])
def test_dispatch_is_the_loop_over_tokens(sparse, load):
    """No token is dropped; the worst load takes the other way and is counted."""
    x, weight, weights, _ = drawn()
    y, grads, over = found(load, sparse)
    expected = by_hand(x, loads(load), weight, weights)
    np.testing.assert_allclose(y, expected, rtol=FLOAT32, atol=FLOAT32)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads(load)), strict=True):
        np.testing.assert_allclose(g, e, rtol=FLOAT32, atol=FLOAT32 * np.abs(e).max())
    assert over == (sparse and load == "skewed")


@pytest.mark.parametrize(("load", "overflown"), [("skewed", 3), ("mixed", 1)])
def test_each_piece_goes_in_its_own_rounds(load, overflown, monkeypatch):
    """Three pieces of 27 tokens, the last one padded; the worst load takes two rounds or more."""
    monkeypatch.setattr(D, "FEW", 8)
    x, weight, weights, _ = drawn()
    y, grads, over = found(load, True, 3)
    np.testing.assert_allclose(
        y, by_hand(x, loads(load), weight, weights), rtol=FLOAT32, atol=FLOAT32
    )
    expected = jax.tree.leaves(expected_grads(load))
    for g, e in zip(jax.tree.leaves(grads), expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=FLOAT32, atol=FLOAT32 * np.abs(e).max())
    assert over == overflown


@pytest.mark.parametrize("load", ["even", "skewed", "nowhere"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "gathered"])
def test_what_is_sent_in_fp8_is_what_one_device_computes(sparse, load):
    """Tiles along the rows of the weights' gradients lie elsewhere on a mesh: other roundings."""
    y, (*rows, held), _ = found(load, sparse, fp8=RECIPE)
    alone, (*expected, wanted), _ = found(load, sparse, fp8=RECIPE, ranks=1)
    for g, e in zip((y, *rows), (alone, *expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=FLOAT32, atol=FLOAT32 * np.abs(e).max())
    for g, e in zip(held, wanted, strict=True):
        assert 0 < np.linalg.norm(g - e) < TILES * np.linalg.norm(e)
    exact, (d_x, *_), _ = found(load, sparse)
    for g, e in ((y, exact), (rows[0], d_x)):
        assert 0 < np.linalg.norm(g - e) < TILES * np.linalg.norm(e)


@pytest.mark.parametrize(
    ("sparse", "load", "block"),
    [
        (True, "skewed", 2),
        (False, "even", 3),
        pytest.param(True, "even", 3, marks=pytest.mark.slow),
        pytest.param(False, "skewed", 2, marks=pytest.mark.slow),
    ],
)
def test_weights_that_crossed_in_blocks_are_those_that_crossed_in_float32(sparse, load, block):
    """Values and gradients, of experts that are cut along D over two devices each: of 6 values
    parts end inside blocks of two, and with blocks of three."""
    x, weight, weights, given = drawn(2 * DIM)
    fp8 = FP8(block, False)

    def run(moved, x, weight, weights):
        rows, inner = spec("batch", None), (("embed", None), ("embed", None), (None, "embed"))
        held = tuple(spec("expert", *own) for own in inner)

        def one(x, index, weight, weights):
            named = (("expert", *own) for own in inner)
            whole = tuple(moved(w, axes) for w, axes in zip(weights, named, strict=True))
            how = dict(reach=K, slack=1.5, sparse=sparse, pieces=2, fp8=fp8)
            return D.dispatch(x, index, weight, whole, **how)

        cut = local(one, (rows, rows, rows, held), (rows, spec()))
        y, over = cut(x, loads(load), weight, weights)
        return (y * given).sum(), (y, over)

    def in_blocks(w, axes):
        return crossed(w, cut_of(axes, 1, block))

    def in_float32(w, axes):
        return gather(w, *axes, along="embed")

    mesh = make_mesh(MeshConfig(expert=RANKS, fsdp=2), jax.devices()[: 2 * RANKS])
    with jax.set_mesh(mesh):
        call = functools.partial(jax.grad, argnums=(1, 2, 3), has_aux=True)
        program = jax.jit(call(run), static_argnums=0)
        found, expected = (program(m, x, weight, weights) for m in (in_blocks, in_float32))
    assert found[1][1] == expected[1][1] == (sparse and load == "skewed")
    for g, e in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(g, e, rtol=FLOAT32, atol=FLOAT32 * np.abs(e).max())


def crossing(jaxpr):
    """(primitive, dtype) of all rows of DIM values that cross devices in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("all_gather", "reduce_scatter", "ragged_all_to_all"):
            x = eqn.invars[0].aval
            if x.ndim > 1 and x.shape[-1] == DIM:
                yield eqn.primitive.name, x.dtype.name
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = inner if hasattr(inner, "eqns") else getattr(inner, "jaxpr", None)
            if inner is not None:
                yield from crossing(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "gathered"])
def test_tokens_and_gradients_cross_in_fp8_and_sums_do_not(sparse):
    """Here the exchange is a gather, by which sums come back as well."""
    x, weight, weights, given = drawn()
    seen = {}
    with jax.set_mesh(make_mesh(MeshConfig(expert=RANKS), jax.devices()[:RANKS])):
        for fp8 in (None, RECIPE):
            run = jax.make_jaxpr(program(sparse, fp8=fp8))
            jaxpr = run(loads("even"), given, x, weight, weights).jaxpr
            seen[fp8] = collections.Counter(crossing(jaxpr))
    there, narrow = ("all_gather", "float32"), ("all_gather", "float8_e4m3fn")
    back = there if sparse else ("reduce_scatter", "float32")
    assert set(seen[None]) == {there, back}
    assert set(seen[RECIPE]) == {narrow, back}
    if sparse:
        # Each once before a loop and once in it, or in it and once behind: tokens there and sums
        # back, then tokens and gradients there and the tokens' gradients back.
        assert seen[RECIPE] == {narrow: 2 * (1 + 2), back: 2 * (1 + 1)}
        assert seen[None] == {there: 2 * (2 + 3)}
    else:
        assert seen[None][there] == seen[RECIPE][narrow]


@pytest.mark.parametrize(("few", "pieces"), [(256, 1), (64, 2), (16, 8)])
def test_pieces_are_no_smaller_than_what_the_least_buffer_holds(few, pieces, monkeypatch):
    """80 tokens of two experts a rank: eight pieces would each have a buffer for 256 pairs."""
    seen = []

    def whole(how, rows, weights):
        seen.append((how[0].computed, rows[0].shape))
        return rows[0], jax.numpy.zeros(len(rows[0]))

    monkeypatch.setattr(D, "FEW", few)
    monkeypatch.setattr(D, "in_rounds", whole)
    x, weight, weights, given = drawn()
    with jax.set_mesh(make_mesh(MeshConfig(expert=RANKS), jax.devices()[:RANKS])):
        # Traced anew: what is known of `program` was made with other buffers.
        run = program.__wrapped__(True, 8)
        jax.eval_shape(run, loads("even"), given, x, weight, weights)
    tokens = TOKENS // RANKS // pieces
    assert set(seen) == {(max(int(1.5 * tokens * K), few), (pieces, tokens, DIM))}


def test_the_skewed_load_would_overflow_and_the_even_one_would_not():
    """What the test above rests on: rows for the fullest rank against the buffer."""
    size = D.room(TOKENS // RANKS, K, RANKS, EXPERTS // RANKS, reach=K, slack=1.5)
    assert size == D.Room(sent=160, received=256, computed=256)

    def fullest(load):
        ranks = loads(load) // (EXPERTS // RANKS)
        return max((ranks == r).any(1).sum() for r in range(RANKS))

    assert fullest("even") < size.received < fullest("skewed")


@pytest.mark.parametrize(
    ("ranks", "reached"), [(1, 1), (4, 4), (8, 4), (16, 8), (64, 8), (6, 6), (256, 8)]
)
def test_groups_bound_the_ranks_that_a_token_reaches(ranks, reached):
    """DeepSeek-V3: 8 of 256 experts, from 4 of 8 groups. 8 ranks hold a group each; 6 cut them."""
    assert D.reach(ranks, 8, 8, 4) == reached


def test_no_choice_of_experts_reaches_more():
    """Every choice of K experts from `topk_group` groups, enumerated."""
    n_group, topk_group, k = 4, 2, 3
    for ranks in (2, 4, 8):
        most = 0
        for chosen in itertools.combinations(range(EXPERTS), k):
            groups = {e // (EXPERTS // n_group) for e in chosen}
            if len(groups) <= topk_group:
                most = max(most, len({e // (EXPERTS // ranks) for e in chosen}))
        assert most <= D.reach(ranks, k, n_group, topk_group)
    assert D.reach(4, k, n_group, topk_group) == 2
