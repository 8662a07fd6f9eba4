# SPDX-License-Identifier: Apache-2.0
"""Weights of the recipe's products that cross devices: quantised where they lie, sent in E4M3.

DeepSeek-V3 (arXiv 2412.19437) section 3.3. A device that holds a part of a master weight makes its
part of the blocks, and all parts are gathered: a byte a value where the float32 weight has four,
and each device quantises its own part alone. Along the axis that is gathered the blocks are those
of the whole weight, to the bit, wherever it is cut; along heads and hidden values, which stay cut,
those of the piece. The gradient comes back in the master's float32, summed over the devices.

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


class Cut(NamedTuple):
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


def cut_of(axes: tuple[str | None, ...], inputs: int, block: int) -> Cut | None:
    """`Cut` of a weight that is cut along one of `WHOLE`, which is all of its K or N; else None.

    Args: as in `Cut`.
    """
    found = [axis for axis in WHOLE if axis in axes and piece(*axes, along=axis)[1] > 1]
    own = list(axes[_lead(axes) :])
    if len(found) != 1 or found not in (own[:inputs], own[inputs:]):
        return None
    return Cut(axes, inputs, found[0], block)


def crossed(part: jax.Array, cut: Cut) -> Blocks:
    """The whole weight in blocks, made of the parts that lie on the devices.

    Args:
        part: [..., *K, *N] float32, the part here.
        cut: from `cut_of`.
    """
    made, master = _crossed(part, cut)
    made = jax.lax.stop_gradient(made)  # it is the master's that counts
    return Blocks(*made, own=master.shape[cut.lead :], inputs=cut.inputs, master=master)


def stored(w: jax.Array, axes: tuple[str | None, ...], inputs: int, block: int) -> Blocks | None:
    """A weight in blocks, cut over devices along its experts, heads and hidden values alone.

    Inside the program that is jitted, where the weight lies by the rules in force. None where a
    device's part of it would end inside a block.

    Args:
        w: [*layers, *experts, *K, *N]
        axes, inputs, block: as in `Cut`.
    """
    own = w.shape[_lead(axes) :]
    where = blocks_spec(axes, own, inputs, block)
    if where is None:
        return None

    def made(part: jax.Array) -> Scaled:
        if cut := cut_of(axes, inputs, block):
            return crossed(part, cut).matrix
        for axis in WHOLE:
            part = gather(part, *axes, along=axis) if axis in axes else part
        return in_blocks(part, len(own), inputs, block).matrix

    found = local(made, (spec(*axes),), Scaled(where, where))(w.astype(jnp.float32))
    return Blocks(*found, own=own, inputs=inputs)


def blocks_spec(
    axes: tuple[str | None, ...], own: tuple[int, ...], inputs: int, block: int
) -> PartitionSpec | None:
    """Where values and scales [..., K', N'] of a weight lie that is `stored`, or None.

    Args:
        axes, inputs, block: as in `Cut`.
        own: (*K, *N)
    """
    lead, where = _lead(axes), []
    for start, end in ((0, inputs), (inputs, len(own))):
        first, *others = (None if axis in WHOLE else axis for axis in axes[lead:][start:end])
        count = pieces(first) if first else 1
        ends_inside = count > 1 and math.prod(own[start:end]) % (count * block)
        if ends_inside or any(axis and pieces(axis) > 1 for axis in others):
            return None
        where.append(first)
    return spec(*axes[:lead], *where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _crossed(part: jax.Array, cut: Cut) -> tuple[Scaled, jax.Array]:
    """(blocks, zeros [..., *K, *N] that stand for the master weight)."""
    lead, own = part.shape[: cut.lead], part.shape[cut.lead :]
    k, n = math.prod(own[: cut.inputs]), math.prod(own[cut.inputs :])
    at = cut.matrix.index(cut.along)
    other = 2 * cut.lead + 1 - at
    matrix = pad(part.reshape(*lead, k, n), cut.block, (other,))
    if matrix.shape[at] % cut.block:
        made = _of_any_parts(matrix, cut, at, other)
    else:
        made = quantize_blocks(matrix, block=cut.block)
        made = Scaled(*(gather(x, *cut.matrix, along=cut.along) for x in made))
    return made, jnp.zeros_like(jax.eval_shape(lambda: _whole(part, cut)))


def _whole(part: jax.Array, cut: Cut) -> jax.Array:
    return gather(part, *cut.axes, along=cut.along)


def _forward(part: jax.Array, cut: Cut):
    # Of the gathered zeros nothing is left but how their gradient comes back: in parts, added up.
    back = jax.vjp(lambda x: _whole(x, cut), jnp.zeros_like(part))[1]
    return _crossed(part, cut), back


_crossed.defvjp(_forward, lambda cut, back, given: back(given[1]))


def _of_any_parts(part: jax.Array, cut: Cut, at: int, other: int) -> Scaled:
    """Blocks [..., K', N'] of parts that end inside blocks.

    What crosses devices first is the largest magnitude of each row and block of columns (of columns
    and rows, if these are cut): four bytes for b values.

    Args:
        part: [..., K, N], filled up along `other`.
        at: the axis that is cut.
        other: the other one.
    """
    b = cut.block
    whole = functools.partial(gather, along=cut.along)
    largest = whole(_largest(scaled.magnitude(part), other, b), *cut.matrix)
    scale = scaled.scale_of(_largest(pad(largest, b, (at,)), at, b), power_of_two=False)
    here, size = piece(*cut.matrix, along=cut.along)[0], part.shape[at]
    mine = jax.lax.dynamic_slice_in_dim(jnp.repeat(scale, b, at), here * size, size, at)
    values = scaled.encode(part, jnp.repeat(mine, b, other)).astype(scaled.E4M3)
    return Scaled(pad(whole(values, *cut.matrix), b, (at,)), scale)


def _largest(x: jax.Array, axis: int, block: int) -> jax.Array:
    """The largest of each `block` along an axis."""
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]).max(axis + 1)


def _lead(axes: tuple[str | None, ...]) -> int:
    return sum(axis in ("layers", "expert") for axis in axes)
