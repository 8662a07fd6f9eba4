# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul on a TPU: a grid step for each (group, tile of rows) that share rows.

Rows are not moved: a tile that two groups share is visited twice and each visit stores its own
rows. The lists of visits are computed by XLA and prefetched as scalars; the grid is as long as the
list, so experts without rows cost nothing and their weights are not read. With few rows (decoding)
all of them are one tile, the visits are the active experts, and each one's weights are read once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import groups, mosaic, tuning
from pallas_kernels.dispatch import Backend

OP = "grouped_matmul"


def matmul(
    x_MK: jax.Array,
    w_EKN: jax.Array,
    sizes_E: jax.Array,
    *,
    transposed: bool,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """[M, N]: row m times its group's w (w[N, K]ᵀ if `transposed`); zeros in the tail."""
    (m, k), n = x_MK.shape, w_EKN.shape[1 if transposed else 2]
    size = x_MK.dtype.itemsize
    tm, tn, tk = tuning.choose(
        OP,
        dict(m=m, n=n, k=k, e=len(w_EKN), t=int(transposed), bits=8 * size),
        backend,
        lambda: heuristic((m, n, k), len(w_EKN), size),
    )
    steps = steps_of(k, tk)
    list_ = groups.visits(groups.with_tail(sizes_E, m), m, tm)
    w_spec = weight_spec((tn, tk), len(w_EKN), steps, transposed)
    return pl.pallas_call(
        functools.partial(_matmul_kernel, transposed=transposed, n_groups=len(w_EKN)),
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(n, tn), list_.count, steps),
            in_specs=[pl.BlockSpec((tm, tk), lambda j, v, s, g, t, _: (t[v], s)), w_spec],
            out_specs=pl.BlockSpec((tm, tn), lambda j, v, s, g, t, _: (t[v], j)),
            scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32)],
        ),
        compiler_params=mosaic.params(
            ("parallel", "arbitrary", "arbitrary"),
            2 * (tm + tn) * tk * size + tm * tn * 16,
            backend,
        ),
        cost_estimate=cost((m, n, k), len(w_EKN), size),
        interpret=backend.interpret,
        name=OP,
    )(list_.group_V, list_.tile_V, list_.start_G, x_MK, w_EKN)


def outer(
    x_MK: jax.Array,
    dy_MN: jax.Array,
    sizes_E: jax.Array,
    *,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """[E, K, N]: xᵀ dy over each group's rows."""
    (m, k), n, e = x_MK.shape, dy_MN.shape[1], len(sizes_E)
    size = x_MK.dtype.itemsize
    tm, tk, tn = tuning.choose(
        "grouped_outer",
        dict(m=m, n=n, k=k, e=e, bits=8 * size),
        backend,
        lambda: (rows_tile(m, e), side_tile(k), side_tile(n)),
    )
    list_ = groups.visits(sizes_E, m, tm, empty=True)
    return pl.pallas_call(
        _outer_kernel,
        out_shape=jax.ShapeDtypeStruct((e, k, n), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(k, tk), pl.cdiv(n, tn), list_.count),
            in_specs=[
                pl.BlockSpec((tm, tk), lambda i, j, v, g, t, _: (t[v], i)),
                pl.BlockSpec((tm, tn), lambda i, j, v, g, t, _: (t[v], j)),
            ],
            out_specs=pl.BlockSpec((None, tk, tn), lambda i, j, v, g, t, _: (g[v], i, j)),
            scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
        ),
        compiler_params=mosaic.params(
            ("parallel", "parallel", "arbitrary"),
            2 * tm * (tk + tn) * size + tk * tn * 16 + tm * (tk + tn) * 4,
            backend,
        ),
        cost_estimate=cost((m, n, k), e, size),
        interpret=backend.interpret,
        name="grouped_outer",
    )(list_.group_V, list_.tile_V, list_.start_G, x_MK, dy_MN)


