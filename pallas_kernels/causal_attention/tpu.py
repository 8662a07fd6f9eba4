# SPDX-License-Identifier: Apache-2.0
"""Causal attention on TPU: JAX's splash attention, one kernel forward and two for the gradient."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from pallas_kernels import tuning
from pallas_kernels.dispatch import Backend, Unsupported
from pallas_kernels.mosaic import LANES, divisor

BLOCK = 512  # queries, and keys, of a block


def attend(q_BJGTK, k_BJSK, v_BJSV, segments_BT, *, scale: float, backend: Backend) -> jax.Array:
    """As `causal_attention` where the keys are the queries' own row."""
    b, j, g, t, k = q_BJGTK.shape
    if t % LANES:
        raise Unsupported(f"rows of {t} tokens: splash attention has multiples of {LANES}")
    if q_BJGTK.dtype != jnp.bfloat16:
        raise Unsupported(f"{q_BJGTK.dtype}: splash attention multiplies bfloat16; 'xla' has any")
    q_BHTK = (q_BJGTK * scale).astype(q_BJGTK.dtype).reshape(b, j * g, t, k)
    dims = dict(t=t, k=k, v=v_BJSV.shape[-1], heads=j * g, shared=g)
    own = lambda: (divisor(t, LANES, BLOCK),) * 2  # noqa: E731
    tiles = tuning.choose("causal_attention", dims, backend, own)
    attention = _kernel(j * g, t, tiles, backend.interpret)
    out_BHTV = jax.vmap(lambda q, k, v, s: attention(q, k, v, splash.SegmentIds(s, s)))(
        q_BHTK, k_BJSK, v_BJSV, segments_BT
    )
    seen = (segments_BT > 0)[:, None, :, None]  # padding sees padding in there
    return jnp.where(seen, out_BHTV, 0).reshape(b, j, g, t, -1)


def _kernel(heads: int, length: int, tiles: tuning.Tiles, interpret: bool):
    queries, keys = tiles
    if length % math.lcm(queries, keys) or keys % LANES:
        raise Unsupported(f"blocks {tiles} of rows of {length}: both divide it, keys by {LANES}")
    same = dict(block_q=queries, block_q_dkv=queries, block_q_dq=queries)
    same |= dict(block_kv=keys, block_kv_compute=keys, block_kv_dq=keys)
    same |= dict(block_kv_dkv=keys, block_kv_dkv_compute=keys)
    return splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**same),
        interpret=interpret,
    )
