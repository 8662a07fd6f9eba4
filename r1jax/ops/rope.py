# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (arXiv 2104.09864), stretched to longer contexts by YaRN or Llama 3.

DeepSeek weights rotate interleaved pairs (x0, x1), (x2, x3), …; Qwen and Llama weights rotate the
halves (x0, x_{R/2}), …. Both are here; which one a model uses is a fact of its weights.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chips import present


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """Angular frequency θ_i = theta^(-2i/dim) of each rotary pair, in radians per position.

    Returns:
        [dim / 2] float64, computed once on the host.
    """
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def yarn_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float,
    original_max_position: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> np.ndarray:
    """YaRN's frequencies (arXiv 2309.00071, eq. 23).

    Pairs that turn more than `beta_fast` times within `original_max_position` are kept, those that
    turn less than `beta_slow` times are slowed by `factor`, those between are blended linearly in
    the pair's index.

    Returns:
        [dim / 2] float64, in radians per position.
    """
    inv_freq = inverse_frequencies(dim, theta)

    def pair_at(turns: float) -> float:
        return dim * math.log(original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_at(beta_fast)), 0)
    high = min(math.ceil(pair_at(beta_slow)), dim - 1)
    ramp = (np.arange(dim // 2) - low) / max(high - low, 0.001)
    slowed = np.clip(ramp, 0.0, 1.0)
    return inv_freq * (1.0 - slowed) + inv_freq / factor * slowed


def llama3_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float,
    original_max_position: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> np.ndarray:
    """Llama 3.1's frequencies: fast pairs kept, slow ones slowed by `factor`, blended between.

    A pair is fast if it turns more than `high_freq_factor` times within `original_max_position`,
    slow if less than `low_freq_factor` times; the blend is linear in the number of turns (Llama 3,
    arXiv 2407.21783, section 3.4.2, as released).

    Returns:
        [dim / 2] float64, in radians per position.
    """
    inv_freq = inverse_frequencies(dim, theta)
    turns = original_max_position * inv_freq / (2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return inv_freq * kept + inv_freq / factor * (1.0 - kept)


def yarn_mscale(factor: float, mscale: float) -> float:
    """m = 0.1 · mscale · ln(factor) + 1 (YaRN eq. 25); 1 when the context is not extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rotation(positions: jax.Array, inv_freq: jax.Array, scale: float = 1.0):
    """cos and sin of position · frequency, each [..., R/2] float32, times `scale`."""
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(inv_freq, jnp.float32)
    return jax.lax.optimization_barrier((jnp.cos(angle) * scale, jnp.sin(angle) * scale))


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
    x32 = x.astype(jnp.float32)
    if present()[0] == "cpu":  # one kernel, where two halves put together are three
        halves = x32.reshape(*x.shape[:-1], 2, -1)
        signed = np.array([[-1.0], [1.0]], np.float32) * sin[..., None, :]
        turned = halves * cos[..., None, :] + jnp.flip(halves, -2) * signed
        return turned.reshape(x.shape).astype(x.dtype)
    a, b = jnp.split(x32, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
