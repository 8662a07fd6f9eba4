# SPDX-License-Identifier: Apache-2.0
"""Exact attention under any mask, block by block of queries and keys: no logits [T, S] are whole.

The softmax runs along the keys with a running maximum and sum (Milakov and Gimelshein 2018, arXiv
1805.02867); the gradient makes each block again from the log-sum-exp (FlashAttention-2, arXiv
2307.08691, algorithms 1 and 2). Plain JAX for every backend: memory grows with T + S, and blocks of
keys that no query of a block may attend to are never visited.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chips

QUERIES, KEYS = 128, 256  # of a block
MANY = 2**20  # logits of a block, all rows and heads: from here on a CPU takes half the keys
NEG = -1e30  # of masked logits: finite, so that the difference of two is not NaN
LEAST = -5e29  # of a row's peak: exp(NEG − LEAST) is 0


class _Blocks(NamedTuple):
    """The operands, padded to whole blocks; queries cut: n blocks of t rows, R = G · t; `keys` in
    a block."""

    q_nBJRK: jax.Array
    k_BJSK: jax.Array
    v_BJSV: jax.Array
    mask_nBtS: jax.Array
    keys: int


class Segments(NamedTuple):
    """Documents of packed rows, where queries may be a piece of each row.

    Attributes:
        queries_BT: [B, T] int32, the document of each query; 0 is padding.
        keys_BS: [B, S] those of the keys, S a multiple of T.
        piece: which of the S / T pieces of a row the queries are; may be traced.
    """

    queries_BT: jax.Array
    keys_BS: jax.Array
    piece: jax.Array | int


def causal_mask(
    segments_BT: jax.Array, keys_BS: jax.Array | None = None, *, piece: jax.Array | int = 0
) -> jax.Array:
    """[B, T, S] mask: key not after the query, in the same segment; segment 0 is padding.

    Args:
        segments_BT: [B, T] segments of the queries.
        keys_BS: [B, S] those of the keys; the queries' own if not given.
        piece: which stretch of T keys the queries are.
    """
    keys_BS = segments_BT if keys_BS is None else keys_BS
    t = segments_BT.shape[1]
    query_T, key_S = piece * t + jnp.arange(t), jnp.arange(keys_BS.shape[1])
    same = segments_BT[:, :, None] == keys_BS[:, None, :]
    return (key_S <= query_T[:, None]) & same & (keys_BS > 0)[:, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BJGTK, k_BJSK, v_BJSV, mask_BTS, scale: float) -> jax.Array:
    """softmax(q·k · scale) v over the keys that the mask allows; a query without any gives 0.

    Args:
        q_BJGTK: [B, J, G, T, K] queries, G heads for each of J key-value heads.
        k_BJSK: [B, J, S, K] keys.
        v_BJSV: [B, J, S, V] values.
        mask_BTS: [B, T, S] True where query t may attend to key s.
        scale: softmax scale.

    Returns:
        [B, J, G, T, V] in q's dtype; logits, softmax and sums are float32. It has a gradient in
        reverse mode, not in forward mode, and no second one.
    """
    return _forward(q_BJGTK, k_BJSK, v_BJSV, mask_BTS, scale)[0]


def _forward(q, k, v, mask, scale):
    """(out [B, J, G, T, V], log-sum-exp [n, B, J, R])."""
    blocks = _cut(q, k, v, mask)

    def rows(xs):
        q_BJRK, mask_BtS = xs

        def body(i, carry):
            peak, total, out = carry
            k_i, v_i, ok = _keys(i, blocks, mask_BtS)
            x = _masked(_dot("bjrk,bjsk->bjrs", q_BJRK, k_i) * scale, ok, NEG)
            higher = jnp.maximum(peak, x.max(-1))
            e = jnp.exp(x - higher[..., None])  # 0 where masked: the peak is at least LEAST
            shrink = jnp.exp(peak - higher)
            brought = _dot("bjrs,bjsv->bjrv", e.astype(v.dtype), v_i)
            return higher, total * shrink + e.sum(-1), out * shrink[..., None] + brought

        zero = jnp.zeros_like(q_BJRK[..., 0], jnp.float32)
        blank = _dot("bjrs,bjsv->bjrv", q_BJRK[..., :0], v[:, :, :0])
        start = zero + LEAST, zero, blank
        reach = _reach(mask_BtS, blocks.keys)
        peak, total, out = jax.lax.fori_loop(*reach, body, start)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    out, lse = jax.lax.map(rows, (blocks.q_nBJRK, blocks.mask_nBtS))
    return _joined(out, q.shape), lse


def _with_residuals(q, k, v, mask, scale):
    out, lse = _forward(q, k, v, mask, scale)
    return out, (q, k, v, mask, out, lse)


def _backward(scale, residuals, given):
    q, k, v, mask, out, lse = residuals
    blocks = _cut(q, k, v, mask)
    n = len(lse)
    dot_BJGT = (given.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    given_nBJRV, dot_nBJR = _rows(given.astype(q.dtype), n), _rows(dot_BJGT, n)[..., 0]

    def rows(carry, xs):
        q_BJRK, mask_BtS, given_BJRV, dot_BJR, lse_BJR = xs

        def body(i, carry):
            dq, dk, dv = carry
            k_i, v_i, ok = _keys(i, blocks, mask_BtS)
            x = _dot("bjrk,bjsk->bjrs", q_BJRK, k_i) * scale
            p = _masked(jnp.exp(x - lse_BJR[..., None]), ok, 0.0)
            dp = _dot("bjrv,bjsv->bjrs", given_BJRV, v_i)
            dx = (p * (dp - dot_BJR[..., None]) * scale).astype(q.dtype)
            dq += _dot("bjrs,bjsk->bjrk", dx, k_i)
            dk = _added(dk, i, _dot("bjrs,bjrk->bjsk", dx, q_BJRK))
            dv = _added(dv, i, _dot("bjrs,bjrv->bjsv", p.astype(q.dtype), given_BJRV))
            return dq, dk, dv

        zero = jnp.zeros_like(q_BJRK, jnp.float32)
        dq, *carry = jax.lax.fori_loop(*_reach(mask_BtS, blocks.keys), body, (zero, *carry))
        return tuple(carry), dq.astype(q.dtype)

    start = tuple(jnp.zeros_like(x, jnp.float32) for x in blocks[1:3])
    xs = (blocks.q_nBJRK, blocks.mask_nBtS, given_nBJRV, dot_nBJR, lse)
    (dk, dv), dq = jax.lax.scan(rows, start, xs)
    whole = lambda x, like: x[:, :, : like.shape[2]].astype(like.dtype)  # noqa: E731
    return _joined(dq, q.shape), whole(dk, k), whole(dv, v), None


attend.defvjp(_with_residuals, _backward)


def _cut(q, k, v, mask) -> _Blocks:
    n = -(-mask.shape[1] // QUERIES)
    size = _n_keys(mask.shape[2], math.prod(q.shape[:3]) * min(mask.shape[1], QUERIES))
    keys = lambda x, axis: _padded(x, axis, size)  # noqa: E731
    mask_BNtS = _padded(keys(mask, 2), 1, -(-mask.shape[1] // n))
    mask_BNtS = mask_BNtS.reshape(len(mask), n, -1, mask_BNtS.shape[2])
    return _Blocks(_rows(q, n), keys(k, 2), keys(v, 2), jnp.moveaxis(mask_BNtS, 1, 0), size)


def _n_keys(s: int, rows: int) -> int:
    """Keys of a block of `rows`: equal blocks, so that padding is less than one key a block."""
    half = rows * min(s, KEYS) >= MANY and chips.present()[0] == "cpu"
    return -(-s // -(-s // (KEYS // 2 if half else KEYS)))


def _padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros (False) behind, up to a multiple."""
    more = -x.shape[axis] % multiple
    return x if not more else jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])


