# SPDX-License-Identifier: Apache-2.0
"""Block-scaled matmul on a TPU: the sum along K of (a_k · b_k) · scale_a · scale_b in float32.

The products of one block of K are exact in the matrix unit's float32 sum; the partial result is
scaled and added in float32 on the vector unit, so nothing is ever summed across blocks in less.
TPU7x multiplies the E4M3 values themselves. Other chips gain nothing from that: the values become
bfloat16 in VMEM, which holds each E4M3 number exactly, so only the traffic from HBM is FP8's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic, tuning
from pallas_kernels.dispatch import Backend
from pallas_kernels.scaled import Scaled

OP = "fp8_matmul"


def fprop(
    x: Scaled,
    w: Scaled,
    *,
    block: int,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """[M, N] = x[M, K] w[K, N], x in tiles and w in blocks."""
    scale_KN = jnp.repeat(w.scale, block, -1)
    operands = (x.values, x.scale.T, w.values, scale_KN)
    return _matmul(operands, False, block=block, dtype=dtype, backend=backend)


def dgrad(
    dy: Scaled,
    w: Scaled,
    *,
    block: int,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """[M, K] = dy[M, N] w[K, N]ᵀ, dy in tiles and w in blocks."""
    scale_NK = jnp.repeat(w.scale.T, block, -1)
    operands = (dy.values, dy.scale.T, w.values, scale_NK)
    return _matmul(operands, True, block=block, dtype=dtype, backend=backend)


def wgrad(
    xt: Scaled,
    dyt: Scaled,
    *,
    block: int,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """[K, N] = xt[K, M] dyt[N, M]ᵀ, both in tiles along the tokens."""
    operands = (xt.values, xt.scale.T, dyt.values, dyt.scale.T)
    return _matmul(operands, True, block=block, dtype=dtype, backend=backend)


def _matmul(operands, transposed, *, block, dtype, backend):
    """a[M, K] b[K, N], b given as [N, K] if `transposed`; scales as [K / block, M or N]."""
    mosaic.check_block(block)
    a_MK, sa_KM, b, sb_KN = operands
    (m, k), n = a_MK.shape, sb_KN.shape[1]
    a_MK, sa_KM = mosaic.pad_rows(a_MK, 0), mosaic.pad_rows(sa_KM, 1)
    b, sb_KN = mosaic.pad_rows(b, 0) if transposed else b, mosaic.pad_rows(sb_KN, 1)
    mp, np_ = len(a_MK), sb_KN.shape[1]
    tm, tn, tk = tuning.choose(
        OP,
        dict(m=m, n=n, k=k, b=block, t=int(transposed)),
        backend,
        lambda: heuristic((m, n, k), block, backend),
    )
    check_tiles((tm, tn, tk), (mp, np_, k), block)
    step = tk // block
    by_step = lambda s: s.reshape(k // tk, step, -1)  # noqa: E731
    b_spec = (
        pl.BlockSpec((tn, tk), lambda i, j, s: (j, s))
        if transposed
        else pl.BlockSpec((tk, tn), lambda i, j, s: (s, j))
    )
    out = pl.pallas_call(
        functools.partial(
            _kernel, block=block, transposed=transposed, native=backend.device.fp8 > 0
        ),
        out_shape=jax.ShapeDtypeStruct((mp, np_), dtype),
        grid=(pl.cdiv(mp, tm), pl.cdiv(np_, tn), k // tk),
        in_specs=[
            pl.BlockSpec((tm, tk), lambda i, j, s: (i, s)),
            pl.BlockSpec((None, step, tm), lambda i, j, s: (s, 0, i)),
            b_spec,
            pl.BlockSpec((None, step, tn), lambda i, j, s: (s, 0, j)),
        ],
        out_specs=pl.BlockSpec((tm, tn), lambda i, j, s: (i, j)),
        scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32)],
        compiler_params=mosaic.params(
            ("parallel", "parallel", "arbitrary"), need((tm, tn, tk), block, dtype), backend
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * k,
            transcendentals=0,
            bytes_accessed=m * k + n * k + m * n * jnp.dtype(dtype).itemsize,
        ),
        interpret=backend.interpret,
        name=OP,
    )(a_MK, by_step(sa_KM), b, by_step(sb_KN))
    return out[:m, :n]


def heuristic(sizes: tuple[int, int, int], block: int, backend: Backend) -> tuning.Tiles:
    """(tm, tn, tk): square enough that the matrix unit, not HBM, is the limit."""
    m, n, k = sizes
    side = 1024 if backend.device.fp8 else 512
    fit = lambda size: min(side, mosaic.round_up(size, 128 if size > 128 else 32))  # noqa: E731
    return fit(m), fit(n), mosaic.divisor(k, block, 1024)


def need(tiles: tuning.Tiles, block: int, dtype: jnp.dtype) -> int:
    """Bytes of VMEM: two of each operand and result, the sum, a partial result, the bfloat16."""
    tm, tn, tk = tiles
    operands, results = (tm + tn) * tk, tm * tn
    return 2 * operands + 2 * (tm + tn) * block + results * (8 + 2 * jnp.dtype(dtype).itemsize)


def check_tiles(tiles: tuning.Tiles, sizes: tuple[int, int, int], block: int) -> None:
    """Raises ValueError unless the tiles can cover [M, K] and [K, N]."""
    tm, tn, tk = tiles
    m, n, k = sizes
    whole = lambda tile, size: tile == size or tile % mosaic.LANES == 0  # noqa: E731
    if not (whole(tm, m) and whole(tn, n)) or tk % block or k % tk:
        raise ValueError(
            f"tiles (tm, tn, tk) = {tiles} for (m, n, k) = {sizes}: tm and tn must be multiples of "
            f"{mosaic.LANES} or all of it, tk a multiple of {block=} that divides k"
        )


def dot(a: jax.Array, b: jax.Array, transposed: bool, native: bool) -> jax.Array:
    """a b, or a bᵀ, of E4M3 values into float32."""
    if not native:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def add_products(
    sum_ref: jax.Ref, a: tuple, b: tuple, block: int, *, transposed: bool, native: bool
) -> None:
    """sum += Σ over the blocks in VMEM of (a_k · b_k) · scale_a · scale_b.

    Args:
        sum_ref: [tm, tn] float32.
        a: (values [tm, tk], scales [tk / block, tm]).
        b: (values [tk, tn], or [tn, tk] if `transposed`, scales [tk / block, tn]).
    """
    (a_ref, sa_ref), (b_ref, sb_ref) = a, b
    sa = sa_ref[...].T  # rows of scales become columns: one for each row of a
    for t in range(a_ref.shape[1] // block):
        at = pl.ds(t * block, block)
        b_values = b_ref[:, at] if transposed else b_ref[at, :]
        partial = dot(a_ref[:, at], b_values, transposed, native)
        sum_ref[...] += partial * sa[:, t : t + 1] * sb_ref[t : t + 1, :]


def _kernel(*refs, block, transposed, native):
    a_ref, sa_ref, b_ref, sb_ref, o_ref, sum_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    add_products(
        sum_ref, (a_ref, sa_ref), (b_ref, sb_ref), block, transposed=transposed, native=native
    )

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        o_ref[...] = sum_ref[...].astype(o_ref.dtype)
