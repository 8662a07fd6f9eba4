# SPDX-License-Identifier: Apache-2.0
"""Rows of experts in whole tiles, and the experts' networks over them one tile after another.

A CPU multiplies a tile by its expert's weights where these lie; the gradient of the weights is
added up in place, so neither is copied for every tile.
"""

import jax
import jax.numpy as jnp

from r1jax.ops.deal import Slots, slots


def tile_experts(sizes_E: jax.Array, m: int, tile_rows: int) -> tuple[jax.Array, jax.Array]:
    """(first tile of each expert [E], expert of each tile [I]) for experts of whole tiles.

    Args:
        sizes_E: [E] rows of each expert, m at most together.
        m: most rows.
        tile_rows: of a tile; I = ⌈m / tile_rows⌉ + E bounds the tiles at any load. Unused tiles
            name the last expert.
    """
    ends_E = jnp.cumsum(-(-sizes_E // tile_rows))
    n_tiles = -(-m // tile_rows) + len(sizes_E)
    expert_I = jnp.searchsorted(ends_E, jnp.arange(n_tiles), side="right")
    return ends_E - -(-sizes_E // tile_rows), jnp.minimum(expert_I, len(sizes_E) - 1)


def tiled_slots(index_TK: jax.Array, n_experts: int, tile_rows: int) -> tuple[Slots, jax.Array]:
    """(`slots` with every expert's rows padded to whole tiles, expert of each tile).

    Args:
        index_TK: [T, K] int32 experts of each token, each at most once; E for none.
        n_experts: E.
        tile_rows: of a tile.
    """
    t, k = index_TK.shape
    close = slots(index_TK, n_experts, t * k)
    first_E, expert_I = tile_experts(close.count_n, t * k, tile_rows)
    shift_E = first_E * tile_rows - (jnp.cumsum(close.count_n) - close.count_n)
    size = len(expert_I) * tile_rows
    shifted_TK = close.slot_TK + shift_E.at[index_TK].get(mode="clip")
    slot_TK = jnp.where(close.slot_TK < t * k, shifted_TK, size).astype(jnp.int32)
    token_TK = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[:, None], (t, k))
    token_S = jnp.full(size, t, jnp.int32).at[slot_TK].set(token_TK, mode="drop")
    return Slots(slot_TK, token_S, close.count_n), expert_I


@jax.custom_vjp
def swiglu_tiles(rows_IRD, weight_IR, expert_I, weights) -> jax.Array:
    """[I, R, D]: weight · (SiLU(x·W_gate) ⊙ (x·W_up)) · W_down of each tile's expert.

    Args:
        rows_IRD: [I, R, D] tiles of rows.
        weight_IR: [I, R] of each row.
        expert_I: [I] int32.
        weights: (w_gate_EDF, w_up_EDF, w_down_EFD) in the dtype of the rows.
    """
    return _forward(rows_IRD, weight_IR, expert_I, weights)[0]


def _forward(rows_IRD, weight_IR, expert_I, weights):
    w_gate, w_up, w_down = weights

    def one(tile):
        row_RD, weight_R, e = tile
        gate, up = row_RD @ _of(w_gate, e), row_RD @ _of(w_up, e)
        h = jax.nn.silu(gate) * up * weight_R[:, None].astype(up.dtype)
        return h @ _of(w_down, e), gate, up

    out, gate, up = jax.lax.map(one, (rows_IRD, weight_IR, expert_I))
    return out, (rows_IRD, weight_IR, expert_I, weights, gate, up)


def _backward(residuals, given_IRD):
    rows_IRD, weight_IR, expert_I, (w_gate, w_up, w_down), *kept = residuals

    def one(totals, tile):
        row_RD, weight_R, e, gate, up, given_RD = tile
        weight_R1 = weight_R[:, None].astype(up.dtype)
        share = jax.nn.sigmoid(gate)
        mixed = gate * share * up
        d_h = given_RD @ _of(w_down, e).T
        d_weight = (d_h * mixed).sum(-1, dtype=weight_R.dtype)
        d_h = d_h * weight_R1
        d_gate, d_up = d_h * up * share * (1.0 + gate * (1.0 - share)), d_h * gate * share
        # Operands of two products each: made once, not inside both.
        d_gate, d_up, h = jax.lax.optimization_barrier((d_gate, d_up, mixed * weight_R1))
        d_row = d_gate @ _of(w_gate, e).T + d_up @ _of(w_up, e).T
        pairs = (row_RD, d_gate), (row_RD, d_up), (h, given_RD)
        totals = tuple(_added(x, e, *pair) for x, pair in zip(totals, pairs, strict=True))
        return totals, (d_row, d_weight)

    zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in (w_gate, w_up, w_down))
    tiles = (rows_IRD, weight_IR, expert_I, *kept, given_IRD)
    totals, (d_rows, d_weight) = jax.lax.scan(one, zeros, tiles)
    return d_rows, d_weight, None, tuple(x.astype(w_up.dtype) for x in totals)


swiglu_tiles.defvjp(_forward, _backward)


def _of(w_EDF: jax.Array, e: jax.Array) -> jax.Array:
    """Expert e's matrix."""
    return jax.lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)


def _added(total_EDF: jax.Array, e: jax.Array, x_RD: jax.Array, y_RF: jax.Array) -> jax.Array:
    """The totals with xᵀ · y added to expert e's."""
    more_DF = jnp.einsum("rd,rf->df", x_RD, y_RF, preferred_element_type=jnp.float32)
    return jax.lax.dynamic_update_index_in_dim(total_EDF, _of(total_EDF, e) + more_DF, e, 0)
