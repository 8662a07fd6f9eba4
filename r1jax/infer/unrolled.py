# SPDX-License-Identifier: Apache-2.0
"""A decoder whose layers lie each by itself: how a CPU decodes.

A scan over stacked layers copies a layer's weights out of its stack before it multiplies by them,
and its cache before it attends to it. Decoding does little but read them, so on a CPU the copies
cost more than the products; a TPU or GPU reads them where they lie.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.infer.cache import Cache
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


def cache_for_decoding(model: nnx.Module | Unrolled, cache: Cache) -> Cache:
    """The cache as the layers of `for_decoding`'s model lie."""
    return _split(cache) if isinstance(model, Unrolled) else cache


def stacked(cache: Cache) -> Cache:
    """The cache as the model's own layers lie."""
    return _joined(cache) if isinstance(cache.entries[0][0], tuple) else cache


def _depth(stack: Block) -> int:
    return len(jax.tree.leaves(stack)[0])


@jax.jit
def _layers(stacks: tuple[Block, ...]) -> tuple[tuple[Block, ...], ...]:
    one = lambda stack, i: jax.tree.map(lambda x: x[i], stack)  # noqa: E731
    return tuple(tuple(one(stack, i) for i in range(_depth(stack))) for stack in stacks)


@jax.jit
def _split(cache: Cache) -> Cache:
    one = lambda entry, i: jax.tree.map(lambda x: x[i : i + 1], entry)  # noqa: E731
    entries = tuple(tuple(one(e, i) for i in range(_depth(e))) for e in cache.entries)
    return cache._replace(entries=entries)


@jax.jit
def _joined(cache: Cache) -> Cache:
    entries = tuple(jax.tree.map(lambda *xs: jnp.concatenate(xs), *s) for s in cache.entries)
    return cache._replace(entries=entries)
