# SPDX-License-Identifier: Apache-2.0
"""The block-scaled product of Hopper's E4M3 kernels: `wgmma` over 128 of K, then float32.

A tensor core's own sum of E4M3 products keeps about 14 bits, so as in DeepSeek-V3 section 3.3.2 no
sum is longer than 128: each partial result goes to registers, times both scales, and is added
there. Two or three warpgroups compute, one more fetches operands, which go round the stages of
shared memory. The blocks of a kernel stay and take one result after the other, so that the next
one's operands come while the last one leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.dispatch import Backend, Unsupported

MULTIPROCESSORS = 132
ROWS, STEP = 64, 128  # rows of a `wgmma`, K of a partial sum
COLUMNS = 128  # of a result: twice as many sums do not fit the registers
# Of a tile in shared memory: where a transfer may begin, and what a matrix is a multiple of.
ALIGNED_ROWS, ALIGNED_COLUMNS = 8, 64


class Plan(NamedTuple):
    """What is static in a product.

    Attributes:
        warpgroups: that compute, 2 or 3.
        pieces: of 64 rows that each has of a result.
        stages: of operands in shared memory.
        width: columns of results that are worked on together, for the L2 cache.
        cluster: blocks that share the operand b of their results.
        per_scale: steps to a scale.
        one_scale: b has one scale for all columns of a result.
    """

    warpgroups: int
    pieces: int
    stages: int
    width: int
    cluster: int
    per_scale: int
    one_scale: bool

    @property
    def rows(self) -> int:
        """Of a block's result."""
        return self.warpgroups * self.pieces * ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that fetches and of one that computes: 512 for one of each warpgroup."""
        return (40, 232) if self.warpgroups == 2 else (24, 160)


class Scratch(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
        a_smem: [stages, rows, 128].
        sa_smem: [stages, rows] float32.
        b_smem: [stages, COLUMNS, 128].
        sb_smem: [stages, COLUMNS] float32; one row that nothing reads if `one_scale`.
        o_smem: [warpgroups, 64, 128 bytes].
        come: a stage's operands are there.
        used: the warpgroups are done with a stage.
    """

    a_smem: Any
    sa_smem: Any
    b_smem: Any
    sb_smem: Any
    o_smem: Any
    come: Any
    used: Any


