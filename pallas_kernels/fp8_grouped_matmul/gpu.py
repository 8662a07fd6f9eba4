# SPDX-License-Identifier: Apache-2.0
"""Block-scaled grouped matmuls on Hopper: the products of `pallas_kernels.hopper`, ragged groups.

Transfers of tiles begin at multiples of 8 rows, and those of scales at multiples of 4, so rows are
first moved to where every group begins at a multiple of 8, and results back: the kernel's own
bytes once more for each, beside weights that are read once. A result has a piece of 64 rows for
each warpgroup. A group's last piece begins 64 rows before its end, so that some rows are computed
twice rather than rows of the next group; only a group of fewer than 64 stores less than a piece.

`wgmma` reads E4M3 only with the contraction last: products of w[E, K, N] over K transpose it first,
those over N do not.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import groups, hopper, mosaic, tuning
from pallas_kernels.dispatch import Backend, Unsupported
from pallas_kernels.hopper import ALIGNED_ROWS, COLUMNS, ROWS, STEP, Plan, Scratch
from pallas_kernels.scaled import Scaled


def matmul(
    x: Scaled,
    w: Scaled,
    sizes_E: jax.Array,
    *,
    block: int,
    transposed: bool,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """[M, N]: row m times its group's w (w[N, K]ᵀ if `transposed`); zeros in the tail."""
    hopper.check_block(block)
    if not transposed:
        w = Scaled(w.values.swapaxes(1, 2), w.scale.swapaxes(1, 2))
    m, (e, n, k) = len(x.values), w.values.shape
    chosen = tuning.choose(
        "fp8_grouped_matmul",
        dict(m=m, n=n, k=k, e=e, b=block, t=int(transposed)),
        backend,
        lambda: (3, 1, 4, 8, 1) if m >= 256 * e else (2, 1, 5, 8, 1),
    )
    plan = Plan(*chosen, block // STEP, True)
    slot_M, source_P = groups.aligned(sizes_E, m, ALIGNED_ROWS, ROWS)
    count, table = groups.pieces(
        mosaic.round_up(sizes_E.astype(jnp.int32), ALIGNED_ROWS),
        len(source_P),
        ROWS,
        plan.warpgroups,
    )
    rows_I = (table[:, 3:, None] + jnp.arange(ROWS)).reshape(-1)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, block=block),
        out_type=jax.ShapeDtypeStruct((len(source_P), n), dtype),
        **hopper.launch(plan, x.values.dtype, dtype, plan.warpgroups, backend),
    )
    scale = x.scale[source_P[rows_I]].T
    y_PN = kernel(count, table, x.values[source_P], scale, w.values, w.scale)
    return y_PN.at[slot_M].get(mode="fill", fill_value=0)