def _rows(x_BJGTK: jax.Array, n: int) -> jax.Array:
    """[n, B, J, G · t, K]: rows in n blocks of t."""
    b, j, g, length, k = x_BJGTK.shape
    x = _padded(x_BJGTK, 3, -(-length // n)).reshape(b, j, g, n, -1, k)
    return jnp.moveaxis(x, 3, 0).reshape(n, b, j, -1, k)


def _joined(x_nBJRK: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_rows` for queries of `shape`."""
    n, b, j, _, k = x_nBJRK.shape
    x = jnp.moveaxis(x_nBJRK.reshape(n, b, j, shape[2], -1, k), 0, 3)
    return x.reshape(b, j, shape[2], -1, k)[:, :, :, : shape[3]]


def _reach(mask_BtS: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(first, behind the last) block of `size` keys that some query may attend to."""
    seen_N = mask_BtS.any((0, 1)).reshape(-1, size).any(1)
    n = len(seen_N)
    return seen_N.argmax(), jnp.where(seen_N.any(), n - seen_N[::-1].argmax(), 0)


def _keys(i, blocks: _Blocks, mask_BtS: jax.Array):
    """Block i of the keys: (k, v, mask)."""
    size = blocks.keys
    at = lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size, 2)  # noqa: E731
    return at(blocks.k_BJSK), at(blocks.v_BJSV), at(mask_BtS)


def _masked(x_BJRS: jax.Array, ok_BtS: jax.Array, other: float) -> jax.Array:
    """`x` where the mask of its t queries, which all heads share, allows it."""
    b, j, r, s = x_BJRS.shape
    t = ok_BtS.shape[1]
    x = x_BJRS.reshape(b, j, r // t, t, s)
    return jnp.where(ok_BtS[:, None, None], x, other).reshape(x_BJRS.shape)


def _added(x_BJSK: jax.Array, i, more: jax.Array) -> jax.Array:
    """`x` with `more` added to block i."""
    size = more.shape[2]
    old = jax.lax.dynamic_slice_in_dim(x_BJSK, i * size, size, 2)
    return jax.lax.dynamic_update_slice_in_dim(x_BJSK, old + more, i * size, 2)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
