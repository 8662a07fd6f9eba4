# SPDX-License-Identifier: Apache-2.0
"""Exact multi-head latent attention a row of the batch at a time: how a CPU trains.

The logits of all rows and heads together do not fit a CPU's caches, and XLA:CPU multiplies many
small matrices at once at half the speed that it has for those of one row. One row's shared keys
meet all its heads in one product, so no key is copied for a head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEG = -1e30  # finite: a query without any key gets uniform weights, not NaN


class Operands(NamedTuple):
    """What attends, and what is attended to; a row of it lacks the axis B.

    Attributes:
        q_BHTK, q_rope_BHTR: [B, H, T, K] and [B, H, T, R] queries.
        k_BHSK: [B, H, S, K] keys.
        k_rope_BSR: [B, S, R] keys that all heads share.
        v_BHSV: [B, H, S, V] values.
    """

    q_BHTK: jax.Array
    q_rope_BHTR: jax.Array
    k_BHSK: jax.Array
    k_rope_BSR: jax.Array
    v_BHSV: jax.Array


def attend_rows(x: Operands, mask_BTS: jax.Array, scale: float) -> jax.Array:
    """softmax((q·k + q_rope·k_rope) · scale) v over the keys that the mask allows.

    Args:
        x: queries, keys and values.
        mask_BTS: [B, T, S] True where query t may attend to key s.
        scale: softmax scale.

    Returns:
        [B, H, T, V] in q's dtype; logits and softmax are float32. It has a gradient in reverse
        mode, not in forward mode, and no second one.
    """
    return jax.lax.map(lambda row: _row(*row, scale), (x, mask_BTS))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _row(x: Operands, mask_TS: jax.Array, scale: float) -> jax.Array:
    return _forward(x, mask_TS, scale)[0]


def _forward(x: Operands, mask_TS, scale):
    q, q_rope, k, k_rope, v = x
    shared_HTS = _dot("xr,sr->xs", _flat(q_rope), k_rope).reshape(*q.shape[:2], -1)
    logits_HTS = (_dot("htk,hsk->hts", q, k) + shared_HTS) * scale
    logits_HTS = jnp.where(mask_TS, logits_HTS, NEG)
    # Not normalised: what is divided by the sum is the result, and in the gradient what is given.
    e_HTS = jnp.exp(logits_HTS - logits_HTS.max(-1, keepdims=True))
    total_HT1 = e_HTS.sum(-1, keepdims=True)
    e_HTS = e_HTS.astype(v.dtype)
    out_HTV = (_dot("hts,hsv->htv", e_HTS, v) / total_HT1).astype(q.dtype)
    return out_HTV, (x, mask_TS, e_HTS, total_HT1, out_HTV)


def _backward(scale, residuals, given):
    (q, q_rope, k, k_rope, v), mask_TS, e_HTS, total_HT1, out_HTV = residuals
    given = given.astype(jnp.float32) / total_HT1
    along_HT1 = (given * out_HTV.astype(jnp.float32)).sum(-1, keepdims=True)
    given = given.astype(q.dtype)
    slope_HTS = (_dot("htv,hsv->hts", given, v) - along_HT1) * scale
    d_HTS = jnp.where(mask_TS, e_HTS.astype(jnp.float32) * slope_HTS, 0.0).astype(q.dtype)
    # Operands of several products: made once, not inside each.
    d_HTS, given = jax.lax.optimization_barrier((d_HTS, given))
    like = lambda x, y: x.astype(y.dtype).reshape(y.shape)  # noqa: E731
    slopes = Operands(
        like(_dot("hts,hsk->htk", d_HTS, k), q),
        like(_dot("xs,sr->xr", _flat(d_HTS), k_rope), q_rope),
        like(_dot("hts,htk->hsk", d_HTS, q), k),
        like(_dot("xs,xr->sr", _flat(d_HTS), _flat(q_rope)), k_rope),
        like(_dot("hts,htv->hsv", e_HTS, given), v),
    )
    return slopes, None


_row.defvjp(_forward, _backward)


def _flat(x_HTK: jax.Array) -> jax.Array:
    """[H · T, K]"""
    return x_HTK.reshape(-1, x_HTK.shape[-1])


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
