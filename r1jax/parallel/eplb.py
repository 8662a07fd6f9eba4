# SPDX-License-Identifier: Apache-2.0
"""Where experts live and which are held twice: DeepSeek's expert-parallel load balancer (EPLB).

DeepSeek-V3 (arXiv 2412.19437) section 3.4: redundant experts, chosen by observed loads, so that
every device does about the same work. `hierarchical` keeps each group of experts on one node, as
node-limited routing wants it (for few nodes, and for prefill); `spread_out` does not (for many
devices, and for decoding); `beside` moves none and only adds copies (for training). All of it is
`jnp` over small arrays, for one layer: it runs inside the programs whose experts it places, under
`jax.vmap` for a stack of layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TURNS = 1024  # tokens after which an expert's copies are taken in the same order again


class Placement(NamedTuple):
    """Where the experts of one layer are.

    Attributes:
        expert_S: [S] int32 expert that each slot holds, S / n slots a device in order; E for none.
        share_S: [S] float32 part of that expert's tokens that the slot takes; those of an expert
            sum up to 1.
    """

    expert_S: jax.Array
    share_S: jax.Array

    def device_loads(self, load_E: jax.Array, devices: int) -> jax.Array:
        """[n] load of each device."""
        load_E = jnp.append(jnp.asarray(load_E, jnp.float32), 0.0)
        return (load_E[self.expert_S] * self.share_S).reshape(devices, -1).sum(1)

    def slots(self, index_TK: jax.Array, turn_T: jax.Array, n_experts: int) -> jax.Array:
        """The slot of each chosen expert: its copies take turns, by their shares.

        Args:
            index_TK: [T, K] int32 experts; E for none.
            turn_T: [T] int32, numbers of the tokens: of any that follow one another each copy gets
                its share, to one or two tokens.
            n_experts: E.

        Returns:
            [T, K] int32, S for none.
        """
        order_S = jnp.argsort(self.expert_S, stable=True).astype(jnp.int32)  # expert by expert
        expert_S, share_S = self.expert_S[order_S], self.share_S[order_S]
        before_S = jnp.cumsum(share_S) - share_S
        before_S -= before_S[jnp.searchsorted(expert_S, expert_S)]
        key_S = expert_S + jnp.clip(before_S, 0.0, 1.0 - 1.0 / TURNS)
        # An odd step next to the golden section of all turns: any few of them lie far apart.
        at_T = ((turn_T * 633) % TURNS + 0.5) / TURNS
        key_TK = index_TK + at_T[:, None]  # exact for thousands of experts
        found_TK = jnp.searchsorted(key_S, key_TK, side="right", method="compare_all") - 1
        return jnp.where(index_TK < n_experts, order_S[found_TK], len(order_S))


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
    expert_S = expert_C[jnp.argsort(pack_C, stable=True)]
    return Placement(expert_S, (1.0 / copies_E)[expert_S])


def beside(load_E: jax.Array, *, slots: int, devices: int) -> Placement:
    """Copies of hot experts beside those that the devices hold in order, of which none moves.

    Greedy: the emptiest device that has a slot left takes as many tokens of the heaviest expert of
    the fullest one as neither the one nor the other gets more, or less, than the mean for. The
    fullest device is never fuller than without copies; slots that bring nothing stay empty.

    Args:
        load_E: [E] tokens that each expert gets.
        slots: S ≥ E, a device's own E / n and (S - E) / n for copies behind them.
        devices: n.

    Raises:
        ValueError: slots or experts do not fill the devices evenly.
    """
    e, n = len(load_E), devices
    if e % n or slots % n or slots < e:
        raise ValueError(f"{e} experts in {slots=} do not fill {devices=} evenly")
    load_E, room, held = jnp.asarray(load_E, jnp.float32), (slots - e) // n, e // n
    mean = load_E.sum() / n

    def take(_, state):
        own_nE, expert_nX, taken_nX, used_n = state
        sum_n = own_nE.sum(1) + taken_nX.sum(1)
        full, empty = jnp.argmax(sum_n), jnp.argmin(jnp.where(used_n < room, sum_n, jnp.inf))
        place = jnp.argmax(own_nE[full])
        most = jnp.minimum(own_nE[full, place], mean - sum_n[empty])
        taken = jnp.maximum(jnp.minimum(most, sum_n[full] - mean), 0.0)
        at, real = (empty, jnp.minimum(used_n[empty], room - 1)), taken > 0
        return (
            own_nE.at[full, place].add(-taken),
            expert_nX.at[at].set(jnp.where(real, full * held + place, expert_nX[at])),
            taken_nX.at[at].add(taken),
            used_n.at[empty].add(real.astype(jnp.int32)),
        )

    none = jnp.full((n, room), e, jnp.int32), jnp.zeros((n, room)), jnp.zeros(n, jnp.int32)
    state = (load_E.reshape(n, held), *none)
    own_nE, expert_nX, taken_nX, _ = jax.lax.fori_loop(0, slots - e, take, state)
    expert_nS = jnp.concatenate([jnp.arange(e, dtype=jnp.int32).reshape(n, held), expert_nX], 1)
    expert_S, load_S = expert_nS.reshape(-1), jnp.concatenate([own_nE, taken_nX], 1).reshape(-1)
    whole_S = jnp.append(load_E, 0.0)[expert_S]
    # An expert that nobody asks for is its own device's.
    own_S = (jnp.arange(slots) % (held + room) < held).astype(jnp.float32)
    return Placement(expert_S, jnp.where(whole_S > 0, load_S / whole_S, own_S * (expert_S < e)))


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
    return Placement(expert_S, inner.share_S.reshape(-1))


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
