# SPDX-License-Identifier: Apache-2.0
"""Prefill and one cached step, for any decoder made of stacks (`Transformer`, `DenseTransformer`).

The cache is in two parts: the prompts', held once for all samples of a prompt (on a mesh once for
those that a device draws), and each row's own. For MLA an entry is the latent and the rotated key,
C + R values a token a layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.nn.block import Entry, Step, run_cached
from r1jax.nn.param import all_in_blocks, resident, specs
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


def by_rows(model, prompt: Prompt, rows: int) -> Prompt:
    """The prompts laid out as `step` wants them: in a region of local code a device has those of
    its own rows, [P · n, ...] over all of them.

    A prompt is there n times if its rows lie on n devices. Where `step` has no such region the
    prompts stay as they are.

    Args:
        rows: B, of all prompts.
    """
    devices, prompts = pieces("batch"), prompt.hidden_PD.shape[0]
    if not _local(model, rows):
        return prompt
    group = rows // prompts
    times = next(n for n in range(1, group + 1) if not group % n and not prompts * n % devices)
    repeated = lambda x, axes: constrain(jnp.repeat(x, times, axis=1), *axes)  # noqa: E731
    entries = map_entries(repeated, model, prompt.entries)
    hidden_PD, valid_PS = (
        constrain(jnp.repeat(x, times, axis=0), "batch", None)
        for x in (prompt.hidden_PD, prompt.valid_PS)
    )
    return Prompt(hidden_PD, entries, valid_PS)


def _local(model, rows: int) -> bool:
    """Whether a step is a region of local code: where weights lie for decoding, the devices divide
    the rows, and by the FP8 recipe all weights are in whole blocks.

    A device's piece of other weights would make blocks of its own, and other tokens.
    """
    if not decoding() or rows % pieces("batch"):
        return False
    return not model.cfg.fp8.enabled or all_in_blocks(model.stacks())


def empty_cache(model, prompt: Prompt, rows: int, length: int) -> tuple[Entry, ...]:
    """Own caches for `rows` rows of `length` new tokens, shaped like the prompt's entries."""

    def blank(x, axes):
        return constrain(jnp.zeros((x.shape[0], rows, length, *x.shape[3:]), x.dtype), *axes)

    return map_entries(blank, model, prompt.entries)


def map_entries(fn: Callable, model, entries: tuple[Entry, ...]) -> tuple[tuple[Any, ...], ...]:
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

    Of prompts that `by_rows` has laid out all layers are one region of local code, in which a
    device has its own rows: XLA cannot partition the recipe's kernels by itself.

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
    at = Step(valid_BS[:, None], own_mask, index)
    run, layers = _layers, (model.stacks(), model.norm)
    if _local(model, rows) and prompts % pieces("batch") == 0:
        row = spec("batch", None, None)
        entries = map_entries(lambda _, axes: spec(*axes), model, own)
        lie = Step(row, row, spec(), spec())
        run = local(run, (specs(layers), row, (row, row), (entries,) * 2, lie), (row, entries))
    hidden_B1D, own = run(layers, x_B1D, turn, (prompt.entries, own), at)
    return hidden_B1D[:, 0], own


def _layers(layers, x_B1D, turn, caches, at: Step):
    """All stacks and the final norm on embedded tokens: (hidden_B1D, own caches)."""
    (stacks, norm), written = layers, []
    for stack, entry, cache in zip(stacks, *caches, strict=True):
        x_B1D, cache = run_cached(stack, x_B1D, turn, prompt=entry, own=cache, step=at)
        written.append(cache)
    return norm(x_B1D), tuple(written)
