# SPDX-License-Identifier: Apache-2.0
"""Weights of the recipe's products that cross devices: quantised where they lie, sent in E4M3.

DeepSeek-V3 (arXiv 2412.19437) section 3.3. A device that holds a part of a master weight makes its
part of the blocks, and all parts are gathered: a byte a value where the float32 weight has four,
and each device quantises its own part alone. The blocks are those of the whole weight, to the bit,
wherever it is cut. The gradient comes back in the master's float32, summed over the devices.

What decodes keeps the blocks (`stored`): a byte a value, made once.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import scaled
from pallas_kernels.fp8_matmul.api import pad
from pallas_kernels.fp8_quantize import quantize_blocks
from pallas_kernels.scaled import Scaled
from r1jax.ops.blocks import Blocks, in_blocks
from r1jax.sharding import gather, local, piece, pieces, spec

WHOLE = "embed", "latent"  # axes that are cut for memory alone: products want them whole


class Lies(NamedTuple):
    """How a part of a weight [..., *K, *N] lies inside a `local` region.

    Attributes:
        axes: logical axes of the weight; "layers" and "expert" come before its own.
        inputs: how many of its own axes are K.
        along: the one that is gathered: K or N by itself.
        block: b, side of the blocks that are made of it.
    """

    axes: tuple[str | None, ...]
    inputs: int
    along: str
    block: int

    @property
    def lead(self) -> int:
        """How many axes come before the weight's own."""
        return _lead(self.axes)

    @property
    def matrix(self) -> tuple[str | None, ...]:
        """Logical axes of the weight as [..., K, N]."""
        rows = self.axes[self.lead] == self.along
        return *self.axes[: self.lead], *((self.along, None) if rows else (None, self.along))


def lies(axes: tuple[str | None, ...], inputs: int, block: int) -> Lies | None:
    """`Lies` of a weight that is cut along one of `WHOLE`, which is all of its K or N; else None.

    Args: as in `Lies`.
    """
    cut = [axis for axis in WHOLE if axis in axes and piece(*axes, along=axis)[1] > 1]
    own = list(axes[_lead(axes) :])
    if len(cut) != 1 or cut not in (own[:inputs], own[inputs:]):
        return None
    return Lies(axes, inputs, cut[0], block)


def crossed(part: jax.Array, how: Lies) -> Blocks:
    """The whole weight in blocks, made of the parts that lie on the devices.

    Args:
        part: [..., *K, *N] float32, the part here.
        how: it lies.
    """
    made, master = _crossed(part, how)
    made = jax.lax.stop_gradient(made)  # it is the master's that counts
    return Blocks(*made, own=master.shape[how.lead :], inputs=how.inputs, master=master)


def stored(w: jax.Array, axes: tuple[str | None, ...], inputs: int, block: int) -> Blocks | None:
    """A weight in blocks, cut over devices along its experts, heads and hidden values alone.

    Inside the program that is jitted, where the weight lies by the rules in force. None where a
    device's part of it would end inside a block.

    Args:
        w: [*layers, *experts, *K, *N]
        axes, inputs, block: as in `Lies`.
    """
    own = w.shape[_lead(axes) :]
    where = blocks_lie(axes, own, inputs, block)
    if where is None:
        return None

    def made(part: jax.Array) -> Scaled:
        if how := lies(axes, inputs, block):
            return crossed(part, how).matrix
        for axis in WHOLE:
            part = gather(part, *axes, along=axis) if axis in axes else part
        return in_blocks(part, len(own), inputs, block).matrix

    found = local(made, (spec(*axes),), Scaled(where, where))(w.astype(jnp.float32))
    return Blocks(*found, own=own, inputs=inputs)


def blocks_lie(
    axes: tuple[str | None, ...], own: tuple[int, ...], inputs: int, block: int
) -> PartitionSpec | None:
    """Where values and scales [..., K', N'] of a weight lie that is `stored`, or None.

    Args:
        axes, inputs, block: as in `Lies`.
        own: (*K, *N)
    """
    lead, where = _lead(axes), []
    for start, end in ((0, inputs), (inputs, len(own))):
        first, *others = (None if axis in WHOLE else axis for axis in axes[lead:][start:end])
        cut = pieces(first) if first else 1
        inside = cut > 1 and math.prod(own[start:end]) % (cut * block)
        if inside or any(axis and pieces(axis) > 1 for axis in others):
            return None
        where.append(first)
    return spec(*axes[:lead], *where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _crossed(part: jax.Array, how: Lies) -> tuple[Scaled, jax.Array]:
    """(blocks, zeros [..., *K, *N] that stand for the master weight)."""
    lead, own = part.shape[: how.lead], part.shape[how.lead :]
    k, n = math.prod(own[: how.inputs]), math.prod(own[how.inputs :])
    at = how.matrix.index(how.along)
    other = 2 * how.lead + 1 - at
    matrix = pad(part.reshape(*lead, k, n), how.block, (other,))
    if matrix.shape[at] % how.block:
        made = _of_any_parts(matrix, how, at, other)
    else:
        made = quantize_blocks(matrix, block=how.block)
        made = Scaled(*(gather(x, *how.matrix, along=how.along) for x in made))
    return made, jnp.zeros_like(jax.eval_shape(lambda: _whole(part, how)))


def _whole(part: jax.Array, how: Lies) -> jax.Array:
    return gather(part, *how.axes, along=how.along)


def _forward(part: jax.Array, how: Lies):
    # Of the gathered zeros nothing is left but how their gradient comes back: in parts, added up.
    back = jax.vjp(lambda x: _whole(x, how), jnp.zeros_like(part))[1]
    return _crossed(part, how), back


_crossed.defvjp(_forward, lambda how, back, given: back(given[1]))


def _of_any_parts(part: jax.Array, how: Lies, at: int, other: int) -> Scaled:
    """Blocks [..., K', N'] of parts that end inside blocks.

    What crosses devices first is the largest magnitude of each row and block of columns (of columns
    and rows, if these are cut): four bytes for b values.

    Args:
        part: [..., K, N], filled up along `other`.
        at: the axis that is cut.
        other: the other one.
    """
    b = how.block
    whole = functools.partial(gather, along=how.along)
    largest = whole(_largest(scaled.magnitude(part), other, b), *how.matrix)
    scale = scaled.scale_of(_largest(pad(largest, b, (at,)), at, b), power_of_two=False)
    here, size = piece(*how.matrix, along=how.along)[0], part.shape[at]
    mine = jax.lax.dynamic_slice_in_dim(jnp.repeat(scale, b, at), here * size, size, at)
    values = scaled.encode(part, jnp.repeat(mine, b, other)).astype(scaled.E4M3)
    return Scaled(pad(whole(values, *how.matrix), b, (at,)), scale)


def _largest(x: jax.Array, axis: int, block: int) -> jax.Array:
    """The largest of each `block` along an axis."""
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]).max(axis + 1)


def _lead(axes: tuple[str | None, ...]) -> int:
    return sum(axis in ("layers", "expert") for axis in axes)
