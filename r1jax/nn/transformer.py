# SPDX-License-Identifier: Apache-2.0
"""The DeepSeek-V3 decoder: dense layers, then mixture-of-experts layers, and the MTP module."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.config import ModelConfig, RopeConfig
from r1jax.nn import param
from r1jax.nn.block import Block, Entry, run
from r1jax.nn.head import Head
from r1jax.nn.layers import RMSNorm, SwiGLU, recipe
from r1jax.nn.mla import MLA, Rotation
from r1jax.nn.moe import MoE
from r1jax.nn.mtp import MTP
from r1jax.nn.stats import RouterStats
from r1jax.ops.attention import Causal
from r1jax.ops.rope import (
    inverse_frequencies,
    llama3_frequencies,
    rotation,
    yarn_frequencies,
    yarn_mscale,
)
from r1jax.parallel.folding import all_positions, folded, straight, stretches
from r1jax.sharding import count, take, total


class Output(NamedTuple):
    """A full forward pass.

    Attributes:
        hidden_BTD: [B, T, D] after the final norm; `head_DN` turns it into logits.
        entries: for each stack of layers, what its attentions cache: [L, B, T, ...] arrays.
        stats: RouterStats with a leading axis over the mixture-of-experts layers (0 if dense).
    """

    hidden_BTD: jax.Array
    entries: tuple[Entry, ...]
    stats: RouterStats


class Transformer(nnx.Module):
    """DeepSeek-V3 (arXiv 2412.19437). Parameters are float32; activations are `cfg.dtype`."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        dim, std, eps = cfg.hidden_size, cfg.init_std, cfg.rms_norm_eps
        how = dict(std=std, fp8=recipe(cfg.fp8))

        def block(*, dense: bool) -> Block:
            attention = MLA(dim, cfg.mla, cfg.rope, **how)
            if dense:
                ffn = SwiGLU(dim, cfg.intermediate_size, **how)
            else:
                ffn = MoE(dim, cfg.moe, **how)
            return Block(dim, eps=eps, attention=attention, feed_forward=ffn)

        self.embed = param.normal((cfg.vocab_size, dim), ("vocab", "embed"), std)
        n_moe = cfg.num_layers - cfg.first_k_dense
        if cfg.first_k_dense:
            self.dense_layers = param.stack(lambda: block(dense=True), cfg.first_k_dense)
        self.moe_layers = param.stack(lambda: block(dense=False), n_moe)
        self.norm = RMSNorm(dim, eps=eps)
        self.head = param.normal((dim, cfg.vocab_size), ("embed", "vocab"), std)
        if cfg.mtp_depth:
            self.mtp = MTP(dim, eps=eps, block=block(dense=False), **how)

    @property
    def has_mtp(self) -> bool:
        """Whether the multi-token-prediction module is there."""
        return self.cfg.mtp_depth > 0

    def stacks(self) -> tuple[Block, ...]:
        """The stacks of layers in order; each is a Block with a leading layer axis."""
        return (
            (self.dense_layers, self.moe_layers) if self.cfg.first_k_dense else (self.moe_layers,)
        )

    def output_head(self) -> Head:
        return Head(self.head, False, self.cfg.dtype)

    def head_DN(self) -> jax.Array:
        return self.output_head().whole_DN()

    def embed_tokens(self, tokens_BT: jax.Array) -> jax.Array:
        return embed(param.whole(self.embed, self.cfg.dtype), tokens_BT, self.cfg.dtype)

    def rotation(self, positions_BT: jax.Array) -> Rotation:
        return rotation_of(self.cfg.rope, self.cfg.mla.qk_rope_head_dim, positions_BT)

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
    ) -> Output:
        """Full causal forward pass over packed documents.

        Args:
            tokens_BT: [B, T] int32.
            positions_BT: [B, T] int32, counted from 0 in each document.
            segments_BT: [B, T] int32, document number in the row; 0 is padding.
        """
        return forward(self, tokens_BT, positions_BT, segments_BT)

    def predict_both(self, tokens_BT, next_tokens_BT, positions_BT, segments_BT):
        """A full pass and the MTP module on it: (Output, hidden for P(t_{i+2}), stats [1, ...]).

        Tokens and next tokens are looked up together: their rows' gradients are summed up once.
        """
        both_BTD = self.embed_tokens(jnp.concatenate([tokens_BT, next_tokens_BT], 1))
        x_BTD, next_BTD = jnp.split(both_BTD, 2, axis=1)
        out = decoded(self, x_BTD, positions_BT, segments_BT)
        return out, *self._second(out.hidden_BTD, next_BTD, positions_BT, segments_BT)

    def predict_second(self, hidden_BTD, next_tokens_BT, positions_BT, segments_BT):
        """The MTP module on the main model's output: (hidden for P(t_{i+2}), stats [1, ...])."""
        next_BTD = self.embed_tokens(next_tokens_BT)
        return self._second(hidden_BTD, next_BTD, positions_BT, segments_BT)

    def _second(self, hidden_BTD, next_BTD, positions_BT, segments_BT):
        x_BTD = folded(self.mtp.joined(hidden_BTD, next_BTD))
        positions_BT, segments_BT = folded(positions_BT), folded(segments_BT)
        sight = sight_of(segments_BT)
        how = (self.rotation(positions_BT), sight, segments_BT > 0)
        if self.cfg.remat:  # alone, a module would merge with its second computation: it is scanned
            one = jax.tree.map(lambda x: x[None], self.mtp.block)
            x_BTD, (_, stats) = run(one, x_BTD, *how, cfg=self.cfg)
            stats = jax.tree.map(lambda x: x[0], stats)
        else:
            x_BTD, (_, stats) = self.mtp.block(x_BTD, *how)
        hidden = straight(self.mtp.norm(x_BTD))
        stats = stats._replace(load=total(stats.load, "batch", "length"))
        return hidden, jax.tree.map(lambda x: x[None], stats)


