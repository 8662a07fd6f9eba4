# SPDX-License-Identifier: Apache-2.0
"""Rows of experts in whole tiles, and the experts' networks over them, a few tiles at a time.

A CPU takes out an expert's weights once, multiplies as many tiles by them as the expert has, and
adds the gradient of these weights up meanwhile. Tiles without a row cost nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.ops.deal import Slots, slots

# Tiles multiplied at once, as often as an expert still has so many. Short tiles pad little and long
# products are fast: at D 256, F 128 and 512 rows an expert, gradient included, a layer takes 117 ms
# by single tiles of 128 rows, 94 so by tiles of 64.
BLOCKS = 8, 4, 2, 1


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


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def swiglu_tiles(rows_MD, weight_M, span_E2, weights, tile_rows: int) -> jax.Array:
    """[M, D]: weight · (SiLU(x·W_gate) ⊙ (x·W_up)) · W_down of each row's expert.

    Args:
        rows_MD: [M, D] rows in whole tiles, M = I · tile_rows.
        weight_M: [M] of each row.
        span_E2: [E, 2] int32 first tile of each expert, and the one behind its last. Results of
            tiles that are nobody's are zero.
        weights: (w_gate_EDF, w_up_EDF, w_down_EFD) in the dtype of the rows.
        tile_rows: of a tile.
    """
    return _forward(rows_MD, weight_M, span_E2, weights, tile_rows)[0]


def _forward(rows_MD, weight_M, span_E2, weights, tile_rows):
    w_gate, w_up, w_down = weights
    wide_EDF = jnp.concatenate([w_gate, w_up], -1)  # one product in place of two

    def expert(kept, one):
        span, wide_DF, down_FD = one

        def turn(cut, kept):
            both_RF = cut(rows_MD) @ wide_DF
            gate, up = jnp.split(both_RF, 2, -1)
            h_RF = jax.nn.silu(gate) * up * cut(weight_M)[:, None].astype(up.dtype)
            return _put(kept, cut.at, (h_RF @ down_FD, both_RF))

        return over(span, turn, kept), None

    over = _over(len(rows_MD), tile_rows)
    empty = lambda w: jnp.zeros((len(rows_MD), w.shape[-1]), w.dtype)  # noqa: E731
    kept = empty(w_down), empty(wide_EDF)
    (out_MD, both_MF), _ = jax.lax.scan(expert, kept, (span_E2, wide_EDF, w_down))
    return out_MD, (rows_MD, weight_M, span_E2, wide_EDF, w_down, both_MF)


def _backward(tile_rows, residuals, given_MD):
    rows_MD, weight_M, span_E2, wide_EDF, w_down, both_MF = residuals

    def expert(slopes, one):
        span, wide_DF, down_FD = one

        def turn(cut, kept):
            d_wide_DF, d_down_FD, *slopes = kept
            gate, up = jnp.split(cut(both_MF), 2, -1)
            weight_R1, given_RD = cut(weight_M)[:, None].astype(up.dtype), cut(given_MD)
            share = jax.nn.sigmoid(gate)
            mixed = gate * share * up
            d_h = given_RD @ down_FD.T
            d_weight = (d_h * mixed).sum(-1, dtype=weight_M.dtype)
            d_h = d_h * weight_R1
            d_both = d_h * up * share * (1.0 + gate * (1.0 - share)), d_h * gate * share
            # Operands of products: made once, not inside each.
            both = jnp.concatenate(d_both, -1), mixed * weight_R1
            d_both, h = jax.lax.optimization_barrier(both)
            totals = _added(d_wide_DF, cut(rows_MD), d_both), _added(d_down_FD, h, given_RD)
            return *totals, *_put(slopes, cut.at, (d_both @ wide_DF.T, d_weight))

        kept = *(jnp.zeros(w.shape, jnp.float32) for w in (wide_DF, down_FD)), *slopes
        d_wide_DF, d_down_FD, *slopes = over(span, turn, kept)
        dtype = w_down.dtype
        return tuple(slopes), (*jnp.split(d_wide_DF.astype(dtype), 2, -1), d_down_FD.astype(dtype))

    over = _over(len(rows_MD), tile_rows)
    slopes = jnp.zeros_like(rows_MD), jnp.zeros_like(weight_M)
    (d_rows, d_weight), d_weights = jax.lax.scan(expert, slopes, (span_E2, wide_EDF, w_down))
    return d_rows, d_weight, None, d_weights


swiglu_tiles.defvjp(_forward, _backward)


class _Cut(NamedTuple):
    """Takes the rows of some tiles out of an array: `rows` of them from row `at` on."""

    at: jax.Array
    rows: int

    def __call__(self, x_MF: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_MF, self.at, self.rows)


def _over(m: int, tile_rows: int) -> Callable:
    """(span of an expert, turn, kept) → `turn(cut, kept)` over all of its tiles, of m rows, the
    most at once first (`BLOCKS`)."""

    def over(span_2, turn, kept):
        first, end = span_2
        for tiles in (n for n in BLOCKS if n * tile_rows <= m):
            turns = (end - first) // tiles

            def body(i, kept, *, first=first, tiles=tiles):
                return turn(_Cut((first + i * tiles) * tile_rows, tiles * tile_rows), kept)

            kept = jax.lax.fori_loop(0, turns, body, kept)
            first = first + turns * tiles
        return kept

    return over


def _put(kept, at: jax.Array, rows) -> tuple[jax.Array, ...]:
    """Each of the kept arrays with its new rows in place, from row `at` on."""
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, at, 0)  # noqa: E731
    return tuple(put(x, y) for x, y in zip(kept, rows, strict=True))


def _added(total_DF: jax.Array, x_RD: jax.Array, y_RF: jax.Array) -> jax.Array:
    """The total with xᵀ · y added."""
    return total_DF + jnp.einsum("rd,rf->df", x_RD, y_RF, preferred_element_type=jnp.float32)
