# SPDX-License-Identifier: Apache-2.0
"""Rows that cross devices, by DeepSeek's recipe in E4M3 (DeepSeek-V3, section 3.3.3).

Tokens go to the experts in tiles 1 × b with their scales, and so do the gradients on the way back
through the sum over experts: these are the operands of the experts' first products, forward and
backward, which need no more. The sums themselves, and the gradients of the tokens, cross devices
in the activations' dtype.
"""

import functools
from collections.abc import Callable

import jax

from pallas_kernels.scaled import Scaled
from r1jax.ops.linear import FP8, tiled, untiled

Axes = str | tuple[str, ...]


def in_tiles(move: Callable[[jax.Array], jax.Array], x_TD: jax.Array, fp8: FP8 | None):
    """move(x) in x's dtype; by the recipe of E4M3 values and of scales, each moved by itself.

    A row of zeros where nothing came from is one still.
    """
    if fp8 is None:
        return move(x_TD)
    return untiled(Scaled(*map(move, tiled(x_TD, fp8))), fp8, x_TD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def to_all(x_TD: jax.Array, axes: Axes, fp8: FP8 | None) -> jax.Array:
    """[T, D] → [n·T, D]: every rank's tokens on each, `in_tiles`."""
    return in_tiles(functools.partial(_gathered, axes), x_TD, fp8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def from_all(y_TD: jax.Array, axes: Axes, fp8: FP8 | None) -> jax.Array:
    """[n·T, D] → [T, D]: the sum over ranks for one's own tokens; its gradient goes `in_tiles`."""
    return jax.lax.psum_scatter(y_TD, axes, tiled=True)


def _gathered(axes: Axes, x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, axes, tiled=True)


def _summed(axes: Axes, fp8: FP8 | None, _, given_TD: jax.Array):
    return (jax.lax.psum_scatter(given_TD, axes, tiled=True),)


def _returned(axes: Axes, fp8: FP8 | None, _, given_TD: jax.Array):
    return (in_tiles(functools.partial(_gathered, axes), given_TD, fp8),)


to_all.defvjp(lambda x_TD, axes, fp8: (to_all(x_TD, axes, fp8), None), _summed)
from_all.defvjp(lambda y_TD, axes, fp8: (from_all(y_TD, axes, fp8), None), _returned)
