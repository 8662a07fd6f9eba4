# SPDX-License-Identifier: Apache-2.0
"""Block-scaled matmul on Hopper: E4M3 `wgmma` over 128 of K, then scaled and summed in float32.

A tensor core's own sum of E4M3 products keeps about 14 bits, so as in DeepSeek-V3 section 3.3.2 no
sum is longer than 128: each partial result goes to registers, times both scales, and is added
there. `wgmma` reads E4M3 only with the contraction last, so `fprop` transposes the weight first.

Two warpgroups compute 64 rows each of a [128, 128] result; a third fetches operands. Lowered for
CUDA and simulated in the tests; not yet run on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, mosaic
from pallas_kernels.dispatch import Backend, Unsupported
from pallas_kernels.fp8_quantize.gpu import swizzled
from pallas_kernels.scaled import Scaled

ROWS, SIDE, STEP = 64, 128, 128  # rows of a warpgroup, side of a result, K of a partial sum
WARPGROUPS, STAGES = 2, 4


def fprop(x: Scaled, w: Scaled, *, block: int, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """[M, N] = x[M, K] w[K, N], x in tiles and w in blocks."""
    scale_KN = jnp.repeat(w.scale, block, -1)
    return _matmul((x.values, x.scale.T), (w.values.T, scale_KN), block, dtype, backend)


def dgrad(dy: Scaled, w: Scaled, *, block: int, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """[M, K] = dy[M, N] w[K, N]ᵀ, dy in tiles and w in blocks."""
    scale_NK = jnp.repeat(w.scale.T, block, -1)
    return _matmul((dy.values, dy.scale.T), (w.values, scale_NK), block, dtype, backend)


def wgrad(xt: Scaled, dyt: Scaled, *, block: int, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """[K, N] = xt[K, M] dyt[N, M]ᵀ, both in tiles along the tokens."""
    return _matmul((xt.values, xt.scale.T), (dyt.values, dyt.scale.T), block, dtype, backend)


def _matmul(a, b, block, dtype, backend):
    """a[M, K] b[N, K]ᵀ with scales [K / block, M] and [K / block, N]."""
    if block % STEP:
        raise Unsupported(f"{block=}: GPU kernels have multiples of {STEP}; 'xla' has any")
    simulation = _compat.gpu_interpret_params() if backend.interpret else None
    if backend.interpret and simulation is None:
        raise Unsupported("this JAX cannot simulate Mosaic GPU on CPU; use 'xla'")
    m, n, k = len(a[0]), len(b[0]), a[0].shape[1]
    a, b = _filled(a), _filled(b)
    mp, np_ = len(a[0]), len(b[0])
    kernel = plgpu.kernel(
        functools.partial(_kernel, steps=k // STEP, per_scale=block // STEP),
        out_type=jax.ShapeDtypeStruct((mp, np_), dtype),
        scratch_types=[plgpu.SMEM((WARPGROUPS, ROWS, SIDE), dtype, transforms=swizzled(dtype))],
        grid=(mp // SIDE, np_ // SIDE),
        grid_names=("m", "n"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=_compat.gpu_compiler_params(),
        interpret=simulation,
    )
    return kernel(*a, *b)[:m, :n]


def _filled(operand):
    """Zeros up to whole results: rows of values, columns of scales."""
    values, scale = operand
    rows = mosaic.round_up(len(values), SIDE) - len(values)
    if not rows:
        return operand
    return jnp.pad(values, ((0, rows), (0, 0))), jnp.pad(scale, ((0, 0), (0, rows)))


def _kernel(*refs, steps, per_scale):
    a_gmem, sa_gmem, b_gmem, sb_gmem, o_gmem, o_smem = refs
    warpgroup = jax.lax.axis_index("wg")
    at_m = pl.ds(jax.lax.axis_index("m") * SIDE, SIDE)
    at_n = pl.ds(jax.lax.axis_index("n") * SIDE, SIDE)
    own = pl.ds(warpgroup * ROWS, ROWS)

    def step(_, *refs):
        a_smem, sa_smem, b_smem, sb_smem, total = refs

        def product(acc_ref):
            plgpu.wgmma(acc_ref, a_smem.at[own], _compat.transposed(b_smem))
            return acc_ref[...]

        partial = pl.run_scoped(product, plgpu.ACC((ROWS, SIDE), jnp.float32))
        sa = _compat.load(sa_smem.at[0, own], plgpu.Layout.WGMMA.reduce(1))
        sb = _compat.load(sb_smem.at[0], plgpu.Layout.WGMMA.reduce(0))
        spread = lambda s, axis: jax.lax.broadcast_in_dim(s, (ROWS, SIDE), (axis,))  # noqa: E731
        return total + partial * spread(sa, 0) * spread(sb, 1)

    def compute(pipeline):
        zero = jnp.zeros((ROWS, SIDE), jnp.float32)
        total = pipeline(plgpu.layout_cast(zero, plgpu.Layout.WGMMA))
        o_smem[warpgroup] = total.astype(o_smem.dtype)
        plgpu.commit_smem()
        rows = pl.ds(jax.lax.axis_index("m") * SIDE + warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(o_smem.at[warpgroup], o_gmem.at[rows, at_n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    values = plgpu.BlockSpec((SIDE, STEP), lambda s: (0, s), transforms=swizzled(a_gmem.dtype))
    scales = plgpu.BlockSpec((1, SIDE), lambda s: (s // per_scale, 0))
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        in_specs=[values, scales, values, scales],
        max_concurrent_steps=STAGES,
        wg_axis="wg",
        num_compute_wgs=WARPGROUPS,
        compute_context=compute,
    )(a_gmem.at[at_m], sa_gmem.at[:, at_m], b_gmem.at[at_n], sb_gmem.at[:, at_n])
