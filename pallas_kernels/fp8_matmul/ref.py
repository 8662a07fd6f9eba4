# SPDX-License-Identifier: Apache-2.0
"""Block-scaled matmuls in plain jnp: each operand times its scales, then one float32 matmul."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Backend
from pallas_kernels.scaled import Scaled


def fprop(x: Scaled, w: Scaled, *, block: int, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """[M, N] = x[M, K] w[K, N], x in tiles and w in blocks."""
    del backend
    return _dot(of_tiles(x, block), of_blocks(w, block), dtype)


def dgrad(dy: Scaled, w: Scaled, *, block: int, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """[M, K] = dy[M, N] w[K, N]ᵀ, dy in tiles and w in blocks."""
    del backend
    return _dot(of_tiles(dy, block), of_blocks(w, block).T, dtype)


def wgrad(xt: Scaled, dyt: Scaled, *, block: int, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """[K, N] = xt[K, M] dyt[N, M]ᵀ, both in tiles along the tokens."""
    del backend
    return _dot(of_tiles(xt, block), of_tiles(dyt, block).T, dtype)


def of_tiles(x: Scaled, block: int) -> jax.Array:
    """values · scale of tiles 1 × block, float32."""
    return x.values.astype(jnp.float32) * jnp.repeat(x.scale, block, -1)


def of_blocks(w: Scaled, block: int) -> jax.Array:
    """values · scale of blocks, float32."""
    return w.values.astype(jnp.float32) * jnp.repeat(jnp.repeat(w.scale, block, -2), block, -1)


def _dot(a, b, dtype):
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST).astype(dtype)