def heuristic(sizes: tuple[int, int, int], n_groups: int, itemsize: int) -> tuning.Tiles:
    """(tm, tn, tk): tiles about as long as a group; few rows are one tile beside wide weights."""
    m, n, k = sizes
    contraction = k if k % mosaic.LANES else mosaic.divisor(k, mosaic.LANES, 4096 // itemsize)
    return rows_tile(m, n_groups), side_tile(n), contraction


def rows_tile(m: int, n_groups: int) -> int:
    """Rows of a tile: about as many as a group has."""
    if m <= 256:  # decoding
        return mosaic.round_up(m, 32)
    mean = m // n_groups
    return 512 if mean >= 1024 else 256 if mean >= 512 else 128


def side_tile(size: int) -> int:
    """Columns of a tile."""
    return size if size <= 1024 else 1024


def steps_of(k: int, tk: int) -> int:
    """Tiles along the contraction; ValueError where they do not cover it exactly."""
    if k % tk or (tk % mosaic.LANES and tk != k):
        raise ValueError(f"{tk=} must divide {k=} and be a multiple of {mosaic.LANES} or all of it")
    return k // tk


def weight_spec(
    tiles: tuple[int, int], n_groups: int, steps: int, transposed: bool
) -> pl.BlockSpec:
    """The block of a group's weights. The tail (group `n_groups`) reads nothing new."""
    tn, tk = tiles

    def at(j, v, s, *smem):
        group_V = smem[0]
        before = jnp.maximum(v - 1, 0)
        tail = group_V[v] == n_groups
        group = jnp.where(tail, jnp.minimum(group_V[before], n_groups - 1), group_V[v])
        step = jnp.where(tail, steps - 1, s)
        return (group, j, step) if transposed else (group, step, j)

    return pl.BlockSpec((None, tn, tk) if transposed else (None, tk, tn), at)


def mine(smem: tuple, v: jax.Array, tile: int, axis: int) -> jax.Array:
    """Which rows of the tile of visit v are the visiting group's, along `axis` of two.

    Args:
        smem: the lists of `groups.Visits`: group_V, tile_V, start_G.
        v: the visit.
        tile: rows of a tile.
        axis: 0: [tile, 1], 1: [1, tile].
    """
    group_V, tile_V, start_G = smem
    shape = (tile, 1) if axis == 0 else (1, tile)
    row = tile_V[v] * tile + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    group = group_V[v]
    return (row >= start_G[group]) & (row < start_G[group + 1])


def first_and_last(group_V, v, count) -> tuple[jax.Array, jax.Array]:
    """Whether visit v is its group's first, its last."""
    group = group_V[v]
    first = (v == 0) | (group_V[jnp.maximum(v - 1, 0)] != group)
    last = (v == count - 1) | (group_V[jnp.minimum(v + 1, count - 1)] != group)
    return first, last


def store_own(o_ref: jax.Ref, sum_ref: jax.Ref, own: jax.Array) -> None:
    """o = sum in the rows of the visiting group; the others stay."""
    kept = o_ref[...].astype(jnp.float32)
    o_ref[...] = jnp.where(own, sum_ref[...], kept).astype(o_ref.dtype)


def _precision(dtype):
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _matmul_kernel(*refs, transposed, n_groups):
    *smem, x_ref, w_ref, o_ref, sum_ref = refs
    v, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(smem[0][v] < n_groups)
    def _():
        sum_ref[...] += jax.lax.dot_general(
            x_ref[...],
            w_ref[...],
            (((1,), (1 if transposed else 0,)), ((), ())),
            precision=_precision(x_ref.dtype),
            preferred_element_type=jnp.float32,
        )

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        store_own(o_ref, sum_ref, mine(smem, v, len(sum_ref), 0))


def _outer_kernel(*refs):
    *smem, x_ref, dy_ref, o_ref, sum_ref = refs
    v = pl.program_id(2)
    first, last = first_and_last(smem[0], v, pl.num_programs(2))

    @pl.when(first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    own = mine(smem, v, len(x_ref), 0)
    # Other groups' rows, and what lies beyond the last row: selected away, for NaN · 0 is NaN.
    only = lambda ref: jnp.where(own, ref[...].astype(jnp.float32), 0.0)  # noqa: E731
    sum_ref[...] += jax.lax.dot_general(
        only(x_ref).astype(x_ref.dtype),
        only(dy_ref).astype(dy_ref.dtype),
        (((0,), (0,)), ((), ())),
        precision=_precision(x_ref.dtype),
        preferred_element_type=jnp.float32,
    )

    @pl.when(last)
    def _():
        o_ref[...] = sum_ref[...].astype(o_ref.dtype)


def cost(sizes: tuple[int, int, int], n_groups: int, itemsize: int) -> pl.CostEstimate:
    """What XLA's scheduler is told: each matrix is read once."""
    m, n, k = sizes
    return pl.CostEstimate(
        flops=2 * m * n * k,
        transcendentals=0,
        bytes_accessed=(m * (k + n) + min(m, n_groups) * k * n) * itemsize,
    )
