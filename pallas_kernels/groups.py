# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic of ragged groups: which rows belong to which expert, in tiles.

Rows are sorted by group; group g has sizes[g] of them, any number and none. Rows after the last
group are the tail: room that was not needed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Visits(NamedTuple):
    """(group, tile) pairs that share rows, in order of the rows: the steps of a kernel.

    Attributes:
        group_V: [V] int32; entries from `count` on repeat the last.
        tile_V: [V] int32.
        start_G: [G + 1] int32 first row of each group, and the end.
        count: int32 scalar, at most V = ⌈M / tile⌉ + G − 1.
    """

    group_V: jax.Array
    tile_V: jax.Array
    start_G: jax.Array
    count: jax.Array


def visits(sizes_G: jax.Array, m: int, tile: int, *, empty: bool = False) -> Visits:
    """The visits of groups to tiles of `tile` rows.

    Args:
        sizes_G: [G] int32 rows of each group; their sum is at most m.
        m: rows in all.
        tile: rows of a tile.
        empty: a group without rows visits one tile all the same: it has a result to clear.
    """
    n_tiles, n_groups = -(-m // tile), len(sizes_G)
    sizes_G = sizes_G.astype(jnp.int32)
    zero = jnp.zeros((1,), jnp.int32)
    start_G = jnp.concatenate([zero, jnp.cumsum(sizes_G, dtype=jnp.int32)])
    first_G = jnp.minimum(start_G[:-1] // tile, n_tiles - 1)
    last_G = jnp.maximum(start_G[1:] - 1, 0) // tile
    of_group_G = jnp.where(sizes_G > 0, last_G - first_G + 1, 1 if empty else 0)
    end_G = jnp.cumsum(of_group_G, dtype=jnp.int32)
    count = end_G[-1]
    v = jnp.minimum(jnp.arange(n_tiles + n_groups - 1), jnp.maximum(count - 1, 0))
    group_V = jnp.searchsorted(end_G, v, side="right").astype(jnp.int32)
    group_V = jnp.minimum(group_V, n_groups - 1)
    tile_V = first_G[group_V] + v - (end_G - of_group_G)[group_V]
    return Visits(group_V, jnp.clip(tile_V, 0, n_tiles - 1).astype(jnp.int32), start_G, count)


def with_tail(sizes_E: jax.Array, m: int) -> jax.Array:
    """[E + 1]: the tail as one more group."""
    sizes_E = sizes_E.astype(jnp.int32)
    return jnp.append(sizes_E, m - sizes_E.sum())


def padded(sizes_E: jax.Array, m: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """Where rows go when every group's rows are filled up to whole tiles.

    Returns:
        slot_M: [M] row of the filled buffer; beyond its end for the tail.
        group_I: [I] group of each of its tiles, I = min(M, ⌈M / tile⌉ + E): rows fill no more.
    """
    n_tiles = min(m, -(-m // tile) + len(sizes_E))
    tiles_E = -(-sizes_E // tile)
    start_E = jnp.cumsum(sizes_E) - sizes_E
    before_E = jnp.cumsum(tiles_E) - tiles_E
    row = jnp.arange(m)
    group_M = jnp.searchsorted(start_E + sizes_E, row, side="right")
    real = group_M < len(sizes_E)
    group_M = jnp.minimum(group_M, len(sizes_E) - 1)
    slot_M = before_E[group_M] * tile + row - start_E[group_M]
    group_I = jnp.searchsorted(before_E + tiles_E, jnp.arange(n_tiles), side="right")
    group_I = jnp.minimum(group_I, len(sizes_E) - 1)
    return jnp.where(real, slot_M, n_tiles * tile), group_I


def aligned(sizes_G: jax.Array, m: int, multiple: int, least: int) -> tuple[jax.Array, jax.Array]:
    """Where rows go when every group begins at a multiple of some rows.

    Returns:
        slot_M: [M] row of the wider buffer; beyond its end for the tail.
        source_P: [P] row that comes to each of its rows, any row where a group is filled up. P is
            a multiple too, and at least `least`.
    """
    sizes_G = sizes_G.astype(jnp.int32)
    wide = max(-(-(m + len(sizes_G) * (multiple - 1)) // multiple) * multiple, least)
    filled_G = -(-sizes_G // multiple) * multiple
    end_G, filled_end_G = jnp.cumsum(sizes_G), jnp.cumsum(filled_G)
    row = jnp.arange(m)
    group_M = jnp.searchsorted(end_G, row, side="right")
    known_M = jnp.minimum(group_M, len(sizes_G) - 1)
    moved_G = filled_end_G - filled_G - (end_G - sizes_G)
    slot_M = jnp.where(group_M < len(sizes_G), row + moved_G[known_M], wide)
    slot = jnp.arange(wide)
    group_P = jnp.searchsorted(filled_end_G, slot, side="right")
    source_P = slot - moved_G[jnp.minimum(group_P, len(sizes_G) - 1)]
    return slot_M, jnp.clip(source_P, 0, m - 1)


def pieces(sizes_G: jax.Array, m: int, rows: int, each: int) -> tuple[jax.Array, jax.Array]:
    """Results of `each` pieces of `rows` rows, none of which has rows of two groups.

    A group of `rows` or more has whole pieces; the last begins so that it ends with the group. One
    of fewer has a single piece, which begins no later than m − rows.

    Returns:
        count: [1] int32, results.
        table: [I, 3 + each] int32, I = min(m, ⌈m / (rows · each)⌉ + G): the group; which rows of
            the first piece are the group's: how many come before, and how many they are; the first
            row of each piece. A group's pieces beyond its end repeat its last one.
    """
    sizes_G = sizes_G.astype(jnp.int32)
    start_G = jnp.cumsum(sizes_G) - sizes_G
    results_G = -(-sizes_G // (rows * each))
    end_G = jnp.cumsum(results_G)
    i = jnp.arange(min(m, -(-m // (rows * each)) + len(sizes_G)))
    group_I = jnp.minimum(jnp.searchsorted(end_G, i, side="right"), len(sizes_G) - 1)
    size_I, start_I = sizes_G[group_I], start_G[group_I]
    first_I = (i - (end_G - results_G)[group_I]) * rows * each
    few_I = size_I < rows
    last_I = jnp.where(few_I, jnp.minimum(m - rows - start_I, 0), size_I - rows)
    begins = [start_I + jnp.minimum(first_I + rows * p, last_I) for p in range(each)]
    skip_I = jnp.where(few_I, start_I - begins[0], 0)
    table = jnp.stack([group_I, skip_I, jnp.minimum(size_I, rows), *begins], 1)
    return end_G[-1:].astype(jnp.int32), jnp.maximum(table, 0).astype(jnp.int32)


def check(sizes_E: jax.Array, m: int, n_groups: int, *, tail: bool) -> None:
    """Raises ValueError unless sizes are [n_groups] integers that sum to m (to at most m, `tail`).

    What only a running program knows is not checked.
    """
    if sizes_E.shape != (n_groups,) or not jnp.issubdtype(sizes_E.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes {sizes_E.shape} {sizes_E.dtype}: expected integers ({n_groups},)"
        )
    try:
        sizes = np.asarray(sizes_E)
    except jax.errors.TracerArrayConversionError:
        return
    total = int(sizes.sum())
    if sizes.min(initial=0) < 0 or total > m or (total < m and not tail):
        raise ValueError(
            f"group_sizes of shape {sizes.shape} sum to {total}, x has {m} rows"
            + ("" if total > m else "; rows that belong to no group need tail=True")
        )
