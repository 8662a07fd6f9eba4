# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (arXiv 2104.09864) and its YaRN extension (arXiv 2309.00071).

DeepSeek weights rotate interleaved pairs (x0, x1), (x2, x3), …; Qwen and Llama weights rotate the
halves (x0, x_{R/2}), …. Both are here; which one a model uses is a fact of its weights.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_max_position: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> np.ndarray:
    """Angular frequency of each rotary pair, in radians per position.

    θ_i = theta^(-2i/dim). With `factor` > 1, YaRN (eq. 23): pairs that turn more than `beta_fast`
    times within `original_max_position` are kept, those that turn less than `beta_slow` times are
    slowed by `factor`, those between are blended linearly in the pair's index.

    Returns:
        [dim / 2] float32, computed once on the host.
    """
    inv = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if factor > 1.0:

        def pair_at(turns: float) -> float:
            return (
                dim
                * math.log(original_max_position / (turns * 2 * math.pi))
                / (2 * math.log(theta))
            )

        low = max(math.floor(pair_at(beta_fast)), 0)
        high = min(math.ceil(pair_at(beta_slow)), dim - 1)
        ramp = (np.arange(dim // 2) - low) / max(high - low, 0.001)
        slowed = np.clip(ramp, 0.0, 1.0)
        inv = inv * (1.0 - slowed) + inv / factor * slowed
    return inv.astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """m = 0.1 · mscale · ln(factor) + 1 (YaRN eq. 25); 1 when the context is not extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rotation(positions: jax.Array, inv_freq: jax.Array, scale: float = 1.0):
    """cos and sin of position · frequency, each [..., R/2] float32, times `scale`."""
    angle = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate_interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x0, x1), (x2, x3), … of the last axis: the layout of DeepSeek weights.

    Args:
        x: [..., R].
        cos, sin: [..., R/2], broadcastable against x's leading axes.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + R/2}) of the last axis: the layout of Qwen and Llama."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
