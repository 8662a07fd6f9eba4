# SPDX-License-Identifier: Apache-2.0
"""The loss head in plain jnp, tile by tile over tokens and vocabulary: for CPU and for XLA.

The pieces that need no loop (`start`, `absorb`, `finish`, `slope`) act on one tile of logits with
the tokens down the rows; the kernels call the same ones on tiles in their memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.dispatch import Backend

TILE = (1024, 8192)  # 32 MB of logits
LOWEST = float(jnp.finfo(jnp.float32).min)  # finite: the difference of two such is not NaN


class Running(NamedTuple):
    """What a pass over the vocabulary carries of each token, [T, 1] float32.

    Attributes:
        peak: m, the largest logit so far.
        total: Σ exp(s − m).
        spread: Σ exp(s − m) (s − m).
        target: the target's logit, 0 until its tile has come.
    """

    peak: jax.Array
    total: jax.Array
    spread: jax.Array
    target: jax.Array


class Sums(NamedTuple):
    """Results of each token: log P(target), entropy and log Σ exp(s), float32."""

    logp: jax.Array
    entropy: jax.Array
    norm: jax.Array


class Given(NamedTuple):
    """What the gradient of a tile needs of each token, [T, 1] float32.

    Attributes:
        norm: log Σ exp(s).
        entropy: H.
        logp: the gradient that came for log P(target).
        of_entropy: the gradient that came for H.
    """

    norm: jax.Array
    entropy: jax.Array
    logp: jax.Array
    of_entropy: jax.Array


def tile_sizes(backend: Backend, hidden_TD, head_DN, tile: tuple[int, int] | None):
    """(tokens, columns): asked for, tuned, or TILE."""
    dims = {"m": len(hidden_TD), "k": len(head_DN), "vocabulary": head_DN.shape[1]}
    return tuning.choose(
        "softmax_xent_xla", dims, chip=backend.chip, explicit=tile, heuristic=lambda: TILE
    )


def start(shape: tuple[int, ...]) -> Running:
    """Nothing seen yet."""
    zero = jnp.zeros(shape, jnp.float32)
    return Running(zero + LOWEST, zero, zero, zero)


def absorb(running: Running, logits_TN: jax.Array, hit_TN: jax.Array) -> Running:
    """One more tile of logits; `hit_TN` is True at the target. −inf is probability zero.

    With m' = max(m, max s): total' = e^{m−m'} total + Σ e^{s−m'}, and the spread alike, moved by
    (m − m') total (Milakov and Gimelshein 2018, arXiv 1805.02867, with the entropy's sum beside).
    """
    peak = jnp.maximum(running.peak, logits_TN.max(-1, keepdims=True))
    away = logits_TN - peak
    e = jnp.exp(away)
    shrink = jnp.exp(running.peak - peak)
    moved = jnp.where(running.total > 0, (running.peak - peak) * running.total, 0.0)
    return Running(
        peak,
        running.total * shrink + e.sum(-1, keepdims=True),
        (running.spread + moved) * shrink
        + jnp.where(e > 0, e * away, 0.0).sum(-1, keepdims=True),
        running.target + jnp.where(hit_TN, logits_TN, 0.0).sum(-1, keepdims=True),
    )


def finish(running: Running) -> Sums:
    """log P = s_target − m − log total; H = log total − spread / total."""
    log_total = jnp.log(running.total)
    return Sums(
        (running.target - running.peak) - log_total,
        log_total - running.spread / running.total,
        running.peak + log_total,
    )


def slope(logits_TN: jax.Array, hit_TN: jax.Array, given: Given) -> jax.Array:
    """The gradient of a tile's logits, p = exp(s − norm): g (δ − p) − h p (log p + H)."""
    logp_TN = logits_TN - given.norm
    p = jnp.exp(logp_TN)
    bent = jnp.where(p > 0, given.of_entropy * (logp_TN + given.entropy), 0.0)
    return jnp.where(hit_TN, given.logp, 0.0) - p * (given.logp + bent)


