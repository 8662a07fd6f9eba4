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

import jax
import jax.numpy as jnp

from r1jax.ops.experts import choose
from r1jax.ops.linear import FP8, gradient_rounded, rounded
from r1jax.parallel.rounds import Room, Weights, computed, in_rounds, mine
from r1jax.parallel.wire import from_all, to_all
from r1jax.sharding import carriers, count, platform

FEW = 256  # rows: a buffer need not be smaller


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
        fp8: the recipe, for the experts' products (`fp8_experts`) and for what is sent (`wire`).
            On one device tokens and gradients are rounded as if they were sent: no mesh changes
            what is computed.

    Returns:
        ([T, D] in x's dtype, scalar float32: pieces whose buffers would have overflown).
    """
    ranks, held = count("expert"), weights[0].shape[0]
    if ranks == 1:
        values = weights[0].shape[1] * weights[0].shape[2]
        how = choose(*index_TK.shape, held, platform(), values=values)
        x_TD = x_TD if fp8 is None else rounded(x_TD, fp8)
        y_TD = computed(x_TD, index_TK, weight_TK, weights, fp8=fp8, how=how)
        return y_TD if fp8 is None else gradient_rounded(y_TD, fp8), jnp.float32(0.0)
    k = index_TK.shape[1]
    pieces = no_smaller(pieces, len(x_TD) * k)
    size = room(-(-len(x_TD) // pieces), k, ranks, held, reach=reach, slack=slack)
    if not (platform() == "tpu" if sparse is None else sparse):
        return _gathered(x_TD, index_TK, weight_TK, weights, size, fp8=fp8), jnp.float32(0.0)
    rows = (_cut(x_TD, pieces), _cut(index_TK, pieces, ranks * held), _cut(weight_TK, pieces))
    y, rounds_P = in_rounds((size, fp8), rows, weights)
    over = (rounds_P > 1).sum(dtype=jnp.float32)
    return y.reshape(-1, x_TD.shape[1])[: len(x_TD)], over


def _cut(x: jax.Array, pieces: int, fill: int = 0) -> jax.Array:
    """[T, ...] → [pieces, ⌈T / pieces⌉, ...]."""
    short = ((0, -len(x) % pieces),) + ((0, 0),) * (x.ndim - 1)
    return jnp.pad(x, short, constant_values=fill).reshape(pieces, -1, *x.shape[1:])


def _gathered(x_TD, index_TK, weight_TK, weights, size: Room, *, fp8):
    axis, ranks, held = carriers("expert"), count("expert"), weights[0].shape[0]
    t, k = index_TK.shape
    most = max(size.computed // (ranks * min(k, held)), 1)  # tokens of a rank at a time
    pieces = -(-t // most)
    how = choose(-(-t // pieces) * ranks, k, held * ranks, platform())

    # The gradients of the weights are summed up in float32, whatever they are used in.
    wide = weights if fp8 else [w.astype(jnp.float32) for w in weights]

    def one(_, piece):
        x = to_all(piece[0], axis, fp8)
        index_tK, weight_tK = (jax.lax.all_gather(p, axis, tiled=True) for p in piece[1:])
        here_tK, rows = mine(index_tK, weights), len(x) * min(k, held)
        narrow = wide if fp8 else [w.astype(n.dtype) for w, n in zip(wide, weights, strict=True)]
        y = computed(x, here_tK, weight_tK, narrow, fp8=fp8, how=how, rows=rows)
        return None, from_all(y, axis, fp8)

    xs = (_cut(x_TD, pieces), _cut(index_TK, pieces, ranks * held), _cut(weight_TK, pieces))
    if pieces == 1:
        return one(None, jax.tree.map(lambda x: x[0], xs))[1]
    y = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, xs)[1]
    return y.reshape(-1, x_TD.shape[1])[:t]
