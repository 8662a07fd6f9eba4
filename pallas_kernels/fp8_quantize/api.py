# SPDX-License-Identifier: Apache-2.0
"""Online E4M3 quantisation: DeepSeek-V3 (arXiv 2412.19437) section 3.3.

Activations and gradients in tiles 1 × b along the contraction, weights in blocks b × b. For weight
gradients the contraction is along the rows (tokens), so activations are tiled anew as b × 1 and
handed over transposed: every operand of every product has its contraction last.
`pallas_kernels.scaled` says what becomes of zeros, tiny numbers, Inf and NaN.

Not differentiable: a derivative through a rounding means nothing. `fp8_linear` has the recipe's.
"""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import dispatch, scaled
from pallas_kernels.dispatch import Backend, Implementation
from pallas_kernels.fp8_quantize import ref
from pallas_kernels.scaled import Scaled

DTYPES = ("bfloat16", "float32")


def quantize_tiles(
    x_MK: jax.Array,
    *,
    block: int = 128,
    power_of_two: bool = False,
    rows: jax.Array | None = None,
    implementation: Implementation = None,
) -> Scaled:
    """x ≈ values · scale with a scale for each 1 × block tile.

    Args:
        x_MK: [M, K] bfloat16 or float32; block divides K.
        block: 128 or 256; "xla" has any.
        power_of_two: round the scale up to a power of two.
        rows: int32 scalar; what stands from this row on is not read: zeros. None: all M are real.
        implementation: see `pallas_kernels.dispatch`.

    Returns:
        values [M, K], scale [M, K / block].

    Raises:
        ValueError: dtype or shape.
        Unsupported: the named implementation cannot.
    """
    _check(x_MK, block, 1)
    return _run(
        lambda b, x, n: _module(b).tiles(x, n, block=block, power_of_two=power_of_two, backend=b),
        implementation,
        (x_MK, rows),
    )


def quantize_transposed(
    x_MK: jax.Array,
    *,
    block: int = 128,
    power_of_two: bool = False,
    rows: jax.Array | None = None,
    implementation: Implementation = None,
) -> Scaled:
    """x in tiles block × 1, transposed: what weight gradients contract over.

    Args: as `quantize_tiles`. Block need not divide M: the last tile is filled with zeros.

    Returns:
        values [K, M rounded up to block], scale [K, ⌈M / block⌉].
    """
    _check(x_MK, block, 1)
    return _run(
        lambda b, x, n: _module(b).transposed(
            x, n, block=block, power_of_two=power_of_two, backend=b
        ),
        implementation,
        (x_MK, rows),
    )


def quantize_both(
    x_MK: jax.Array,
    *,
    block: int = 128,
    power_of_two: bool = False,
    rows: jax.Array | None = None,
    implementation: Implementation = None,
) -> tuple[Scaled, Scaled]:
    """(`quantize_tiles`, `quantize_transposed`) of one reading of x: gradients need both."""
    _check(x_MK, block, 1)
    return _run(
        lambda b, x, n: _both(b, x, n, block=block, power_of_two=power_of_two),
        implementation,
        (x_MK, rows),
    )


def quantize_blocks(
    w_KN: jax.Array,
    *,
    block: int = 128,
    power_of_two: bool = False,
    implementation: Implementation = None,
) -> Scaled:
    """w ≈ values · scale with a scale for each block × block.

    Args:
        w_KN: [..., K, N] bfloat16 or float32; block divides K and N.
        others: as `quantize_tiles`.

    Returns:
        values [..., K, N], scale [..., K / block, N / block].
    """
    _check(w_KN, block, 2)
    *lead, k, n = w_KN.shape

    def call(b, w):
        out = _module(b).blocks(w, block=block, power_of_two=power_of_two, backend=b)
        return Scaled(out.values.reshape(w_KN.shape), out.scale.reshape(*lead, k // block, -1))

    return _run(call, implementation, (w_KN.reshape(-1, n),))


def _both(backend, x_MK, rows, **options):
    """One pass on a TPU; elsewhere two."""
    module = _module(backend)
    if backend.name == "tpu":
        return module.both(x_MK, rows, backend=backend, **options)
    of = lambda way: way(x_MK, rows, backend=backend, **options)  # noqa: E731
    return of(module.tiles), of(module.transposed)


def _module(backend: Backend) -> Any:
    """The kernels' modules cost most of a second to import: only who runs them pays."""
    if backend.name == "tpu":
        from pallas_kernels.fp8_quantize import tpu

        return tpu
    if backend.name == "gpu":
        from pallas_kernels.fp8_quantize import gpu

        return gpu
    return ref


def _run(call: Callable, implementation: Implementation, args: tuple) -> Any:
    return dispatch.without_derivative(call, "fp8_linear")(implementation, *args)


def _check(x, block, divided):
    dispatch.check_dtype("x", x.dtype, DTYPES)
    if block < 1:
        raise ValueError(f"{block=} must be positive")
    if x.ndim < 2 or (divided == 1 and x.ndim > 2):
        raise ValueError(f"x of shape {x.shape}: expected [M, K]; blocks may have leading axes")
    for size in x.shape[-divided:]:
        scaled.check_divides("x", x.shape, size, block)
