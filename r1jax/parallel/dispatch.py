# SPDX-License-Identifier: Apache-2.0
"""Tokens to their experts' devices and back: dropless and exact at any load, in bounded memory.

On one device: `ops.experts`. Over a mesh axis of n ranks that hold E / n experts each:

`sparse`: a token travels to the ranks that hold its experts (`exchange`), which send back the sum
    over theirs. The buffers hold `room` times the rows of a balanced load. Should any rank of the
    mesh get more, all send in as many rounds as it takes, a window of their tokens in each, and
    that is counted: no token is dropped, and it is the same program.
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
ROUNDS = "dispatch_rounds"  # scope of the loop over them

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


def no_smaller(pieces: int, pairs: int) -> int:
    """Pieces that (token, expert) pairs are worth: one that does not fill the smallest buffers
    would cost as much as one that does, as a step of decoding with a token or two."""
    return max(min(pieces, pairs // FEW), 1)


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
            Fewer where T is small, see `no_smaller`.
        sparse: the way; None lets the platform choose.
        fp8: of the experts' products: `fp8_experts`.

    Returns:
        ([T, D] in x's dtype, scalar float32: pieces whose buffers would have overflown).
    """
    ranks, held = count("expert"), weights[0].shape[0]
    if ranks == 1:
        values = weights[0].shape[1] * weights[0].shape[2]
        how = choose(*index_TK.shape, held, platform(), values=values)
        y_TD = _experts(x_TD, index_TK, weight_TK, weights, fp8=fp8, implementation=how)
        return y_TD, jnp.float32(0.0)
    k = index_TK.shape[1]
    pieces = no_smaller(pieces, len(x_TD) * k)
    size = room(-(-len(x_TD) // pieces), k, ranks, held, reach=reach, slack=slack)
    if not (platform() == "tpu" if sparse is None else sparse):
        return _gathered(x_TD, index_TK, weight_TK, weights, size, fp8=fp8), jnp.float32(0.0)
    rows = (_cut(x_TD, pieces), _cut(index_TK, pieces, ranks * held), _cut(weight_TK, pieces))
    y, rounds_P = _in_rounds((size, fp8), rows, weights)
    over = (rounds_P > 1).sum(dtype=jnp.float32)
    return y.reshape(-1, x_TD.shape[1])[: len(x_TD)], over


def _cut(x: jax.Array, pieces: int, fill: int = 0) -> jax.Array:
    """[T, ...] → [pieces, ⌈T / pieces⌉, ...]."""
    short = ((0, -len(x) % pieces),) + ((0, 0),) * (x.ndim - 1)
    return jnp.pad(x, short, constant_values=fill).reshape(pieces, -1, *x.shape[1:])


def _experts(x_TD, index_TK, weight_TK, weights, *, fp8, implementation, rows=None):
    operands = (x_TD, index_TK, weight_TK, weights)
    if fp8 is None:
        return experts(*operands, implementation=implementation, rows=rows)
    return fp8_experts(*operands, fp8=fp8, rows=rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(how: tuple[Room, FP8 | None], rows, weights: Weights):
    """(y [P, T, D], rounds [P]) of P pieces of rows (x, index, weight), one after the other.

    Its gradient makes each round's products again, so that one round lives at a time, and sums up
    what the rounds bring the weights in float32, whatever they are used in.
    """

    def piece(_, rows):
        rounds = _rounds(rows[1], weights, how[0])

        def one(j, y_TD):
            return y_TD + _sparse(how, *_window(rows, j, rounds, weights, how[0]), weights)

        with jax.named_scope(ROUNDS):
            y_TD = jax.lax.fori_loop(0, rounds, one, jnp.zeros_like(rows[0]))
        return None, (y_TD, rounds)

    return jax.lax.scan(piece, None, rows)[1]


def _in_rounds_forward(how, rows, weights):
    y, rounds_P = _in_rounds(how, rows, weights)
    return (y, rounds_P), (rows, rounds_P, weights)


def _in_rounds_backward(how, kept, given):
    (x, index, weight), rounds_P, weights = kept

    def piece(total, one):
        *rows, rounds, given_TD = one

        def add(j, sums):
            x_TD, index_TK, weight_TK = _window(rows, j, rounds, weights, how[0])
            run = lambda x, w, held: _sparse(how, x, index_TK, w, held)  # noqa: E731
            brought = jax.vjp(run, x_TD, weight_TK, weights)[1](given_TD)
            return jax.tree.map(lambda s, b: s + b.astype(s.dtype), sums, brought)

        start = (jnp.zeros_like(rows[0]), jnp.zeros_like(rows[2]), total)
        with jax.named_scope(ROUNDS):
            d_x, d_weight, total = jax.lax.fori_loop(0, rounds, add, start)
        return total, (d_x, d_weight)

    zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
    total, (d_x, d_weight) = jax.lax.scan(piece, zeros, (x, index, weight, rounds_P, given[0]))
    total = tuple(t.astype(w.dtype) for t, w in zip(total, weights, strict=True))
    return (d_x, None, d_weight), total


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _finest(t: int, k: int, size: Room, weights: Weights) -> int:
    """Windows of t tokens, a power of two, of which each fits into the buffers at any load."""
    ranks, held = count("expert"), weights[0].shape[0]
    most = min(size.received // ranks, size.computed // (ranks * min(k, held)))
    return 1 << (-(-t // max(most, 1)) - 1).bit_length()


def _rounds(index_TK: jax.Array, weights: Weights, size: Room) -> jax.Array:
    """Rounds of the whole mesh, a power of two: as few as no buffer of any rank overflows in."""
    (t, k), ranks, held = index_TK.shape, count("expert"), weights[0].shape[0]
    finest = _finest(t, k, size, weights)
    goes_TKn = (index_TK // held)[:, :, None] == jnp.arange(ranks)
    loads_2Tn = jnp.stack([goes_TKn.any(1).astype(jnp.int32), goes_TKn.sum(1, dtype=jnp.int32)])
    loads_2Tn = jnp.pad(loads_2Tn, ((0, 0), (0, -t % finest), (0, 0)))
    loads_2wn = loads_2Tn.reshape(2, finest, -1, ranks).sum(2)
    loads_2wn = jax.lax.psum(loads_2wn, carriers("expert"))
    limit_2 = jnp.array([size.received, size.computed])
    over = [
        (loads_2wn.reshape(2, 1 << n, -1, ranks).sum(2).max((1, 2)) > limit_2).any()
        for n in range(finest.bit_length() - 1)
    ]
    # The finest windows fit whatever the load.
    over = total(jnp.array([*over, False], jnp.float32), "batch", "length", "heads") > 0
    return 1 << jnp.argmin(over).astype(jnp.int32)


def _window(rows, j: jax.Array, rounds: jax.Array, weights: Weights, size: Room):
    """The rows (x, index, weight) with no experts for tokens outside the j-th of the windows."""
    x_TD, index_TK, weight_TK = rows
    t, k = index_TK.shape
    finest = _finest(t, k, size, weights)
    length = -(-t // finest) * (finest // rounds)
    mine_T1 = (jnp.arange(t) // length == j)[:, None]
    nowhere = count("expert") * weights[0].shape[0]
    return x_TD, jnp.where(mine_T1, index_TK, nowhere), weight_TK


def _sparse(how, x_TD, index_TK, weight_TK, weights):
    size, fp8 = how
    (axis,), ragged = carriers("expert"), platform() == "tpu"
    where = slots(index_TK // weights[0].shape[0], count("expert"), size.sent)
    counts_nn = jax.lax.all_gather(where.count_n, axis)
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

    # The gradients of the weights are summed up in float32, whatever they are used in.
    dtypes, wide = [w.dtype for w in weights], [w.astype(jnp.float32) for w in weights]

    def one(_, piece):
        x, index_tK, weight_tK = (jax.lax.all_gather(p, axis, tiled=True) for p in piece)
        mine_tK, rows = _mine(index_tK, weights), len(x) * min(k, held)
        narrow = tuple(w.astype(d) for w, d in zip(wide, dtypes, strict=True))
        operands = (x, mine_tK, weight_tK, narrow)
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
