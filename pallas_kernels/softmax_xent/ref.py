# SPDX-License-Identifier: Apache-2.0
"""The loss head in plain jnp, tile by tile over tokens and vocabulary: for CPU and for XLA.

The pieces that need no loop (`start`, `absorb`, `finish`, `slope`) act on one tile of logits with
the tokens down the rows; the kernels call the same ones on tiles in their memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from pallas_kernels import tuning
from pallas_kernels.dispatch import Backend

LOGITS = 2**22  # of a tile: 16 MB
SHARED_LOGITS = 2**24  # of a tile on each device of a mesh: every tile costs a sum across them
COLUMNS = 1024  # of a tile, at least
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


def tile_sizes(backend: Backend, hidden_BTD, head_DN, tile: tuple[int, int] | None):
    """(tokens of each row of the leading axes, columns): asked for, tuned, or LOGITS of them.

    Few columns of many tokens rather than the reverse: the head's gradient is then summed in one
    product. Under a mesh a tile is shared out among its devices.
    """
    *batch, length, depth = hidden_BTD.shape
    rows, n = math.prod(batch), head_DN.shape[1]
    devices = _devices()
    logits = LOGITS if devices == 1 else devices * SHARED_LOGITS

    def heuristic():
        tokens = min(rows * length, logits // COLUMNS)
        return tokens, max(COLUMNS, logits // tokens)

    dims = {"m": rows * length, "k": depth, "vocabulary": n}
    tokens, width = tile or tuning.choose("softmax_xent_xla", dims, backend, heuristic)
    return max(tokens // rows, 1), width


def _devices() -> int:
    """Devices among which the compiler may share an array out."""
    mesh = jax.sharding.get_abstract_mesh()
    free = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in free if kind != AxisType.Manual)


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
        (running.spread + moved) * shrink + jnp.where(e > 0, e * away, 0.0).sum(-1, keepdims=True),
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
        "...td,dn->...tn",
        hidden_TD,
        head_DN.astype(hidden_TD.dtype),
        preferred_element_type=jnp.float32,
    )
    return product / temperature


def forward(
    hidden_BTD: jax.Array,
    head_DN: jax.Array,
    targets_BT: jax.Array,
    temperature: jax.Array,
    *,
    backend: Backend,
    tile: tuple[int, int] | None = None,
) -> Sums:
    """log P(target), entropy and log-sum-exp, [..., T], with one [tile] of logits at a time."""
    n = head_DN.shape[1]
    t, columns_most = tile_sizes(backend, hidden_BTD, head_DN, tile)
    hidden_kBtD, targets_kBt1 = _chunks(hidden_BTD, t), _chunks(targets_BT[..., None], t)
    count, size = tile_of(n, columns_most)

    def one_tile(running, i):
        begin, stale = columns(i, n, size)
        w_Dn = jax.lax.dynamic_slice_in_dim(head_DN, begin, size, 1)

        def one_chunk(xs):
            hidden_BtD, targets_Bt1, running = xs
            logits = logits_of(hidden_BtD, w_Dn, temperature)
            return absorb(running, *_fresh(logits, begin, stale, targets_Bt1))

        return jax.lax.map(one_chunk, (hidden_kBtD, targets_kBt1, running)), None

    running, _ = jax.lax.scan(one_tile, start(targets_kBt1.shape), jnp.arange(count))
    return Sums(*(_joined(x, targets_BT.shape[-1])[..., 0] for x in finish(running)))


def backward(
    hidden_BTD: jax.Array,
    head_DN: jax.Array,
    targets_BT: jax.Array,
    temperature: jax.Array,
    given: Given,
    *,
    backend: Backend,
    tile: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of hidden (float32) and head (its dtype), every tile of logits made once again."""
    n = head_DN.shape[1]
    t, columns_most = tile_sizes(backend, hidden_BTD, head_DN, tile)
    xs = jax.tree.map(
        lambda x: _chunks(x, t), (hidden_BTD, targets_BT[..., None], given)
    )  # padded rows come with gradients of zero
    count, size = tile_of(n, columns_most)

    def one_tile(carry, i):
        d_hidden, d_head = carry
        begin, stale = columns(i, n, size)
        w_Dn = jax.lax.dynamic_slice_in_dim(head_DN, begin, size, 1)

        def one_chunk(d_w, xs):
            (hidden_BtD, targets_Bt1, given), d_hidden_BtD = xs
            logits = logits_of(hidden_BtD, w_Dn, temperature)
            d_logits = slope(*_fresh(logits, begin, stale, targets_Bt1), given) / temperature
            more, d_w_more = products(d_logits.astype(hidden_BtD.dtype), hidden_BtD, w_Dn)
            return d_w + d_w_more, d_hidden_BtD + more

        zero = jnp.zeros(w_Dn.shape, jnp.float32)
        d_w, d_hidden = jax.lax.scan(one_chunk, zero, (xs, d_hidden))
        return (d_hidden, added(d_head, d_w, begin)), None

    zeros = jnp.zeros(xs[0].shape, jnp.float32), jnp.zeros_like(head_DN)
    (d_hidden, d_head), _ = jax.lax.scan(one_tile, zeros, jnp.arange(count))
    return _joined(d_hidden, targets_BT.shape[-1]), d_head


def products(d_logits_TN, hidden_TD, head_DN) -> tuple[jax.Array, jax.Array]:
    """What a tile's slope adds to the gradients of hidden and head [D, N], float32."""
    w = head_DN.astype(hidden_TD.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    d_hidden = dot("...tn,dn->...td", d_logits_TN, w)
    d_head = dot("...td,...tn->dn", hidden_TD, d_logits_TN)
    return d_hidden, d_head


def added(head_DN: jax.Array, more_Dn: jax.Array, begin) -> jax.Array:
    """`head_DN` with a tile's gradient; columns of an earlier tile get zeros."""
    old = jax.lax.dynamic_slice_in_dim(head_DN, begin, more_Dn.shape[1], 1)
    new = old + more_Dn.astype(head_DN.dtype)
    return jax.lax.dynamic_update_slice_in_dim(head_DN, new, begin, 1)


def _fresh(logits_tn, begin, stale, targets_t1) -> tuple[jax.Array, jax.Array]:
    """(logits, −inf where an earlier tile has had the column; whether it is the target's)."""
    at = jax.lax.broadcasted_iota(jnp.int32, logits_tn.shape, logits_tn.ndim - 1)
    fresh = at >= stale
    hit = fresh & (at + begin == targets_t1)
    return jnp.where(fresh, logits_tn, -jnp.inf), hit


def _chunks(x_BTD: jax.Array, most: int) -> jax.Array:
    """[..., T, D] → [k, ..., t, D], zeros behind, in as few chunks of at most `most` as it takes.

    Only the last axis of tokens is cut: those before it may be sharded.
    """
    *batch, length, width = x_BTD.shape
    count = -(-length // most)
    pad = -length % count
    x = jnp.pad(x_BTD, (*((0, 0),) * len(batch), (0, pad), (0, 0))) if pad else x_BTD
    return jnp.moveaxis(x.reshape(*batch, count, -1, width), -3, 0)


def _joined(x_kBtD: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunks`."""
    count, *batch, t, width = x_kBtD.shape
    return jnp.moveaxis(x_kBtD, 0, -3).reshape(*batch, count * t, width)[..., :length, :]