def swizzled(dtype: jnp.dtype) -> tuple:
    """How matrices lie in shared memory: no two threads of a transfer meet in a bank."""
    bytes_ = 128
    tile = (8, bytes_ // jnp.dtype(dtype).itemsize)
    return plgpu.TilingTransform(tile), plgpu.SwizzleTransform(bytes_)


def simulation(backend: Backend) -> dict[str, Any]:
    """What `plgpu.kernel` takes to run on CPU, or nothing.

    Raises:
        Unsupported: this JAX cannot.
    """
    if not backend.interpret:
        return {}
    if (params := _compat.gpu_interpret_params()) is None:
        raise Unsupported("this JAX cannot simulate Mosaic GPU on CPU; use 'xla'")
    return dict(interpret=params)


def check_block(block: int) -> None:
    """Raises Unsupported unless the products have this block size."""
    if block % STEP:
        raise Unsupported(f"{block=}: GPU kernels have multiples of {STEP}; 'xla' has any")


def launch(plan: Plan, values: jnp.dtype, out: jnp.dtype, shares: int, backend: Backend) -> dict:
    """Arguments of `plgpu.kernel`, shared memory among them.

    Args:
        plan: of the products.
        values, out: dtypes of operands and result.
        shares: in which a's rows come.
        backend: the simulation takes one block.
    """
    copies = shares + (2 if plan.one_scale else 3)
    smem = lambda shape, dtype: plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))  # noqa: E731
    barriers = dict(num_arrivals=plan.warpgroups, num_barriers=plan.stages)
    shared = plan.cluster > 1
    scratch = Scratch(
        a_smem=smem((plan.stages, plan.rows, STEP), values),
        sa_smem=plgpu.SMEM((plan.stages, plan.rows), jnp.float32),
        b_smem=smem((plan.stages, COLUMNS, STEP), values),
        sb_smem=plgpu.SMEM((1 if plan.one_scale else plan.stages, COLUMNS), jnp.float32),
        o_smem=smem((plan.warpgroups, ROWS, 128 // jnp.dtype(out).itemsize), out),
        come=plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
        used=plgpu.ClusterBarrier(collective_axes=("cluster",), **barriers)
        if shared
        else plgpu.Barrier(**barriers),
    )
    return dict(
        scratch_types=scratch._asdict(),
        grid=(1 if backend.interpret else MULTIPROCESSORS // plan.cluster,),
        grid_names=("block",),
        **(dict(cluster=(plan.cluster,), cluster_names=("cluster",)) if shared else {}),
        num_threads=plan.warpgroups + 1,
        thread_name="wg",
        compiler_params=_compat.gpu_compiler_params(),
        **simulation(backend),
    )


def fetch(gmem: tuple, steps: tuple, plan: Plan, scratch: Scratch, *, begin: Any = 0) -> None:
    """A result's operands, step by step, into stages that the warpgroups are done with.

    Args:
        gmem: of this result a [rows, K] as a list of equal shares of the rows, its scales
            [K / b, rows], from a multiple of 4 on, for a transfer begins at one of 16 bytes,
            b [COLUMNS, K], and its scales [K / b, COLUMNS] unless `one_scale`.
        steps: of the results before, and of this one.
        begin: the first step of K.
    """
    a_gmem, sa_gmem, b_gmem, sb_gmem = gmem
    (first, count), share = steps, plan.rows // len(a_gmem)
    shared = dict(collective_axes="cluster") if plan.cluster > 1 else {}

    @pl.loop(0, count)
    def _(step):
        stage = jax.lax.rem(first + step, jnp.int32(plan.stages))

        @pl.when(first + step >= plan.stages)
        def _():
            plgpu.barrier_wait(scratch.used.at[stage])

        come = scratch.come.at[stage]
        k = pl.ds((begin + step) * STEP, STEP)
        scale = jax.lax.div(begin + step, jnp.int32(plan.per_scale))
        for i, a in enumerate(a_gmem):
            rows = pl.ds(i * share, share)
            plgpu.copy_gmem_to_smem(a.at[:, k], scratch.a_smem.at[stage, rows], come)
        plgpu.copy_gmem_to_smem(sa_gmem.at[scale], scratch.sa_smem.at[stage], come)
        plgpu.copy_gmem_to_smem(b_gmem.at[:, k], scratch.b_smem.at[stage], come, **shared)
        if not plan.one_scale:
            plgpu.copy_gmem_to_smem(sb_gmem.at[scale], scratch.sb_smem.at[stage], come)


def drain(fetched: jax.Array, plan: Plan, scratch: Scratch) -> None:
    """Waits until the last stages are used: another block of the cluster may still say so."""

    @pl.loop(jnp.maximum(fetched - plan.stages, 0), fetched)
    def _(step):
        plgpu.barrier_wait(scratch.used.at[jax.lax.rem(step, jnp.int32(plan.stages))])


def products(
    sb_gmem: Any, steps: tuple, plan: Plan, scratch: Scratch, *, within: tuple | None = None
) -> tuple[tuple[jax.Array, ...], ...]:
    """This warpgroup's pieces [64, COLUMNS] of a result, each as parts of its columns.

    They are float32 in registers. Parts are as wide as what leaves at once, so that scales of some
    columns need registers at a time; with one scale for all columns, a piece is one part.

    Args:
        sb_gmem: [K / b] scales of b, read here if `one_scale`.
        steps: as in `fetch`.
        within: first and last + 1 of the K of these steps to sum over, if not over all.
    """
    first, count = steps
    scale_of = lambda step: (  # noqa: E731
        sb_gmem[jax.lax.div(step, jnp.int32(plan.per_scale))] if plan.one_scale else jnp.float32(0)
    )

    def step(i, carry):
        totals, sb = carry
        stage = jax.lax.rem(first + i, jnp.int32(plan.stages))
        plgpu.barrier_wait(scratch.come.at[stage])
        if within is not None:
            _clear(stage, [bound - i * STEP for bound in within], plan, scratch)
        ahead = scale_of(jnp.minimum(i + 1, count - 1))  # it comes from main memory
        totals = tuple(
            _added(parts, piece, stage, sb, plan=plan, scratch=scratch)
            for piece, parts in enumerate(totals)
        )
        plgpu.barrier_arrive(scratch.used.at[stage])
        return totals, ahead

    width = COLUMNS if plan.one_scale else scratch.o_smem.shape[-1]
    zero = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
    start = ((zero,) * (COLUMNS // width),) * plan.pieces, scale_of(jnp.int32(0))
    return jax.lax.fori_loop(0, count, step, start)[0]


def _clear(stage, within, plan, scratch) -> None:
    """Zeros in this warpgroup's rows of a outside of `within`."""
    own = plan.pieces * ROWS
    rows = pl.ds(jax.lax.axis_index("wg") * own, own)
    begin, end = within

    @pl.when((begin > 0) | (end < STEP))
    def _():
        layout = plgpu.Layout.WGMMA_8BIT
        a = _compat.load(scratch.a_smem.at[stage, rows], layout).astype(jnp.float32)
        k = plgpu.broadcasted_iota(jnp.int32, a.shape, 1, layout=layout)
        kept = jnp.where((k >= begin) & (k < end), a, 0.0)
        scratch.a_smem[stage, rows] = kept.astype(scratch.a_smem.dtype)
        plgpu.commit_smem()


def _added(parts, piece, stage, sb, *, plan, scratch):
    """The parts of a piece plus its partial sums, scaled."""
    rows = pl.ds((jax.lax.axis_index("wg") * plan.pieces + piece) * ROWS, ROWS)
    width = parts[0].shape[1]
    spread = lambda x, axis: jax.lax.broadcast_in_dim(x, (ROWS, width), (axis,))  # noqa: E731

    def product(acc_ref):
        b = _compat.transposed(scratch.b_smem.at[stage])
        plgpu.wgmma(acc_ref, scratch.a_smem.at[stage, rows], b)
        sa = _compat.load(scratch.sa_smem.at[stage, rows], plgpu.Layout.WGMMA.reduce(1))
        return acc_ref[...], sa

    def scale(column):
        if plan.one_scale:
            return spread(sa * sb, 0)
        columns = scratch.sb_smem.at[stage, pl.ds(column, width)]
        return spread(sa, 0) * spread(_compat.load(columns, plgpu.Layout.WGMMA.reduce(0)), 1)

    partial, sa = pl.run_scoped(product, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
    columns = range(0, COLUMNS, width)
    return tuple(
        part + partial[:, column : column + width] * scale(column)
        for part, column in zip(parts, columns, strict=True)
    )


def store(
    totals: Sequence[Sequence[jax.Array]], place: Callable[[int], Any], scratch: Scratch
) -> None:
    """This warpgroup's pieces through shared memory to place(piece), [64, COLUMNS]."""
    own = scratch.o_smem.at[jax.lax.axis_index("wg")]
    width = own.shape[-1]
    for piece, parts in enumerate(totals):
        for column in range(0, COLUMNS, width):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own[...] = columns_of(parts, column, width).astype(own.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own, place(piece).at[:, pl.ds(column, width)])


def columns_of(parts: Sequence[jax.Array], column: int, width: int) -> jax.Array:
    """[64, width] of a piece from a column on."""
    each = parts[0].shape[1]
    begin = column % each
    return parts[column // each][:, begin : begin + width]
