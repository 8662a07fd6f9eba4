# SPDX-License-Identifier: Apache-2.0
"""Weights that are in E4M3 before a product reads them.

DeepSeek-V3 (arXiv 2412.19437) section 3.3.2. On one device a pass that trains makes blocks of a
master weight where it multiplies; a loop that decodes reads the same ones at every token, a byte a
value. Blocks of a checkpoint are taken as they are stored. A weight that crosses devices is in
blocks before (`parallel.weights`), and its products pass the gradient on to the master weight.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.api import pad
from pallas_kernels.fp8_matmul.ref import of_blocks
from pallas_kernels.fp8_quantize import quantize_blocks
from pallas_kernels.scaled import Scaled
from r1jax.ops.quant import BLOCK, BlockScaled


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """A weight as E4M3 values with a scale a block; it stands where a module has an array.

    Leading axes (layers, experts) are free.

    Attributes:
        values: [..., K', N'] float8_e4m3fn, K and N filled up to whole blocks with zeros.
        scale: [..., K' / b, N' / b] float32.
        own: (*K, *N), the last axes of the weight.
        inputs: how many of these are K, which products contract.
        master: [..., *K, *N] what products pass the weight's gradient to, in its dtype. Its values
            are not read: those of a weight that crossed devices did not. None: not trained.
    """

    values: jax.Array
    scale: jax.Array
    own: tuple[int, ...] = field(metadata=dict(static=True))
    inputs: int = field(metadata=dict(static=True))
    master: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.values.shape[:-2], *self.own)

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of the weight's values."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> Scaled:
        """[..., K', N'], as products take it; without a master it has no derivative."""
        whole = Scaled(self.values, self.scale)
        return _not_trained(whole) if self.master is None else whole

    @property
    def like_master(self) -> jax.Array:
        """[..., K, N] that products are given for the gradient alone: the master, or zeros."""
        lead, k = self.values.shape[:-2], math.prod(self.own[: self.inputs])
        whole = jnp.zeros(self.shape, jnp.float32) if self.master is None else self.master
        return whole.reshape(*lead, k, -1)

    @property
    def block(self) -> int:
        """b."""
        return self.values.shape[-1] // self.scale.shape[-1]

    @property
    def here(self) -> "Blocks":
        """Of a weight that is cut over devices along the first axis of K or of N, in whole blocks:
        what a device holds is a weight itself."""
        own = list(self.own)
        for first, last, held in ((0, self.inputs, -2), (self.inputs, len(own), -1)):
            if (size := self.values.shape[held]) < math.prod(own[first:last]):
                own[first] = size // math.prod(own[first + 1 : last])
        return replace(self, own=tuple(own))

    def trained(self, master: jax.Array | None) -> "Blocks":
        """With another master weight, or none."""
        return replace(self, master=master)

    def cotangent(self) -> "Blocks":
        """What a gradient looks like: of values and scales there is none."""
        return replace(self, values=None, scale=None)

    def __getitem__(self, key: Any) -> "Blocks":
        """`w[...]`, the whole, as a module reads its parameters."""
        if key is not Ellipsis:
            raise ValueError(f"a weight in blocks is read whole, w[...], not w[{key}]")
        return self

    def astype(self, dtype: Any) -> jax.Array:
        """The weight: values · scale, rounded to `dtype` once."""
        whole = of_blocks(self.matrix, self.block)
        k = math.prod(self.own[: self.inputs])
        n = math.prod(self.own[self.inputs :])
        return whole[..., :k, :n].reshape(self.shape).astype(dtype)


@jax.custom_vjp
def _not_trained(matrix: Scaled) -> Scaled:
    """The same. Asked for its gradient it raises: a weight without a master would never move."""
    return matrix


def _refused(*_):
    raise ValueError("a weight in blocks has no derivative: differentiate the one it was made of")


_not_trained.defvjp(_refused, _refused)


def in_blocks(w: jax.Array | BlockScaled, own: int, inputs: int, block: int) -> Blocks:
    """The weight in blocks, as `linear` makes them of it at every pass.

    Args:
        w: [..., *K, *N] float32, or a checkpoint's; its blocks are kept if they have this size and
            are whole in [K, N], and made anew of its values otherwise.
        own: number of the last axes that are the weight's own; those before are layers and experts.
        inputs: how many of these are K.
        block: b.
    """
    lead, last = w.shape[: w.ndim - own], w.shape[w.ndim - own :]
    k, n = math.prod(last[:inputs]), math.prod(last[inputs:])
    scale = _kept_scale(w) if isinstance(w, BlockScaled) and block == BLOCK else None
    if scale is not None:
        values = pad(w.values.reshape(*lead, k, n), block, (len(lead), len(lead) + 1))
        return Blocks(values, scale, last, inputs)
    matrix = w.astype(jnp.float32).reshape(*lead, k, n)
    made = quantize_blocks(pad(matrix, block, (len(lead), len(lead) + 1)), block=block)
    return Blocks(made.values, made.scale, last, inputs)


def _kept_scale(w: BlockScaled) -> jax.Array | None:
    """[..., K' / b, N' / b] of a checkpoint's scales; None where its blocks lie across ours."""
    layout, scale = w.layout, jnp.swapaxes(w.scale, -1, -2)
    if not layout.transposed:
        return None
    if layout.swapped:
        if layout.matrix[1] % (2 * BLOCK):
            return None
        scale = jnp.roll(scale, scale.shape[-2] // 2, -2)
    if layout.part is None:
        return scale
    out = layout.matrix[0]
    whole, (start, stop) = (layout.split or (out,))[-1], layout.part
    groups = out // whole
    ends = stop % BLOCK == 0 or (groups == 1 and stop == out)
    if start % BLOCK or not ends or (groups > 1 and whole % BLOCK):
        return None
    parts = scale.reshape(*scale.shape[:-1], groups, -1)[..., start // BLOCK : -(-stop // BLOCK)]
    return parts.reshape(*scale.shape[:-1], -1)
