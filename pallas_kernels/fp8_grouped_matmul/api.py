# SPDX-License-Identifier: Apache-2.0
"""The experts' linear layer in E4M3: DeepSeek-V3 section 3.3 over ragged groups, dropless.

The products of `fp8_matmul` with the rows of `grouped_matmul`: sorted by expert, group_sizes[e] of
them for expert e. Rows after the last group are set to zero before any scale is found, so what
stands there reaches neither results nor gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, groups, scaled
from pallas_kernels.dispatch import Backend, Implementation
from pallas_kernels.fp8_grouped_matmul import ref
from pallas_kernels.fp8_matmul.api import DTYPES, Recipe, check_made, pad
from pallas_kernels.fp8_quantize import quantize_blocks, quantize_both, quantize_tiles
from pallas_kernels.scaled import Scaled


def fp8_grouped_fprop(
    x: Scaled,
    w: Scaled,
    group_sizes_E: jax.Array,
    *,
    block: int = 128,
    tail: bool = False,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = None,
) -> jax.Array:
    """y_m = x_m w of its group.

    Args:
        x: [M, K] in tiles 1 × block, rows sorted by group.
        w: [E, K, N] in blocks.
        group_sizes_E: [E] integers.
        block: 128 or 256; "xla" has any.
        tail: rows after the last group may be left over; they give zeros.
        dtype: of the result, bfloat16 or float32; the sum is float32.
        implementation: see `pallas_kernels.dispatch`.

    Returns:
        [M, N].

    Raises:
        ValueError: dtypes; values, scales, contractions or group sizes that do not fit.
        Unsupported: the named implementation cannot.
    """
    _check(("x", x), w, group_sizes_E, block, tail)
    if x.values.shape[1] != w.values.shape[1]:
        raise ValueError(f"x {x.values.shape} and w {w.values.shape}: expected [M, K], [E, K, N]")
    return _matmul(implementation, (x, w), group_sizes_E, block, dtype=dtype, transposed=False)


def fp8_grouped_dgrad(
    dy: Scaled,
    w: Scaled,
    group_sizes_E: jax.Array,
    *,
    block: int = 128,
    tail: bool = False,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = None,
) -> jax.Array:
    """dx_m = dy_m wᵀ of its group: dy [M, N] in tiles; otherwise as `fp8_grouped_fprop`.

    Returns:
        [M, K].
    """
    _check(("dy", dy), w, group_sizes_E, block, tail)
    if dy.values.shape[1] != w.values.shape[2]:
        raise ValueError(f"dy {dy.values.shape} and w {w.values.shape}: expected [M, N], [E, K, N]")
    return _matmul(implementation, (dy, w), group_sizes_E, block, dtype=dtype, transposed=True)


def fp8_grouped_wgrad(
    xt: Scaled,
    dyt: Scaled,
    group_sizes_E: jax.Array,
    *,
    block: int = 128,
    dtype: Any = jnp.float32,
    implementation: Implementation = None,
) -> jax.Array:
    """dw_e = xᵀ dy over the rows of group e: xt [K, M], dyt [N, M] of `quantize_transposed`.

    M is rounded up to the block, so the sizes may sum to less. Zeros for a group without rows.

    Returns:
        [E, K, N].
    """
    scaled.check_tiles("xt", xt, block)
    scaled.check_tiles("dyt", dyt, block)
    if xt.values.shape[1] != dyt.values.shape[1]:
        raise ValueError(f"xt {xt.values.shape}, dyt {dyt.values.shape}: expected [K, M], [N, M]")
    groups.check(group_sizes_E, xt.values.shape[1], len(group_sizes_E), tail=True)
    dispatch.check_dtype("the result", jnp.dtype(dtype), DTYPES)
    return dispatch.without_derivative(
        lambda b, xt, dyt, sizes: _module(b).outer(
            xt, dyt, sizes, block=block, dtype=dtype, backend=b
        ),
        "fp8_grouped_linear",
    )(implementation, xt, dyt, group_sizes_E)


def fp8_grouped_linear(
    x_MK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    blocks: Scaled | None = None,
    block: int = 128,
    power_of_two: bool = False,
    tail: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """y_m = x_m w of its group with all three products in E4M3, scales found online.

    Args:
        x_MK: [M, K] bfloat16 or float32, rows sorted by group.
        w_EKN: [E, K, N] bfloat16 or float32 (a float32 master weight stays as it is).
        group_sizes_E, tail: as `grouped_matmul`.
        blocks: as `fp8_linear`, [E, K, N] filled up.
        block, power_of_two, implementation: as `fp8_linear`, and as there K and N are filled up.

    Returns:
        [M, N] in x's dtype. The gradients have the dtypes of x and w.

    Raises:
        ValueError: dtypes; shapes that do not fit; sizes that do not sum to M.
        Unsupported: the named implementation cannot.
    """
    dispatch.check_dtype("x", x_MK.dtype, DTYPES)
    dispatch.check_dtype("w", w_EKN.dtype, DTYPES)
    if x_MK.ndim != 2 or w_EKN.ndim != 3 or x_MK.shape[1] != w_EKN.shape[1]:
        raise ValueError(f"x {x_MK.shape} and w {w_EKN.shape}: expected [M, K] and [E, K, N]")
    groups.check(group_sizes_E, len(x_MK), len(w_EKN), tail=tail)
    n = w_EKN.shape[2]
    if not len(x_MK):
        return jnp.zeros((0, n), x_MK.dtype)
    backend = dispatch.resolve(implementation)
    if backend.explicit:
        _module(backend)  # Unsupported before anything is quantised
    recipe = Recipe(block, power_of_two, implementation)
    x_MK, w_EKN = pad(x_MK, block, (1,)), pad(w_EKN, block, (1, 2))
    check_made(blocks, w_EKN, block)
    operands = dispatch.varying_alike(x_MK, w_EKN, blocks, group_sizes_E)
    return _linear(recipe, *operands)[:, :n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(recipe: Recipe, x_MK, w_EKN, blocks: Scaled | None, sizes_E) -> jax.Array:
    options = dict(block=recipe.block, implementation=recipe.implementation)
    x = quantize_tiles(x_MK, rows=sizes_E.sum(), power_of_two=recipe.power_of_two, **options)
    w = blocks or quantize_blocks(w_EKN, **options)
    return fp8_grouped_fprop(x, w, sizes_E, tail=True, dtype=x_MK.dtype, **options)


def _linear_forward(recipe, x_MK, w_EKN, blocks, sizes_E):
    options = dict(block=recipe.block, implementation=recipe.implementation)
    x, xt = quantize_both(x_MK, rows=sizes_E.sum(), power_of_two=recipe.power_of_two, **options)
    w = blocks or quantize_blocks(w_EKN, **options)
    y = fp8_grouped_fprop(x, w, sizes_E, tail=True, dtype=x_MK.dtype, **options)
    return y, (xt, w, sizes_E, jnp.zeros((0,), w_EKN.dtype))


def _linear_backward(recipe, kept, dy_MN):
    xt, w, sizes_E, like_w = kept
    options = dict(block=recipe.block, implementation=recipe.implementation)
    dy, dyt = quantize_both(dy_MN, rows=sizes_E.sum(), power_of_two=recipe.power_of_two, **options)
    dx = fp8_grouped_dgrad(dy, w, sizes_E, tail=True, dtype=dy_MN.dtype, **options)
    dw = fp8_grouped_wgrad(xt, dyt, sizes_E, dtype=like_w.dtype, **options)
    return dx, dw, None, np.zeros(sizes_E.shape, jax.dtypes.float0)


_linear.defvjp(_linear_forward, _linear_backward)


def _module(backend: Backend) -> Any:
    """The kernels' module costs most of half a second to import: only who runs it pays."""
    if backend.name == "tpu":
        from pallas_kernels.fp8_grouped_matmul import tpu

        return tpu
    if backend.name == "gpu":
        from pallas_kernels.fp8_grouped_matmul import gpu

        return gpu
    return ref


def _matmul(implementation, operands, sizes, block, *, dtype, transposed):
    dispatch.check_dtype("the result", jnp.dtype(dtype), DTYPES)
    return dispatch.without_derivative(
        lambda b, x, w, sizes: _module(b).matmul(
            x, w, sizes, block=block, transposed=transposed, dtype=dtype, backend=b
        ),
        "fp8_grouped_linear",
    )(implementation, *operands, sizes)


def _check(named, w, sizes, block, tail):
    scaled.check_tiles(*named, block)
    scaled.check_blocks("w", w, block)
    if w.values.ndim != 3:
        raise ValueError(f"w {w.values.shape}: expected [E, K, N]")
    groups.check(sizes, len(named[1].values), len(w.values), tail=tail)
