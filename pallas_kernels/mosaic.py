# SPDX-License-Identifier: Apache-2.0
"""What the TPU kernels share: sizes of blocks, limits of VMEM."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import MIB
from pallas_kernels.dispatch import Backend, Unsupported

BLOCKS = (128, 256)  # of FP8 scales: the width of a vector register, or of the newer matrix unit
LANES, SUBLANES_8BIT = 128, 32
SHARE = 0.875  # of VMEM that one kernel may take
SCOPED = 32 * MIB  # asked for at least: the compiler's default is 16 to 32


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def divisor(size: int, block: int, most: int) -> int:
    """The largest multiple of `block` that divides `size` and is at most `most` (or the block)."""
    n = size // block
    return block * max(d for d in range(1, n + 1) if n % d == 0 and (d == 1 or d * block <= most))


def check_block(block: int) -> None:
    """Raises Unsupported unless the kernels have this block size."""
    if block not in BLOCKS:
        raise Unsupported(f"{block=}: TPU kernels have blocks of {BLOCKS}; 'xla' has any")


def params(semantics: tuple[str, ...], need: int, backend: Backend) -> pltpu.CompilerParams:
    """Compiler parameters with a VMEM limit for a kernel that needs about `need` bytes.

    Raises:
        Unsupported: the chip has not so much.
    """
    most = math.floor(SHARE * backend.device.on_chip)
    if need > most:
        raise Unsupported(f"needs {need:,} bytes of VMEM, {backend.chip} has {most:,} to give")
    limit = min(most, max(SCOPED, 2 * need))
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)


def pad_rows(x: jax.Array, axis: int) -> jax.Array:
    """Zeros up to a multiple of 32 where an axis is too short for a tile of 128."""
    size = x.shape[axis]
    if size >= LANES or size % SUBLANES_8BIT == 0:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -size % SUBLANES_8BIT)
    return jnp.pad(x, width)
