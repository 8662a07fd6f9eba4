# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of one instruction: two for each multiply and add of a product."""

import functools
import json
import math
import re

import numpy as np

from r1jax.parallel.hlo import Array, Instruction

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_ESTIMATE = re.compile(r'"cost_estimate":(\{[^{}]*\})')
_GROUPS = re.compile(r'"is_ragged_dot":true,"num_groups_in_ragged_dot":"(\d+)"')
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)_")
# Products of a kernel of attention: so many as wide as a key, so many as wide as a value.
_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
_GEMM = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_RAGGED = ("ragged-dot", "grouped_", "fp8_grouped_")


def flops(instruction: Instruction, operands: tuple[Array, ...]) -> float:
    """Of a `dot`, a `convolution` (as which TPUs run every product) or a library call; else 0."""
    if instruction.opcode == "dot":
        return _dot(instruction.arrays[0], operands[0], instruction.numbers("lhs_contracting_dims"))
    if instruction.opcode == "convolution":
        return _convolution(instruction, operands)
    if instruction.opcode == "custom-call":
        return _library(instruction, operands)
    return 0.0


def ragged_groups(instruction: Instruction) -> int:
    """Groups of a ragged product that a fusion computes; 1 if it computes none.

    XLA:TPU writes it as a product of every row with every group's matrix under a mask, and skips
    the tiles whose mask is empty: what runs is one group's share.
    """
    found = _GROUPS.search(instruction.attributes)
    return max(int(found.group(1)), 1) if found else 1


def kernel(instruction: Instruction) -> bool:
    """Whether it is a call of a kernel written by hand, which may or may not say what it costs."""
    return instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes


def ragged_kernel(instruction: Instruction) -> bool:
    """Whether it is a kernel for ragged products, XLA:TPU's own or one of `pallas_kernels`: what it
    states is the cost of all rows, whether they belong to a group or not."""
    return kernel(instruction) and instruction.name.startswith(_RAGGED)


def read_again(instruction: Instruction, operands: tuple[Array, ...]) -> float:
    """Bytes that JAX's splash attention reads beyond reading each operand once.

    Its blocks of keys and values are read for every block of queries that may see them; for the
    gradient of keys and values it is the other way round.
    """
    found = _SPLASH.search(instruction.name)
    if not kernel(instruction) or not found:
        return 0.0
    blocks, (q, k, v) = operands[0].dims[-2:], operands[2:5]
    visits, backwards = _visits(blocks, q, k), found.group(1) == "dkv"
    fixed = blocks[1] if backwards else blocks[0]
    moving = (q, operands[8]) if backwards else (k, v)
    return max(visits / fixed - 1.0, 0.0) * sum(a.bytes for a in moving) * _shared(q, k, backwards)


def _shared(q: Array, k: Array, backwards: bool) -> float:
    """Query heads that read the same keys."""
    return 1.0 if backwards else q.size / k.size


def _visits(blocks: tuple[int, int], q: Array, k: Array) -> int:
    """Pairs of blocks that hold a query and a key not behind it, of the device with most of them:
    queries may be a piece of their rows, and the last is."""
    queries, keys = blocks
    t, s = q.dims[-2], k.dims[-2]
    return sum(-(-(s - t + (i + 1) * t // queries) * keys // s) for i in range(queries))


def _splash(which: str, operands: tuple[Array, ...]) -> float:
    """Of one kernel of JAX's splash attention: masks of blocks, a table, q, k, v come first."""
    (queries, keys), (q, k, v) = operands[0].dims[-2:], operands[2:5]
    wide = sum(n * a.dims[-1] for n, a in zip(_PRODUCTS[which], (k, v), strict=True))
    rows, length = q.size // q.dims[-1], k.dims[-2]
    return 2.0 * rows * length * wide * _visits((queries, keys), q, k) / (queries * keys)


def _dot(out: Array, left: Array, contracting: tuple[int, ...]) -> float:
    return 2.0 * out.size * math.prod(left.dims[d] for d in contracting)


def _convolution(instruction: Instruction, operands: tuple[Array, ...]) -> float:
    labels = _LABELS.search(instruction.attributes)
    if not labels or len(operands) < 2:
        return 0.0
    left, kernel, out = labels.groups()
    dims = [
        dict(zip(names, array.dims, strict=True))
        for names, array in zip(
            (left, kernel, out), (*operands[:2], instruction.arrays[0]), strict=True
        )
    ]
    spatial = sorted(c for c in out if c.isdigit())
    window = _window(instruction.attributes, len(spatial))
    pairs = 1
    for axis, name in enumerate(spatial):
        how = tuple(window[key][axis] for key in ("stride", "pad", "lhs_dilate", "rhs_dilate"))
        pairs *= _pairs(dims[0][name], window["size"][axis], dims[2][name], how)
    batch = dims[0]["b"] // (instruction.integer("batch_group_count") or 1)
    return 2.0 * batch * dims[2]["f"] * dims[1]["i"] * pairs


def _window(attributes: str, rank: int) -> dict[str, list]:
    found = _WINDOW.search(attributes)
    window = {"size": [1] * rank, "stride": [1] * rank, "pad": [(0, 0)] * rank}
    window |= {"lhs_dilate": [1] * rank, "rhs_dilate": [1] * rank}
    for part in found.group(1).split() if found else ():
        key, _, value = part.partition("=")
        if key == "pad":
            window[key] = [tuple(map(int, v.split("_"))) for v in value.split("x")]
        elif key in window:
            window[key] = [int(v) for v in value.split("x")]
    return window


@functools.lru_cache(4096)
def _pairs(size: int, kernel: int, out: int, how: tuple) -> int:
    """(output, kernel) positions of one dimension that meet an element, not padding or a hole."""
    stride, (low, _), left_dilation, right_dilation = how
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * right_dilation - low
    inside = (at >= 0) & (at <= (size - 1) * left_dilation) & (at % left_dilation == 0)
    return int(inside.sum())


def _library(instruction: Instruction, operands: tuple[Array, ...]) -> float:
    """A kernel that states its cost or is known, or a matrix product of a vendor's library."""
    if kernel(instruction) and (found := _SPLASH.search(instruction.name)):
        return _splash(found.group(1), operands)
    estimate = _ESTIMATE.search(instruction.attributes)
    if estimate:
        return float(json.loads(estimate.group(1)).get("flops", 0))
    contracting = _GEMM.search(instruction.attributes)
    if contracting and operands:
        axes = tuple(int(n.strip('" ')) for n in contracting.group(1).split(",") if n)
        return _dot(instruction.arrays[0], operands[0], axes)
    return 0.0
