# SPDX-License-Identifier: Apache-2.0
"""Prefill and one cached step, for any decoder made of stacks (`Transformer`, `DenseTransformer`).

The cache is in two parts: the prompts', held once for all samples of a prompt, and each row's own.
For MLA an entry is the latent and the rotated key, C + R values a token a layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.nn.block import Entry, Step, run_cached
from r1jax.nn.param import resident
from r1jax.sharding import constrain


class Prompt(NamedTuple):
    """Prefilled prompts.

    Attributes:
        hidden_PD: [P, D] final hidden state at each prompt's last token.
        entries: for each stack, arrays [L, P, S, ...].
        valid_PS: [P, S] False on (left) padding.
    """

    hidden_PD: jax.Array
    entries: tuple[Entry, ...]
    valid_PS: jax.Array


def positions_of(valid_BT: jax.Array) -> jax.Array:
    """[B, T] int32 positions that count valid tokens from 0, whatever the padding before them."""
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=-1) - 1, 0)


def light(model):
    """The model with its weights as layers use them, so that no token waits for a cast of all, or
    by the FP8 recipe for blocks of all.

    Not so on a mesh: a second copy of what is large enough to be cut is memory that caches need.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return resident(model) if mesh.empty or mesh.size == 1 else model


def prefill(model, tokens_PS: jax.Array, valid_PS: jax.Array) -> Prompt:
    """Runs left-padded prompts once.

    Args:
        tokens_PS: [P, S] int32, each prompt ending at S − 1.
        valid_PS: [P, S] bool.
    """
    out = model(tokens_PS, positions_of(valid_PS), valid_PS.astype(jnp.int32))
    return Prompt(out.hidden_BTD[:, -1], out.entries, valid_PS)


def empty_cache(prompt: Prompt, rows: int, length: int) -> tuple[Entry, ...]:
    """Own caches for `rows` rows of `length` new tokens, shaped like the prompt's entries."""

    def blank(x):
        zeros = jnp.zeros((x.shape[0], rows, length, *x.shape[3:]), x.dtype)
        return constrain(zeros, "layers", "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(blank, prompt.entries)


def step(model, token_B: jax.Array, prompt: Prompt, own: tuple[Entry, ...], index: jax.Array):
    """Feeds one token a row at slot `index` of the own cache.

    Args:
        token_B: [B] int32, B a multiple of the prompts P; row b belongs to prompt b // (B / P).
        index: scalar int32, tokens generated before this one.

    Returns:
        (hidden_BD after the final norm, own caches).
    """
    rows, length = token_B.shape[0], jax.tree.leaves(own)[0].shape[2]
    valid_BS = jnp.repeat(prompt.valid_PS, rows // prompt.valid_PS.shape[0], axis=0)
    own_mask = jnp.broadcast_to(jnp.arange(length) <= index, (rows, 1, length))
    at = Step(valid_BS[:, None], own_mask, index)
    positions_B1 = valid_BS.sum(-1, keepdims=True, dtype=jnp.int32) + index
    turn = model.rotation(positions_B1)
    x_B1D = model.embed_tokens(token_B[:, None])
    written = []
    for layers, entries, cache in zip(model.stacks(), prompt.entries, own, strict=True):
        x_B1D, cache = run_cached(layers, x_B1D, turn, prompt=entries, own=cache, step=at)
        written.append(cache)
    return model.norm(x_B1D)[:, 0], tuple(written)
