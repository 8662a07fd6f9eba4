# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square layer normalisation."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019).

    Args:
        x: [..., D], any float dtype; the statistics are taken in float32.
        weight_D: [D] gain.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1) + eps)
    return (x32 * scale[..., None] * weight_D.astype(jnp.float32)).astype(x.dtype)
