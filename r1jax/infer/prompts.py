# SPDX-License-Identifier: Apache-2.0
"""Feeding prompts: in chunks, and after what an earlier turn of the conversation left."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.infer.cache import Cache, begin, extend, grown, last
from r1jax.infer.multitoken import extend_mtp
from r1jax.nn.block import Entry

CHUNK = 512  # tokens of a prompt that are fed at once
MANY = 2048  # of all rows: from here on a CPU's products are Eigen's
_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"


class Kept(NamedTuple):
    """What generations leave for prompts that begin with the same tokens.

    Attributes:
        tokens: of each row, all that were fed.
        cache: of the main model.
        own: the MTP module's cache, or None.
        own_length_B: [B] its entries; 0 without.
    """

    tokens: list[list[int]]
    cache: Cache
    own: Entry | None
    own_length_B: np.ndarray


class Fed(NamedTuple):
    """Prompts in the cache.

    Attributes:
        cache: of the main model.
        own: the MTP module's cache, or None.
        hidden_BD: [B, D] at each row's last token.
        reused: tokens, over all rows, that were there already.
    """

    cache: Cache
    own: Entry | None
    hidden_BD: jax.Array
    reused: int


def feed(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    mtp: bool,
    kept: Kept | None = None,
    room: int = 0,
) -> Fed:
    """Feeds prompts of any lengths, `CHUNK` tokens at a time.

    Args:
        model: a decoder made of stacks.
        prompts: token ids of each row.
        mtp: feed the MTP module too: hidden i and token i + 1, all but the last.
        kept: of the same rows; what their prompts share with it is not fed again. It is used up.
        room: slots that the caches have behind the longest prompt, at least one.
    """
    length_B = np.array([len(p) for p in prompts], np.int32)
    start_B = np.zeros_like(length_B) if kept is None else _shared(kept, prompts, mtp)
    rest_B = length_B - start_B
    most = int(rest_B.max())
    width = min(CHUNK, 1 << max(most - 1, 15).bit_length())
    padded_BS = np.zeros((len(prompts), -(-most // width) * width + 1), np.int32)
    for row, prompt, start in zip(padded_BS, prompts, start_B, strict=True):
        row[: len(prompt) - start] = prompt[start:]
    need = int(length_B.max()) + max(room, 1), int(start_B.max()) + padded_BS.shape[1] - 1
    capacity = bucket(max(need))
    cache, own, hidden_BD = None, None, None
    if start_B.any():
        cache, own = _roomy(kept, start_B, capacity, mtp)
    for start in range(0, most, width):
        part = padded_BS[:, start : start + width], padded_BS[:, start + 1 : start + width + 1]
        valid_B, rows = np.clip(rest_B - start, 0, width), len(prompts) * width
        if cache is None:
            how = dict(capacity=capacity, mtp=mtp)
            hidden_BD, cache, own = _begin(rows)(model, *part, valid_B, **how)
            continue
        before = cache, own, start_B + start
        new_BD, cache, own = _extend(rows)(model, (*part, valid_B), *before)
        ends_B = (valid_B > 0) & (rest_B <= start + width)
        hidden_BD = new_BD if hidden_BD is None else jnp.where(ends_B[:, None], new_BD, hidden_BD)
    return Fed(cache, own, hidden_BD, int(start_B.sum()))


def _shared(kept: Kept, prompts: Sequence[Sequence[int]], mtp: bool) -> np.ndarray:
    """[B] tokens of each prompt that need not be fed: the last is, for its hidden state."""

    def common(old, new):
        n = min(len(old), len(new) - 1)
        return next((i for i in range(n) if old[i] != new[i]), n)

    shared_B = np.array([common(*row) for row in zip(kept.tokens, prompts, strict=True)], np.int32)
    if not mtp:
        return shared_B
    if kept.own is None:
        return np.zeros_like(shared_B)
    # Entry i of the module is made of token i + 1: the last token in common is fed again, for the
    # entry that it makes with the token that follows it now.
    return np.maximum(np.minimum(shared_B - 1, kept.own_length_B), 0).astype(np.int32)


def _roomy(kept: Kept, start_B: np.ndarray, capacity: int, mtp: bool):
    """(cache, own) of `kept` cut to `start_B` tokens, with room for `capacity` at least."""
    cache, own = kept.cache, kept.own
    if cache.capacity < capacity:
        cache = grown(cache, capacity)
        if mtp:
            own = grown(Cache((own,), cache.length_B), capacity).entries[0]
    return cache._replace(length_B=jnp.asarray(start_B)), own if mtp else None


def bucket(n: int) -> int:
    """A capacity for `n` tokens: few different ones, so that few programs are compiled."""
    step = 1 << max(n.bit_length() - 4, 7)
    return 1 << max(n - 1, 127).bit_length() if n <= 512 else -(-n // step) * step


def _for_rows(**how) -> Callable:
    """`jax.jit(fn, **how)` in two ways: the decorated function takes the rows that its products
    have and returns the way for so many.

    XLA:CPU gives products to YNNPACK, with 4,096 rows a fifth slower than Eigen (two cores of an
    EPYC, 576 × 1,536: 100 and 128 GFLOP/s; with 512 equal; experiments/log/006_…). Library fusions
    in XLA_FLAGS stand.
    """

    def decorate(fn):
        many = jax.jit(fn, compiler_options={_YNNPACK: ""}, **how)
        few = jax.jit(fn, **how)

        def chosen(rows: int):
            eigen = jax.default_backend() == "cpu" and rows >= MANY
            return many if eigen and _YNNPACK not in os.environ.get("XLA_FLAGS", "") else few

        return chosen

    return decorate


@_for_rows(static_argnames=("capacity", "mtp"))
def _begin(model, tokens_BT, next_BT, valid_B, *, capacity: int, mtp: bool):
    """(hidden_BD at each row's last token of the chunk, cache, own) of a first chunk."""
    hidden_BTD, cache = begin(model, tokens_BT, valid_B, capacity)
    own = None
    if mtp:
        # The module's block is of the kind of the last stack's.
        blank = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), cache.entries[-1])
        own = extend_mtp(model, hidden_BTD, next_BT, blank, jnp.zeros_like(valid_B))[1]
    return last(hidden_BTD, valid_B), cache, own


@_for_rows(donate_argnames=("cache", "own"))
def _extend(model, part, cache: Cache, own, own_length_B):
    """The same of a further chunk; without an MTP module `own` is None."""
    tokens_BT, next_BT, valid_B = part
    hidden_BTD, cache = extend(model, tokens_BT, cache)
    if own is not None:
        own = extend_mtp(model, hidden_BTD, next_BT, own, own_length_B)[1]
    cache = cache._replace(length_B=cache.length_B + valid_B)
    return last(hidden_BTD, valid_B), cache, own
