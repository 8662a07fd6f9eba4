# SPDX-License-Identifier: Apache-2.0
"""What the bench measures: an op at a named shape, the same work left to XLA, the true values."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import candidates, shapes
from pallas_kernels.dispatch import Implementation
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_fprop
from pallas_kernels.fp8_matmul import fp8_fprop
from pallas_kernels.fp8_quantize import quantize_blocks, quantize_tiles
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.scaled import Scaled
from pallas_kernels.tuning import Tiles

BLOCK = 128
CORNER = 64  # rows and columns compared with float64: enough to see, quick at any shape


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        arrays: its arguments.
        call: (implementation) → function of the arrays.
        xla: the same result in high precision, of arguments `xla_arrays`, by XLA's own op.
        truth: [rows, columns] float64 of a corner of the result.
        flops: of the matmul, 0 where memory is the only bound.
        traffic: bytes that must be read and written.
        bits: of the operands of the matmul.
        tiles: (op, dims, candidates) for the tuner; no candidates: nothing to choose.
    """

    arrays: tuple
    call: Callable[[Implementation], Callable]
    xla: Callable
    xla_arrays: tuple
    truth: np.ndarray
    flops: float
    traffic: float
    bits: int
    tiles: tuple[str, dict[str, int], tuple[Tiles, ...]]


def fp8_quantize(shape: shapes.Matmul) -> Case:
    """Activations in tiles: memory bound."""
    m, k, _ = shape
    x = _normal(0, m, k).astype(jnp.bfloat16)
    corner = np.float64(x[:CORNER, :BLOCK])
    return Case(
        arrays=(x,),
        call=lambda i: lambda x: quantize_tiles(x, implementation=i),
        xla=lambda x: quantize_tiles(x, implementation="xla"),
        xla_arrays=(x,),
        truth=corner[:, :CORNER],
        flops=0,
        traffic=m * k * 3 + m * k // BLOCK * 4,
        bits=16,
        tiles=("fp8_quantize", dict(m=m, k=k, b=BLOCK), tuple(candidates.quantize(m, k, BLOCK))),
    )


def fp8_matmul(shape: shapes.Matmul) -> Case:
    """The forward product of quantised operands, beside XLA's bfloat16 matmul."""
    m, k, n = shape
    n = n // BLOCK * BLOCK
    x, w = _normal(0, m, k).astype(jnp.bfloat16), _normal(1, k, n).astype(jnp.bfloat16)
    qx, qw = quantize_tiles(x), quantize_blocks(w)
    return Case(
        arrays=(qx, qw),
        call=lambda i: lambda x, w: fp8_fprop(x, w, implementation=i),
        xla=lambda x, w: jnp.dot(x, w),
        xla_arrays=(x, w),
        truth=_of_tiles(qx, CORNER) @ _of_blocks(qw.values, qw.scale),
        flops=2 * m * k * n,
        traffic=m * k + k * n + 2 * m * n,
        bits=8,
        tiles=(
            "fp8_matmul",
            dict(m=m, n=n, k=k, b=BLOCK, t=0),
            tuple(candidates.matmul((m, n, k), BLOCK, 1)),
        ),
    )


def grouped(shape: shapes.Grouped) -> Case:
    """Sorted rows times their experts' bfloat16 weights, beside XLA's `ragged_dot`."""
    m, k, n, e = shape
    sizes = _sizes(m, e)
    x, w = _normal(0, m, k).astype(jnp.bfloat16), _normal(1, e, k, n).astype(jnp.bfloat16)
    return Case(
        arrays=(x, w, sizes),
        call=lambda i: lambda x, w, s: grouped_matmul(x, w, s, tail=True, implementation=i),
        xla=jax.lax.ragged_dot,
        xla_arrays=(x, w, sizes),
        truth=_by_group(np.float64(x[:CORNER]), lambda g: np.float64(w[g, :, :CORNER]), sizes),
        flops=2 * m * k * n,
        traffic=2 * (m * (k + n) + _active(sizes) * k * n),
        bits=16,
        tiles=(
            "grouped_matmul",
            dict(m=m, n=n, k=k, e=e, t=0, bits=16),
            tuple(candidates.matmul((m, n, k), BLOCK, 2)),
        ),
    )


def fp8_grouped(shape: shapes.Grouped) -> Case:
    """The same with quantised operands, beside XLA's bfloat16 `ragged_dot`."""
    m, k, n, e = shape
    sizes = _sizes(m, e)
    x, w = _normal(0, m, k).astype(jnp.bfloat16), _normal(1, e, k, n).astype(jnp.bfloat16)
    qx, qw = quantize_tiles(x), quantize_blocks(w)
    return Case(
        arrays=(qx, qw, sizes),
        call=lambda i: lambda x, w, s: fp8_grouped_fprop(x, w, s, tail=True, implementation=i),
        xla=jax.lax.ragged_dot,
        xla_arrays=(x, w, sizes),
        truth=_by_group(
            _of_tiles(qx, CORNER), lambda g: _of_blocks(qw.values[g], qw.scale[g]), sizes
        ),
        flops=2 * m * k * n,
        traffic=m * k + _active(sizes) * k * n + 2 * m * n,
        bits=8,
        tiles=(
            "fp8_grouped_matmul",
            dict(m=m, n=n, k=k, e=e, b=BLOCK, t=0),
            tuple(candidates.matmul((m, n, k), BLOCK, 1)),
        ),
    )


OPS: dict[str, tuple[dict[str, Any], Callable[[Any], Case]]] = {
    "fp8_quantize": (shapes.MATMUL, fp8_quantize),
    "fp8_matmul": (shapes.MATMUL, fp8_matmul),
    "grouped_matmul": (shapes.GROUPED, grouped),
    "fp8_grouped_matmul": (shapes.GROUPED, fp8_grouped),
}


def corner(result: Any) -> np.ndarray:
    """The part of a result that `truth` has."""
    if isinstance(result, Scaled):
        return _of_tiles(result, CORNER)[:, :CORNER]
    return np.float64(result[:CORNER, :CORNER])


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def _sizes(m, e):
    """Rows of each group as a router that is not quite balanced gives them."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.multinomial(m, rng.dirichlet(np.full(e, 4.0))), jnp.int32)


def _active(sizes):
    return int((np.asarray(sizes) > 0).sum())


def _of_tiles(x: Scaled, rows: int) -> np.ndarray:
    return np.float64(x.values[:rows]) * np.repeat(np.float64(x.scale[:rows]), BLOCK, 1)


def _of_blocks(values, scale) -> np.ndarray:
    """The first CORNER columns (of the first block) in float64."""
    return np.float64(values[:, :CORNER]) * np.repeat(np.float64(scale[:, 0]), BLOCK)[:, None]


def _by_group(x: np.ndarray, w_of: Callable, sizes: jax.Array) -> np.ndarray:
    group = np.repeat(np.arange(len(sizes)), np.asarray(sizes))[: len(x)]
    rows: Iterator = (x[i : i + 1] @ w_of(g) for i, g in enumerate(group))
    return np.concatenate(list(rows))
