# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: the weights, and which pure function uses them when."""

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.config import MLAConfig, RopeConfig
from r1jax.nn import param
from r1jax.nn.layers import RMSNorm
from r1jax.nn.param import use
from r1jax.ops.attention import LatentPart, mla_absorbed, mla_naive
from r1jax.ops.rope import rotate_interleaved, yarn_mscale
from r1jax.sharding import total

Rotation = tuple[jax.Array, jax.Array]  # cos and sin, each [B, T, R/2]

LATENT_EPS = 1e-6  # of the norms of the latents, whatever the model's: as released


class MLA(nnx.Module):
    """DeepSeek-V3 section 2.1.1. It caches one latent [C] and one rotated key [R] a token."""

    Part = LatentPart

    def __init__(self, dim: int, cfg: MLAConfig, rope: RopeConfig, *, std: float):
        h, c, q = cfg.num_heads, cfg.kv_lora_rank, cfg.q_lora_rank
        k, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.nope_dim = k
        m = yarn_mscale(rope.factor, rope.mscale_all_dim)
        self.scale = (k + r) ** -0.5 * m * m
        if q is None:
            self.w_q = param.normal((dim, h, k + r), ("embed", "heads", None), std)
        else:
            self.w_dq = param.normal((dim, q), ("embed", "latent"), std)
            self.q_norm = RMSNorm(q, eps=LATENT_EPS)
            self.w_uq = param.normal((q, h, k + r), (_latent(q), "heads", None), std)
        self.w_dkv = param.normal((dim, c), ("embed", "latent"), std)
        self.kv_norm = RMSNorm(c, eps=LATENT_EPS)
        self.w_kr = param.normal((dim, r), ("embed", None), std)
        self.w_uk = param.normal((c, h, k), (_latent(c), "heads", None), std)
        self.w_uv = param.normal((c, h, v), (_latent(c), "heads", None), std)
        self.w_o = param.normal((h, v, dim), ("heads", None, "embed"), std)
        self.full_query = q is None

    def entry(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
        """What is cached of each token: (latent c_BTC, rotated shared key k_rope_BTR)."""
        c_BTC = self.kv_norm(jnp.einsum("btd,dc->btc", x_BTD, use(self.w_dkv, x_BTD.dtype)))
        k_BTR = jnp.einsum("btd,dr->btr", x_BTD, use(self.w_kr, x_BTD.dtype))
        return c_BTC, rotate_interleaved(k_BTR, *rotation)

    def query(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
        """(q_nope_BTHK, q_rope_BTHR): the part without position, and the rotated part."""
        dtype = x_BTD.dtype
        if self.full_query:
            q = jnp.einsum("btd,dhk->bthk", x_BTD, use(self.w_q, dtype))
        else:
            q = self.q_norm(jnp.einsum("btd,dq->btq", x_BTD, use(self.w_dq, dtype)))
            q = jnp.einsum("btq,qhk->bthk", q, use(self.w_uq, dtype))
        q_nope_BTHK, q_rope_BTHR = q[..., : self.nope_dim], q[..., self.nope_dim :]
        cos, sin = rotation
        return q_nope_BTHK, rotate_interleaved(q_rope_BTHR, cos[:, :, None], sin[:, :, None])

    def __call__(self, x_BTD: jax.Array, rotation: Rotation, part: LatentPart) -> jax.Array:
        """Attention over one part as long as the queries, keys expanded: training and prefill."""
        q, dtype = self.query(x_BTD, rotation), x_BTD.dtype
        w_uk_CHK, w_uv_CHV = use(self.w_uk, dtype), use(self.w_uv, dtype)
        out = mla_naive(*q, part, w_uk_CHK, w_uv_CHV, scale=self.scale)
        return self._project(out)

    def cached(self, x_BTD: jax.Array, rotation: Rotation, parts: tuple[LatentPart, ...]):
        """Attention over cached latents, absorbed: for decoding."""
        q, dtype = self.query(x_BTD, rotation), x_BTD.dtype
        w_uk_CHK, w_uv_CHV = use(self.w_uk, dtype), use(self.w_uv, dtype)
        out = mla_absorbed(*q, parts, w_uk_CHK, w_uv_CHV, scale=self.scale)
        return self._project(out)

    def _project(self, out_BTHV: jax.Array) -> jax.Array:
        w_o_HVD = use(self.w_o, out_BTHV.dtype)
        return total(jnp.einsum("bthv,hvd->btd", out_BTHV, w_o_HVD), "heads")


def _latent(rank: int) -> str | None:
    """The axis of a latent that is projected up: cut over devices unless it is odd and small."""
    return "latent" if rank % 8 == 0 else None
