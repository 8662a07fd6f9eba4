# SPDX-License-Identifier: Apache-2.0
"""Dense decoders, one module: Qwen2 (biased q, k, v), Qwen3 (normalised q, k), Llama (neither)."""

import jax
from flax import nnx

from r1jax.config import DenseConfig
from r1jax.nn import param
from r1jax.nn.block import Block
from r1jax.nn.head import Head
from r1jax.nn.layers import RMSNorm, SwiGLU, project, recipe
from r1jax.nn.mla import Rotation
from r1jax.nn.transformer import Output, embed, forward, rotation_of
from r1jax.ops.attention import KVPart, gqa
from r1jax.ops.rope import rotate_half
from r1jax.sharding import total


class GQA(nnx.Module):
    """Grouped-query attention with rotary halves; caches rotated keys and values."""

    Part = KVPart
    ENTRY = ("heads", None), ("heads", None)  # logical axes of what is cached of a token

    def __init__(self, cfg: DenseConfig):
        d, h, j, k = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        std = cfg.init_std
        self.w_q = param.linear((d, h, k), ("embed", "heads", None), std)
        self.w_k = param.linear((d, j, k), ("embed", "heads", None), std)
        self.w_v = param.linear((d, j, k), ("embed", "heads", None), std)
        self.w_o = param.linear((h, k, d), ("heads", None, "embed"), std, inputs=2)
        self.biased = cfg.qkv_bias
        if self.biased:
            self.b_q = param.constant(0.0, (h, k), ("heads", None))
            self.b_k = param.constant(0.0, (j, k), ("heads", None))
            self.b_v = param.constant(0.0, (j, k), ("heads", None))
        self.normed = cfg.qk_norm
        if self.normed:
            self.q_norm = RMSNorm(k, eps=cfg.rms_norm_eps)
            self.k_norm = RMSNorm(k, eps=cfg.rms_norm_eps)
        self.scale = k**-0.5
        self.fp8 = recipe(cfg.fp8)

    def entry(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
        """What is cached of each token: (rotated key, value), each [B, T, J, K]."""
        k_BTJK = project("btd,djk->btjk", x_BTD, self.w_k, self.fp8)
        v_BTJK = project("btd,djk->btjk", x_BTD, self.w_v, self.fp8)
        if self.biased:
            k_BTJK = k_BTJK + self.b_k[...].astype(x_BTD.dtype)
            v_BTJK = v_BTJK + self.b_v[...].astype(x_BTD.dtype)
        if self.normed:
            k_BTJK = self.k_norm(k_BTJK)
        return _rotate(k_BTJK, rotation), v_BTJK

    def __call__(self, x_BTD: jax.Array, rotation: Rotation, part: KVPart) -> jax.Array:
        return self.cached(x_BTD, rotation, (part,))

    def cached(self, x_BTD: jax.Array, rotation: Rotation, parts: tuple[KVPart, ...]) -> jax.Array:
        q_BTHK = project("btd,dhk->bthk", x_BTD, self.w_q, self.fp8)
        if self.biased:
            q_BTHK = q_BTHK + self.b_q[...].astype(x_BTD.dtype)
        if self.normed:
            q_BTHK = self.q_norm(q_BTHK)
        out_BTHK = gqa(_rotate(q_BTHK, rotation), parts, scale=self.scale)
        return total(project("bthk,hkd->btd", out_BTHK, self.w_o, self.fp8), "heads")


def _rotate(x_BTHK: jax.Array, rotation: Rotation) -> jax.Array:
    cos, sin = rotation
    return rotate_half(x_BTHK, cos[:, :, None], sin[:, :, None])


class DenseTransformer(nnx.Module):
    """A Qwen2, Qwen3 or Llama decoder with the interface of `nn.transformer.Transformer`."""

    has_mtp = False

    def __init__(self, cfg: DenseConfig):
        self.cfg = cfg
        dim, std, eps = cfg.hidden_size, cfg.init_std, cfg.rms_norm_eps

        def block() -> Block:
            ffn = SwiGLU(dim, cfg.intermediate_size, std=std, fp8=recipe(cfg.fp8))
            return Block(dim, eps=eps, attention=GQA(cfg), feed_forward=ffn)

        self.embed = param.normal((cfg.vocab_size, dim), ("vocab", "embed"), std)
        self.layers = param.stack(block, cfg.num_layers)
        self.norm = RMSNorm(dim, eps=eps)
        if not cfg.tie_embeddings:
            self.head = param.normal((dim, cfg.vocab_size), ("embed", "vocab"), std)

    def stacks(self) -> tuple[Block, ...]:
        return (self.layers,)

    def output_head(self) -> Head:
        tied = self.cfg.tie_embeddings
        return Head(self.embed if tied else self.head, tied, self.cfg.dtype)

    def head_DN(self) -> jax.Array:
        return self.output_head().whole_DN()

    def embed_tokens(self, tokens_BT: jax.Array) -> jax.Array:
        return embed(param.whole(self.embed, self.cfg.dtype), tokens_BT, self.cfg.dtype)

    def rotation(self, positions_BT: jax.Array) -> Rotation:
        return rotation_of(self.cfg.rope, self.cfg.head_dim, positions_BT)

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
    ) -> Output:
        """As `Transformer.__call__`; `stats.load` is [L, 0]."""
        return forward(self, tokens_BT, positions_BT, segments_BT)
