# SPDX-License-Identifier: Apache-2.0
"""Which devices a collective joins, and which axes of the mesh they lie along.

XLA writes groups as lists `{{0,1},{2,3}}`, as a reshaped count `[2,4]<=[4,2]T(1,0)`, or by a mesh
`mesh['a'=2,'b'=4] {'b'}`; permutations as `source_target_pairs={{0,1},{1,0}}`.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from r1jax.parallel.hlo import Instruction

_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=(\{(?:\{[\d,]*\},?)*\})")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=[@\w.\-]*\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? ?\{([^}]*)\}"
)
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")

Groups = tuple[tuple[int, ...], ...]


def groups(instruction: Instruction) -> Groups:
    """Groups of devices, or (source, target) pairs; () means all devices or what is not known."""
    text = instruction.attributes
    if found := _LISTS.search(text):
        lists = re.findall(r"\{([\d,]+)\}", found.group(1))
        return tuple(tuple(map(int, one.split(","))) for one in lists)
    if found := _COUNTED.search(text):
        shape, counted, order = (_integers(g) for g in found.groups())
        ids = np.arange(math.prod(counted)).reshape(counted)
        return _rows(ids.transpose(order or None).reshape(shape))
    if found := _MESH.search(text):
        return _by_mesh(*found.groups())
    return ()


def along(found: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of the mesh whose coordinate differs within a group; all axes of size > 1 for ().

    Args:
        mesh: sizes by name, outermost first, in the order in which devices are numbered.
    """
    names, shape = tuple(mesh), tuple(mesh.values())
    if not found:
        return tuple(n for n in names if mesh[n] > 1)
    if max(max(g) for g in found) >= math.prod(shape):
        return ("unknown",)
    varies = np.zeros(len(shape), bool)
    for group in found:
        place = np.array(np.unravel_index(group, shape))
        varies |= (place != place[:, :1]).any(1)
    return tuple(n for n, v in zip(names, varies, strict=True) if v)


def _by_mesh(axes: str, ids: str | None, chosen: str) -> Groups:
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = _integers(ids or "") or tuple(range(math.prod(sizes.values())))
    array, split = np.array(order), []
    parts = {name: (int(pre), int(size)) for name, pre, size in _AXIS.findall(chosen) if pre}
    whole = {name for name, pre, _ in _AXIS.findall(chosen) if not pre}
    for name, n in sizes.items():
        pre, size = parts.get(name, (1, n))
        split += [(pre, False), (size, name in whole or name in parts), (n // (pre * size), False)]
    array = array.reshape([n for n, _ in split])
    inner = [i for i, (_, joined) in enumerate(split) if joined]
    outer = [i for i in range(len(split)) if i not in inner]
    size = math.prod(split[i][0] for i in inner)
    return _rows(array.transpose(outer + inner).reshape(-1, size))


def _integers(text: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in (text or "").split(",") if n.strip())


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in array.reshape(-1, array.shape[-1]))
