# SPDX-License-Identifier: Apache-2.0
"""Small models with every parameter drawn, for tests: none is at a value that hides its absence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.config import DenseConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from r1jax.nn.dense import DenseTransformer
from r1jax.nn.transformer import Transformer

VOCAB = 13


def model_config(**changes) -> ModelConfig:
    """One dense and two mixture-of-experts layers, groups, a shared expert, YaRN and MTP."""
    cfg = ModelConfig(
        vocab_size=VOCAB,
        num_layers=3,
        first_k_dense=1,
        hidden_size=8,
        intermediate_size=12,
        max_position=64,
        mtp_depth=1,
        dtype="float32",
        remat=False,
        rope=RopeConfig(factor=4.0, original_max_position=8),
        mla=MLAConfig(
            num_heads=2,
            q_lora_rank=6,
            kv_lora_rank=5,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=3,
        ),
        moe=MoEConfig(
            n_routed_experts=6,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=3,
            topk_group=2,
            moe_intermediate_size=4,
        ),
    )
    return dataclasses.replace(cfg, **changes)


def plain_model_config() -> ModelConfig:
    """The other side of every switch: full queries; no dense layer, groups, sharing, YaRN, MTP."""
    cfg = model_config()
    return dataclasses.replace(
        cfg,
        num_layers=2,
        first_k_dense=0,
        mtp_depth=0,
        rope=RopeConfig(),
        mla=dataclasses.replace(cfg.mla, q_lora_rank=None),
        moe=dataclasses.replace(cfg.moe, n_group=1, topk_group=1, n_shared_experts=0),
    )


def dense_config(*, qwen2: bool, **changes) -> DenseConfig:
    """Qwen2-shaped (biases, tied head) or Llama-shaped."""
    cfg = DenseConfig(
        vocab_size=VOCAB,
        num_layers=2,
        hidden_size=8,
        intermediate_size=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        qkv_bias=qwen2,
        tie_embeddings=qwen2,
        max_position=64,
        dtype="float32",
        remat=False,
        rope=RopeConfig(theta=1e4),
    )
    return dataclasses.replace(cfg, **changes)


def filled(make, seed: int = 0):
    """The module that `make()` builds, all variables drawn: gains around 1, the rest of std 0.4."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        gain = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape) + gain, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(make))


@functools.cache
def model(cfg: ModelConfig | DenseConfig, seed: int = 0):
    """A filled `Transformer` or `DenseTransformer`."""
    kind = Transformer if isinstance(cfg, ModelConfig) else DenseTransformer
    return filled(lambda: kind(cfg), seed)


@jax.jit
def logits(model, tokens_BT, positions_BT, segments_BT):
    """[B, T, N] of the full forward pass; one compilation a shape and config."""
    out = model(tokens_BT, positions_BT, segments_BT)
    return (out.hidden_BTD @ model.head_DN().astype(out.hidden_BTD.dtype)).astype(jnp.float32)


def tokens(seed: int, *shape: int) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def whole_rows(tokens_BT):
    """(tokens, positions, segments) of rows that are one document each."""
    b, t = tokens_BT.shape
    return tokens_BT, np.tile(np.arange(t, dtype=np.int32), (b, 1)), np.ones((b, t), np.int32)
