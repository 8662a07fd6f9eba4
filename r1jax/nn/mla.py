# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: the weights, and which pure function uses them when."""

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.config import MLAConfig, RopeConfig
from r1jax.nn import param
from r1jax.nn.layers import RMSNorm, project
from r1jax.nn.param import operand
from r1jax.ops.attention import LatentPart, mla_absorbed, mla_naive
from r1jax.ops.linear import FP8, rounded, seen
from r1jax.ops.rope import rotate_interleaved, yarn_mscale
from r1jax.sharding import platform, total

Rotation = tuple[jax.Array, jax.Array]  # cos and sin, each [B, T, R/2]

LATENT_EPS = 1e-6  # of the norms of the latents, whatever the model's: as released


class MLA(nnx.Module):
    """DeepSeek-V3 section 2.1.1. It caches one latent [C] and one rotated key [R] a token.

    In FP8 the latents are rounded before they are cached, so that absorbed attention, which is
    given the up-projections as their products see them, sees what these products see.
    """

    Part = LatentPart
    ENTRY = (None,), (None,)  # logical axes of what is cached of a token

    def __init__(
        self,
        dim: int,
        cfg: MLAConfig,
        rope: RopeConfig,
        *,
        std: float,
        fp8: FP8 | None = None,
    ):
        self.fp8 = fp8
        h, c, q = cfg.num_heads, cfg.kv_lora_rank, cfg.q_lora_rank
        k, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.nope_dim = k
        m = yarn_mscale(rope.factor, rope.mscale_all_dim)
        self.scale = (k + r) ** -0.5 * m * m
        if q is None:
            self.w_q = param.linear((dim, h, k + r), ("embed", "heads", None), std)
        else:
            self.w_dq = param.linear((dim, q), ("embed", "latent"), std)
            self.q_norm = RMSNorm(q, eps=LATENT_EPS)
            self.w_uq = param.linear((q, h, k + r), (_latent(q), "heads", None), std)
        self.w_dkv = param.linear((dim, c), ("embed", "latent"), std)
        self.kv_norm = RMSNorm(c, eps=LATENT_EPS)
        self.w_kr = param.linear((dim, r), ("embed", None), std)
        self.w_uk = param.linear((c, h, k), (_latent(c), "heads", None), std)
        self.w_uv = param.linear((c, h, v), (_latent(c), "heads", None), std)
        self.w_o = param.linear((h, v, dim), ("heads", None, "embed"), std, inputs=2)
        self.full_query = q is None

    def entry(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
        """What is cached of each token: (latent c_BTC, rotated shared key k_rope_BTR)."""
        c_BTC = self.kv_norm(project("btd,dc->btc", x_BTD, self.w_dkv, self.fp8))
        if self.fp8 is not None:
            c_BTC = rounded(c_BTC, self.fp8)
        k_BTR = project("btd,dr->btr", x_BTD, self.w_kr, self.fp8)
        return c_BTC, rotate_interleaved(k_BTR, *rotation)

    def query(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
        """(q_nope_BTHK, q_rope_BTHR): the part without position, and the rotated part."""
        if self.full_query:
            q = project("btd,dhk->bthk", x_BTD, self.w_q, self.fp8)
        else:
            q = self.q_norm(project("btd,dq->btq", x_BTD, self.w_dq, self.fp8))
            q = project("btq,qhk->bthk", q, self.w_uq, self.fp8)
        q_nope_BTHK, q_rope_BTHR = jnp.split(q, [self.nope_dim], axis=-1)
        cos, sin = rotation
        return q_nope_BTHK, rotate_interleaved(q_rope_BTHR, cos[:, :, None], sin[:, :, None])

    def __call__(self, x_BTD: jax.Array, rotation: Rotation, part: LatentPart) -> jax.Array:
        """Attention over one part as long as the queries, keys expanded: training and prefill."""
        q, up = self.query(x_BTD, rotation), self._up(x_BTD.dtype)
        how = dict(scale=self.scale, fp8=self.fp8, backend=platform())
        out = mla_naive(*q, part, *up, **how)
        return self._project(out)

    def cached(self, x_BTD: jax.Array, rotation: Rotation, parts: tuple[LatentPart, ...]):
        """Attention over cached latents, absorbed: for decoding."""
        q, up = self.query(x_BTD, rotation), self._up(x_BTD.dtype)
        out = mla_absorbed(*q, parts, *(seen(w, self.fp8) for w in up), scale=self.scale)
        return self._project(out)

    def _up(self, dtype) -> tuple[jax.Array, jax.Array]:
        """(w_uk_CHK, w_uv_CHV)"""
        return operand(self.w_uk, dtype, self.fp8), operand(self.w_uv, dtype, self.fp8)

    def _project(self, out_BTHV: jax.Array) -> jax.Array:
        return total(project("bthv,hvd->btd", out_BTHV, self.w_o, self.fp8), "heads")


def _latent(rank: int) -> str | None:
    """The axis of a latent that is projected up: cut over devices unless it is odd and small."""
    return "latent" if rank % 8 == 0 else None
