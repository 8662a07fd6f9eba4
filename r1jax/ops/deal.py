# SPDX-License-Identifier: Apache-2.0
"""Tokens dealt out to bins, ranks or experts, without a sort: where each stands, and back.

The rows lie in the order (bin, token). Only gathers move them, in gradients too: for TPUs a sort or
a scatter of so many rows takes ten seconds each to compile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chips import present

BLOCK = 512  # tokens of the inner level of a running sum


class Slots(NamedTuple):
    """Where tokens stand among the rows of all bins.

    Attributes:
        slot_TK: [T, K] int32 row that token t has in its k-th bin; S where there is none.
        token_S: [S] int32 token of each row, T for a row that is not used.
        count_n: [n] int32 rows of each bin.
    """

    slot_TK: jax.Array
    token_S: jax.Array
    count_n: jax.Array


def slots(bin_TK: jax.Array, n: int, size: int) -> Slots:
    """Deals tokens out to bins, once to each.

    Args:
        bin_TK: [T, K] int32 bins of each token; n for none. One that a token names twice counts
            once, at its first k.
        n: bins.
        size: S, rows of all bins; a token that finds no room has no row there.
    """
    t, k = bin_TK.shape
    earlier = jnp.tril(jnp.ones((k, k), bool), -1)
    again_TK = ((bin_TK[:, :, None] == bin_TK[:, None, :]) & earlier).any(-1)
    names_TKn = bin_TK[:, :, None] == jnp.arange(n)
    goes_Tn = names_TKn.any(1).astype(jnp.int32)
    count_n = goes_Tn.sum(0)
    place_Tn = jnp.cumsum(count_n) - count_n + running(goes_Tn) - 1
    place_TK = jnp.where(names_TKn, place_Tn[:, None], 0).sum(-1, dtype=jnp.int32)
    slot_TK = jnp.where(again_TK | (bin_TK >= n), size, jnp.minimum(place_TK, size))
    token_TK = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[:, None], (t, k))
    token_S = jnp.full(size, t, jnp.int32).at[slot_TK].set(token_TK, mode="drop")
    return Slots(slot_TK, token_S, count_n)


def running(x_Tn: jax.Array) -> jax.Array:
    """`jnp.cumsum(x_Tn, 0)` in two levels: TPUs take four seconds to compile a long one."""
    t, n = x_Tn.shape
    if t <= BLOCK:
        return jnp.cumsum(x_Tn, 0)
    x_btn = jnp.pad(x_Tn, ((0, -t % BLOCK), (0, 0))).reshape(-1, BLOCK, n)
    total_bn = x_btn.sum(1)
    before_bn = jnp.cumsum(total_bn, 0) - total_bn
    return (jnp.cumsum(x_btn, 1) + before_bn[:, None]).reshape(-1, n)[:t]


@jax.custom_vjp
def laid_out(x_TD: jax.Array, where: Slots) -> jax.Array:
    """[T, D] → [S, D]: tokens at their rows; rows that are not used hold some token.

    Its gradient is `summed`: a gather, where XLA would scatter.
    """
    return x_TD.at[where.token_S].get(mode="clip")


@jax.custom_vjp
def summed(x_SD: jax.Array, where: Slots) -> jax.Array:
    """[S, D] → [T, D]: the sum of each token's rows, in float32."""
    slot_KT = where.slot_TK.T  # K first: TPUs sum such up without another copy
    if len(slot_KT) and present()[0] == "cpu":  # one kernel, in place of all rows and their sum
        total_TD = sum(_row(x_SD, slot_T).astype(jnp.float32) for slot_T in slot_KT)
        return total_TD.astype(x_SD.dtype)
    row_KTD = x_SD.at[slot_KT].get(mode="clip")
    there_KT1 = (slot_KT < len(x_SD))[:, :, None]
    return jnp.where(there_KT1, row_KTD, 0).sum(0, dtype=jnp.float32).astype(x_SD.dtype)


def _row(x_SD: jax.Array, slot_T: jax.Array) -> jax.Array:
    """[T, D]: the row in each token's slot, zeros where it has none."""
    there_T1 = (slot_T < len(x_SD))[:, None]
    return jnp.where(there_T1, x_SD.at[slot_T].get(mode="clip"), 0)


def _summed_backward(where: Slots, given):
    used_S1 = (where.token_S < len(given))[:, None]
    return jnp.where(used_S1, laid_out(given, where), 0), None


laid_out.defvjp(lambda x, where: (laid_out(x, where), where), lambda w, g: (summed(g, w), None))
summed.defvjp(lambda x, where: (summed(x, where), where), _summed_backward)


@jax.custom_vjp
def weight_of(weight_TK: jax.Array, where: Slots) -> jax.Array:
    """[T, K] → [S]: the weight that its token gives to each row; 0 for a row that is not used."""
    t, k = where.slot_TK.shape
    row_SK = weight_TK.at[where.token_S].get(mode="clip")
    slot_SK = where.slot_TK.at[where.token_S].get(mode="clip")
    size = len(where.token_S)
    mine_SK = (slot_SK == jnp.arange(size)[:, None]) & (where.token_S < t)[:, None]
    return jnp.where(mine_SK, row_SK, 0).sum(-1)


def _weight_backward(where: Slots, given_S):
    size = len(given_S)
    found_TK = given_S.at[where.slot_TK].get(mode="clip")
    return jnp.where(where.slot_TK < size, found_TK, 0), None


weight_of.defvjp(lambda w, where: (weight_of(w, where), where), _weight_backward)
