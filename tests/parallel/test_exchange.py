# SPDX-License-Identifier: Apache-2.0
"""The index arithmetic of the exchange, by hand and against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from r1jax.ops.deal import laid_out, slots, summed
from r1jax.parallel.exchange import Way, exchange, sources, way

# What rank 0, 1 and 2 send to each rank.
COUNTS = np.array([[1, 2, 0], [3, 0, 1], [0, 2, 2]])


def test_slots_by_hand():
    """Three ranks; token 0 goes to 2 and 0, token 1 twice to 0, token 2 to 1 and nowhere."""
    where = slots(jnp.array([[2, 0], [0, 0], [1, 3]]), 3, 6)
    assert where.count_n.tolist() == [2, 1, 1]
    # Rows: (0: tokens 0 and 1), (1: token 2), (2: token 0), and two that are not used.
    assert where.token_S.tolist() == [0, 1, 2, 0, 3, 3]
    assert where.slot_TK.tolist() == [[3, 0], [1, 6], [2, 6]]


def test_the_way_there_and_back_by_hand():
    there = Way(*(np.asarray(x).tolist() for x in way(jnp.array(COUNTS), 1)))
    # Rank 1 sends rows 0, 1, 2 to rank 0, behind rank 0's one, and row 3 to rank 2, as the first.
    assert there == Way([0, 3, 3], [3, 0, 1], [1, 2, 0], [2, 0, 2])
    back = Way(*(np.asarray(x).tolist() for x in way(jnp.array(COUNTS).T, 1)))
    # What it got, two rows of rank 0 and two of rank 2, goes back to where it lay there.
    assert back == Way([0, 2, 2], [2, 0, 2], [1, 3, 0], [3, 0, 1])


def moved(counts_nn, rows_of, size):
    """`jax.lax.ragged_all_to_all` as loops over ranks, by the arguments of `way`."""
    n = len(counts_nn)
    ways = [way(jnp.array(counts_nn), r) for r in range(n)]
    out = np.zeros((n, size), rows_of[0].dtype)
    for s, r in np.ndindex(n, n):
        begin, there, rows = ways[s].begin_n[r], ways[s].there_n[r], ways[s].send_n[r]
        assert rows == ways[r].receive_n[s]
        out[r, there : there + rows] = rows_of[s][begin : begin + rows]
    return out


@pytest.mark.parametrize("seed", range(3))
def test_the_emulation_finds_the_rows_that_the_way_sends(seed):
    """`sources`, which tests on CPU rest on, against the semantics of the primitive."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, (4, 4)) * rng.integers(0, 2, (4, 4))
    rows_of = [100 * s + np.arange(1, counts[s].sum() + 1) for s in range(4)]
    expected = moved(counts, rows_of, 20)
    for me in range(4):
        rank, row, real = sources(jnp.array(counts), me, 20)
        assert real.sum() == counts[:, me].sum()
        found = [rows_of[s][i] if ok else 0 for s, i, ok in zip(rank, row, real, strict=True)]
        np.testing.assert_array_equal(found, expected[me])
    # And back: every row to where it lay.
    back = moved(counts.T, list(expected), 20)
    for s in range(4):
        np.testing.assert_array_equal(back[s, : len(rows_of[s])], rows_of[s])


def test_exchange_moves_rows_there_and_back():
    mesh = jax.make_mesh((3,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:3])
    counts, cut = jnp.array(COUNTS), PartitionSpec("expert")

    def run(x, back):
        how = (counts.T, 5) if back else (counts, 6)
        return jax.shard_map(
            lambda x: exchange(x[0], *how, "expert", False)[None],
            mesh=mesh, in_specs=cut, out_specs=cut,
        )(x)  # fmt: skip

    rng = np.random.default_rng(0)
    there, back = (rng.normal(size=(3, n, 2)).astype(np.float32) for n in (5, 6))
    for x, counts_nn, size in ((there, COUNTS, 6), (back, COUNTS.T, 5)):
        out = jax.jit(run, static_argnums=1)(x, size == 5)
        for d in range(2):
            expected = moved(counts_nn, [x[s, :, d] for s in range(3)], size)
            np.testing.assert_array_equal(out[..., d], expected)


def test_laid_out_and_summed_are_each_others_gradient():
    rng = np.random.default_rng(0)
    where = slots(jnp.array(rng.integers(0, 5, (7, 3))), 4, 16)  # rank 4: nowhere
    assert (where.token_S == 7).any()
    x, y = rng.normal(size=(7, 2)), rng.normal(size=(16, 2))
    used = np.asarray(where.token_S) < 7
    place = np.zeros((16, 7))
    place[np.flatnonzero(used), np.asarray(where.token_S)[used]] = 1.0
    with jax.enable_x64(True):
        rows, pull = jax.vjp(lambda x: laid_out(x, where), jnp.array(x))
        np.testing.assert_allclose(rows[used], (place @ x)[used])
        np.testing.assert_allclose(pull(jnp.array(y))[0], place.T @ y, rtol=1e-6)
        tokens, pull = jax.vjp(lambda y: summed(y, where), jnp.array(y))
        np.testing.assert_allclose(tokens, place.T @ y, rtol=1e-6)
        np.testing.assert_allclose(pull(jnp.array(x))[0], place @ x)
