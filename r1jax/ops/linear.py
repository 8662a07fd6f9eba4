# SPDX-License-Identifier: Apache-2.0
"""Linear layers: in the activations' dtype, or by DeepSeek's FP8 recipe.

DeepSeek-V3 (arXiv 2412.19437) section 3.3. By the recipe all three products of a layer, for the
result and for both gradients, have E4M3 operands: activations and gradients with a scale for each
tile 1 × b along the contraction, weights with one for each block b × b, sums in float32.
`pallas_kernels.fp8_linear` computes it.

Inside a region where a device sees its own pieces the tiles and blocks are those of the pieces:
they equal the whole array's where b divides the pieces.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import present
from pallas_kernels.fp8_matmul import fp8_linear
from pallas_kernels.fp8_matmul.api import pad
from pallas_kernels.fp8_quantize import quantize_tiles
from pallas_kernels.scaled import Scaled
from r1jax.ops.blocks import Blocks, in_blocks


@dataclass(frozen=True)
class FP8:
    """The static part of the recipe.

    Attributes:
        block: b, length of the tiles and side of the blocks.
        power_of_two: whether scales of activations and gradients are rounded up to powers of two.
    """

    block: int
    power_of_two: bool


def linear(equation: str, x: jax.Array, w: jax.Array | Blocks, fp8: FP8 | None) -> jax.Array:
    """y = x · w, `jnp.einsum` of the equation, in x's dtype or by the recipe.

    Args:
        equation: of `jnp.einsum`: the last axes of x with the first of w, as "btd,dhk->bthk".
        x: [..., *K] activations.
        w: [*K, *N]; without a recipe it is cast to x's dtype, with one it is quantised as it is.
            Of one that lies in blocks already the gradient is its master's.
        fp8: the recipe, or None.

    Returns:
        [..., *N] in x's dtype.

    Raises:
        ValueError: another kind of equation.
    """
    axes = _contracted(equation)
    if fp8 is None and not _as_matrices(x, w):
        return jnp.einsum(equation, x, w.astype(x.dtype))
    rows = x.reshape(*x.shape[: x.ndim - axes], math.prod(w.shape[:axes]))
    result = *rows.shape[:-1], *w.shape[axes:]
    if fp8 is None:
        matrix = _matrix(w.astype(x.dtype), axes)
        return (rows.reshape(math.prod(rows.shape[:-1]), len(matrix)) @ matrix).reshape(result)
    made = isinstance(w, Blocks)
    with jax.named_scope("fp8_linear"):
        y = fp8_linear(
            rows,
            w.like_master if made else _matrix(w, axes),
            blocks=w.matrix if made else None,
            block=fp8.block,
            power_of_two=fp8.power_of_two,
        )
    return y.reshape(result)


def seen(w: jax.Array | Blocks, fp8: FP8 | None, *, axes: int = 1) -> jax.Array:
    """The weight as the recipe's products see it, values · scales; w itself without a recipe.

    Args:
        w: [*K, *N]
        axes: of K.
    """
    if fp8 is None:
        return w
    if isinstance(w, Blocks):
        return w.astype(jnp.float32)
    return in_blocks(w, w.ndim, axes, fp8.block).astype(w.dtype)


def tiled(x: jax.Array, fp8: FP8) -> Scaled:
    """Activations or gradients [..., K] in E4M3: values [..., K], scale [..., ⌈K / b⌉]."""
    rows = pad(x.reshape(-1, x.shape[-1]), fp8.block, (1,))
    tiles = quantize_tiles(rows, block=fp8.block, power_of_two=fp8.power_of_two)
    values = tiles.values[:, : x.shape[-1]].reshape(x.shape)
    return Scaled(values, tiles.scale.reshape(*x.shape[:-1], tiles.scale.shape[1]))


def untiled(tiles: Scaled, fp8: FP8, dtype: Any) -> jax.Array:
    """[..., K] of `tiled`: values · scale, rounded to `dtype` once."""
    scale = jnp.repeat(tiles.scale, fp8.block, -1)[..., : tiles.values.shape[-1]]
    return (tiles.values.astype(jnp.float32) * scale).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded(x: jax.Array, fp8: FP8) -> jax.Array:
    """Activations [..., K] as the recipe's products see them; the gradient passes as it is.

    `linear` of it is `linear` of x: what is rounded once is not changed by rounding it again.
    """
    return untiled(tiled(x, fp8), fp8, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gradient_rounded(y: jax.Array, fp8: FP8) -> jax.Array:
    """y [..., K]; it is the gradient that is `rounded` on its way back."""
    return y


rounded.defvjp(lambda x, fp8: (rounded(x, fp8), None), lambda fp8, _, given: (given,))
gradient_rounded.defvjp(lambda y, fp8: (y, None), lambda fp8, _, given: (rounded(given, fp8),))


def _as_matrices(*arrays: jax.Array) -> bool:
    """Whether a product is written as one of matrices: on CPUs, unless a mesh may cut its rows.

    Of more axes than two XLA:CPU turns an operand of the weight's gradient round before it
    multiplies: a fifth of the three products' time (2,048 tokens, 256 × 512).
    """
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    whole = (mesh.empty or len(mesh.manual_axes) == len(mesh.axis_names) for mesh in meshes)
    return present()[0] == "cpu" and all(whole)


def _matrix(w: jax.Array, axes: int) -> jax.Array:
    return w.reshape(math.prod(w.shape[:axes]), math.prod(w.shape[axes:]))


def _contracted(equation: str) -> int:
    """How many axes x and w share."""
    operands, result = equation.replace("...", "").split("->")
    x, w = operands.split(",")
    axes = len([name for name in w if name not in result])
    if not axes or x[-axes:] != w[:axes] or result != x[:-axes] + w[axes:]:
        raise ValueError(
            f"{equation=} must multiply the last axes of x with the first of w, as 'btd,dhk->bthk'"
        )
    return axes
