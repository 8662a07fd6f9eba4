# SPDX-License-Identifier: Apache-2.0
"""The FP8 recipe in plain numpy: operands quantised and dequantised one tile at a time, sums in
float64. Shares no code with what it is a reference for."""

from typing import NamedTuple

import ml_dtypes
import numpy as np


class Rule(NamedTuple):
    """Length of tiles and side of blocks; whether the scales of tiles are powers of two."""

    block: int
    power_of_two: bool = False


def _seen(piece: np.ndarray, power_of_two: bool) -> np.ndarray:
    """A tile or block as E4M3 with one scale shows it."""
    scale = np.float32(np.abs(piece).max()) / np.float32(448)
    if scale < 2.0**-126:
        return np.zeros_like(piece)
    if power_of_two:
        scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
    scaled = np.clip(np.float32(piece) / scale, -448, 448)
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.float64(scale)


def tiles(x_MK: np.ndarray, block: int, power_of_two: bool = False) -> np.ndarray:
    """Tiles of `block` values along the last axis; the last may be shorter."""
    x_MK = np.asarray(x_MK, np.float64)
    out = np.zeros_like(x_MK)
    for m in range(x_MK.shape[0]):
        for k in range(0, x_MK.shape[1], block):
            out[m, k : k + block] = _seen(x_MK[m, k : k + block], power_of_two)
    return out


def blocks(w_KN: np.ndarray, block: int) -> np.ndarray:
    """Blocks of `block` × `block`; their scales are no powers of two."""
    w_KN = np.asarray(w_KN, np.float64)
    out = np.zeros_like(w_KN)
    for k in range(0, w_KN.shape[0], block):
        for n in range(0, w_KN.shape[1], block):
            at = (slice(k, k + block), slice(n, n + block))
            out[at] = _seen(w_KN[at], False)
    return out


def product(x_MK, w_KN, rule: Rule) -> np.ndarray:
    """y = x w."""
    return tiles(x_MK, *rule) @ blocks(w_KN, rule.block)


def gradients(x_MK, w_KN, dy_MN, rule: Rule):
    """(dx, dw)"""
    across = lambda x: tiles(np.asarray(x).T, *rule)  # noqa: E731
    dx = tiles(dy_MN, *rule) @ blocks(w_KN, rule.block).T
    return dx, across(x_MK) @ across(dy_MN).T


def groups(sizes_E: np.ndarray) -> list[slice]:
    """The rows of each expert."""
    ends = np.cumsum(sizes_E)
    return [slice(end - size, end) for end, size in zip(ends, sizes_E, strict=True)]


def grouped(x_MK, w_EKN, sizes_E, rule: Rule) -> np.ndarray:
    """y_m = x_m w of its expert; zeros behind the last."""
    y_MN = np.zeros((len(x_MK), w_EKN.shape[2]))
    for w, own in zip(w_EKN, groups(sizes_E), strict=True):
        y_MN[own] = product(np.asarray(x_MK)[own], w, rule)
    return y_MN


def grouped_gradients(x_MK, w_EKN, sizes_E, dy_MN, rule: Rule):
    """(dx, dw): tiles along the rows go over the borders between experts."""
    real = (np.arange(len(x_MK)) < sizes_E.sum())[:, None]
    x_MK, dy_MN = np.where(real, x_MK, 0), np.where(real, dy_MN, 0)
    across = lambda x: tiles(x.T, *rule).T  # noqa: E731
    x_seen, dy_seen = across(x_MK), across(dy_MN)
    dx_MK, dw_EKN = np.zeros(x_MK.shape), np.zeros(w_EKN.shape)
    for e, own in enumerate(groups(sizes_E)):
        dx_MK[own] = tiles(dy_MN[own], *rule) @ blocks(w_EKN[e], rule.block).T
        dw_EKN[e] = x_seen[own].T @ dy_seen[own]
    return dx_MK, dw_EKN
