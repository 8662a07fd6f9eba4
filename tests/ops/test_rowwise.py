# SPDX-License-Identifier: Apache-2.0
"""Attention a row at a time = the equations written out, in result and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import attention, rowwise
from r1jax.ops.attention import Causal, LatentPart, mla_naive
from r1jax.ops.rowwise import Operands, attend_rows

FLOAT32 = 3e-5  # sums of up to 30 float32 products of order 1, in another order
BFLOAT16 = 3e-2  # weights and gradients rounded to eight bits on the way
B, H, T, S, K, R, V = 2, 3, 5, 7, 4, 2, 6
SCALE = 0.3


def drawn(seed):
    rng = np.random.default_rng(seed)
    shapes = [(B, H, T, K), (B, H, T, R), (B, H, S, K), (B, S, R), (B, H, S, V)]
    arrays = [rng.normal(size=shape) for shape in shapes]
    mask = rng.random((B, T, S)) < 0.6
    mask[0, 2] = False  # a query without any key
    return arrays, mask, rng.normal(size=(B, H, T, V))


def drawn_causal(seed):
    """As many queries as keys, none attending to a later key."""
    (q, q_rope, *keys), mask, given = drawn(seed)
    queries = [np.concatenate([x, x[:, :, : S - T] + 1], 2) for x in (q, q_rope)]
    mask = np.tri(S, dtype=bool) & (np.random.default_rng(seed).random((B, S, S)) < 0.6)
    return [*queries, *keys], mask, np.concatenate([given, given[:, :, : S - T]], 2)


def by_hand(arrays, mask, given):
    """(out, gradients of Σ out · given) in float64, one query at a time."""
    q, q_rope, k, k_rope, v = arrays
    out, grads = np.zeros(given.shape), [np.zeros_like(x) for x in arrays]
    for b, h, t in np.ndindex(*given.shape[:3]):
        logits = (k[b, h] @ q[b, h, t] + k_rope[b] @ q_rope[b, h, t]) * SCALE
        logits = np.where(mask[b, t], logits, -1e30)
        e = np.exp(logits - logits.max())
        p = e / e.sum()
        out[b, h, t] = p @ v[b, h]
        slope = v[b, h] @ given[b, h, t]
        d = np.where(mask[b, t], p * (slope - p @ slope), 0.0) * SCALE
        grads[0][b, h, t] += d @ k[b, h]
        grads[1][b, h, t] += d @ k_rope[b]
        grads[2][b, h] += np.outer(d, q[b, h, t])
        grads[3][b] += np.outer(d, q_rope[b, h, t])
        grads[4][b, h] += np.outer(p, given[b, h, t])
    return out, grads


def compared(arrays, mask, given, *, dtype, close, causal):
    held = [jnp.asarray(x, dtype) for x in arrays]
    wanted, gradients = by_hand([np.asarray(x, np.float64) for x in held], mask, given)

    def loss(*arrays):
        q, q_rope, k, k_rope, v = (x.swapaxes(1, 2) if x.ndim == 4 else x for x in arrays)
        x = Operands(q, q_rope, k, k_rope, v)
        out = attend_rows(x, mask, SCALE, causal).swapaxes(1, 2)
        return (out.astype(jnp.float32) * given).sum(), out

    (_, out), found = jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(*held)
    for got, want in zip((out, *found), (wanted, *gradients), strict=True):
        assert got.dtype == dtype
        scale = np.abs(want).max()
        np.testing.assert_allclose(np.asarray(got, np.float64) / scale, want / scale, atol=close)


@pytest.mark.parametrize(("dtype", "close"), [(jnp.float32, FLOAT32), (jnp.bfloat16, BFLOAT16)])
def test_equations_and_gradients(dtype, close):
    compared(*drawn(0), dtype=dtype, close=close, causal=False)


@pytest.mark.parametrize("size", [2, 3])  # 7 queries: pieces of 2, 2, 2, 1 and of 3, 3, 1
def test_pieces_of_causal_rows(size, monkeypatch):
    monkeypatch.setattr(rowwise, "PIECE", size)
    arrays, mask, given = drawn_causal(3)
    mask |= np.eye(S, dtype=bool)  # a query without keys would weigh those of its piece alone
    compared(arrays, mask, given, dtype=jnp.float32, close=FLOAT32, causal=True)


def test_pieces():
    halves = rowwise._pieces(100, 100, True)
    assert halves == [(slice(0, 64), slice(64)), (slice(64, 100), slice(100))]
    assert len(rowwise._pieces(511, 511, True)) == rowwise.PIECES
    assert rowwise._pieces(100, 120, False) == [(slice(100), slice(120))]


def test_mla_naive_is_the_same_either_way(monkeypatch):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    part = LatentPart(draw(B, T, 5), draw(B, T, R), jnp.asarray(rng.random((B, T, T)) < 0.6))
    args = draw(B, T, H, K), draw(B, T, H, R), part, draw(5, H, K), draw(5, H, V)
    whole = mla_naive(*args, scale=SCALE)
    monkeypatch.setattr(attention, "MANY", 1)
    called = []
    monkeypatch.setattr(attention, "attend_rows", lambda *a: called.append(1) or attend_rows(*a))
    np.testing.assert_allclose(mla_naive(*args, scale=SCALE), whole, rtol=FLOAT32, atol=FLOAT32)
    assert called


def test_mla_naive_looks_at_no_later_pieces(monkeypatch):
    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    sight = Causal.of(jnp.asarray([[1, 1, 1, 2, 2], [1, 2, 2, 2, 2]], jnp.int32))
    args = draw(B, T, H, K), draw(B, T, H, R), draw(B, T, 5), draw(B, T, R)
    up = draw(5, H, K), draw(5, H, V)
    run = lambda sight: mla_naive(*args[:2], LatentPart(*args[2:], sight), *up, scale=SCALE)  # noqa: E731
    whole = run(sight.mask_BTS)
    monkeypatch.setattr(attention, "MANY", 1)
    monkeypatch.setattr(rowwise, "PIECE", 2)
    np.testing.assert_allclose(run(sight), whole, rtol=FLOAT32, atol=FLOAT32)


def test_rows_that_an_explicit_mesh_cuts(monkeypatch):
    monkeypatch.setattr(attention, "MANY", 1)
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    rows, mask = (draw(B, T, H, K), draw(B, T, H, R), draw(B, T, 5), draw(B, T, R)), jnp.tri(T) > 0
    up = draw(5, H, K), draw(5, H, V)

    def run(q, q_rope, c, k_rope):
        part = LatentPart(c, k_rope, jnp.broadcast_to(mask, (B, T, T)))
        return mla_naive(q, q_rope, part, *up, scale=SCALE)

    whole = run(*rows)
    mesh = jax.make_mesh((B,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        cut = jax.jit(run)(*jax.device_put(rows, jax.NamedSharding(mesh, jax.P("data"))))
    assert cut.sharding.spec[0] == "data"
    np.testing.assert_allclose(cut, whole, rtol=FLOAT32, atol=FLOAT32)


def test_who_attends_by_rows():
    q, k = jnp.zeros((1, 256, 8, 1)), jnp.zeros((1, 256, 8, 1))
    assert attention._by_rows(q, k, "cpu")
    assert not attention._by_rows(q, k, "tpu")
    assert not attention._by_rows(q[:, :64], k[:, :64], "cpu")
