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
from pallas_kernels.mosaic import LANES, round_up

BLOCKS = (512, 384, 256)  # queries, and keys, of a block


def attend(q_BJGTK, k_BJSK, v_BJSV, segments_BT, *, scale: float, backend: Backend) -> jax.Array:
    """As `causal_attention` where the keys are the queries' own row. Rows are padded to blocks."""
    b, j, g, length, k = q_BJGTK.shape
    if q_BJGTK.dtype != jnp.bfloat16:
        raise Unsupported(f"{q_BJGTK.dtype}: splash attention multiplies bfloat16; 'xla' has any")
    dims = dict(t=length, k=k, v=v_BJSV.shape[-1], heads=j * g, shared=g)
    tiles = tuning.choose("causal_attention", dims, backend, lambda: (_block(length),) * 2)
    if any(n % LANES for n in tiles):
        raise Unsupported(f"blocks {tiles}: splash attention has multiples of {LANES}")
    padded = round_up(length, math.lcm(*tiles))
    behind = lambda x, axis: jnp.pad(x, _behind(x.ndim, axis, padded - length))  # noqa: E731
    q_BHTK = (q_BJGTK * scale).astype(q_BJGTK.dtype).reshape(b, j * g, length, k)
    attention = _kernel(j * g, padded, tiles, backend.interpret)
    out_BHTV = jax.vmap(lambda q, k, v, s: attention(q, k, v, splash.SegmentIds(s, s)))(
        *(behind(x, 2) for x in (q_BHTK, k_BJSK, v_BJSV)), behind(segments_BT, 1)
    )
    seen = (segments_BT > 0)[:, None, :, None]  # padding sees padding in there
    return jnp.where(seen, out_BHTV[:, :, :length], 0).reshape(b, j, g, length, -1)


def _block(length: int) -> int:
    """The one that pads least, the largest of those."""
    return min((*BLOCKS, LANES), key=lambda n: (round_up(length, n), -n))


def _behind(rank: int, axis: int, more: int) -> list[tuple[int, int]]:
    return [(0, more if a == axis else 0) for a in range(rank)]


def _kernel(heads: int, length: int, tiles: tuning.Tiles, interpret: bool):
    queries, keys = tiles
    same = dict(block_q=queries, block_q_dkv=queries, block_q_dq=queries)
    same |= dict(block_kv=keys, block_kv_compute=keys, block_kv_dq=keys)
    same |= dict(block_kv_dkv=keys, block_kv_dkv_compute=keys)
    return splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**same),
        interpret=interpret,
    )
