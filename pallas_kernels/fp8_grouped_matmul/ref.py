# SPDX-License-Identifier: Apache-2.0
"""Block-scaled grouped matmuls in plain jnp: operands times their scales, then `grouped_matmul`."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Backend
from pallas_kernels.fp8_matmul.ref import of_blocks, of_tiles
from pallas_kernels.grouped_matmul import ref as grouped
from pallas_kernels.scaled import Scaled


def matmul(
    x: Scaled,
    w: Scaled,
    sizes_E: jax.Array,
    *,
    block: int,
    transposed: bool,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """[M, N]: row m times its group's w (w[N, K]ᵀ if `transposed`); zeros in the tail."""
    x_MK, w_EKN = of_tiles(x, block), of_blocks(w, block)
    return grouped.matmul(x_MK, w_EKN, sizes_E, transposed=transposed, dtype=dtype, backend=backend)


def outer(
    xt: Scaled,
    dyt: Scaled,
    sizes_E: jax.Array,
    *,
    block: int,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """[E, K, N]: xᵀ dy over each group's rows, of the transposes xt [K, M] and dyt [N, M]."""
    x_MK, dy_MN = of_tiles(xt, block).T, of_tiles(dyt, block).T
    return grouped.outer(x_MK, dy_MN, sizes_E, dtype=dtype, backend=backend)
