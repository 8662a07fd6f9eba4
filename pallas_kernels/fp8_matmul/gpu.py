# SPDX-License-Identifier: Apache-2.0
"""Block-scaled matmul on Hopper: the products of `pallas_kernels.hopper` over a dense result.

`wgmma` reads E4M3 only with the contraction last, so `fprop` transposes the weight first. Weights
that lie [N, K], as checkpoints have them, multiply by `dgrad` without.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, mosaic, tuning
from pallas_kernels.dispatch import Backend
from pallas_kernels.hopper import ALIGNED_COLUMNS, ALIGNED_ROWS, COLUMNS, ROWS, STEP, Plan, Scratch
from pallas_kernels.scaled import Scaled


def fprop(x: Scaled, w: Scaled, *, block: int, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """[M, N] = x[M, K] w[K, N], x in tiles and w in blocks."""
    w = Scaled(w.values.T, w.scale.T)
    return _matmul(x, w, block, dtype, backend=backend, one_scale=True)


def dgrad(dy: Scaled, w: Scaled, *, block: int, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """[M, K] = dy[M, N] w[K, N]ᵀ, dy in tiles and w in blocks."""
    return _matmul(dy, w, block, dtype, backend=backend, one_scale=True)


def wgrad(xt: Scaled, dyt: Scaled, *, block: int, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """[K, N] = xt[K, M] dyt[N, M]ᵀ, both in tiles along the tokens."""
    return _matmul(xt, dyt, block, dtype, backend=backend, one_scale=False)


def _matmul(a, b, block, dtype, *, backend, one_scale):
    """a[M, K] b[N, K]ᵀ; a in tiles, b in tiles or (`one_scale`) in blocks."""
    hopper.check_block(block)
    m, n, k = len(a.values), len(b.values), a.values.shape[1]
    chosen = tuning.choose(
        "fp8_matmul",
        dict(m=m, n=n, k=k, b=block, t=2 - one_scale),
        backend,
        lambda: (3, 1, 4, 8, 1 + one_scale) if m > 192 else (2, 2, 3, 8, 1),
    )
    plan = Plan(*chosen, block // STEP, one_scale)
    if backend.interpret:
        plan = plan._replace(cluster=1)
    rows = plan.rows * plan.cluster if backend.interpret else ALIGNED_ROWS
    columns = COLUMNS if backend.interpret else ALIGNED_COLUMNS
    operands = (
        _filled(a.values, rows, 0),
        _filled(a.scale.T, rows, 1),
        _filled(b.values, columns, 0),
        b.scale if one_scale else _filled(b.scale.T, columns, 1),
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, block=block),
        out_type=jax.ShapeDtypeStruct((len(operands[0]), len(operands[2])), dtype),
        **hopper.launch(plan, a.values.dtype, dtype, 1, backend),
    )
    return kernel(*operands)[:m, :n]


def _filled(x, multiple, axis):
    """Zeros up to a multiple: what a transfer has beyond a matrix is zeros."""
    fill = mosaic.round_up(x.shape[axis], multiple) - x.shape[axis]
    return jnp.pad(x, [(0, fill if i == axis else 0) for i in range(2)]) if fill else x


def _kernel(a_gmem, sa_gmem, b_gmem, sb_gmem, o_gmem, *, plan, block, **scratch):
    scratch = Scratch(**scratch)
    warpgroup, at = jax.lax.axis_index("wg"), jax.lax.axis_index("block")
    (m, k), n = a_gmem.shape, b_gmem.shape[0]
    steps, blocks = k // STEP, jax.lax.axis_size("block")
    grid = pl.cdiv(m, plan.rows * plan.cluster), pl.cdiv(n, COLUMNS)
    results = jax.lax.div(grid[0] * grid[1] - at + blocks - 1, jnp.int32(blocks))

    def place(i):
        """First row and column of the i-th result."""
        row, column = plgpu.planar_snake(at + i * blocks, grid, 1, plan.width)
        if plan.cluster > 1:
            row = row * plan.cluster + jax.lax.axis_index("cluster")
        return row * plan.rows, column * COLUMNS

    fetching, computing = plan.registers

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        plgpu.set_max_registers(fetching, action="decrease")

        @pl.loop(0, results)
        def _(i):
            row, column = place(i)
            rows, columns = pl.ds(row, plan.rows), pl.ds(column, COLUMNS)
            sb = None if plan.one_scale else sb_gmem.at[:, columns]
            gmem = [a_gmem.at[rows]], sa_gmem.at[:, rows], b_gmem.at[columns], sb
            hopper.fetch(gmem, (i * steps, steps), plan, scratch)

        hopper.drain(results * steps, plan, scratch)

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        plgpu.set_max_registers(computing, action="increase")

        @pl.loop(0, results)
        def _(i):
            row, column = place(i)
            sb = sb_gmem.at[jax.lax.div(column, jnp.int32(block))] if plan.one_scale else None
            totals = hopper.products(sb, (i * steps, steps), plan, scratch)
            own = row + warpgroup * plan.pieces * ROWS
            hopper.store(
                totals,
                lambda piece: o_gmem.at[pl.ds(own + piece * ROWS, ROWS), pl.ds(column, COLUMNS)],
                scratch,
            )

        plgpu.wait_smem_to_gmem(0)
