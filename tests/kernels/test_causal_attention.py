# SPDX-License-Identifier: Apache-2.0
"""Causal attention of packed documents: value and gradient against float64, on each backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Backend, Unsupported, shapes
from pallas_kernels.causal_attention import causal_attention
from tests.kernels.conformance import BACKENDS, TPU, XLA, error, normal

# Queries, weights, values and results in bfloat16, one rounding each: 2^-9 of most of them.
BFLOAT16, FLOAT32 = 6e-3, 1e-5
SCALE = 0.11


def documents(b: int, t: int) -> np.ndarray:
    """Rows of up to three documents of any length, with padding (0) behind; one row is full."""
    rng = np.random.default_rng(t)
    segments = np.cumsum(rng.random((b, t)) < 2 / t, 1) + 1
    for row, end in enumerate(rng.integers(1, t + 1, b - 1)):
        segments[row, end:] = 0
    return segments.astype(np.int32)


def whole(q, k, v, segments, given):
    """(out, dq, dk, dv) in float64, by the definition."""
    q, k, v, given = (np.asarray(x, np.float64) for x in (q, k, v, given))
    t = q.shape[3]
    ok = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    ok = (ok & np.tri(t, dtype=bool))[:, None, None]
    e = np.where(ok, np.exp(np.einsum("bjgtk,bjsk->bjgts", q, k) * SCALE), 0.0)
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bjgts,bjsv->bjgtv", p, v)
    dp = np.einsum("bjgtv,bjsv->bjgts", given, v)
    ds = p * (dp - (given * out).sum(-1, keepdims=True)) * SCALE
    dq, dk = np.einsum("bjgts,bjsk->bjgtk", ds, k), np.einsum("bjgts,bjgtk->bjsk", ds, q)
    return out, dq, dk, np.einsum("bjgts,bjgtv->bjsv", p, given)


def both_ways(backend, segments, given, *qkv):
    def call(*qkv):
        how = dict(scale=SCALE, implementation=backend)
        out, pull = jax.vjp(lambda *x: causal_attention(*x, segments, **how), *qkv)
        return out, *pull(given)

    return jax.jit(call)(*qkv)


def operands(shape: shapes.Attention, dtype):
    b, heads, g, t, k, v = shape
    j = heads // g
    sizes = ((b, j, g, t, k), (b, j, t, k), (b, j, t, v), (b, j, g, t, v))
    return [jnp.asarray(normal(i, *size), dtype) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [shapes.ATTENTION["tiny"], (1, 6, 3, 100, 64, 64)])
def test_value_and_gradient_are_those_of_float64(backend, shape):
    *qkv, given = operands(shapes.Attention(*shape), jnp.bfloat16)
    segments = documents(shape[0], shape[3])
    got = both_ways(backend, jnp.asarray(segments), given, *qkv)
    for mine, want in zip(got, whole(*qkv, segments, given), strict=True):
        assert mine.dtype == jnp.bfloat16
        assert error(mine, want) < BFLOAT16


@pytest.mark.parametrize("t", [1, 77, 300])
def test_any_length_in_float32(t):
    *qkv, given = operands(shapes.Attention(2, 4, 2, t, 8, 5), np.float32)
    segments = documents(2, t)
    got = both_ways(XLA, jnp.asarray(segments), given, *qkv)
    for mine, want in zip(got, whole(*qkv, segments, given), strict=True):
        assert error(mine, want) < FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_query_may_not_see_changes_nothing(backend):
    """Padding is 0 and has no gradient; another document, or what follows, may be anything."""
    shape = shapes.Attention(1, 2, 1, 128, 64, 64)
    q, k, v, given = operands(shape, jnp.bfloat16)
    second, last = 40, 90
    segments = jnp.asarray([[1] * second + [2] * (last - second) + [0] * (128 - last)])
    run = functools.partial(both_ways, backend, segments, given)
    first = run(q, k, v)
    later = lambda x, n: x.at[..., n:, :].set(7.0)  # noqa: E731
    other = run(*(later(x, second) for x in (q, k, v)))
    np.testing.assert_array_equal(first[0][..., :second, :], other[0][..., :second, :])
    for x in first:
        assert not np.asarray(x, np.float32)[..., last:, :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_of_the_rows_are_pieces_of_the_result(backend):
    """As on meshes that cut rows: which piece may be known only when it runs. What the pieces give
    the keys adds up."""
    *qkv, given = operands(shapes.Attention(2, 4, 2, 384, 64, 64), jnp.bfloat16)
    documents_BT = documents(2, 384)
    out, dq, dk, dv = whole(*qkv, documents_BT, given)
    segments, size = jnp.asarray(documents_BT), 128

    @jax.jit
    def part(piece):
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, piece * size, size, axis)  # noqa: E731
        how = dict(piece=piece, scale=SCALE, implementation=backend)
        mine = cut(segments, 1), segments
        out, pull = jax.vjp(lambda *x: causal_attention(*x, *mine, **how), cut(qkv[0], 3), *qkv[1:])
        return out, *pull(cut(given, 3))

    parts = [part(piece) for piece in range(3)]
    joined = [np.concatenate([np.float64(p[i]) for p in parts], axis=3) for i in (0, 1)]
    summed = [sum(np.float64(p[i]) for p in parts) for i in (2, 3)]
    for mine, want in zip(joined + summed, (out, dq, dk, dv), strict=True):
        assert error(mine, want) < BFLOAT16


def test_what_the_kernel_cannot_it_says_and_the_device_then_runs_the_other():
    q, k, v, _ = operands(shapes.Attention(1, 2, 1, 128, 64, 64), np.float32)
    segments = jnp.ones((1, 128), jnp.int32)
    with pytest.raises(Unsupported, match="multiplies bfloat16"):
        causal_attention(q, k, v, segments, scale=SCALE, implementation=TPU)
    own = Backend("tpu", "v5p", explicit=False)
    out = causal_attention(q, k, v, segments, scale=SCALE, implementation=own)
    np.testing.assert_array_equal(out, causal_attention(q, k, v, segments, scale=SCALE))


def test_other_refusals():
    q, k, v, _ = operands(shapes.Attention(1, 2, 1, 128, 64, 64), jnp.bfloat16)
    segments = jnp.ones((1, 128), jnp.int32)
    call = functools.partial(causal_attention, scale=SCALE)
    with pytest.raises(Unsupported, match="pieces of 64 tokens"):
        call(q[:, :, :, :64], k, v, segments[:, :64], segments, implementation=TPU)
    with pytest.raises(Unsupported, match="no kernel for GPUs"):
        call(q, k, v, segments, implementation=Backend("gpu", "h100"))
    with pytest.raises(Unsupported, match="multiples of 128"):
        call(q, k, v, segments, implementation=Backend("tpu", "v5p", tiles=(96, 128)))
    for bad, message in (
        ((q[0], k, v, segments), "expected"),
        ((q, k[:, :1], v, segments), "share B, J and K"),
        ((q, k, v[:, :, :5], segments), "share B, J and S"),
        ((q, k, v, segments[:, :5]), r"\[1, 5\] must be \[B, T\]"),
        ((q, k, v, segments, segments[:, :5]), r"\[1, 5\] must be \[B, S\]"),
        ((q[:, :, :, :60], k, v, segments[:, :60], segments), "multiple of the queries' T"),
        ((q, k, v.astype(np.float32), segments), "one floating dtype"),
        ((q, k, v, segments * 1.0), "integer"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*bad)
