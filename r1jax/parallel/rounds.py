# SPDX-License-Identifier: Apache-2.0
"""Pieces of tokens to their experts' devices and back, sent while others are computed.

A device's tokens go in P pieces, and a piece in as many rounds as no buffer of any rank overflows
in, a window of its tokens in each. These items follow each other in one loop, whose j-th turn sends
item j + 1, computes item j and brings item j − 1 back. The three do not wait for each other, so a
compiler has the arithmetic of one item to put beside the exchanges of its neighbours: DualPipe's
idea (DeepSeek-V3, section 3.2.1) inside one layer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.scaled import Scaled
from r1jax.ops.blocks import Blocks
from r1jax.ops.deal import Slots, laid_out, slots, summed
from r1jax.ops.experts import experts, fp8_experts
from r1jax.ops.linear import FP8, tiled, untiled
from r1jax.parallel.exchange import exchange
from r1jax.parallel.wire import in_tiles
from r1jax.sharding import carriers, count, index, platform, total

ROUNDS = "dispatch_rounds"  # scope of the loop over items

Weights = tuple[jax.Array | Blocks, ...]  # w_gate_EDF, w_up_EDF, w_down_EFD


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


class Ticket(NamedTuple):
    """Where the tokens of an item lie among the rows that are sent, and what all ranks send.

    Attributes:
        piece: scalar int32, which they are of.
        where: of its tokens.
        counts_nn: [n, n] int32 rows from each rank to each.
    """

    piece: jax.Array
    where: Slots
    counts_nn: jax.Array


class Rows(NamedTuple):
    """Rows that have come to this rank.

    Attributes:
        x_RD: of tokens.
        index_RK: int32 experts among those held here; their number for none.
        weight_RK: float32 mixing weights.
    """

    x_RD: jax.Array
    index_RK: jax.Array
    weight_RK: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_rounds(how: tuple[Room, FP8 | None], rows, weights: Weights):
    """(y [P, T, D], rounds [P]) of P pieces of rows (x, index, weight).

    Its gradient makes each item's products again, so that few items live at a time, and sums up
    what they bring the weights in float32, whatever they are used in.
    """
    size, fp8 = how
    rounds_P, weights = _all_rounds(rows[1], weights, size), _read(weights)

    def bring(y_PTD, done):
        with jax.named_scope("combine"):
            return _added(y_PTD, done[0], _back(*done, size))

    def turn(j, carry):
        (ticket, here), done, y_PTD = carry
        coming = _send(rows, j + 1, rounds_P, weights, how)
        y_RD = computed(*here, weights, fp8=fp8, rows=size.computed)
        return coming, (ticket, y_RD), bring(y_PTD, done)

    with jax.named_scope(ROUNDS):
        first = _send(rows, 0, rounds_P, weights, how)
        none = _nobody(first[0]), jnp.zeros_like(first[1].x_RD)
        start = first, none, jnp.zeros_like(rows[0])
        _, done, y_PTD = jax.lax.fori_loop(0, rounds_P.sum(), turn, start)
        return bring(y_PTD, done), rounds_P


def _forward(how, rows, weights):
    y_PTD, rounds_P = in_rounds(how, rows, weights)
    return (y_PTD, rounds_P), (rows, rounds_P, _read(weights))


def _backward(how, kept, given):
    (size, fp8), (rows, rounds_P, weights), given_PTD = how, kept, given[0]

    def send(j):
        ticket, here = _send(rows, j, rounds_P, weights, how)
        there = lambda given: _there(given, ticket, size)  # noqa: E731
        return ticket, here, in_tiles(there, given_PTD[ticket.piece], fp8)

    def bring(sums, done):
        ticket, *brought = done
        with jax.named_scope("combine"):
            return tuple(
                _added(s, ticket, _back(ticket, b, size))
                for s, b in zip(sums, brought, strict=True)
            )

    def turn(j, carry):
        (ticket, here, given_RD), done, sums, total_held = carry
        coming = send(j + 1)

        def run(x_RD, weight_RK, masters):
            moved = here._replace(x_RD=x_RD, weight_RK=weight_RK)
            return computed(*moved, _passed(weights, masters), fp8=fp8, rows=size.computed)

        masters = _masters(weights)
        *brought, held = jax.vjp(run, here.x_RD, here.weight_RK, masters)[1](given_RD)
        total_held = tuple(t + h.astype(t.dtype) for t, h in zip(total_held, held, strict=True))
        return coming, (ticket, *brought), bring(sums, done), total_held

    with jax.named_scope(ROUNDS):
        first = send(0)
        none = _nobody(first[0]), jnp.zeros_like(first[1].x_RD), jnp.zeros_like(first[1].weight_RK)
        start = jnp.zeros_like(rows[0]), jnp.zeros_like(rows[2])
        zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
        start = first, none, start, zeros
        _, done, sums, held = jax.lax.fori_loop(0, rounds_P.sum(), turn, start)
        d_x, d_weight = bring(sums, done)
    held = tuple(h.astype(m.dtype) for h, m in zip(held, _masters(weights), strict=True))
    none = tuple(w.cotangent() if isinstance(w, Blocks) else w for w in weights)
    return (d_x, None, d_weight), _passed(none, held)


in_rounds.defvjp(_forward, _backward)


def _read(weights: Weights) -> Weights:
    """Without master weights, which no product reads: loops need not carry them."""
    return tuple(w.trained(None) if isinstance(w, Blocks) else w for w in weights)


def _masters(weights: Weights) -> tuple[jax.Array, ...]:
    """What gradients are passed to: the weights, or zeros that stand for them."""
    zeros = lambda w: jnp.zeros(w.shape, jnp.float32)  # noqa: E731
    return tuple(zeros(w) if isinstance(w, Blocks) else w for w in weights)


def _passed(weights: Weights, masters: tuple[jax.Array, ...]) -> Weights:
    """The weights with these masters."""
    pairs = zip(weights, masters, strict=True)
    return tuple(w.trained(m) if isinstance(w, Blocks) else m for w, m in pairs)


def computed(x_TD, index_TK, weight_TK, weights: Weights, *, fp8: FP8 | None, rows=None, how=None):
    """`ops.experts`, by default by the implementation for rows that have been sent."""
    how = how or ("ragged" if platform() == "tpu" else None)
    operands = (x_TD, index_TK, weight_TK, weights)
    if fp8 is None:
        return experts(*operands, implementation=how, rows=rows)
    return fp8_experts(*operands, fp8=fp8, rows=rows)


def _send(rows, j, rounds_P, weights: Weights, how: tuple[Room, FP8 | None]):
    """(ticket, rows) of item j, sent to its experts' ranks; behind the last item are empty ones."""
    size, fp8 = how
    ranks, held = count("expert"), weights[0].shape[0]
    x_PTD, index_PTK, weight_PTK = rows
    k = index_PTK.shape[2]
    piece, mine_T = _item(j, rounds_P, index_PTK.shape[1:], weights, size)
    index_TK = jnp.where(mine_T[:, None], index_PTK[piece], ranks * held)
    where = slots(index_TK // held, ranks, size.sent)
    (axis,) = carriers("expert")
    ticket = Ticket(piece, where, jax.lax.all_gather(where.count_n, axis))
    with jax.named_scope("dispatch"):
        x_TD, numbers = x_PTD[piece], [index_TK + 1, _bits(weight_PTK[piece])]
        if fp8 is not None:  # scales travel with the other numbers: TPUs send 128 in any case
            x_TD, scale = tiled(x_TD, fp8)
            numbers.append(_bits(scale))
        x_RD = _there(x_TD, ticket, size)
        # Rows that nobody sends are 0: they have no expert.
        got_R = _there(jnp.concatenate(numbers, 1), ticket, size)
        index_RK, bits_RK, scale_R = jnp.split(got_R, (k, 2 * k), axis=1)
        if fp8 is not None:
            x_RD = untiled(Scaled(x_RD, _floats(scale_R)), fp8, x_PTD.dtype)
    return ticket, Rows(x_RD, mine(index_RK - 1, weights), _floats(bits_RK))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _floats(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def _there(x_TD: jax.Array, ticket: Ticket, size: Room) -> jax.Array:
    (axis,), ragged = carriers("expert"), platform() == "tpu"
    laid = laid_out(x_TD, ticket.where)
    return exchange(laid, ticket.counts_nn, size.received, axis, ragged)


def _back(ticket: Ticket, y_RD: jax.Array, size: Room) -> jax.Array:
    (axis,), ragged = carriers("expert"), platform() == "tpu"
    back_SD = exchange(y_RD, ticket.counts_nn.T, size.sent, axis, ragged)
    return summed(back_SD, ticket.where)


def _added(sum_PTD: jax.Array, ticket: Ticket, y_TD: jax.Array) -> jax.Array:
    return sum_PTD.at[ticket.piece].add(y_TD)


def _nobody(ticket: Ticket) -> Ticket:
    """That of an item without tokens."""
    where, size = ticket.where, len(ticket.where.token_S)
    t = len(where.slot_TK)
    where = Slots(
        jnp.full_like(where.slot_TK, size),
        jnp.full_like(where.token_S, t),
        jnp.zeros_like(where.count_n),
    )
    return Ticket(jnp.zeros_like(ticket.piece), where, jnp.zeros_like(ticket.counts_nn))


def _finest(t: int, k: int, size: Room, weights: Weights) -> int:
    """Windows of t tokens, a power of two, of which each fits into the buffers at any load."""
    ranks, held = count("expert"), weights[0].shape[0]
    most = min(size.received // ranks, size.computed // (ranks * min(k, held)))
    return 1 << (-(-t // max(most, 1)) - 1).bit_length()


def _all_rounds(index_PTK: jax.Array, weights: Weights, size: Room) -> jax.Array:
    return jax.vmap(lambda index_TK: _rounds(index_TK, weights, size))(index_PTK)


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


def _item(j, rounds_P: jax.Array, shape: tuple[int, int], weights: Weights, size: Room):
    """(piece of item j, [T] bool: which of its tokens are in its window)."""
    (t, k), end_P = shape, jnp.cumsum(rounds_P)
    piece = jnp.minimum((end_P <= j).sum(dtype=jnp.int32), len(rounds_P) - 1)
    rounds, before = rounds_P[piece], (end_P - rounds_P)[piece]
    length = -(-t // (finest := _finest(t, k, size, weights))) * (finest // rounds)
    return piece, jnp.arange(t) // length == j - before


def mine(index_RK: jax.Array, weights: Weights) -> jax.Array:
    """Indices into the experts held here; their number for those held elsewhere."""
    held = weights[0].shape[0]
    local_RK = index_RK - index("expert") * held
    return jnp.where((local_RK >= 0) & (local_RK < held), local_RK, held)
