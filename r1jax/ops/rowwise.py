# SPDX-License-Identifier: Apache-2.0
"""Exact multi-head latent attention a row of the batch at a time: how a CPU trains.

The logits of all rows and heads together do not fit a CPU's caches, and XLA:CPU multiplies many
small matrices at once at half the speed that it has for those of one row. One row's shared keys
meet all its heads in one product, so no key is copied for a head. Where queries may not attend to
later keys they go a piece at a time, each with the keys up to its end: five eighths of the work.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

PIECE, PIECES = 64, 4  # fewest queries at once, where these attend to no later keys; most pieces
NEG = -1e30  # finite: a query without any key gets uniform weights, not NaN


class Operands(NamedTuple):
    """What attends, and what is attended to; a row of it lacks the axis B.

    Attributes:
        q_BTHK, q_rope_BTHR: [B, T, H, K] and [B, T, H, R] queries.
        k_BSHK: [B, S, H, K] keys.
        k_rope_BSR: [B, S, R] keys that all heads share.
        v_BSHV: [B, S, H, V] values.
    """

    q_BTHK: jax.Array
    q_rope_BTHR: jax.Array
    k_BSHK: jax.Array
    k_rope_BSR: jax.Array
    v_BSHV: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend_rows(x: Operands, mask_BTS: jax.Array, scale: float, causal: bool = False) -> jax.Array:
    """softmax((q·k + q_rope·k_rope) · scale) v over the keys that the mask allows.

    Args:
        x: queries, keys and values.
        mask_BTS: [B, T, S] True where query t may attend to key s.
        scale: softmax scale.
        causal: T = S, and no query may attend to a later key: most of these are not looked at.

    Returns:
        [B, T, H, V] in q's dtype; logits and softmax are float32. It has a gradient in reverse
        mode, not in forward mode, and no second one.
    """
    return _forward(x, mask_BTS, scale, causal)[0]


def _forward(x: Operands, mask_BTS, scale, causal):
    def row(one):
        (q, q_rope, k, k_rope, v), mask_TS = one
        q, q_rope, k, v = map(_heads, (q, q_rope, k, v))
        found = []
        for t, s in _pieces(*mask_TS.shape, causal):
            piece = Operands(q[:, t], q_rope[:, t], k[:, s], k_rope[s], v[:, s])
            found.append(_attended(piece, mask_TS[t, s], scale))
        out, *kept = zip(*found, strict=True)
        return jnp.concatenate([*map(_heads, out)]), kept

    out_BTHV, kept = jax.lax.map(row, (x, mask_BTS))
    return out_BTHV, (x, mask_BTS, out_BTHV, kept)


def _attended(x: Operands, mask_TS, scale):
    """(out_HTV, e_HTS, total_HT1) of one row's queries and keys, heads first."""
    q, q_rope, k, k_rope, v = x
    shared_HTS = _dot("xr,sr->xs", _flat(q_rope), k_rope).reshape(*q.shape[:2], -1)
    logits_HTS = (_dot("htk,hsk->hts", q, k) + shared_HTS) * scale
    logits_HTS = jnp.where(mask_TS, logits_HTS, NEG)
    # Not normalised: what is divided by the sum is the result, and in the gradient what is given.
    e_HTS = jnp.exp(logits_HTS - logits_HTS.max(-1, keepdims=True))
    total_HT1 = e_HTS.sum(-1, keepdims=True)
    e_HTS = e_HTS.astype(v.dtype)
    return (_dot("hts,hsv->htv", e_HTS, v) / total_HT1).astype(q.dtype), e_HTS, total_HT1


def _backward(scale, causal, residuals, given_BTHV):
    def row(one):
        (x, mask_TS, out, kept), given = one
        moved = (*map(_heads, (x.q_BTHK, x.q_rope_BTHR, x.k_BSHK, x.v_BSHV, out, given)),)
        q, q_rope, k, v, out, given = moved
        of_queries, of_keys = [], None
        for (t, s), e, total in zip(_pieces(*mask_TS.shape, causal), *kept, strict=True):
            operands = Operands(q[:, t], q_rope[:, t], k[:, s], x.k_rope_BSR[s], v[:, s])
            own, more = _slopes(operands, (mask_TS[t, s], e, total), out[:, t], given[:, t], scale)
            of_queries.append(own)
            of_keys = more if of_keys is None else jax.tree.map(_onto, of_keys, more)
        whole = lambda pieces: jnp.concatenate([*map(_heads, pieces)])  # noqa: E731
        d_q, d_q_rope = map(whole, zip(*of_queries, strict=True))
        d_k, d_k_rope, d_v = of_keys
        slopes = Operands(d_q, d_q_rope, _heads(d_k), d_k_rope, _heads(d_v))
        return jax.tree.map(lambda d, x: d.astype(x.dtype), slopes, x)

    return jax.lax.map(row, (residuals, given_BTHV)), None


def _slopes(x: Operands, weights, out_HTV, given, scale):
    """(slopes of q, q_rope), (of k, k_rope, v), float32, of one row, heads first."""
    (q, q_rope, k, k_rope, v), (mask_TS, e_HTS, total_HT1) = x, weights
    given = given.astype(jnp.float32) / total_HT1
    along_HT1 = (given * out_HTV.astype(jnp.float32)).sum(-1, keepdims=True)
    given = given.astype(q.dtype)
    slope_HTS = (_dot("htv,hsv->hts", given, v) - along_HT1) * scale
    d_HTS = jnp.where(mask_TS, e_HTS.astype(jnp.float32) * slope_HTS, 0.0).astype(q.dtype)
    # Operands of several products: made once, not inside each.
    d_HTS, given = jax.lax.optimization_barrier((d_HTS, given))
    d_q_rope = _dot("xs,sr->xr", _flat(d_HTS), k_rope).reshape(q_rope.shape)
    of_keys = (
        _dot("hts,htk->hsk", d_HTS, q),
        _dot("xs,xr->sr", _flat(d_HTS), _flat(q_rope)),
        _dot("hts,htv->hsv", e_HTS, given),
    )
    return (_dot("hts,hsk->htk", d_HTS, k), d_q_rope), of_keys


def _pieces(t: int, s: int, causal: bool) -> list[tuple[slice, slice]]:
    """(queries, the keys that they may attend to) for all queries in order."""
    if not causal:
        return [(slice(t), slice(s))]
    size = max(PIECE, -(-t // PIECES))
    return [(slice(i, min(i + size, t)), slice(min(i + size, t))) for i in range(0, t, size)]


def _onto(some: jax.Array, more: jax.Array) -> jax.Array:
    """more [..., S', K], with the shorter `some` added to its first rows."""
    behind = more.shape[-2] - some.shape[-2]
    return more + jnp.pad(some, ((0, 0),) * (some.ndim - 2) + ((0, behind), (0, 0)))


attend_rows.defvjp(_forward, _backward)


def _heads(x_THK: jax.Array) -> jax.Array:
    """[H, T, K], or back: a row's share is moved while a cache holds it."""
    return x_THK.swapaxes(0, 1)


def _flat(x_HTK: jax.Array) -> jax.Array:
    """[H · T, K]"""
    return x_HTK.reshape(-1, x_HTK.shape[-1])


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
