# SPDX-License-Identifier: Apache-2.0
"""Tokens to their experts' devices and back: dropless and exact at any load, in bounded memory.

On one device: `ops.experts`. Over a mesh axis of n ranks that hold E / n experts each:

`sparse`: a token travels to the ranks that hold its experts (`exchange`), which send back the sum
    over theirs. The buffers hold `room` times the rows of a balanced load. Should any rank of the
    mesh get more, all take the other way for this layer, and that is counted: no token is dropped.
`gathered`: every rank sees the tokens of all, a few at a time, and the sums over its experts are
    reduce-scattered: right at any load, in n times the traffic at worst. CPUs and GPUs run it.

With DeepSeek-V3's node-limited routing (section 2.1.2) a token goes to at most `topk_group` groups
of experts: `reach` ranks, which bounds the rows that are sent.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.ops.deal import laid_out, slots, summed
from r1jax.ops.experts import choose, experts, fp8_experts
from r1jax.ops.linear import FP8
from r1jax.parallel.exchange import exchange
from r1jax.sharding import carriers, count, index, platform, total

FEW = 256  # rows: a buffer need not be smaller

Weights = tuple[jax.Array, jax.Array, jax.Array]  # w_gate_EDF, w_up_EDF, w_down_EFD


class Room(NamedTuple):
    """What the buffers of the sparse way hold, in rows.

    Attributes:
        sent: S, that a rank may send.
        received: R, that a rank may receive.
        computed: M, (row, expert) pairs that a rank may compute.
    """

    sent: int
    received: int
    computed: int


def reach(n_ranks: int, k: int, n_group: int, topk_group: int) -> int:
    """Ranks that a token may go to, when experts lie on them in order (section 2.1.2)."""
    ranks_of_a_group = -(-n_ranks // n_group)
    whole = n_ranks % n_group == 0 or n_group % n_ranks == 0
    return min(k, n_ranks, topk_group * ranks_of_a_group if whole else n_ranks)


def room(tokens: int, k: int, ranks: int, held: int, *, reach: int, slack: float) -> Room:
    """The buffers of a rank of `ranks` with `held` experts: `slack` times the balanced load."""
    received = min(tokens * ranks, max(int(slack * tokens * reach), FEW))
    computed = min(received * min(k, held), max(int(slack * tokens * k), FEW))
    return Room(tokens * reach, received, computed)


def dispatch(
    x_TD: jax.Array,
    index_TK: jax.Array,
    weight_TK: jax.Array,
    weights: Weights,
    *,
    reach: int,
    slack: float,
    pieces: int = 1,
    sparse: bool | None = None,
    fp8: FP8 | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = Σ_k weight_tk · SwiGLU_{index_tk}(x_t), the experts being spread over the mesh.

    Args:
        x_TD: [T, D] this device's tokens.
        index_TK: [T, K] int32 chosen experts, counted over all devices.
        weight_TK: [T, K] float32 mixing weights.
        weights: of the experts that this device holds.
        reach: ranks that a token may go to at most, see `reach`.
        slack: buffers hold so many times the balanced load.
        pieces: T is gone through in so many, each dispatched by itself: buffers are that smaller.
        sparse: the way; None lets the platform choose.
        fp8: of the experts' products: `fp8_experts`.

    Returns:
        ([T, D] in x's dtype, scalar float32: pieces whose buffers would have overflown).
    """
    how = dict(reach=reach, slack=slack, sparse=sparse, fp8=fp8)
    if pieces == 1 or count("expert") == 1:
        return _once(x_TD, index_TK, weight_TK, weights, **how)
    # What was made of a piece is made again for its gradient, so that one lives at a time. The
    # gradients of the weights are summed up in float32, whatever they are used in.
    dtypes, wide = [w.dtype for w in weights], [w.astype(jnp.float32) for w in weights]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(_, piece):
        narrow = tuple(w.astype(d) for w, d in zip(wide, dtypes, strict=True))
        return None, _once(*piece, narrow, **how)

    nowhere = count("expert") * weights[0].shape[0]
    xs = (_cut(x_TD, pieces), _cut(index_TK, pieces, nowhere), _cut(weight_TK, pieces))
    y, over = jax.lax.scan(one, None, xs)[1]
    return y.reshape(-1, x_TD.shape[1])[: len(x_TD)], over.sum()


