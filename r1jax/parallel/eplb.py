# SPDX-License-Identifier: Apache-2.0
"""Where experts live and which are held twice: DeepSeek's expert-parallel load balancer (EPLB).

DeepSeek-V3 (arXiv 2412.19437) section 3.4: redundant experts, chosen by observed loads, so that
every device does about the same work. `hierarchical` keeps each group of experts on one node, as
node-limited routing wants it (for few nodes, and for prefill); `spread_out` does not (for many
devices, and for decoding). All of it is `jnp` over small arrays, for one layer: it runs inside the
programs whose experts it places, under `jax.vmap` for a stack of layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Placement(NamedTuple):
    """Where the experts of one layer are.

    Attributes:
        expert_S: [S] int32 expert that each slot holds, S / n slots a device in order.
        copies_E: [E] int32 slots that hold each expert, at least 1.
    """

    expert_S: jax.Array
    copies_E: jax.Array

    def device_loads(self, load_E: jax.Array, devices: int) -> jax.Array:
        """[n] load of each device, an expert's being shared evenly by its copies."""
        share_S = (jnp.asarray(load_E, jnp.float32) / self.copies_E)[self.expert_S]
        return share_S.reshape(devices, -1).sum(1)

    def slots(self, index_TK: jax.Array, turn_T: jax.Array) -> jax.Array:
        """The slot of each chosen expert: copies take turns.

        Args:
            index_TK: [T, K] int32 experts; E for none.
            turn_T: [T] int32, numbers of the tokens: an expert's copies get equally many of any
                that follow one another.

        Returns:
            [T, K] int32, S for none.
        """
        n_slots, n_experts = self.expert_S.shape[0], self.copies_E.shape[0]
        slot_S = jnp.argsort(self.expert_S, stable=True).astype(jnp.int32)  # expert by expert
        first_E = jnp.cumsum(self.copies_E) - self.copies_E
        here_TK = jnp.minimum(index_TK, n_experts - 1)
        found_TK = slot_S[first_E[here_TK] + turn_T[:, None] % self.copies_E[here_TK]]
        return jnp.where(index_TK < n_experts, found_TK, n_slots)


def balanced_packs(weight_N: jax.Array, packs: int) -> jax.Array:
    """N items into packs of N / packs each, their sums about equal: [N] int32 the pack of each.

    Greedy: the heaviest item that is left goes to the lightest pack that has room; of equally light
    packs to the one that holds fewest.

    Raises:
        ValueError: N is no multiple of `packs`.
    """
    n = len(weight_N)
    if packs < 1 or n % packs:
        raise ValueError(f"{n} items do not fill {packs=} evenly")
    weight_N = jnp.asarray(weight_N, jnp.float32)
    order_N = jnp.argsort(-weight_N, stable=True)

    def put(i, state):
        pack_N, sum_P, held_P = state
        light_P = jnp.where(held_P < n // packs, sum_P, jnp.inf)
        pack = jnp.argmin(jnp.where(light_P == light_P.min(), held_P, n))
        item = order_N[i]
        return (
            pack_N.at[item].set(pack.astype(jnp.int32)),
            sum_P.at[pack].add(weight_N[item]),
            held_P.at[pack].add(1),
        )

    empty = (jnp.zeros(n, jnp.int32), jnp.zeros(packs, jnp.float32), jnp.zeros(packs, jnp.int32))
    return jax.lax.fori_loop(0, n, put, empty)[0]


def copies(weight_N: jax.Array, slots: int) -> jax.Array:
    """How often each of N items is held in `slots` slots: [N] int32, at least once each.

    Greedy, and optimal for the largest share: each slot that is left over goes to the item whose
    copies carry most.

    Raises:
        ValueError: there are fewer slots than items.
    """
    n = len(weight_N)
    if slots < n:
        raise ValueError(f"{slots=} cannot hold {n} experts")
    weight_N = jnp.asarray(weight_N, jnp.float32)
    more = lambda _, count_N: count_N.at[jnp.argmax(weight_N / count_N)].add(1)  # noqa: E731
    return jax.lax.fori_loop(0, slots - n, more, jnp.ones(n, jnp.int32))


def spread_out(load_E: jax.Array, *, slots: int, devices: int) -> Placement:
    """The global policy: replicate whatever is hot, pack over all devices.

    Args:
        load_E: [E] tokens that each expert got, over some recent time.
        slots: S ≥ E places for experts in all, a multiple of the devices.
        devices: n.

    Raises:
        ValueError: slots do not fit experts or devices.
    """
    copies_E = copies(load_E, slots)
    every_E = jnp.arange(len(load_E), dtype=jnp.int32)
    expert_C = jnp.repeat(every_E, copies_E, total_repeat_length=slots)
    pack_C = balanced_packs((jnp.asarray(load_E, jnp.float32) / copies_E)[expert_C], devices)
    return Placement(expert_C[jnp.argsort(pack_C, stable=True)], copies_E)


def hierarchical(
    load_E: jax.Array, *, slots: int, devices: int, nodes: int, groups: int
) -> Placement:
    """The policy of node-limited routing: whole groups to nodes, then copies and packs in each.

    Args:
        load_E: [E] tokens that each expert got; experts e · groups / E are of one group.
        slots: S ≥ E, a multiple of the devices.
        devices: n, a multiple of the nodes.
        nodes: of the devices.
        groups: of the experts (`n_group`), a multiple of the nodes.

    Raises:
        ValueError: one does not divide the other.
    """
    e = len(load_E)
    for whole, name, part in ((e, "experts", groups), (devices, "devices", nodes)):
        if whole % part:
            raise ValueError(f"{name}={whole} must be divisible by {part}")
    load_E = jnp.asarray(load_E, jnp.float32)
    node_G = balanced_packs(load_E.reshape(groups, -1).sum(1), nodes)
    # The groups of node after node, and so their experts.
    group_nG = jnp.argsort(node_G, stable=True).reshape(nodes, -1)
    members_GE = jnp.arange(e, dtype=jnp.int32).reshape(groups, -1)
    expert_nE = members_GE[group_nG].reshape(nodes, -1)
    inside = lambda load: spread_out(load, slots=slots // nodes, devices=devices // nodes)  # noqa: E731
    inner = jax.vmap(inside)(load_E[expert_nE])
    expert_S = jnp.take_along_axis(expert_nE, inner.expert_S, 1).reshape(-1)
    copies_E = jnp.zeros(e, jnp.int32).at[expert_nE].set(inner.copies_E)
    return Placement(expert_S, copies_E)


def dealt(load_E: jax.Array, *, devices: int, groups: int) -> jax.Array:
    """A new order of the experts, [E] int32, in which equal parts of them get about equal loads.

    Each group stays whole and in one piece, so that a router whose columns and biases follow it
    chooses as before: a model with its experts in this order is the same function.

    Args:
        load_E: [E] tokens that each expert got.
        devices: n parts, of which one divides `groups` or is divided by it.
        groups: of the experts (`n_group`).

    Raises:
        ValueError: neither divides the other, or the experts do not divide.
    """
    if devices % groups and groups % devices:
        raise ValueError(f"{groups=} of experts and {devices=}: one must divide the other")
    whole = dict(slots=len(load_E), devices=devices, groups=groups)
    return hierarchical(load_E, **whole, nodes=min(devices, groups)).expert_S
