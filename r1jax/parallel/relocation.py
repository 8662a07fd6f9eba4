# SPDX-License-Identifier: Apache-2.0
"""Experts' weights to the devices that are to hold them (`eplb` says which).

What travels is what a device is to hold and does not; nobody ever holds the experts of all.
`relocated` puts them into other places; `with_copies` adds copies, and sums up their gradients.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.parallel.exchange import exchange
from r1jax.sharding import carriers, count, index, platform


def relocated(x_EX: jax.Array, expert_S: jax.Array) -> jax.Array:
    """The slots of this device, [S / n, ...], from the experts of all of them.

    Args:
        x_EX: [E / n, ...] something of each expert that this device holds, such as its weights.
        expert_S: [S] int32 expert that each slot is to hold, the same on all devices; any expert
            may be in several.
    """
    ranks = count("expert")
    if ranks == 1:
        return x_EX[expert_S]
    (axis,), me = carriers("expert"), index("expert")
    held, size, slots = len(x_EX), len(expert_S) // ranks, jnp.arange(len(expert_S))
    holder_S, receiver_S = expert_S // held, slots // size
    counts_nn = jnp.zeros((ranks, ranks), jnp.int32).at[holder_S, receiver_S].add(1)
    # Slots are in the order of their receivers, and so is what this device sends. Every expert is
    # in a slot, so that no more copies are sent than there are slots beyond one for each.
    most = held + len(expert_S) - ranks * held
    mine_S = jnp.nonzero(holder_S == me, size=most, fill_value=0)[0]
    sent = x_EX[jnp.clip(expert_S[mine_S] - me * held, 0, held - 1)]
    got = exchange(sent, counts_nn, size, axis, platform() == "tpu")
    # They come in the order of their senders.
    here_S = jax.lax.dynamic_slice_in_dim(holder_S, me * size, size)
    return got[jnp.argsort(jnp.argsort(here_S, stable=True))]


@jax.custom_vjp
def with_copies(x_EX: jax.Array, expert_nX: jax.Array) -> jax.Array:
    """What this device holds of each of its experts, and copies behind: [E / n + X, ...].

    The gradient of an expert is the sum of those of its copies, made in float32 where it lives.

    Args:
        x_EX: [E / n, ...] of the experts that this device holds.
        expert_nX: [n, X] int32 expert of each copy that each device is to hold, the same on all; E
            for none, which is 0.
    """
    copies = [_fetched(x_EX, _turn(expert_nX[:, i], len(x_EX))) for i in range(expert_nX.shape[1])]
    return jnp.concatenate([x_EX, *copies])


def _copies_forward(x_EX, expert_nX):
    return with_copies(x_EX, expert_nX), expert_nX


def _copies_backward(expert_nX, given):
    own = len(given) - expert_nX.shape[1]
    sums_EX, copies = given[:own].astype(jnp.float32), given[own:]
    for i in range(expert_nX.shape[1]):
        sums_EX = _returned(sums_EX, copies[i : i + 1], _turn(expert_nX[:, i], own))
    return sums_EX.astype(given.dtype), None


with_copies.defvjp(_copies_forward, _copies_backward)


class _Turn(NamedTuple):
    """One expert for each device: [n] int32 who holds it, and where among theirs."""

    holder_n: jax.Array
    place_n: jax.Array


def _turn(expert_n: jax.Array, held: int) -> _Turn:
    return _Turn(expert_n // held, expert_n % held)


def _fetched(x_EX: jax.Array, turn: _Turn) -> jax.Array:
    """[1, ...]: the expert of this device's turn."""
    (axis,), me = carriers("expert"), index("expert")
    mine_n = turn.holder_n == me
    if platform() != "tpu":
        rows = jnp.where(_column(mine_n, x_EX.ndim), x_EX[turn.place_n], 0)
        return jax.lax.psum_scatter(rows, axis, tiled=True)
    sent_n = mine_n.astype(jnp.int32)
    got_n = (jnp.arange(len(sent_n)) == turn.holder_n[me]).astype(jnp.int32)
    way = (turn.place_n * sent_n, sent_n, jnp.zeros_like(sent_n), got_n)
    return jax.lax.ragged_all_to_all(x_EX, jnp.zeros_like(x_EX[:1]), *way, axis_name=axis)


def _returned(sums_EX: jax.Array, given_1X: jax.Array, turn: _Turn) -> jax.Array:
    """The sums with what the copies of this turn bring.

    An expert may have copies everywhere: rows come in as many pieces as there are devices.
    """
    (axis,), me, n = carriers("expert"), index("expert"), count("expert")
    mine_n, who_n = turn.holder_n == me, jnp.arange(n)
    pieces = math.gcd(n, given_1X.shape[1])
    size = given_1X.shape[1] // pieces
    before_n = jnp.where(who_n < me, turn.holder_n == turn.holder_n[me], False).sum()
    sent_n = (who_n == turn.holder_n[me]).astype(jnp.int32)
    way = (jnp.zeros_like(sent_n), sent_n, before_n * sent_n, mine_n.astype(jnp.int32))
    # Rows come in the order of their senders.
    sender_n = jnp.argsort(~mine_n, stable=True)
    real_n = who_n < mine_n.sum()

    def piece(i, sums_EX):
        row = jax.lax.dynamic_slice_in_dim(given_1X, i * size, size, 1)
        if platform() == "tpu":
            blank = jnp.zeros((n, *row.shape[1:]), row.dtype)
            got = jax.lax.ragged_all_to_all(row, blank, *way, axis_name=axis)
        else:
            got = jax.lax.all_gather(row, axis, tiled=True)[sender_n]
        got = jnp.where(_column(real_n, got.ndim), got, 0).astype(jnp.float32)
        old = jax.lax.dynamic_slice_in_dim(sums_EX, i * size, size, 1)
        new = old.at[turn.place_n[sender_n]].add(got)
        return jax.lax.dynamic_update_slice_in_dim(sums_EX, new, i * size, 1)

    return jax.lax.fori_loop(0, pieces, piece, sums_EX)


def _column(x_n: jax.Array, ndim: int) -> jax.Array:
    return x_n.reshape(-1, *(1,) * (ndim - 1))
