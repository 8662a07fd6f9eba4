# SPDX-License-Identifier: Apache-2.0
"""Rows of positions folded over devices, so that causal attention is as much work for each.

Of a row that n devices share, the last piece attends to all of it and the first to itself alone.
Cut into 2n stretches, of which device i has the i-th from the front and the i-th from the back,
every device has the same number of keys to look at. All else goes position by position, and does
not mind.

    straight   0 1 | 2 3 | 4 5        folded   0 5 | 1 4 | 2 3
"""

import jax
import jax.numpy as jnp

from r1jax.sharding import carriers, count, gather, index


def stretches(length: int) -> tuple[jax.Array | int, ...]:
    """Which stretches of the row the device's `length` positions are, of as many as fit, in the
    order in which they lie here: two, or one where they cannot be folded."""
    n, me = count("length"), index("length")
    return (me, 2 * n - 1 - me) if _folds(length) else (me,)


def folded(x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] this device's positions of rows that lie straight, to those of folded rows."""
    if not _folds(x_BT.shape[1]):
        return x_BT
    first, second = jnp.split(x_BT, 2, axis=1)
    even, odd = _there()
    return _in_turn(_sent(first, even), _sent(second, odd))


def straight(x_BT: jax.Array) -> jax.Array:
    """Back: `straight(folded(x))` is x."""
    if not _folds(x_BT.shape[1]):
        return x_BT
    first, second = jnp.split(_in_turn(*jnp.split(x_BT, 2, axis=1)), 2, axis=1)
    even, odd = ([(there, here) for here, there in way] for way in _there())
    return jnp.concatenate([_sent(first, even), _sent(second, odd)], 1)


def all_positions(x_BT: jax.Array) -> jax.Array:
    """[B, S, ...] all positions, in order, of rows that lie folded."""
    rest = (None,) * (x_BT.ndim - 2)
    all_BS = gather(x_BT, "batch", "length", *rest, along="length")
    if not _folds(x_BT.shape[1]):
        return all_BS
    n, half = count("length"), x_BT.shape[1] // 2
    x = all_BS.reshape(len(all_BS), n, 2, half, *all_BS.shape[2:])
    flat = lambda x: x.reshape(len(x), n * half, *x.shape[3:])  # noqa: E731
    return jnp.concatenate([flat(x[:, :, 0]), flat(x[:, ::-1, 1])], 1)


def _folds(length: int) -> bool:
    return count("length") > 1 and length % 2 == 0


def _there() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of the stretches with an even and with an odd number: device i of straight rows
    has 2i and 2i + 1."""
    n = count("length")
    owner = [min(s, 2 * n - 1 - s) for s in range(2 * n)]
    return tuple([(i, owner[2 * i + odd]) for i in range(n)] for odd in (0, 1))


def _sent(x: jax.Array, way: list[tuple[int, int]]) -> jax.Array:
    return jax.lax.ppermute(x, carriers("length"), way)


def _in_turn(a: jax.Array, b: jax.Array) -> jax.Array:
    """The two one behind the other; on odd devices, whose front stretch is an odd one, b first."""
    in_order, other = jnp.concatenate([a, b], 1), jnp.concatenate([b, a], 1)
    return jnp.where(index("length") % 2 == 0, in_order, other)
