# SPDX-License-Identifier: Apache-2.0
"""A decoder whose layers lie each by itself: how a CPU decodes.

A scan over stacked layers copies a layer's weights out of its stack before it multiplies by them.
Decoding does little but read weights, so on a CPU the copies cost more than the products; a TPU or
GPU reads them where they lie.
"""

from dataclasses import dataclass

import jax
from flax import nnx

from r1jax.nn.block import Block
from r1jax.nn.head import Head

SMALLEST, LARGEST = 2**20, 2**30  # bytes of a layer; of all layers, which are held twice then


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unrolled:
    """What decoding asks of a model, with its stacks as tuples of layers."""

    model: nnx.Module
    layers: tuple[tuple[Block, ...], ...]

    def stacks(self) -> tuple[tuple[Block, ...], ...]:
        return self.layers

    @property
    def norm(self):
        return self.model.norm

    @property
    def mtp(self):
        return self.model.mtp

    def rotation(self, positions_BT: jax.Array):
        return self.model.rotation(positions_BT)

    def embed_tokens(self, tokens_BT: jax.Array) -> jax.Array:
        return self.model.embed_tokens(tokens_BT)

    def output_head(self) -> Head:
        return self.model.output_head()

    def head_DN(self) -> jax.Array:
        return self.model.head_DN()


def for_decoding(model):
    """The model as this backend decodes with it fastest: itself, or `Unrolled`."""
    stacks = model.stacks()
    sizes = [sum(x.nbytes for x in jax.tree.leaves(stack)) for stack in stacks]
    layer = max(size // _depth(stack) for size, stack in zip(sizes, stacks, strict=True))
    alone = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty
    if not alone or layer < SMALLEST or sum(sizes) > LARGEST:
        return model
    return Unrolled(model, _layers(stacks))


def _depth(stack: Block) -> int:
    return len(jax.tree.leaves(stack)[0])


@jax.jit
def _layers(stacks: tuple[Block, ...]) -> tuple[tuple[Block, ...], ...]:
    one = lambda stack, i: jax.tree.map(lambda x: x[i], stack)  # noqa: E731
    return tuple(tuple(one(stack, i) for i in range(_depth(stack))) for stack in stacks)
