# SPDX-License-Identifier: Apache-2.0
"""Bytes of weights, and of what linear layers keep for the backward pass, by format.

"FP8 takes 75 % less memory than FP32" is a claim about both. Neither the float32 master weights nor
the optimizer are in it: whatever the layers are computed in, they are there as well.
"""

import functools
import math
from typing import NamedTuple

import jax

from r1jax.config import DenseConfig, ModelConfig
from r1jax.nn.build import blank
from r1jax.nn.param import leaves

STACKS = ("layers.", "dense_layers.", "moe_layers.")
NOT = ("embed", "head", "b_q", "b_k", "b_v")  # weights of linear layers in FP8
# Weights that read the same activations.
INPUTS = {
    ("w_q", "w_k", "w_v", "w_dq", "w_dkv", "w_kr"): "hidden",
    ("w_uk", "w_uv"): "latent",
    ("w_gate", "w_up"): "hidden",
}


class Linear(NamedTuple):
    """One linear layer, or one for each layer of a stack and each expert.

    Attributes:
        k, n: of the matrices, [k, n].
        matrices: how many there are.
        layers: of the stack.
        rows: that a token gives to each of the layers.
        reads: what it reads; layers of the same `reads` keep it once.
    """

    k: int
    n: int
    matrices: int
    layers: int
    rows: int
    reads: str


class Bytes(NamedTuple):
    """Of one format.

    Attributes:
        weights: all parameters; in FP8 those of linear layers with their scales, bfloat16 the rest.
        kept: what the linear layers read of one token, kept for the gradients of their weights.
    """

    weights: float
    kept: float


@functools.cache
def linears(cfg: ModelConfig | DenseConfig) -> tuple[Linear, ...]:
    """Every layer that the FP8 recipe quantises, with the MTP module's."""
    found = []
    for path, variable in leaves(blank(cfg)).items():
        *parent, name = path.split(".")
        shape = jax.tree.leaves(variable)[0].shape
        layers = shape[0] if path.startswith(STACKS) else 1
        shape = shape[1:] if path.startswith(STACKS) else shape
        if name in NOT or "router" in parent or len(shape) < 2:
            continue
        routed = parent[-1] == "feed_forward" and len(shape) == 3
        experts, shape = (shape[0], shape[1:]) if routed else (1, shape)
        axes = 2 if name == "w_o" else 1
        size = math.prod(shape[:axes]), math.prod(shape[axes:])
        read = next((r for names, r in INPUTS.items() if name in names), name)
        rows = cfg.moe.num_experts_per_tok if routed else 1
        reads = ".".join((*parent, read))
        found.append(Linear(*size, experts * layers, layers, rows, reads))
    return tuple(found)


def by_format(cfg: ModelConfig | DenseConfig) -> dict[str, Bytes]:
    """{"float32", "bfloat16", "fp8": bytes}; FP8 with the block of the config."""
    block, layers = cfg.fp8.block, linears(cfg)
    parameters = sum(math.prod(jax.tree.leaves(v)[0].shape) for v in leaves(blank(cfg)).values())
    rest = parameters - sum(x.k * x.n * x.matrices for x in layers)
    read = {x.reads: x for x in layers}.values()
    values = sum(x.k * x.rows * x.layers for x in read)
    fp8 = Bytes(
        sum(weight_bytes(x, block) for x in layers) + 2 * rest,
        sum(kept_bytes(x, block) for x in read),
    )
    return {
        "float32": Bytes(4 * parameters, 4 * values),
        "bfloat16": Bytes(2 * parameters, 2 * values),
        "fp8": fp8,
    }


def weight_bytes(layer: Linear, block: int) -> int:
    """E4M3 values in whole blocks, and a float32 scale for each of them."""
    blocks = -(-layer.k // block) * -(-layer.n // block)
    return layer.matrices * blocks * (block * block + 4)


def kept_bytes(layer: Linear, block: int) -> float:
    """Of a token: E4M3 values, and its part of the scales of tiles along the tokens."""
    values = -(-layer.k // block) * block * layer.rows * layer.layers
    return values * (1 + 4 / block)
