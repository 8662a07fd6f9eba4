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
from pallas_kernels.causal_attention.ref import Segments
from pallas_kernels.dispatch import Backend, Unsupported
from pallas_kernels.mosaic import LANES, round_up

BLOCKS = (512, 384, 256)  # queries, and keys, of a block


def attend(
    q_BJGTK, k_BJSK, v_BJSV, segments: Segments, *, scale: float, backend: Backend
) -> jax.Array:
    """As `causal_attention`. Whole rows are padded to blocks; pieces must consist of them."""
    b, j, g, length, k = q_BJGTK.shape
    if q_BJGTK.dtype != jnp.bfloat16:
        raise Unsupported(f"{q_BJGTK.dtype}: splash attention multiplies bfloat16; 'xla' has any")
    dims = dict(t=length, k=k, v=v_BJSV.shape[-1], heads=j * g, shared=g)
    tiles = tuning.choose("causal_attention", dims, backend, lambda: (_block(length),) * 2)
    if any(n % LANES for n in tiles):
        raise Unsupported(f"blocks {tiles}: splash attention has multiples of {LANES}")
    more, pieces = -length % math.lcm(*tiles), k_BJSK.shape[2] // length
    if more and pieces > 1:
        raise Unsupported(f"pieces of {length} tokens of a row; 'xla' takes any, this {tiles}")
    behind = lambda x, axis: jnp.pad(x, _behind(x.ndim, axis, more)) if more else x  # noqa: E731
    q_BHTK = (q_BJGTK * scale).astype(q_BJGTK.dtype).reshape(b, j * g, length, k)
    attention = _kernel(j * g, length + more, tiles, pieces, interpret=backend.interpret)
    attention = _of_piece(attention, segments.piece, pieces)
    out_BHTV = jax.vmap(lambda q, k, v, *s: attention(q, k, v, splash.SegmentIds(*s)))(
        *(behind(x, 2) for x in (q_BHTK, k_BJSK, v_BJSV)),
        *(behind(x, 1) for x in (segments.queries_BT, segments.keys_BS)),
    )
    seen = (segments.queries_BT > 0)[:, None, :, None]  # padding sees padding in there
    return jnp.where(seen, out_BHTV[:, :, :length], 0).reshape(b, j, g, length, -1)


def _block(length: int) -> int:
    """The one that pads least, the largest of those."""
    return min((*BLOCKS, LANES), key=lambda n: (round_up(length, n), -n))


def _behind(rank: int, axis: int, more: int) -> list[tuple[int, int]]:
    return [(0, more if a == axis else 0) for a in range(rank)]


def _kernel(heads: int, length: int, tiles: tuning.Tiles, pieces: int, *, interpret: bool):
    queries, keys = tiles
    same = dict(block_q=queries, block_q_dkv=queries, block_q_dq=queries)
    same |= dict(block_kv=keys, block_kv_compute=keys, block_kv_dq=keys)
    same |= dict(block_kv_dkv=keys, block_kv_dkv_compute=keys)
    return splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((pieces * length,) * 2)] * heads),
        block_sizes=splash.BlockSizes(**same),
        head_shards=1,
        q_seq_shards=pieces,
        interpret=interpret,
    )


def _of_piece(attention, piece: jax.Array | int, pieces: int):
    """The kernel of one piece of the rows: its part of the tables, [head, queries, keys] of blocks
    and [queries]."""

    def part(x):
        axis = 1 if x.ndim == 3 else 0
        size = x.shape[axis] // pieces
        return jax.lax.dynamic_slice_in_dim(x, piece * size, size, axis)

    return attention if pieces == 1 else jax.tree.map(part, attention)
