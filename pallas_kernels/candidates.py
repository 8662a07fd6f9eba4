# SPDX-License-Identifier: Apache-2.0
"""Tiles worth measuring, for the tuner."""

from collections.abc import Iterator

from pallas_kernels.tuning import Tiles

SIDES = (128, 256, 512, 1024)
DEEPEST = 4096  # bytes of one row of a tile along the contraction


def quantize(m: int, k: int, block: int) -> Iterator[Tiles]:
    """(rows, columns) of a piece."""
    for rows in (64, 128, 256, 512):
        for columns in _divisors(k, block, 8192):
            if rows <= max(m, 64):
                yield rows, columns


def matmul(sizes: tuple[int, int, int], block: int, itemsize: int) -> Iterator[Tiles]:
    """(tm, tn, tk): sides up to the matrix, tk a divisor of k that is a multiple of the block."""
    m, n, k = sizes
    for tm in SIDES:
        for tn in SIDES:
            for tk in _divisors(k, block, DEEPEST // itemsize):
                if tm <= max(m, 128) and tn <= max(n, 128) and tk >= min(k, 256):
                    yield tm, tn, tk


def hopper() -> Iterator[Tiles]:
    """(warpgroups, pieces, stages, width, cluster) of `pallas_kernels.hopper.Plan`."""
    for warpgroups, stages in ((3, 4), (2, 5)):
        for width in (8, 16):
            yield from ((warpgroups, 1, stages, width, cluster) for cluster in (1, 2))


def head(m: int, n: int) -> Iterator[Tiles]:
    """(tokens, columns) of a tile of logits."""
    for tm in (256, 512, 1024, 2048):
        for tn in (256, 512, 1024, 2048):
            if tm <= max(m, 256) and tn <= max(n, 256) and tm * tn <= 2**21:
                yield tm, tn


def attention(length: int) -> Iterator[Tiles]:
    """(queries, keys) of a block."""
    sides = [n for n in (256, 512, 1024, 2048) if length % n == 0] or [length]
    yield from ((queries, keys) for queries in sides for keys in sides)


def _divisors(size: int, block: int, most: int) -> list[int]:
    return [t for t in range(block, min(size, most) + 1, block) if size % t == 0]
