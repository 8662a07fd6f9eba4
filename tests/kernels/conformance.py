# SPDX-License-Identifier: Apache-2.0
"""What every op's conformance test uses: the backends that run on CPU, errors against float64.

A test of an op is parametrised over `BACKENDS`, takes named shapes from `pallas_kernels.shapes`
("tiny") and random ones from hypothesis, and compares forward and VJP with numpy in float64 through
`error`: norm of the difference over norm of the true value.
"""

import numpy as np
import pytest

from pallas_kernels import Backend

XLA = Backend("xla", chip="cpu")
TPU = Backend("tpu", chip="v5p", interpret=True)  # converts E4M3 to bfloat16
TPU_FP8 = Backend("tpu", chip="tpu7x", interpret=True)  # multiplies E4M3

BACKENDS = [pytest.param(XLA, id="xla"), pytest.param(TPU, id="tpu")]
FP8_BACKENDS = [*BACKENDS, pytest.param(TPU_FP8, id="tpu7x", marks=pytest.mark.slow)]

# Sums of up to a few thousand products in float32: 2^-24 · √K with room; one rounding to bfloat16.
FLOAT32_ERROR = 1e-5
BFLOAT16_ERROR = 2.0**-8


def error(got, want) -> float:
    """‖got − want‖ / ‖want‖ in float64; 0 where both are zero."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{got.shape} {want.shape}"
    norm = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / norm) if norm else float(np.linalg.norm(got))


def of_tiles(x, block: int) -> np.ndarray:
    """values · scale of tiles 1 × block, float64."""
    return np.float64(x.values) * np.repeat(np.float64(x.scale), block, -1)


def of_blocks(w, block: int) -> np.ndarray:
    """values · scale of blocks, float64."""
    return np.float64(w.values) * np.repeat(np.repeat(np.float64(w.scale), block, -2), block, -1)


def normal(seed: int, *shape: int, spread: float = 0.0) -> np.ndarray:
    """float32 normal numbers, each times exp(spread · a normal number): wide ranges of scales."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    return (x * np.exp(spread * rng.normal(size=shape))).astype(np.float32)
