# SPDX-License-Identifier: Apache-2.0
"""Prefill and one cached step, for any decoder made of stacks (`Transformer`, `DenseTransformer`).

The cache is in two parts: the prompts', held once for all samples of a prompt, and each row's own.
For MLA an entry is the latent and the rotated key, C + R values a token a layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.nn.block import Entry, Step, run_cached
from r1jax.nn.param import resident, specs
from r1jax.sharding import constrain, decoding, local, pieces, spec


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


def dealt(model, prompt: Prompt, rows: int) -> Prompt:
    """The prompts as `step` wants them where weights lie for decoding: cut over devices with their
    rows, [P · n, ...].

    A prompt whose rows lie on several devices is there n times. As it is where `step` has no region
    of local code: elsewhere, and for rows that the devices do not divide.

    Args:
        rows: B, of all prompts.
    """
    n, prompts = pieces("batch"), prompt.hidden_PD.shape[0]
    if not decoding() or rows % n:
        return prompt
    group = rows // prompts
    times = next(c for c in range(1, group + 1) if not group % c and not prompts * c % n)
    repeated = lambda x, axes: constrain(jnp.repeat(x, times, axis=1), *axes)  # noqa: E731
    entries = by_entry(repeated, model, prompt.entries)
    hidden_PD, valid_PS = (
        constrain(jnp.repeat(x, times, axis=0), "batch", None)
        for x in (prompt.hidden_PD, prompt.valid_PS)
    )
    return Prompt(hidden_PD, entries, valid_PS)


def empty_cache(model, prompt: Prompt, rows: int, length: int) -> tuple[Entry, ...]:
    """Own caches for `rows` rows of `length` new tokens, shaped like the prompt's entries."""

    def blank(x, axes):
        return constrain(jnp.zeros((x.shape[0], rows, length, *x.shape[3:]), x.dtype), *axes)

    return by_entry(blank, model, prompt.entries)


def by_entry(fn: Callable, model, entries: tuple[Entry, ...]) -> tuple[tuple[Any, ...], ...]:
    """`fn(array, its logical axes)` of all that is cached, arrays [L, B, S, ...]."""
    return tuple(
        tuple(
            fn(x, ("layers", "batch", None, *axes))
            for x, axes in zip(entry, stack.attention.ENTRY, strict=True)
        )
        for entry, stack in zip(entries, model.stacks(), strict=True)
    )


def step(model, token_B: jax.Array, prompt: Prompt, own: tuple[Entry, ...], index: jax.Array):
    """Feeds one token a row at slot `index` of the own cache.

    Where weights lie for decoding, and the devices divide rows and prompts (`dealt`), all layers
    are one region in which a device has its own rows: what is not known to XLA as a product, the
    recipe's kernels, it could not partition.

    Args:
        token_B: [B] int32, B a multiple of the prompts P; row b belongs to prompt b // (B / P).
        index: scalar int32, tokens generated before this one.

    Returns:
        (hidden_BD after the final norm, own caches).
    """
    rows, length = token_B.shape[0], jax.tree.leaves(own)[0].shape[2]
    prompts = prompt.valid_PS.shape[0]
    valid_BS = jnp.repeat(prompt.valid_PS, rows // prompts, axis=0)
    own_mask = jnp.broadcast_to(jnp.arange(length) <= index, (rows, 1, length))
    positions_B1 = valid_BS.sum(-1, keepdims=True, dtype=jnp.int32) + index
    turn = model.rotation(positions_B1)
    x_B1D = model.embed_tokens(token_B[:, None])
    run, stacks = _through, model.stacks()
    if decoding() and not (rows % pieces("batch") or prompts % pieces("batch")):
        row = spec("batch", None, None)
        entries = by_entry(lambda _, axes: spec(*axes), model, own)
        where = (specs((stacks, model.norm)), row, (row, row), entries, entries, row, row, spec())
        run = local(_through, where, (row, entries))
    at = valid_BS[:, None], own_mask, index
    hidden_B1D, own = run((stacks, model.norm), x_B1D, turn, prompt.entries, own, *at)
    return hidden_B1D[:, 0], own


def _through(layers, x_B1D, turn, entries, own, prompt_mask_B1S, own_mask_B1S, index):
    """All stacks and the final norm on embedded tokens: (hidden_B1D, own caches)."""
    (stacks, norm), written = layers, []
    at = Step(prompt_mask_B1S, own_mask_B1S, index)
    for stack, entry, cache in zip(stacks, entries, own, strict=True):
        x_B1D, cache = run_cached(stack, x_B1D, turn, prompt=entry, own=cache, step=at)
        written.append(cache)
    return norm(x_B1D), tuple(written)
