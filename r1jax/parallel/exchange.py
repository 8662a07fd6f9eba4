# SPDX-License-Identifier: Apache-2.0
"""Rows of uneven number between the devices of a mesh axis, and back: index arithmetic, one move.

A token is sent once to each rank that holds some of its experts, however many it holds. The rows
that a rank sends lie in the order (receiver, token), those it has received in (sender, token).
`counts_nn[s, r]`, the rows that rank s sends to rank r, says the rest; its transpose is the way
back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Way(NamedTuple):
    """The four arguments of `jax.lax.ragged_all_to_all`, [n] int32 each: where the rows for each
    rank begin here, how many they are, where they begin there, and how many come from it."""

    begin_n: jax.Array
    send_n: jax.Array
    there_n: jax.Array
    receive_n: jax.Array


def way(counts_nn: jax.Array, me: jax.Array | int) -> Way:
    """How rank `me` sends and receives; `way(counts_nn.T, me)` brings everything back."""
    n = counts_nn.shape[0]
    send_n, receive_n = counts_nn[me], counts_nn[:, me]
    before_n = jnp.where(jnp.arange(n)[:, None] < me, counts_nn, 0).sum(0, dtype=jnp.int32)
    return Way(jnp.cumsum(send_n) - send_n, send_n, before_n, receive_n)


def sources(counts_nn: jax.Array, me: jax.Array | int, size: int):
    """Where each row that rank `me` receives comes from.

    Returns:
        (rank_R, row_R, real_R): the sender, the row of its buffer, and whether there is such a row.
    """
    receive_n = counts_nn[:, me]
    end_n = jnp.cumsum(receive_n)
    row_R = jnp.arange(size)
    rank_R = jnp.minimum(jnp.searchsorted(end_n, row_R, side="right"), len(end_n) - 1)
    there_nn = jnp.cumsum(counts_nn, 1) - counts_nn
    begin_R = (end_n - receive_n)[rank_R]
    return rank_R, there_nn[rank_R, me] + row_R - begin_R, row_R < end_n[-1]


def exchange(x_SD: jax.Array, counts_nn: jax.Array, size: int, axis: str, ragged: bool):
    """Every rank's rows to where they go: [S, D] → [size, D]. Rows that nobody sends are 0.

    Args:
        x_SD: rows in the order (receiver, ...).
        counts_nn: [n, n] rows from each rank to each; no rank receives more than `size`.
        size: rows of the result.
        axis: mesh axis of the ranks.
        ragged: by `jax.lax.ragged_all_to_all`, which XLA:CPU lacks; otherwise every rank sees all
            rows and picks its own: the same, for tests.
    """
    me = jax.lax.axis_index(axis)
    if ragged:
        blank = jnp.zeros((size, *x_SD.shape[1:]), x_SD.dtype)
        return jax.lax.ragged_all_to_all(x_SD, blank, *way(counts_nn, me), axis_name=axis)
    rank_R, row_R, real_R = sources(counts_nn, me, size)
    found = jax.lax.all_gather(x_SD, axis)[rank_R, row_R]
    return jnp.where(real_R.reshape(-1, *(1,) * (x_SD.ndim - 1)), found, 0)