def tile_of(n: int, most: int) -> tuple[int, int]:
    """(tiles, size): as few tiles of at most `most` as cover n, evenly, in multiples of 128."""
    count = -(-n // most)
    size = -(-n // count)
    return count, size if count == 1 else min(most, size + -size % 128)


def columns(i, n: int, size: int) -> tuple[jax.Array, jax.Array]:
    """(first column, columns of it that an earlier tile has had) of tile i; the last one overlaps.

    So every tile is whole and no copy of the head is padded.
    """
    begin = jnp.minimum(i * size, n - size)
    return begin, i * size - begin


def logits_of(hidden_TD: jax.Array, head_DN: jax.Array, temperature: jax.Array) -> jax.Array:
    """[T, N] float32; the head is read in the hidden states' dtype."""
    product = jnp.einsum(
        "td,dn->tn",
        hidden_TD,
        head_DN.astype(hidden_TD.dtype),
        preferred_element_type=jnp.float32,
    )
    return product / temperature


def forward(
    hidden_TD: jax.Array,
    head_DN: jax.Array,
    targets_T: jax.Array,
    temperature: jax.Array,
    *,
    backend: Backend,
    tile: tuple[int, int] | None = None,
) -> Sums:
    """log P(target), entropy and log-sum-exp, [T] float32, with one [tile] of logits at a time."""
    tile = tile_sizes(backend, hidden_TD, head_DN, tile)
    (t, _), n = hidden_TD.shape, head_DN.shape[1]
    hidden_ktD, targets_kt1 = _chunks(hidden_TD, tile[0]), _chunks(targets_T[:, None], tile[0])
    count, size = tile_of(n, tile[1])

    def one_tile(running, i):
        begin, stale = columns(i, n, size)
        w_Dn = jax.lax.dynamic_slice_in_dim(head_DN, begin, size, 1)

        def one_chunk(xs):
            hidden_tD, targets_t1, running = xs
            logits = logits_of(hidden_tD, w_Dn, temperature)
            return absorb(running, *_fresh(logits, begin, stale, targets_t1))

        return jax.lax.map(one_chunk, (hidden_ktD, targets_kt1, running)), None

    running, _ = jax.lax.scan(one_tile, start(targets_kt1.shape), jnp.arange(count))
    return Sums(*(x.reshape(-1)[:t] for x in finish(running)))


def backward(
    hidden_TD: jax.Array,
    head_DN: jax.Array,
    targets_T: jax.Array,
    temperature: jax.Array,
    given: Given,
    *,
    backend: Backend,
    tile: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of hidden (float32) and head (its dtype), every tile of logits made once again."""
    tile = tile_sizes(backend, hidden_TD, head_DN, tile)
    (t, d), n = hidden_TD.shape, head_DN.shape[1]
    xs = jax.tree.map(
        lambda x: _chunks(x, tile[0]), (hidden_TD, targets_T[:, None], given)
    )  # padded rows come with gradients of zero
    count, size = tile_of(n, tile[1])

    def one_tile(carry, i):
        d_hidden, d_head = carry
        begin, stale = columns(i, n, size)
        w_Dn = jax.lax.dynamic_slice_in_dim(head_DN, begin, size, 1)

        def one_chunk(d_w, xs):
            (hidden_tD, targets_t1, given), d_hidden_tD = xs
            logits = logits_of(hidden_tD, w_Dn, temperature)
            d_logits = slope(*_fresh(logits, begin, stale, targets_t1), given) / temperature
            d_logits = d_logits.astype(hidden_tD.dtype)
            more, d_w_more = products(d_logits, hidden_tD, w_Dn)
            return d_w + d_w_more, d_hidden_tD + more

        zero = jnp.zeros(w_Dn.shape, jnp.float32)
        d_w, d_hidden = jax.lax.scan(one_chunk, zero, (xs, d_hidden))
        return (d_hidden, added(d_head, d_w, begin)), None

    zeros = jnp.zeros(xs[0].shape, jnp.float32), jnp.zeros_like(head_DN)
    (d_hidden, d_head), _ = jax.lax.scan(one_tile, zeros, jnp.arange(count))
    return d_hidden.reshape(-1, d)[:t], d_head


def products(d_logits_TN, hidden_TD, head_DN) -> tuple[jax.Array, jax.Array]:
    """What a tile's slope adds to the gradients of hidden [T, D] and head [D, N], float32."""
    w = head_DN.astype(hidden_TD.dtype)
    d_hidden = jnp.einsum("tn,dn->td", d_logits_TN, w, preferred_element_type=jnp.float32)
    d_head = jnp.einsum("td,tn->dn", hidden_TD, d_logits_TN, preferred_element_type=jnp.float32)
    return d_hidden, d_head


def added(head_DN: jax.Array, more_Dn: jax.Array, begin) -> jax.Array:
    """`head_DN` with a tile's gradient; columns of an earlier tile get zeros."""
    old = jax.lax.dynamic_slice_in_dim(head_DN, begin, more_Dn.shape[1], 1)
    new = old + more_Dn.astype(head_DN.dtype)
    return jax.lax.dynamic_update_slice_in_dim(head_DN, new, begin, 1)


def _fresh(logits_tn, begin, stale, targets_t1) -> tuple[jax.Array, jax.Array]:
    """(logits, −inf where an earlier tile has had the column; whether it is the target's)."""
    at = jax.lax.broadcasted_iota(jnp.int32, logits_tn.shape, 1)
    fresh = at >= stale
    hit = fresh & (at + begin == targets_t1)
    return jnp.where(fresh, logits_tn, -jnp.inf), hit


def _chunks(x_TD: jax.Array, most: int) -> jax.Array:
    """[T, ...] → [k, t, ...] with zeros behind, in as few chunks of at most `most` as it takes."""
    n = x_TD.shape[0]
    count = -(-n // most)
    pad = -n % count
    x = jnp.pad(x_TD, ((0, pad), *((0, 0),) * (x_TD.ndim - 1))) if pad else x_TD
    return x.reshape(count, -1, *x_TD.shape[1:])
