# SPDX-License-Identifier: Apache-2.0
"""The small modules: RMSNorm, projections and the dense feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.config import FP8Config
from r1jax.nn import param
from r1jax.nn.stats import RouterStats
from r1jax.ops.linear import FP8, linear
from r1jax.ops.mlp import swiglu
from r1jax.ops.norm import rms_norm
from r1jax.sharding import total


def recipe(cfg: FP8Config) -> FP8 | None:
    """What the linear layers of a config are computed by."""
    return FP8(cfg.block, cfg.power_of_two) if cfg.enabled else None


def project(equation: str, x: jax.Array, weight: nnx.Param, fp8: FP8 | None) -> jax.Array:
    """`ops.linear.linear` with a module's weight."""
    return linear(equation, x, param.operand(weight, x.dtype, fp8), fp8)


class RMSNorm(nnx.Module):
    """`ops.norm.rms_norm` with its gain."""

    def __init__(self, dim: int, *, eps: float, axis: str | None = None):
        self.eps = eps
        self.weight = param.constant(1.0, (dim,), (axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


class SwiGLU(nnx.Module):
    """`ops.mlp.swiglu` with its three matrices."""

    def __init__(self, dim: int, hidden: int, *, std: float, fp8: FP8 | None = None):
        self.fp8 = fp8
        self.w_gate = param.linear((dim, hidden), ("embed", "mlp"), std)
        self.w_up = param.linear((dim, hidden), ("embed", "mlp"), std)
        self.w_down = param.linear((hidden, dim), ("mlp", "embed"), std)

    def mix(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., D]."""
        held = (self.w_gate, self.w_up, self.w_down)
        weights = (param.operand(w, x.dtype, self.fp8) for w in held)
        return total(swiglu(x, *weights, self.fp8), "mlp")

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        """The feed-forward interface of a block; a dense one has no router and no loads."""
        none = RouterStats(jnp.zeros((0,)), jnp.zeros(x_BTD.shape[0]), jnp.float32(0.0))
        return self.mix(x_BTD), none