def embed(table_ND: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """Rows of the embedding table, in the activations' dtype."""
    return take(table_ND, tokens_BT, "batch", "length", "embed").astype(jnp.dtype(dtype))


def rotation_of(rope: RopeConfig, dim: int, positions_BT: jax.Array) -> Rotation:
    """cos and sin for `dim` rotary dimensions, with YaRN's scale mscale / mscale_all_dim."""
    stretch = dict(factor=rope.factor, original_max_position=rope.original_max_position)
    scale = 1.0
    if rope.factor == 1.0:
        inv_freq = inverse_frequencies(dim, rope.theta)
    elif rope.scaling == "llama3":
        stretch |= dict(low_freq_factor=rope.low_freq_factor)
        stretch |= dict(high_freq_factor=rope.high_freq_factor)
        inv_freq = llama3_frequencies(dim, rope.theta, **stretch)
    else:
        stretch |= dict(beta_fast=rope.beta_fast, beta_slow=rope.beta_slow)
        inv_freq = yarn_frequencies(dim, rope.theta, **stretch)
        whole = yarn_mscale(rope.factor, rope.mscale_all_dim)
        scale = yarn_mscale(rope.factor, rope.mscale) / whole
    return rotation(positions_BT, inv_freq, scale)


def sight_of(segments_BT: jax.Array) -> Causal:
    """What each query may attend to in its row, whole also where rows are cut, and folded then."""
    if count("length") == 1:
        return Causal.of(segments_BT)
    pieces = stretches(segments_BT.shape[1])
    return Causal.of(segments_BT, all_positions(segments_BT), pieces=pieces)


def forward(model, tokens_BT, positions_BT, segments_BT) -> Output:
    """The full pass of any decoder made of stacks: this model or a dense student."""
    return decoded(model, model.embed_tokens(tokens_BT), positions_BT, segments_BT)


def decoded(model, x_BTD: jax.Array, positions_BT, segments_BT) -> Output:
    """`forward` of tokens that have been embedded."""
    x_BTD, positions_BT, segments_BT = map(folded, (x_BTD, positions_BT, segments_BT))
    sight, valid_BT = sight_of(segments_BT), segments_BT > 0
    turn = model.rotation(positions_BT)
    entries, stats = [], None
    for layers in model.stacks():
        x_BTD, (entry, stats) = run(layers, x_BTD, turn, sight, valid_BT, cfg=model.cfg)
        entries.append(jax.tree.map(jax.vmap(straight), entry))
    stats = stats._replace(load=total(stats.load, "batch", "length"))
    return Output(straight(model.norm(x_BTD)), tuple(entries), stats)
