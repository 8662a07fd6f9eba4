# SPDX-License-Identifier: Apache-2.0
"""The three block-scaled matmuls of an FP8 linear layer, and the layer: DeepSeek-V3 section 3.3.

With x in tiles 1 × b, w in blocks b × b, and for weight gradients x and dy in tiles along the
tokens:

    fprop  y  = x w          contraction K
    dgrad  dx = dy wᵀ        contraction N
    wgrad  dw = xᵀ dy        contraction M

Σ over blocks of the contraction of (values · values) · scale · scale, summed in float32. The
operands come from `fp8_quantize`. The matmuls have no derivative; `fp8_linear` has, by the recipe.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, scaled
from pallas_kernels.dispatch import Backend, Implementation
from pallas_kernels.fp8_matmul import ref
from pallas_kernels.fp8_quantize import quantize_blocks, quantize_both, quantize_tiles
from pallas_kernels.scaled import Scaled

DTYPES = ("bfloat16", "float32")


def fp8_fprop(
    x: Scaled,
    w: Scaled,
    *,
    block: int = 128,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = None,
) -> jax.Array:
    """y = x w.

    Args:
        x: [M, K] in tiles 1 × block.
        w: [K, N] in blocks.
        block: 128 or 256; "xla" has any.
        dtype: of the result, bfloat16 or float32; the sum is float32.
        implementation: see `pallas_kernels.dispatch`.

    Returns:
        [M, N].

    Raises:
        ValueError: dtypes; values, scales or contractions that do not fit each other.
        Unsupported: the named implementation cannot.
    """
    scaled.check_tiles("x", x, block)
    scaled.check_blocks("w", w, block)
    _check_contraction(("x", x, 1), ("w", w, 0))
    return _run(lambda b: _module(b).fprop, (x, w), block, dtype, implementation)


def fp8_dgrad(
    dy: Scaled,
    w: Scaled,
    *,
    block: int = 128,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = None,
) -> jax.Array:
    """dx = dy wᵀ: dy [M, N] in tiles, w [K, N] in blocks; otherwise as `fp8_fprop`.

    Returns:
        [M, K].
    """
    scaled.check_tiles("dy", dy, block)
    scaled.check_blocks("w", w, block)
    _check_contraction(("dy", dy, 1), ("w", w, 1))
    return _run(lambda b: _module(b).dgrad, (dy, w), block, dtype, implementation)


def fp8_wgrad(
    xt: Scaled,
    dyt: Scaled,
    *,
    block: int = 128,
    dtype: Any = jnp.float32,
    implementation: Implementation = None,
) -> jax.Array:
    """dw = xᵀ dy: xt [K, M] and dyt [N, M] of `quantize_transposed`; otherwise as `fp8_fprop`.

    Returns:
        [K, N].
    """
    scaled.check_tiles("xt", xt, block)
    scaled.check_tiles("dyt", dyt, block)
    _check_contraction(("xt", xt, 1), ("dyt", dyt, 1))
    return _run(lambda b: _module(b).wgrad, (xt, dyt), block, dtype, implementation)


class Recipe(NamedTuple):
    """The static part of an FP8 layer: sizes of blocks, kind of scales, what computes it."""

    block: int
    power_of_two: bool
    implementation: Implementation


def fp8_linear(
    x: jax.Array,
    w_KN: jax.Array,
    *,
    blocks: Scaled | None = None,
    block: int = 128,
    power_of_two: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """y = x w with all three products in E4M3, scales found online.

    What is kept for the backward pass is E4M3: the weight's blocks and the activations tiled along
    the tokens, a quarter of float32's bytes. K and N that block does not divide are filled with
    zeros, as a checkpoint's last blocks are; the tokens too, for the weight's gradient.

    Args:
        x: [..., K] bfloat16 or float32.
        w_KN: [K, N] bfloat16 or float32 (a float32 master weight stays as it is).
        blocks: w in blocks, where they are made already: [K, N] filled up, as `quantize_blocks`
            gives it. The values of w are not read then; the weight's gradient is still w's.
        block: side of the weight's blocks, length of the tiles.
        power_of_two: scales of activations and gradients are powers of two; the weight's are not.
        implementation: see `pallas_kernels.dispatch`.

    Returns:
        [..., N] in x's dtype. The gradients have the dtypes of x and w.

    Raises:
        ValueError: dtype or shape.
        Unsupported: the named implementation cannot.
    """
    dispatch.check_dtype("x", x.dtype, DTYPES)
    dispatch.check_dtype("w", w_KN.dtype, DTYPES)
    if w_KN.ndim != 2 or x.ndim < 1 or x.shape[-1] != w_KN.shape[0]:
        raise ValueError(
            f"x {x.shape} and w {w_KN.shape} do not multiply: expected [..., K], [K, N]"
        )
    recipe = Recipe(block, power_of_two, implementation)
    x_MK, w = pad(x.reshape(-1, x.shape[-1]), block, (1,)), pad(w_KN, block, (0, 1))
    check_made(blocks, w, block)
    y_MN = _linear(recipe, *dispatch.varying_alike(x_MK, w, blocks))
    return y_MN[:, : w_KN.shape[1]].reshape(*x.shape[:-1], -1)


def check_made(blocks: Scaled | None, w: jax.Array, block: int) -> None:
    """Raises ValueError unless the blocks of a weight, if there are any, fit it filled up."""
    if blocks is None:
        return
    scaled.check_blocks("blocks", blocks, block)
    if blocks.values.shape != w.shape:
        raise ValueError(f"blocks {blocks.values.shape} are not of w, filled up {w.shape}")


def pad(x: jax.Array, block: int, axes: tuple[int, ...]) -> jax.Array:
    """Zeros at the end of these axes, up to a multiple of the block."""
    width = [(0, -size % block if axis in axes else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, width) if any(after for _, after in width) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(recipe: Recipe, x_MK: jax.Array, w_KN: jax.Array, blocks: Scaled | None) -> jax.Array:
    block, power, implementation = recipe
    x = quantize_tiles(x_MK, block=block, power_of_two=power, implementation=implementation)
    w = blocks or quantize_blocks(w_KN, block=block, implementation=implementation)
    return fp8_fprop(x, w, block=block, dtype=x_MK.dtype, implementation=implementation)


def _linear_forward(recipe, x_MK, w_KN, blocks):
    block, power, implementation = recipe
    x, xt = quantize_both(x_MK, block=block, power_of_two=power, implementation=implementation)
    w = blocks or quantize_blocks(w_KN, block=block, implementation=implementation)
    y = fp8_fprop(x, w, block=block, dtype=x_MK.dtype, implementation=implementation)
    return y, (xt, w, jnp.zeros((0,), w_KN.dtype))


def _linear_backward(recipe, kept, dy_MN):
    block, power, implementation = recipe
    xt, w, like_w = kept
    dy, dyt = quantize_both(dy_MN, block=block, power_of_two=power, implementation=implementation)
    options = dict(block=block, implementation=implementation)
    dx = fp8_dgrad(dy, w, dtype=dy_MN.dtype, **options)
    return dx, fp8_wgrad(xt, dyt, dtype=like_w.dtype, **options), None


_linear.defvjp(_linear_forward, _linear_backward)


def _module(backend: Backend) -> Any:
    """The kernels' modules cost most of a second to import: only who runs them pays."""
    if backend.name == "tpu":
        from pallas_kernels.fp8_matmul import tpu

        return tpu
    if backend.name == "gpu":
        from pallas_kernels.fp8_matmul import gpu

        return gpu
    return ref


def _run(
    product: Callable, operands: tuple, block: int, dtype: Any, implementation: Implementation
) -> jax.Array:
    dispatch.check_dtype("the result", jnp.dtype(dtype), DTYPES)
    return dispatch.without_derivative(
        lambda backend, a, b: product(backend)(a, b, block=block, dtype=dtype, backend=backend),
        "fp8_linear",
    )(implementation, *operands)


def _check_contraction(a: tuple, b: tuple) -> None:
    """Raises ValueError unless two (name, operand, axis) are as long along their axes."""
    (a_name, a_axis), (b_name, b_axis) = (a[0], a[2]), (b[0], b[2])
    a_shape, b_shape = a[1].values.shape, b[1].values.shape
    if a_shape[a_axis] != b_shape[b_axis]:
        raise ValueError(
            f"{a_name} {a_shape} and {b_name} {b_shape} do not contract: "
            f"{a_shape[a_axis]} != {b_shape[b_axis]}"
        )
