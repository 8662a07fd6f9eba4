# SPDX-License-Identifier: Apache-2.0
"""Quantisation on a TPU: one pass over x writes the tiles, their transpose, or both.

A grid step holds a [tm, tk] piece of x. Scales of row tiles are columns [tm, 1], one for each of
the row's K / b tiles: their block [tm, K / b] stays in VMEM while the grid walks along K, and each
step fills in its own columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic, scaled, tuning
from pallas_kernels.dispatch import Backend
from pallas_kernels.scaled import Scaled

OP = "fp8_quantize"
ROWS, COLUMNS = 256, 2048  # most of a piece


def tiles(
    x_MK: jax.Array, rows: jax.Array | None, *, block: int, power_of_two: bool, backend: Backend
) -> Scaled:
    """[M, K] in tiles 1 × block."""
    return _run(x_MK, rows, ("tiles",), block, power_of_two, backend=backend)[0]


def transposed(
    x_MK: jax.Array, rows: jax.Array | None, *, block: int, power_of_two: bool, backend: Backend
) -> Scaled:
    """[K, M rounded up to the block]: the transpose in tiles 1 × block."""
    return _run(x_MK, rows, ("transposed",), block, power_of_two, backend=backend)[0]


def both(
    x_MK: jax.Array, rows: jax.Array | None, *, block: int, power_of_two: bool, backend: Backend
) -> tuple[Scaled, Scaled]:
    """(`tiles`, `transposed`) of one pass over x."""
    return tuple(_run(x_MK, rows, ("tiles", "transposed"), block, power_of_two, backend=backend))


def blocks(w_KN: jax.Array, *, block: int, power_of_two: bool, backend: Backend) -> Scaled:
    """[K, N] in blocks."""
    return _run(w_KN, None, ("blocks",), block, power_of_two, backend=backend)[0]


def _run(x_MK, rows, kinds, block, power_of_two, *, backend):
    mosaic.check_block(block)
    m, k = x_MK.shape
    rows = jnp.full((1,), m if rows is None else rows, jnp.int32)
    tm, tk = _piece(kinds, (m, k), block, backend)
    outputs = [_output(kind, (m, k), (tm, tk), block) for kind in kinds]
    specs = [spec for _, pair in outputs for spec in pair]
    results = pl.pallas_call(
        functools.partial(
            _kernel, kinds=kinds, block=block, power_of_two=power_of_two, sizes=(m, k // block)
        ),
        out_shape=[shape for pair, _ in outputs for shape in pair],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(m, tm), k // tk),
            in_specs=[pl.BlockSpec((tm, tk), lambda i, j, _: (i, j))],
            out_specs=specs,
        ),
        compiler_params=mosaic.params(
            ("parallel", "arbitrary"),
            tm * tk * (2 * x_MK.dtype.itemsize + 2 * len(kinds) + 8),
            backend,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * m * k * len(kinds),
            transcendentals=0,
            bytes_accessed=m * k * (x_MK.dtype.itemsize + len(kinds)),
        ),
        interpret=backend.interpret,
        name="_".join((OP, *kinds)),
    )(rows, x_MK)
    return [
        Scaled(values, _public_scale(kind, scale))
        for kind, values, scale in zip(kinds, results[::2], results[1::2], strict=True)
    ]


def _piece(kinds, shape, block, backend):
    """(tm, tk): transposing and blocks take one block of rows, row tiles as many as fit."""
    m, k = shape
    columns = mosaic.divisor(k, block, COLUMNS)
    heuristic = lambda: (min(ROWS, mosaic.round_up(m, 32)), columns)  # noqa: E731
    if kinds != ("tiles",):
        return block, columns
    return tuning.choose(OP, dict(m=m, k=k, b=block), backend, heuristic)


def _output(kind, shape, piece, block):
    """((values, scale) shapes, (values, scale) block specs) of one kind of output."""
    (m, k), (tm, tk) = shape, piece
    n_rows, n_columns = pl.cdiv(m, block), k // block
    f8 = lambda *s: jax.ShapeDtypeStruct(s, scaled.E4M3)  # noqa: E731
    f32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    straight = pl.BlockSpec((tm, tk), lambda i, j, _: (i, j))
    if kind == "tiles":
        scale = pl.BlockSpec((tm, n_columns), lambda i, j, _: (i, 0))
        return (f8(m, k), f32(m, n_columns)), (straight, scale)
    if kind == "transposed":
        scale = pl.BlockSpec((None, 1, tk), lambda i, j, _: (i, 0, j))
        turned = pl.BlockSpec((tk, tm), lambda i, j, _: (j, i))
        return (f8(k, n_rows * block), f32(n_rows, 1, k)), (turned, scale)
    scale = pl.BlockSpec((None, 1, n_columns), lambda i, j, _: (i, 0, 0))
    return (f8(m, k), f32(n_rows, 1, n_columns)), (straight, scale)


def _public_scale(kind, scale):
    if kind == "tiles":
        return scale
    return scale[:, 0].T if kind == "transposed" else scale[:, 0]


def _kernel(rows_smem, x_ref, *out_refs, kinds, block, power_of_two, sizes):
    tm, tk = x_ref.shape
    first = pl.program_id(0) * tm
    row = first + jax.lax.broadcasted_iota(jnp.int32, (tm, 1), 0)
    real = row < jnp.minimum(rows_smem[0], sizes[0])
    out = dict(zip(kinds, zip(out_refs[::2], out_refs[1::2], strict=True), strict=True))
    for t in range(tk // block):
        at = pl.ds(t * block, block)
        x = jnp.where(real, x_ref[:, at].astype(jnp.float32), 0.0)
        size = scaled.magnitude(x)
        tile = pl.program_id(1) * (tk // block) + t
        for kind, (values_ref, scale_ref) in out.items():
            if kind == "transposed":
                scale = scaled.scale_of(size.max(0, keepdims=True), power_of_two)
                values_ref[at, :] = scaled.encode(x, scale).T.astype(scaled.E4M3)
                scale_ref[:, at] = scale
                continue
            amax = size.max(1, keepdims=True)
            amax = amax if kind == "tiles" else amax.max(0, keepdims=True)
            scale = scaled.scale_of(amax, power_of_two)
            values_ref[:, at] = scaled.encode(x, scale).astype(scaled.E4M3)
            _put_column(scale_ref, tile, scale)


def _put_column(ref, index, column):
    """ref[:, index] = column: a store at one lane, as a selection over all of them."""
    lane = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 1)
    ref[...] = jnp.where(lane == index, column, ref[...])