def outer(
    xt: Scaled,
    dyt: Scaled,
    sizes_E: jax.Array,
    *,
    block: int,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """[E, K, N]: xᵀ dy over each group's rows, of the transposes xt [K, M] and dyt [N, M]."""
    hopper.check_block(block)
    (k, m), n, e = xt.values.shape, len(dyt.values), len(sizes_E)
    chosen = tuning.choose(
        "fp8_grouped_outer",
        dict(m=m, n=n, k=k, e=e, b=block),
        backend,
        lambda: (2, 1, 4, 8, 1),
    )
    plan = Plan(*chosen, block // STEP, False)
    if k % plan.rows or n % COLUMNS:
        raise Unsupported(f"[{k=}, {n=}]: results of {plan.rows} by {COLUMNS} do not divide it")
    end_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    kernel = plgpu.kernel(
        functools.partial(_outer_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((e, k, n), dtype),
        **hopper.launch(plan, xt.values.dtype, dtype, 1, backend),
    )
    return kernel(end_E, xt.values, xt.scale.T, dyt.values, dyt.scale.T)


def _outer_kernel(end_gmem, a_gmem, sa_gmem, b_gmem, sb_gmem, o_gmem, *, plan, **scratch):
    scratch = Scratch(**scratch)
    warpgroup, at = jax.lax.axis_index("wg"), jax.lax.axis_index("block")
    blocks, (experts, k, n) = jax.lax.axis_size("block"), o_gmem.shape
    down, across = k // plan.rows, n // COLUMNS
    results = jax.lax.div(experts * down * across - at + (blocks - 1), jnp.int32(blocks))
    fetching, computing = plan.registers

    def place(i):
        """The i-th result's expert, first row and column, and which tokens it sums over."""
        each, i = jnp.int32(down * across), at + i * blocks
        expert, rest = jax.lax.div(i, each), jax.lax.rem(i, each)
        row, column = plgpu.planar_snake(rest, (down, across), 1, plan.width)
        begin = jnp.where(expert > 0, end_gmem[jnp.maximum(expert - 1, 0)], 0)
        return expert, row * plan.rows, column * COLUMNS, (begin, end_gmem[expert])

    def steps_of(tokens):
        """The first step of the tokens, and how many there are."""
        begin, end = tokens
        first = jax.lax.div(begin, jnp.int32(STEP))
        count = jax.lax.div(end + (STEP - 1), jnp.int32(STEP)) - first
        return first, jnp.where(end > begin, count, 0)

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        plgpu.set_max_registers(fetching, action="decrease")

        def result(i, fetched):
            _, row, column, tokens = place(i)
            first, count = steps_of(tokens)
            rows, columns = pl.ds(row, plan.rows), pl.ds(column, COLUMNS)
            sa, sb = sa_gmem.at[:, rows], sb_gmem.at[:, columns]
            gmem = [a_gmem.at[rows]], sa, b_gmem.at[columns], sb
            hopper.fetch(gmem, (fetched, count), plan, scratch, begin=first)
            return fetched + count

        fetched = jax.lax.fori_loop(0, results, result, jnp.int32(0))
        hopper.drain(fetched, plan, scratch)

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        plgpu.set_max_registers(computing, action="increase")

        def result(i, fetched):
            expert, row, column, tokens = place(i)
            first, count = steps_of(tokens)
            within = [token - first * STEP for token in tokens]
            totals = hopper.products(None, (fetched, count), plan, scratch, within=within)
            own = row + warpgroup * plan.pieces * ROWS
            here = o_gmem.at[expert, :, pl.ds(column, COLUMNS)]
            hopper.store(totals, lambda p: here.at[pl.ds(own + p * ROWS, ROWS)], scratch)
            return fetched + count

        jax.lax.fori_loop(0, results, result, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _kernel(count_gmem, pieces_gmem, *refs, plan, block, **scratch):
    a_gmem, sa_gmem, b_gmem, sb_gmem, o_gmem = refs
    scratch = Scratch(**scratch)
    warpgroup, at = jax.lax.axis_index("wg"), jax.lax.axis_index("block")
    blocks, (_, n, k) = jax.lax.axis_size("block"), b_gmem.shape
    steps, grid = k // STEP, (count_gmem[0], n // COLUMNS)
    results = jax.lax.div(grid[0] * grid[1] - at + (blocks - 1), jnp.int32(blocks))
    fetching, computing = plan.registers

    def place(i):
        """The i-th result's row in `pieces`, first column and expert."""
        tile, column = plgpu.planar_snake(at + i * blocks, grid, 1, plan.width)
        return tile, column * COLUMNS, pieces_gmem[tile, 0]

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        plgpu.set_max_registers(fetching, action="decrease")

        @pl.loop(0, results)
        def _(i):
            tile, column, expert = place(i)
            rows = [pl.ds(pieces_gmem[tile, 3 + p], ROWS) for p in range(plan.warpgroups)]
            a, sa = [a_gmem.at[r] for r in rows], sa_gmem.at[:, pl.ds(tile * plan.rows, plan.rows)]
            b = b_gmem.at[expert, pl.ds(column, COLUMNS)]
            hopper.fetch((a, sa, b, None), (i * steps, steps), plan, scratch)

        hopper.drain(results * steps, plan, scratch)

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        plgpu.set_max_registers(computing, action="increase")

        @pl.loop(0, results)
        def _(i):
            tile, column, expert = place(i)
            sb = sb_gmem.at[expert, jax.lax.div(column, jnp.int32(block))]
            totals = hopper.products(sb, (i * steps, steps), plan, scratch)
            begin = pieces_gmem[tile, 3 + warpgroup]
            skip, rows = (pieces_gmem[tile, field] for field in (1, 2))
            here = o_gmem.at[:, pl.ds(column, COLUMNS)]

            @pl.when(rows == ROWS)
            def _():
                hopper.store(totals, lambda _: here.at[pl.ds(begin, ROWS)], scratch)

            @pl.when((rows < ROWS) & (warpgroup == 0))
            def _():
                _store_few(totals[0], here, (begin, skip, rows), scratch)

        plgpu.wait_smem_to_gmem(0)


def _store_few(parts, o_gmem, where, scratch) -> None:
    """`rows` of a piece from `skip` on: a transfer for each power of two in their number.

    All are multiples of ALIGNED_ROWS, as parts of what lies in shared memory have to be.
    """
    begin, skip, rows = where
    own = scratch.o_smem.at[0]
    width = own.shape[-1]
    for column in range(0, COLUMNS, width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        own[...] = hopper.columns_of(parts, column, width).astype(own.dtype)
        plgpu.commit_smem()
        at, size = skip, ROWS // 2
        while size >= ALIGNED_ROWS:
            some = rows & size

            @pl.when(some != 0)
            def _(at=at, size=size, column=column):
                part = pl.ds(pl.multiple_of(at, ALIGNED_ROWS), size)
                target = o_gmem.at[pl.ds(begin + at, size), pl.ds(column, width)]
                plgpu.copy_smem_to_gmem(own.at[part], target)

            at, size = at + some, size // 2
