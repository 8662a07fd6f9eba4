# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's block FP8: E4M3 values with one float32 scale for each 128 × 128 block.

DeepSeek-V3 (arXiv 2412.19437) section 3.3.2; in a checkpoint `weight` and `weight_scale_inv`.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's matrix [out, in] (or vector [n]) lies in an array of ours.

    The array is the matrix transposed, its axes split into those of `split`, and of the last axis
    only `part`. All of it moves numbers and changes none, so `joined` undoes it exactly.

    Attributes:
        matrix: shape in the checkpoint.
        split: shape after the transposition and the splitting; None: nothing is split.
        part: (start, stop) of the last axis; None: all of it.
        swapped: the two halves of the first axis change places.
        transposed: False for a table that is [rows, features] on both sides.
    """

    matrix: tuple[int, ...]
    split: tuple[int, ...] | None = None
    part: tuple[int, int] | None = None
    swapped: bool = False
    transposed: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        whole = self.split or self._turned
        return whole if self.part is None else (*whole[:-1], self.part[1] - self.part[0])

    @property
    def _turned(self) -> tuple[int, ...]:
        return self.matrix[::-1] if self.transposed else self.matrix

    def apply(self, matrix: Any) -> Any:
        """The array of a matrix, numpy or jax."""
        array = matrix.T if self.transposed else matrix
        if self.swapped:
            array = _swap_halves(array)
        array = array.reshape(self.split or self._turned)
        return array if self.part is None else array[..., self.part[0] : self.part[1]]

    def joined(self, parts: list[np.ndarray]) -> np.ndarray:
        """The matrix of one array, or of the arrays that are the parts of its last axis in order.

        All of them have this layout but for their part.
        """
        whole = parts[0] if self.part is None else np.concatenate(parts, axis=-1)
        turned = whole.reshape(self._turned)
        if self.swapped:
            turned = _swap_halves(turned)
        return turned.T if self.transposed else turned


def _swap_halves(x: Any) -> Any:
    return x.reshape(2, x.shape[0] // 2, *x.shape[1:])[::-1].reshape(x.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockScaled:
    """A weight kept as it was stored: E4M3 values in our layout and the checkpoint's own scales.

    It stands where a module has an array: `w[...]`, `w.shape` and `w.astype(dtype)`, which is
    values × scale in float32, rounded once. Leading axes (layers, experts) are free.

    Attributes:
        values: [..., *layout.shape] float8_e4m3fn.
        scale: [..., ⌈out / 128⌉, ⌈in / 128⌉] float32, `weight_scale_inv` untouched. Parts of one
            matrix each hold all of it: their blocks need not end where the parts do.
        layout: how the values lie.
    """

    values: jax.Array
    scale: jax.Array
    layout: Layout = field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.values.shape

    @property
    def size(self) -> int:
        """Number of values."""
        return self.values.size

    @property
    def ndim(self) -> int:
        """Number of axes of the values."""
        return self.values.ndim

    def __getitem__(self, key: Any) -> "BlockScaled":
        """`w[...]`, the whole, as a module reads its parameters."""
        if key is not Ellipsis:
            raise ValueError(f"a block-scaled weight is read whole, w[...], not w[{key}]")
        return self

    def astype(self, dtype: Any) -> jax.Array:
        """[..., *layout.shape]: values × scale of their block."""
        out, into = self.layout.matrix
        spread = jnp.repeat(jnp.repeat(self.scale, BLOCK, -2), BLOCK, -1)[..., :out, :into]
        apply = self.layout.apply
        for _ in range(self.scale.ndim - 2):
            apply = jax.vmap(apply)
        return (self.values.astype(jnp.float32) * apply(spread)).astype(dtype)


def dequantise(values_OI: np.ndarray, scale_RC: np.ndarray) -> np.ndarray:
    """w = values · scale of the block, on the host: [out, in] float32.

    Args:
        values_OI: [out, in] float8_e4m3fn.
        scale_RC: [⌈out / 128⌉, ⌈in / 128⌉] float32.
    """
    w_OI = values_OI.astype(np.float32)
    for r in range(scale_RC.shape[0]):  # a block row at a time: no second matrix of scales
        rows = slice(r * BLOCK, (r + 1) * BLOCK)
        w_OI[rows] *= np.repeat(scale_RC[r], BLOCK)[: w_OI.shape[1]]
    return w_OI


def quantise(w_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block-scaled E4M3 of a matrix, on the host: scale = amax / 448 of each 128 × 128 block.

    Args:
        w_OI: [out, in], finite, any float dtype.

    Returns:
        (values [out, in] float8_e4m3fn, scale [⌈out / 128⌉, ⌈in / 128⌉] float32). A block of zeros
        has scale 1.
    """
    out, into = w_OI.shape
    shape = (-(-out // BLOCK), -(-into // BLOCK))
    values_OI = np.empty((out, into), jnp.float8_e4m3fn)
    scale_RC = np.ones(shape, np.float32)
    for r in range(shape[0]):
        rows = slice(r * BLOCK, (r + 1) * BLOCK)
        strip = np.asarray(w_OI[rows], np.float32)
        padded = np.pad(np.abs(strip), ((0, 0), (0, shape[1] * BLOCK - into)))
        amax_C = padded.reshape(len(strip), -1, BLOCK).max((0, 2))
        scale_RC[r] = np.where(amax_C > 0, amax_C / np.float32(E4M3_MAX), 1.0)
        scaled = strip / np.repeat(scale_RC[r], BLOCK)[:into]
        values_OI[rows] = np.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return values_OI, scale_RC
