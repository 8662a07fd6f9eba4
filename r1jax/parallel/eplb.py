# SPDX-License-Identifier: Apache-2.0
"""Where experts live and which are held twice: DeepSeek's expert-parallel load balancer (EPLB).

DeepSeek-V3 (arXiv 2412.19437) section 3.4: redundant experts, chosen by observed loads, so that
every device does about the same work. `hierarchical` keeps each group of experts on one node, as
node-limited routing wants it (for few nodes, and for prefill); `spread_out` does not (for many
devices, and for decoding). Pure numpy: it is run on the host, between steps.
"""

import heapq
from typing import NamedTuple

import numpy as np


class Placement(NamedTuple):
    """Where the experts of one layer are.

    Attributes:
        expert_S: [S] expert that each slot holds, S / n slots a device in order.
        copies_E: [E] slots that hold each expert, at least 1.
    """

    expert_S: np.ndarray
    copies_E: np.ndarray

    def device_loads(self, load_E: np.ndarray, devices: int) -> np.ndarray:
        """[n] load of each device, an expert's being shared evenly by its copies."""
        share_S = (np.asarray(load_E, np.float64) / self.copies_E)[self.expert_S]
        return share_S.reshape(devices, -1).sum(1)


def balanced_packs(weight_N: np.ndarray, packs: int) -> np.ndarray:
    """N items into packs of N / packs each, their sums about equal: [N] the pack of each item.

    Greedy: the heaviest item that is left goes to the lightest pack that has room.

    Raises:
        ValueError: N is no multiple of `packs`.
    """
    n = len(weight_N)
    if packs < 1 or n % packs:
        raise ValueError(f"{n} items do not fill {packs=} evenly")
    pack_N, heap = np.empty(n, np.int64), [(0.0, 0, p) for p in range(packs)]
    for item in np.argsort(-np.asarray(weight_N, np.float64), kind="stable"):
        weight, held, pack = heapq.heappop(heap)
        pack_N[item] = pack
        if held + 1 < n // packs:
            heapq.heappush(heap, (weight + float(weight_N[item]), held + 1, pack))
    return pack_N


def copies(weight_N: np.ndarray, slots: int) -> np.ndarray:
    """How often each of N items is held in `slots` slots: [N], at least once each.

    Greedy, and optimal for the largest share: each slot that is left over goes to the item whose
    copies carry most.

    Raises:
        ValueError: there are fewer slots than items.
    """
    n = len(weight_N)
    if slots < n:
        raise ValueError(f"{slots=} cannot hold {n} experts")
    weight_N, count_N = np.asarray(weight_N, np.float64), np.ones(n, np.int64)
    for _ in range(slots - n):
        count_N[np.argmax(weight_N / count_N)] += 1
    return count_N


def spread_out(load_E: np.ndarray, *, slots: int, devices: int) -> Placement:
    """The global policy: replicate whatever is hot, pack over all devices.

    Args:
        load_E: [E] tokens that each expert got, over some recent steps.
        slots: S ≥ E places for experts in all, a multiple of the devices.
        devices: n.

    Raises:
        ValueError: slots do not fit experts or devices.
    """
    copies_E = copies(load_E, slots)
    expert_C = np.repeat(np.arange(len(load_E)), copies_E)
    pack_C = balanced_packs((np.asarray(load_E) / copies_E)[expert_C], devices)
    return Placement(expert_C[np.argsort(pack_C, kind="stable")], copies_E)


def hierarchical(
    load_E: np.ndarray, *, slots: int, devices: int, nodes: int, groups: int
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
    for whole, name, part in ((len(load_E), "experts", groups), (devices, "devices", nodes)):
        if whole % part:
            raise ValueError(f"{name}={whole} must be divisible by {part}")
    load_GE = np.asarray(load_E, np.float64).reshape(groups, -1)
    node_G = balanced_packs(load_GE.sum(1), nodes)
    expert_S, copies_E = [], np.zeros(load_GE.size, np.int64)
    for node in range(nodes):
        of_group = np.flatnonzero(node_G == node)
        mine = (of_group[:, None] * load_GE.shape[1] + np.arange(load_GE.shape[1])).reshape(-1)
        inner = spread_out(
            load_GE.reshape(-1)[mine], slots=slots // nodes, devices=devices // nodes
        )
        expert_S.append(mine[inner.expert_S])
        copies_E[mine] = inner.copies_E
    return Placement(np.concatenate(expert_S), copies_E)