def _cut(x: jax.Array, pieces: int, fill: int = 0) -> jax.Array:
    """[T, ...] → [pieces, ⌈T / pieces⌉, ...]."""
    short = ((0, -len(x) % pieces),) + ((0, 0),) * (x.ndim - 1)
    return jnp.pad(x, short, constant_values=fill).reshape(pieces, -1, *x.shape[1:])


def _experts(x_TD, index_TK, weight_TK, weights, *, fp8, implementation, rows=None):
    operands = (x_TD, index_TK, weight_TK, weights)
    if fp8 is None:
        return experts(*operands, implementation=implementation, rows=rows)
    return fp8_experts(*operands, fp8=fp8, rows=rows)


def _once(x_TD, index_TK, weight_TK, weights, *, reach, slack, sparse, fp8):
    ranks, held = count("expert"), weights[0].shape[0]
    none = jnp.float32(0.0)
    if ranks == 1:
        how = choose(*index_TK.shape, held, platform())
        return _experts(x_TD, index_TK, weight_TK, weights, fp8=fp8, implementation=how), none
    size = room(*index_TK.shape, ranks, held, reach=reach, slack=slack)
    operands = (x_TD, index_TK, weight_TK, weights)
    if not (platform() == "tpu" if sparse is None else sparse):
        return _gathered(*operands, size, fp8=fp8), none
    rank_TK = index_TK // held
    where = slots(rank_TK, ranks, size.sent)
    (axis,) = carriers("expert")
    pairs_n = (rank_TK[:, :, None] == jnp.arange(ranks)).sum((0, 1))
    counts_nn, pairs_nn = jax.lax.all_gather((where.count_n, pairs_n), axis)
    over = counts_nn.sum(0).max() > size.received
    over |= pairs_nn.sum(0).max() > size.computed
    over = total(over.astype(jnp.float32), "batch", "length", "heads") > 0  # of the whole mesh
    y_TD = jax.lax.cond(
        over,
        lambda *operands: _gathered(*operands, size, fp8=fp8),
        lambda *operands: _sparse(*operands, size, where=where, counts_nn=counts_nn, fp8=fp8),
        *operands,
    )
    return y_TD, over.astype(jnp.float32)


def _sparse(x_TD, index_TK, weight_TK, weights, size: Room, *, where, counts_nn, fp8):
    (axis,), ragged = carriers("expert"), platform() == "tpu"
    send = lambda x: exchange(laid_out(x, where), counts_nn, size.received, axis, ragged)  # noqa: E731
    with jax.named_scope("dispatch"):
        x_RD, weight_RK = send(x_TD), send(weight_TK)
        index_RK = send(index_TK + 1) - 1  # rows that nobody sends have no expert
    how = "ragged" if ragged else None
    operands = (x_RD, _mine(index_RK, weights), weight_RK, weights)
    y_RD = _experts(*operands, fp8=fp8, implementation=how, rows=size.computed)
    with jax.named_scope("combine"):
        back_SD = exchange(y_RD, counts_nn.T, size.sent, axis, ragged)
        return summed(back_SD, where)


def _gathered(x_TD, index_TK, weight_TK, weights, size: Room, *, fp8):
    axis, ranks, held = carriers("expert"), count("expert"), weights[0].shape[0]
    t, k = index_TK.shape
    most = max(size.computed // (ranks * min(k, held)), 1)  # tokens of a rank at a time
    pieces = -(-t // most)
    how = choose(-(-t // pieces) * ranks, k, held * ranks, platform())

    def one(_, piece):
        x, index_tK, weight_tK = (jax.lax.all_gather(p, axis, tiled=True) for p in piece)
        mine_tK, rows = _mine(index_tK, weights), len(x) * min(k, held)
        operands = (x, mine_tK, weight_tK, weights)
        y = _experts(*operands, fp8=fp8, implementation=how, rows=rows)
        return None, jax.lax.psum_scatter(y, axis, tiled=True)

    xs = (_cut(x_TD, pieces), _cut(index_TK, pieces, ranks * held), _cut(weight_TK, pieces))
    if pieces == 1:
        return one(None, jax.tree.map(lambda x: x[0], xs))[1]
    y = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, xs)[1]
    return y.reshape(-1, x_TD.shape[1])[:t]


def _mine(index_RK: jax.Array, weights: Weights) -> jax.Array:
    """Indices into the experts held here; their number for those held elsewhere."""
    held = weights[0].shape[0]
    local_RK = index_RK - index("expert") * held
    return jnp.where((local_RK >= 0) & (local_RK < held), local_RK, held)
