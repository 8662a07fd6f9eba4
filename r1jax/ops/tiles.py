# SPDX-License-Identifier: Apache-2.0
"""Rows of experts in whole tiles, and the experts' networks over them one tile after another.

A CPU takes out an expert's weights once, multiplies as many tiles by them as the expert has, and
adds the gradient of these weights up meanwhile. Tiles without a row cost nothing.
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
    """(`slots` with every expert's rows padded to whole tiles, first tile of each expert and next).

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
    span_E2 = jnp.stack([first_E, first_E - -close.count_n // tile_rows], -1)
    return Slots(slot_TK, token_S, close.count_n), span_E2


@jax.custom_vjp
def swiglu_tiles(rows_IRD, weight_IR, span_E2, weights) -> jax.Array:
    """[I, R, D]: weight · (SiLU(x·W_gate) ⊙ (x·W_up)) · W_down of each tile's expert.

    Args:
        rows_IRD: [I, R, D] tiles of rows.
        weight_IR: [I, R] of each row.
        span_E2: [E, 2] int32 first tile of each expert, and the one behind its last. Results of
            tiles that are nobody's are zero.
        weights: (w_gate_EDF, w_up_EDF, w_down_EFD) in the dtype of the rows.
    """
    return _forward(rows_IRD, weight_IR, span_E2, weights)[0]


def _forward(rows_IRD, weight_IR, span_E2, weights):
    w_gate, w_up, w_down = weights
    wide_EDF = jnp.concatenate([w_gate, w_up], -1)  # one product in place of two

    def turn(i, kept, wide_DF, down_FD):
        both_RF = rows_IRD[i] @ wide_DF
        gate, up = jnp.split(both_RF, 2, -1)
        h_RF = jax.nn.silu(gate) * up * weight_IR[i][:, None].astype(up.dtype)
        return tuple(_put(x, i, y) for x, y in zip(kept, (h_RF @ down_FD, both_RF), strict=True))

    def expert(kept, one):
        (first, end), *matrices = one
        return jax.lax.fori_loop(first, end, lambda i, x: turn(i, x, *matrices), kept), None

    empty = lambda w: jnp.zeros((*rows_IRD.shape[:2], w.shape[-1]), w.dtype)  # noqa: E731
    kept = empty(w_down), empty(wide_EDF)
    (out_IRD, both_IRF), _ = jax.lax.scan(expert, kept, (span_E2, wide_EDF, w_down))
    return out_IRD, (rows_IRD, weight_IR, span_E2, wide_EDF, w_down, both_IRF)


def _backward(residuals, given_IRD):
    rows_IRD, weight_IR, span_E2, wide_EDF, w_down, both_IRF = residuals

    def turn(i, kept, wide_DF, down_FD):
        d_wide_DF, d_down_FD, *slopes = kept
        gate, up = jnp.split(both_IRF[i], 2, -1)
        weight_R1, given_RD = weight_IR[i][:, None].astype(up.dtype), given_IRD[i]
        share = jax.nn.sigmoid(gate)
        mixed = gate * share * up
        d_h = given_RD @ down_FD.T
        d_weight = (d_h * mixed).sum(-1, dtype=weight_IR.dtype)
        d_h = d_h * weight_R1
        d_both = d_h * up * share * (1.0 + gate * (1.0 - share)), d_h * gate * share
        # Operands of products: made once, not inside each.
        d_both, h = jax.lax.optimization_barrier((jnp.concatenate(d_both, -1), mixed * weight_R1))
        new = d_both @ wide_DF.T, d_weight
        slopes = (_put(x, i, y) for x, y in zip(slopes, new, strict=True))
        return (_added(d_wide_DF, rows_IRD[i], d_both), _added(d_down_FD, h, given_RD), *slopes)

    def expert(slopes, one):
        (first, end), *matrices = one
        kept = *(jnp.zeros(w.shape, jnp.float32) for w in matrices), *slopes
        body = lambda i, kept: turn(i, kept, *matrices)  # noqa: E731
        d_wide_DF, d_down_FD, *slopes = jax.lax.fori_loop(first, end, body, kept)
        dtype = w_down.dtype
        return tuple(slopes), (*jnp.split(d_wide_DF.astype(dtype), 2, -1), d_down_FD.astype(dtype))

    slopes = jnp.zeros_like(rows_IRD), jnp.zeros_like(weight_IR)
    (d_rows, d_weight), d_weights = jax.lax.scan(expert, slopes, (span_E2, wide_EDF, w_down))
    return d_rows, d_weight, None, d_weights


swiglu_tiles.defvjp(_forward, _backward)


def _put(x_IRF: jax.Array, i: jax.Array, tile_RF: jax.Array) -> jax.Array:
    """x with tile i in place."""
    return jax.lax.dynamic_update_index_in_dim(x_IRF, tile_RF, i, 0)


def _added(total_DF: jax.Array, x_RD: jax.Array, y_RF: jax.Array) -> jax.Array:
    """The total with xᵀ · y added."""
    return total_DF + jnp.einsum("rd,rf->df", x_RD, y_RF, preferred_element_type=jnp.float32)
