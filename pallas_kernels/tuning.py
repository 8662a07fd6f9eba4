# SPDX-License-Identifier: Apache-2.0
"""Tiles of a kernel: explicit argument, else `tuned/<chip>.json` of `bench tune`, else heuristic.

A table is {op: {key: tiles}}; the key names every size that the best tiles depend on.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from pallas_kernels.dispatch import Backend

TABLES = Path(__file__).parent / "tuned"
Tiles = tuple[int, ...]


def key(dims: Mapping[str, int]) -> str:
    """`{"m": 4096, "k": 7168}` → "k7168 m4096": independent of the order."""
    return " ".join(f"{name}{size}" for name, size in sorted(dims.items()))


@functools.lru_cache
def _table(chip: str, folder: Path) -> dict[str, dict[str, Tiles]]:
    """The measured tiles of a chip, empty where nothing was measured."""
    path = folder / f"{chip}.json"
    if not path.exists():
        return {}
    return {
        op: {k: tuple(v) for k, v in entries.items()}
        for op, entries in json.loads(path.read_text()).items()
    }


def write(chip: str, op: str, dims: Mapping[str, int], tiles: Tiles) -> Path:
    """Puts one measured choice into the chip's table; the others stay."""
    path = TABLES / f"{chip}.json"
    path.parent.mkdir(exist_ok=True)
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries.setdefault(op, {})[key(dims)] = list(tiles)
    path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()
    return path


def choose(
    op: str, dims: Mapping[str, int], backend: Backend, heuristic: Callable[[], Tiles]
) -> Tiles:
    """The tiles to use. What an explicit choice must divide is for the op to check.

    Raises:
        ValueError: explicit tiles, but not as many as the op has.
    """
    if backend.tiles is not None:
        if len(backend.tiles) != len(heuristic()):
            raise ValueError(f"{op} has {len(heuristic())} tiles, got {backend.tiles}")
        return backend.tiles
    return _table(backend.chip, TABLES).get(op, {}).get(key(dims)) or heuristic()
