# SPDX-License-Identifier: Apache-2.0
"""Experts' weights to the devices that are to hold them (`eplb` says which).

What travels is what a device is to hold and does not; nobody ever holds the experts of all.
"""

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
