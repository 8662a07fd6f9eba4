# SPDX-License-Identifier: Apache-2.0
"""Optimizer chains and schedules.

The learning rate is an argument of the step, not a part of the chain: one compiled step serves a
whole schedule and a resumed run needs only its step number.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from r1jax.config import OptimConfig


def adamw(cfg: OptimConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay on matrices (Loshchilov & Hutter 2019).

    Its `update` takes the gradient's norm as `grad_norm`, and what it returns still has to be
    multiplied by −learning rate: see `apply`.
    """
    return _chain(
        cfg.clip_norm,
        cfg.b1,
        cfg.b2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        moment_dtype=cfg.moment_dtype,
    )


@functools.cache  # stages that differ in learning rate only share one compiled step
def _chain(clip_norm, b1, b2, *, eps, weight_decay, moment_dtype):
    return optax.chain(
        clip_to_norm(clip_norm),
        stored(optax.scale_by_adam(b1, b2, eps), moment_dtype),
        optax.add_decayed_weights(weight_decay, mask=decayed),
    )


def stored(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner` with the floating-point arrays of its state kept in `dtype` between updates.

    It computes in float32: the moments are rounded once an update.
    """
    if dtype == "float32":
        return inner
    to = lambda dtype: lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731

    def init(params):
        return jax.tree.map(to(dtype), inner.init(params))

    def update(updates, state, params=None):
        wide = jax.tree.map(to(jnp.float32), state)
        updates, wide = inner.update(updates, wide, params)
        return updates, jax.tree.map(to(dtype), wide)

    return optax.GradientTransformation(init, update)


def clip_to_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, the norm given to `update` as `grad_norm`: a step needs it anyway."""

    def update(updates, state, params=None, *, grad_norm: jax.Array, **_):
        del params
        scale = largest / jnp.maximum(grad_norm, largest)
        return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def decayed(params: Any) -> Any:
    """True where weight decay applies: not on norm gains and biases."""
    still = ("norm", "b_q", "b_k", "b_v", "value_bias")

    def one(path, _):
        return not any(word in jax.tree_util.keystr((p,)) for p in path for word in still)

    return jax.tree_util.tree_map_with_path(one, params)


def apply(params: Any, updates: Any, learning_rate: jax.Array) -> Any:
    """params − learning_rate · updates."""
    return jax.tree.map(lambda p, u: p - (learning_rate * u).astype(p.dtype), params, updates)


def learning_rate(cfg: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_fraction` of it over `steps`."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1)
    floor = cfg.final_fraction
    return cfg.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))
