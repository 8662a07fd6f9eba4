# SPDX-License-Identifier: Apache-2.0
"""The cache of generation: every row starts at slot 0 and has a length of its own.

Slot i of a row holds what its token i left: for MLA the latent and the rotated key, C + R = 576
values a layer in DeepSeek-V3. Tokens beyond a row's length may have left something; it is masked,
and written over by the next tokens. So a prompt may come in chunks, rows may be of any lengths, and
drafted tokens that are refused cost nothing to forget.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.nn.block import Entry, Step, run_cached


class Cache(NamedTuple):
    """Caches of all stacks, and how far each row got.

    Attributes:
        entries: for each stack, arrays [L, B, S, ...]; for a stack whose layers lie each by itself
            a tuple of as many stacks of one layer (`infer.unrolled`).
        length_B: [B] int32 tokens processed.
    """

    entries: tuple[Entry | tuple[Entry, ...], ...]
    length_B: jax.Array

    @property
    def capacity(self) -> int:
        """S, slots of a row."""
        return jax.tree.leaves(self.entries)[0].shape[2]


def empty(model, rows: int, capacity: int) -> Cache:
    """A cache without tokens."""
    one = jnp.zeros((rows, 1), jnp.int32)
    shapes = jax.eval_shape(lambda m: m(one, one, one).entries, model)
    blank = lambda x: jnp.zeros((*x.shape[:2], capacity, *x.shape[3:]), x.dtype)  # noqa: E731
    return Cache(jax.tree.map(blank, shapes), jnp.zeros(rows, jnp.int32))


def grown(cache: Cache, capacity: int) -> Cache:
    """The cache with room for more tokens."""
    more = capacity - cache.capacity

    def wider(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, more)) + ((0, 0),) * (x.ndim - 3))

    return cache._replace(entries=jax.tree.map(wider, cache.entries))


def slots(length_B: jax.Array, new: int, capacity: int) -> tuple[jax.Array, Step]:
    """(positions_BT, step) of `new` tokens a row that follow its first `length_B`."""
    at_BT = length_B[:, None] + jnp.arange(new, dtype=jnp.int32)
    mask_BTS = jnp.arange(capacity) <= at_BT[:, :, None]
    return at_BT, Step(None, mask_BTS, length_B)


def extend(model, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Feeds T tokens a row after those it has; attention is absorbed, over the latents.

    The lengths stay: the caller adds how many of the T tokens he keeps.

    Args:
        model: a decoder made of stacks.
        tokens_BT: [B, T] int32; length_B + T must not exceed the capacity.
        cache: what came before.

    Returns:
        (hidden_BTD after the final norm, the cache with their entries).
    """
    at_BT, step = slots(cache.length_B, tokens_BT.shape[1], cache.capacity)
    turn = model.rotation(at_BT)
    x_BTD, entries = model.embed_tokens(tokens_BT), []
    for layers, own in zip(model.stacks(), cache.entries, strict=True):
        x_BTD, own = run_cached(layers, x_BTD, turn, prompt=None, own=own, step=step)
        entries.append(own)
    return model.norm(x_BTD), Cache(tuple(entries), cache.length_B)


def begin(model, tokens_BT: jax.Array, valid_B: jax.Array, capacity: int):
    """Feeds right-padded prompts to an empty cache, keys expanded: the fast way for a first chunk.

    Args:
        tokens_BT: [B, T] int32, T ≤ capacity.
        valid_B: [B] int32 real tokens of each row.
        capacity: S of the cache.

    Returns:
        (hidden_BTD, cache); beyond a row's length the hidden states mean nothing.
    """
    b, t = tokens_BT.shape
    at_BT = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    out = model(tokens_BT, at_BT, (at_BT < valid_B[:, None]).astype(jnp.int32))
    short = Cache(out.entries, jnp.asarray(valid_B))
    return out.hidden_BTD, grown(short, capacity)


def last(hidden_BTD: jax.Array, count_B: jax.Array) -> jax.Array:
    """[B, D]: the hidden state of each row's token `count_B` − 1."""
    return jnp.take_along_axis(hidden_BTD, (count_B - 1)[:, None, None], axis=1)[:, 0]
