# SPDX-License-Identifier: Apache-2.0
"""Block-scaled grouped matmuls on a TPU: the visits of `grouped_matmul`, the sums of `fp8_matmul`.

For weight gradients the contraction is along the rows, in tiles of one block of them. A tile that
two groups share has one scale a channel, found over the rows of both, and each group's visit
selects its own rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import groups, mosaic, tuning
from pallas_kernels.dispatch import Backend
from pallas_kernels.fp8_matmul import tpu as dense
from pallas_kernels.grouped_matmul import tpu as grouped
from pallas_kernels.scaled import Scaled

OP = "fp8_grouped_matmul"


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
    mosaic.check_block(block)
    (m, k), n, e = x.values.shape, w.values.shape[1 if transposed else 2], len(w.values)
    values_MK, sx_KM = mosaic.pad_rows(x.values, 0), mosaic.pad_rows(x.scale.T, 1)
    mp = len(values_MK)
    tm, tn, tk = tuning.choose(
        OP,
        dict(m=m, n=n, k=k, e=e, b=block, t=int(transposed)),
        backend,
        lambda: (rows_tile(mp, e), min(1024, n), mosaic.divisor(k, block, 2048)),
    )
    dense.check_tiles((tm, tn, tk), (mp, n, k), block)
    steps, step = k // tk, tk // block
    lists = groups.visits(groups.with_tail(sizes_E, mp), mp, tm)
    w_spec = grouped.weight_spec((tn, tk), e, steps, transposed)
    # Scales as [E, steps, blocks of a step, N]: rows beside the weights' rows or columns.
    sw_EKN = jnp.repeat(w.scale.swapaxes(1, 2) if transposed else w.scale, block, -1)
    scales = sx_KM.reshape(steps, step, mp), sw_EKN.reshape(e, steps, step, n)
    how = dict(block=block, transposed=transposed, native=backend.device.fp8 > 0, n_groups=e)
    out = pl.pallas_call(
        functools.partial(_matmul_kernel, **how),
        out_shape=jax.ShapeDtypeStruct((mp, n), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(n, tn), lists.count, steps),
            in_specs=[
                pl.BlockSpec((tm, tk), lambda j, v, s, g, t, _: (t[v], s)),
                pl.BlockSpec((None, step, tm), lambda j, v, s, g, t, _: (s, 0, t[v])),
                w_spec,
                _scale_spec(w_spec, (step, tn), transposed),
            ],
            out_specs=pl.BlockSpec((tm, tn), lambda j, v, s, g, t, _: (t[v], j)),
            scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32)],
        ),
        compiler_params=mosaic.params(
            ("parallel", *["arbitrary"] * 2), dense.need((tm, tn, tk), block, dtype), backend
        ),
        cost_estimate=grouped.cost((m, n, k), e, 1),
        interpret=backend.interpret,
        name=OP,
    )(*lists[:3], values_MK, scales[0], w.values, scales[1])
    return out[:m]


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
    mosaic.check_block(block)
    (k, m), n, e = xt.values.shape, len(dyt.values), len(sizes_E)
    xt, dyt = _padded(xt), _padded(dyt)
    kp, np_ = len(xt.values), len(dyt.values)
    tk, tn = tuning.choose(
        "fp8_grouped_outer",
        dict(m=m, n=n, k=k, e=e, b=block),
        backend,
        lambda: (min(1024, kp), min(1024, np_)),
    )
    dense.check_tiles((tk, tn, block), (kp, np_, m), block)
    list_ = groups.visits(sizes_E, m, block, empty=True)
    tile_of = lambda size, own: pl.BlockSpec(  # noqa: E731
        (size, block), lambda i, j, v, g, t, _: (own(i, j), t[v])
    )
    scale_of = lambda size, own: pl.BlockSpec(  # noqa: E731
        (None, 1, size), lambda i, j, v, g, t, _: (t[v], 0, own(i, j))
    )
    of_k, of_n = lambda i, j: i, lambda i, j: j
    out = pl.pallas_call(
        functools.partial(_outer_kernel, native=backend.device.fp8 > 0),
        out_shape=jax.ShapeDtypeStruct((e, kp, np_), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(kp, tk), pl.cdiv(np_, tn), list_.count),
            in_specs=[tile_of(tk, of_k), scale_of(tk, of_k), tile_of(tn, of_n), scale_of(tn, of_n)],
            out_specs=pl.BlockSpec((None, tk, tn), lambda i, j, v, g, t, _: (g[v], i, j)),
            scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
        ),
        compiler_params=mosaic.params(
            ("parallel", "parallel", "arbitrary"),
            dense.need((tk, tn, block), block, dtype),
            backend,
        ),
        cost_estimate=grouped.cost((m, n, k), e, 1),
        interpret=backend.interpret,
        name="fp8_grouped_outer",
    )(
        list_.group_V,
        list_.tile_V,
        list_.start_G,
        xt.values,
        xt.scale.T[:, None],
        dyt.values,
        dyt.scale.T[:, None],
    )
    return out[:, :k, :n]


def rows_tile(m: int, n_groups: int) -> int:
    """Rows of a tile: about as many as a group has, or all of few; whole registers of scales."""
    if m < mosaic.LANES:
        return m
    return mosaic.round_up(grouped.rows_tile(m, n_groups), mosaic.LANES)


def _padded(x: Scaled) -> Scaled:
    return Scaled(mosaic.pad_rows(x.values, 0), mosaic.pad_rows(x.scale, 0))


def _scale_spec(w_spec, shape, transposed):
    """The scales that go with the block of weights of `w_spec`."""

    def at(*indices):
        group, a, b = w_spec.index_map(*indices)
        step, column = (b, a) if transposed else (a, b)
        return group, step, 0, column

    return pl.BlockSpec((None, None, *shape), at)


def _matmul_kernel(*refs, block: int, transposed: bool, native: bool, n_groups: int):
    *smem, x_ref, sx_ref, w_ref, sw_ref, o_ref, sum_ref = refs
    v, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(smem[0][v] < n_groups)
    def _():
        dense.add_products(
            sum_ref, (x_ref, sx_ref), (w_ref, sw_ref), block, transposed=transposed, native=native
        )

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        grouped.store_own(o_ref, sum_ref, grouped.mine(smem, v, len(sum_ref), 0))


def _outer_kernel(*refs, native):
    *smem, xt_ref, sx_ref, dyt_ref, sdy_ref, o_ref, sum_ref = refs
    v = pl.program_id(2)
    first, last = grouped.first_and_last(smem[0], v, pl.num_programs(2))

    @pl.when(first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    own = grouped.mine(smem, v, xt_ref.shape[1], 1)
    # Quantised values are finite, so zeros in one operand keep other groups' rows out.
    xt = jnp.where(own, xt_ref[...].astype(jnp.float32), 0.0).astype(
        xt_ref.dtype if native else jnp.bfloat16
    )
    partial = dense.dot(xt, dyt_ref[...], True, native)
    sum_ref[...] += partial * sx_ref[...].T * sdy_ref[...]

    @pl.when(last)
    def _():
        o_ref[...] = sum_ref[...].astype(o_ref.dtype)
