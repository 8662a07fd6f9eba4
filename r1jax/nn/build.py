# SPDX-License-Identifier: Apache-2.0
"""The module of an architecture, by its config alone."""

import jax
from flax import nnx

from r1jax.config import DenseConfig, ModelConfig
from r1jax.nn.dense import DenseTransformer
from r1jax.nn.transformer import Transformer


def build(cfg: ModelConfig | DenseConfig) -> nnx.Module:
    """The decoder of `cfg`, its parameters not yet drawn."""
    return DenseTransformer(cfg) if isinstance(cfg, DenseConfig) else Transformer(cfg)


def blank(cfg: ModelConfig | DenseConfig) -> nnx.Module:
    """The decoder of `cfg` with abstract arrays: nothing is allocated, however large it is."""
    return jax.eval_shape(lambda: build(cfg))
