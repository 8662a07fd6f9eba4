# SPDX-License-Identifier: Apache-2.0
"""E4M3 values with a float32 scale for each tile: the format that the FP8 ops hand each other.

x ≈ values · scale, scale = amax / 448 of the tile, values rounded to nearest even (DeepSeek-V3,
arXiv 2412.19437, section 3.3). The scale is computed as amax · (1/448), within an ulp of the
quotient: XLA makes that of it under jit, so eager, jit and kernels give the same bits. What a tile
may hold:

- zeros, and numbers so small that the scale would not be a normal float32: scale 1 (as blocks of
  zeros in checkpoints), values 0 (power-of-two scales: the same);
- denormal float32 numbers: they count as zero where the unit flushes them, as most do;
- Inf or NaN: scale NaN, values 0. Every product that reads the tile is NaN: nothing hides it;
- with power-of-two scales the scale is rounded up, so values never overflow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126  # smallest normal float32: units that flush denormals agree


class Scaled(NamedTuple):
    """E4M3 values and their scales.

    Attributes:
        values: [..., R, C] float8_e4m3fn.
        scale: float32. Of tiles 1 × b: [..., R, C / b]; of blocks b × b: [..., R / b, C / b].
    """

    values: jax.Array
    scale: jax.Array


def magnitude(x: jax.Array) -> jax.Array:
    """|x| with NaN as Inf: a maximum that drops NaN, as some units' do, then still sees it."""
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))


def scale_of(amax: jax.Array, power_of_two: bool) -> jax.Array:
    """The scale of tiles with these largest magnitudes (of `magnitude`), float32."""
    scale = amax * jnp.float32(1 / E4M3_MAX)
    if power_of_two:
        scale = _round_up_to_power(scale)
    scale = jnp.where(scale >= SMALLEST_SCALE, scale, 1.0)
    return jnp.where(amax < jnp.inf, scale, jnp.nan)


def _round_up_to_power(scale: jax.Array) -> jax.Array:
    """2^⌈log2 scale⌉ exactly, by the bits: exponent + 1 where the fraction is not zero."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    up = jnp.where(bits & 0x7FFFFF != 0, bits + 0x800000, bits)
    return jax.lax.bitcast_convert_type(up & ~0x7FFFFF, jnp.float32)


def encode(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale as float32 within ±448, what is left is the conversion to E4M3; 0 at NaN scales."""
    ratio = jnp.clip(x / scale, -E4M3_MAX, E4M3_MAX)
    return jnp.where(jnp.isnan(scale) | jnp.isnan(x), 0.0, ratio)


def check_tiles(name: str, x: Scaled, block: int) -> None:
    """Raises ValueError unless `x` is [R, C] with scales of 1 × block tiles."""
    _check(name, x, lambda r, c: (r, c // block), (block,) * 1)


def check_blocks(name: str, x: Scaled, block: int) -> None:
    """Raises ValueError unless `x` is [..., R, C] with scales of block × block."""
    _check(name, x, lambda r, c: (r // block, c // block), (block, block))


def _check(name, x, scale_shape, blocks):
    if x.values.dtype != E4M3 or x.scale.dtype != jnp.float32:
        raise ValueError(
            f"{name} has values {x.values.dtype} and scale {x.scale.dtype}, "
            f"expected {E4M3.dtype} and float32"
        )
    shape = x.values.shape
    for size, block in zip(shape[::-1], blocks, strict=False):
        check_divides(name, shape, size, block)
    wanted = (*shape[:-2], *scale_shape(*shape[-2:]))
    if x.scale.shape != wanted:
        raise ValueError(
            f"{name}: values {shape} in blocks of {blocks} need scale {wanted}, got {x.scale.shape}"
        )


def check_divides(name: str, shape: tuple[int, ...], size: int, block: int) -> None:
    """Raises ValueError unless `size`, one of `shape`'s, is a multiple of `block`."""
    if size % block or not size:
        raise ValueError(f"{name} of shape {shape}: {size} is not a multiple of {block=}")
