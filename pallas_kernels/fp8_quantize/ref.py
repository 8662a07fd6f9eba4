# SPDX-License-Identifier: Apache-2.0
"""Quantisation in plain jnp. Any block size; CPUs run on it."""

import jax
import jax.numpy as jnp

from pallas_kernels import scaled
from pallas_kernels.dispatch import Backend
from pallas_kernels.scaled import Scaled


def tiles(
    x_MK: jax.Array, rows: jax.Array | None, *, block: int, power_of_two: bool, backend: Backend
) -> Scaled:
    """[M, K] in tiles 1 × block."""
    del backend
    m, k = x_MK.shape
    x = _real(x_MK, rows).reshape(m, k // block, block)
    scale = scaled.scale_of(scaled.magnitude(x).max(-1), power_of_two)
    values = scaled.encode(x, scale[..., None]).astype(scaled.E4M3)
    return Scaled(values.reshape(m, k), scale)


def transposed(
    x_MK: jax.Array, rows: jax.Array | None, *, block: int, power_of_two: bool, backend: Backend
) -> Scaled:
    """[K, M rounded up to the block]: the transpose in tiles 1 × block."""
    padded = jnp.pad(_real(x_MK, rows), ((0, -len(x_MK) % block), (0, 0)))
    return tiles(padded.T, None, block=block, power_of_two=power_of_two, backend=backend)


def blocks(w_KN: jax.Array, *, block: int, power_of_two: bool, backend: Backend) -> Scaled:
    """[K, N] in blocks."""
    del backend
    k, n = w_KN.shape
    w = w_KN.astype(jnp.float32).reshape(k // block, block, n // block, block)
    scale = scaled.scale_of(scaled.magnitude(w).max((1, 3)), power_of_two)
    values = scaled.encode(w, scale[:, None, :, None]).astype(scaled.E4M3)
    return Scaled(values.reshape(k, n), scale)


def _real(x_MK: jax.Array, rows: jax.Array | None) -> jax.Array:
    """float32, zeros from row `rows` on whatever stood there."""
    x_MK = x_MK.astype(jnp.float32)
    if rows is None:
        return x_MK
    return jnp.where(jnp.arange(len(x_MK))[:, None] < rows, x_MK, 0.0)
