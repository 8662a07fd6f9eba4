# SPDX-License-Identifier: Apache-2.0
"""The index arithmetic of ragged groups against loops over the rows."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import groups

M, E, TILE = 70, 6, 16


@st.composite
def sizes(draw):
    """[E] sizes that sum to at most M; many zeros."""
    cuts = sorted(draw(st.lists(st.integers(0, M), min_size=E, max_size=E)))
    return np.diff([0, *cuts]).astype(np.int32)


@functools.lru_cache
def jitted(empty: bool):
    return jax.jit(functools.partial(groups.visits, m=M, tile=TILE, empty=empty))


@hypothesis.given(sizes(), st.booleans())
def test_visits_are_the_pairs_that_share_rows(sizes_E, empty):
    group_of_row = np.repeat(np.arange(E), sizes_E)
    pairs = sorted({(g, row // TILE) for row, g in enumerate(group_of_row)})
    got = jax.tree.map(np.asarray, jitted(empty)(jnp.asarray(sizes_E)))
    listed = list(zip(got.group_V.tolist(), got.tile_V.tolist(), strict=True))
    real = listed[: got.count]
    if empty:
        assert sorted({g for g, _ in real}) == list(range(E))
        assert [g for g, _ in real] == sorted(g for g, _ in real)
        real = [(g, t) for g, t in real if sizes_E[g]]
    assert real == pairs
    assert all(0 <= t < -(-M // TILE) for _, t in listed)
    assert got.start_G.tolist() == [0, *np.cumsum(sizes_E)]


fill = jax.jit(functools.partial(groups.padded, m=M, tile=TILE))


@hypothesis.given(sizes())
def test_rows_filled_up_to_tiles_stay_apart(sizes_E):
    slot_M, group_I = map(np.asarray, fill(sizes_E))
    total = sizes_E.sum()
    assert len(set(slot_M[:total])) == total
    np.testing.assert_array_equal(group_I[slot_M[:total] // TILE], np.repeat(np.arange(E), sizes_E))
    assert (slot_M[total:] >= len(group_I) * TILE).all()


def test_the_tail_is_a_group():
    assert groups.with_tail(jnp.array([2, 0, 3]), 9).tolist() == [2, 0, 3, 4]


def test_few_rows_visit_only_the_active_experts():
    """In decoding all rows are one tile: as many visits as experts with rows."""
    sizes_E = np.zeros(256, np.int32)
    sizes_E[[3, 77, 200]] = 2, 1, 5
    got = groups.visits(groups.with_tail(sizes_E, 8), 8, 32)
    assert int(got.count) == 3
    assert got.group_V[:3].tolist() == [3, 77, 200]


@pytest.mark.parametrize(
    ("sizes_E", "tail", "message"),
    [
        ([3, 3], False, r"shape \(2,\) sum to 6, x has 8 rows; .* tail=True"),
        ([3, 6], True, r"sum to 9, x has 8 rows$"),
        ([9, -1], False, "sum to 8"),
        ([8], False, r"group_sizes \(1,\) int32: expected integers \(2,\)"),
        ([4.0, 4.0], False, "float32"),
    ],
)
def test_sizes_that_do_not_fit(sizes_E, tail, message):
    with pytest.raises(ValueError, match=message):
        groups.check(jnp.array(sizes_E), 8, 2, tail=tail)


def test_sizes_that_only_the_program_knows_are_not_checked():
    jax.eval_shape(lambda s: groups.check(s, 8, 2, tail=False), jnp.zeros(2, jnp.int32))
    groups.check(jnp.array([3, 4]), 8, 2, tail=True)


ROWS, EACH, ALIGNED = 16, 3, 8
align = jax.jit(functools.partial(groups.aligned, m=M, multiple=ALIGNED, least=ROWS))
divide = jax.jit(functools.partial(groups.pieces, rows=ROWS, each=EACH), static_argnames="m")


@hypothesis.given(sizes())
def test_rows_moved_to_where_groups_are_aligned(sizes_E):
    slot_M, source_P = map(np.asarray, align(sizes_E))
    total, wide = sizes_E.sum(), len(source_P)
    first = np.cumsum(sizes_E) - sizes_E
    assert not (slot_M[first[sizes_E > 0]] % ALIGNED).any()
    assert wide % ALIGNED == 0
    np.testing.assert_array_equal(source_P[slot_M[:total]], np.arange(total))
    assert (slot_M[total:] >= wide).all()
    assert source_P.min() >= 0
    assert source_P.max() < M


@hypothesis.given(sizes())
def test_pieces_have_rows_of_one_group(sizes_E):
    """Every row of a group is in one of its pieces, and aligned groups have aligned pieces."""
    filled = -(-sizes_E // ALIGNED) * ALIGNED
    m = M + E * ALIGNED + -M % ALIGNED
    count, table = (np.asarray(x) for x in divide(filled, m=m))
    group_of_row = np.repeat(np.arange(E), filled)
    seen = np.full(m, -1)
    for group, skip, rows, *begins in table[: count[0]]:
        for begin in begins if rows == ROWS else begins[:1]:
            assert 0 <= begin <= m - ROWS
            assert begin % ALIGNED == 0
            assert skip % ALIGNED == 0
            own = np.arange(begin + skip, begin + skip + rows)
            assert (group_of_row[own] == group).all()
            seen[own] = group
    np.testing.assert_array_equal(seen[: len(group_of_row)], group_of_row)
    assert (seen[len(group_of_row) :] == -1).all()
