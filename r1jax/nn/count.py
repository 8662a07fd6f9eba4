# SPDX-License-Identifier: Apache-2.0
"""How large an architecture is, from its config alone: parameters, cache, arithmetic."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.config import DenseConfig, ModelConfig
from r1jax.nn.build import blank
from r1jax.nn.param import leaves


class Size(NamedTuple):
    """Counts of one architecture.

    Attributes:
        parameters: of the main model, embedding and head included.
        active: of these, what one token passes through: the routed experts it is not sent to are
            left out; of the embedding it reads one row, but all of it is counted, as DeepSeek does.
        mtp: parameters of the multi-token-prediction module, which shares embedding and head.
        cache_values: numbers cached for each token.
        flops: of a forward pass for one token, two for each active weight of a matmul, without
            attention, whose share grows with the context.
        attention_flops: of the attention of one token to one other token.
    """

    parameters: int
    active: int
    mtp: int
    cache_values: int
    flops: int
    attention_flops: int


@functools.cache
def size(cfg: ModelConfig | DenseConfig) -> Size:
    """Counts of an architecture; nothing is allocated."""
    shapes = {path: jax.tree.leaves(v)[0].shape for path, v in leaves(blank(cfg)).items()}
    counts = {path: math.prod(shape) for path, shape in shapes.items()}
    mtp = sum(n for path, n in counts.items() if path.startswith("mtp."))
    total = sum(counts.values()) - mtp
    idle = 0
    if isinstance(cfg, ModelConfig):
        routed = sum(n for path, n in counts.items() if _routed(path) and path.startswith("moe"))
        idle = routed - routed * cfg.moe.num_experts_per_tok // cfg.moe.n_routed_experts
    active = total - idle
    matmul = active - cfg.vocab_size * cfg.hidden_size  # the embedding is looked up
    if isinstance(cfg, DenseConfig) and cfg.tie_embeddings:
        matmul = active  # the table is the head as well
    return Size(
        parameters=total,
        active=active,
        mtp=mtp,
        cache_values=cfg.num_layers * cached_values(cfg),
        flops=2 * matmul,
        attention_flops=2 * cfg.num_layers * _pair_values(cfg),
    )


def train_flops(cfg: ModelConfig | DenseConfig, length: int) -> float:
    """Floating-point operations that training on one token of a row of `length` asks for.

    Three times a forward pass, nothing computed twice: the active matmul weights, causal attention
    to the (length + 1) / 2 tokens a query sees on average, and the MTP module where there is one.
    """
    return 3.0 * (forward_flops(cfg, length) + second_flops(cfg, length))


def forward_flops(cfg: ModelConfig | DenseConfig, length: int) -> float:
    """Of a forward pass of the main model for one token of a causal row of `length`."""
    s = size(cfg)
    return s.flops + s.attention_flops * (length + 1) / 2


def second_flops(cfg: ModelConfig | DenseConfig, length: int) -> float:
    """Of a forward pass of the MTP module, with the head that it shares; 0 without one."""
    if isinstance(cfg, DenseConfig) or not cfg.mtp_depth:
        return 0.0
    active = size(cfg).mtp - _idle(cfg) + cfg.vocab_size * cfg.hidden_size
    return 2 * active + 2 * _pair_values(cfg) * (length + 1) / 2


def decode_flops(cfg: ModelConfig | DenseConfig, context: int) -> float:
    """Of one token of the main model after `context` tokens, which MLA attends to as latents."""
    s = size(cfg)
    if isinstance(cfg, DenseConfig):
        return s.flops + s.attention_flops * context
    m = cfg.mla
    pair = m.num_heads * (2 * m.kv_lora_rank + m.qk_rope_head_dim)
    # W^UK and W^UV carry the query in and the mean latent out, as often as they expand one key.
    return s.flops + 2 * cfg.num_layers * pair * context


def read_by_pass(cfg: ModelConfig, tokens: float) -> float:
    """Parameters that a pass of the main model over so many tokens reads: the more tokens, the more
    different experts; infinitely many ask for all."""
    s, layers = size(cfg), cfg.num_layers - cfg.first_k_dense
    more = _experts_read(cfg, tokens) - cfg.moe.num_experts_per_tok
    return s.active - cfg.vocab_size * cfg.hidden_size + layers * _expert(cfg) * more


def read_by_draft(cfg: ModelConfig, rows: float) -> float:
    """Parameters that the MTP module, with the head, reads for a draft of each row."""
    idle = cfg.moe.n_routed_experts - _experts_read(cfg, rows)
    return size(cfg).mtp - _expert(cfg) * idle + cfg.vocab_size * cfg.hidden_size


def cached_values(cfg: ModelConfig | DenseConfig) -> int:
    """Numbers cached for a token in one layer: 576 in DeepSeek-V3."""
    if isinstance(cfg, DenseConfig):
        return 2 * cfg.num_kv_heads * cfg.head_dim
    return cfg.mla.kv_lora_rank + cfg.mla.qk_rope_head_dim


def _pair_values(cfg: ModelConfig | DenseConfig) -> int:
    """Multiply-adds of one query with one key and one value, over all heads (keys expanded)."""
    if isinstance(cfg, DenseConfig):
        return 2 * cfg.num_heads * cfg.head_dim
    m = cfg.mla
    return m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim)


def _expert(cfg: ModelConfig) -> int:
    """Parameters of one routed expert."""
    return 3 * cfg.hidden_size * cfg.moe.moe_intermediate_size


def _experts_read(cfg: ModelConfig, tokens: float) -> float:
    """Experts of a layer that so many tokens are sent to, if each chooses evenly at random."""
    e, k = cfg.moe.n_routed_experts, cfg.moe.num_experts_per_tok
    return e * (1.0 - (1.0 - k / e) ** tokens)


def _idle(cfg: ModelConfig) -> int:
    """Parameters of one layer's routed experts that a token is not sent to."""
    return _expert(cfg) * (cfg.moe.n_routed_experts - cfg.moe.num_experts_per_tok)


def _routed(path: str) -> bool:
    return path.endswith(("feed_forward.w_gate", "feed_forward.w_up", "feed_forward.w_down"))


def bytes_by_dtype(module) -> dict[str, int]:
    """{dtype: bytes} of a module's arrays."""
    found: dict[str, int] = {}
    for array in jax.tree.leaves(module):
        name = jnp.dtype(array.dtype).name
        found[name] = found.get(name, 0) + array.size * jnp.dtype(array.dtype).itemsize
    return found
