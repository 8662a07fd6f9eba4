# SPDX-License-Identifier: Apache-2.0
"""Attention in blocks: equal to whole logits, in value and gradient, for any mask and length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_attention import ref as blockwise
from r1jax.ops import attention
from r1jax.ops.attention import KVPart, LatentPart, causal_mask, gqa, mla_absorbed, mla_naive

FLOAT32 = 2e-5  # sums of up to 600 products of order 1, taken in another order, against the largest
BFLOAT16 = 2e-2  # weights and values are rounded to 8 bits at other places

LENGTHS = [(1, 1), (5, 300), (129, 257)]
LONGER = [(128, 256), (200, 600), (300, 300), (257, 513)]


def whole(q, k, v, mask, scale):
    """The definition, in float32; a query without a key gives 0."""
    logits = jnp.einsum("bjgtk,bjsk->bjgts", q, k).astype(jnp.float32) * scale
    ok = mask[:, None, None]
    p = jnp.where(ok, jax.nn.softmax(jnp.where(ok, logits, -1e30), -1), 0.0)
    return jnp.einsum("bjgts,bjsv->bjgtv", p, v.astype(jnp.float32))


def operands(rng, t, s, dtype=np.float32, *, b=2, j=2, g=3, k=8, v=5):
    shapes = ((b, j, g, t, k), (b, j, s, k), (b, j, s, v))
    return [jnp.asarray(rng.normal(size=x), dtype) for x in shapes]


def masks(rng, b, t, s):
    """Name → [B, T, S]: causal, packed documents, left padding, holes, blocks without any key."""
    causal = np.arange(s) <= np.arange(t)[:, None] + (s - t)
    segment_S = np.cumsum(rng.random((b, s)) < 4 / s, -1)
    far = np.zeros((b, t, s), bool)
    far[:, t // 2 :, s // 2 :] = True  # whole blocks of queries, and of keys, are empty
    return {
        "causal": np.broadcast_to(causal, (b, t, s)),
        "packed": causal & (segment_S[:, None] == segment_S[:, -t:, None]),
        "padded": causal & (np.arange(s) >= rng.integers(0, s, b)[:, None])[:, None],
        "holes": rng.random((b, t, s)) < 0.3,
        "far": far,
        "none": np.zeros((b, t, s), bool),
    }


def close(got, want, tolerance):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1.0)


@pytest.mark.parametrize("name", ["causal", "packed", "padded", "holes", "far", "none"])
@pytest.mark.parametrize(
    ("t", "s"), [*LENGTHS, *(pytest.param(*ts, marks=pytest.mark.slow) for ts in LONGER)]
)
def test_value_and_gradient_are_those_of_whole_logits(t, s, name):
    if t > s:
        pytest.skip("more queries than keys")
    rng = np.random.default_rng(t * s)
    q, k, v = operands(rng, t, s)
    mask = jnp.asarray(masks(rng, 2, t, s)[name])
    given = jnp.asarray(rng.normal(size=(*q.shape[:-1], v.shape[-1])), np.float32)

    def run(attend):
        def loss(q, k, v):
            out = attend(q, k, v, mask, 0.4)
            return (out * given).sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    ((_, out), grads), ((_, want), wanted) = run(blockwise.attend), run(whole)
    close(out, want, FLOAT32)
    for got, exact in zip(grads, wanted, strict=True):
        close(got, exact, 10 * FLOAT32)


def test_blocks_of_many_rows_have_half_the_keys(monkeypatch):
    monkeypatch.setattr(blockwise, "KEYS", 64)
    rng = np.random.default_rng(3)
    q, k, v = operands(rng, 200, 600)
    for name, mask in masks(rng, 2, 200, 600).items():
        whole_blocks = blockwise.attend(q, k, v, mask, 0.4)
        with monkeypatch.context() as patch:
            patch.setattr(blockwise, "MANY", 2 * 2 * 3 * 128 * 64)
            assert blockwise._cut(q, k, v, mask).keys == 32
            half_blocks = blockwise.attend(q, k, v, mask, 0.4)
        assert blockwise._cut(q, k, v, mask).keys == 60, name
        close(half_blocks, whole_blocks, FLOAT32)
        close(half_blocks, whole(q, k, v, mask, 0.4), FLOAT32)


def test_large_logits_neither_overflow_nor_lose_the_largest():
    rng = np.random.default_rng(0)
    q, k, v = operands(rng, 200, 600)
    mask = jnp.ones((2, 200, 600), bool)
    close(blockwise.attend(60 * q, 60 * k, v, mask, 1.0), whole(60 * q, 60 * k, v, mask, 1.0), 1e-3)


def test_bfloat16_stays_bfloat16_with_float32_sums():
    rng = np.random.default_rng(1)
    q, k, v = operands(rng, 129, 600, jnp.bfloat16)
    mask = jnp.asarray(masks(rng, 2, 129, 600)["causal"])
    out = blockwise.attend(q, k, v, mask, 0.4)
    assert out.dtype == jnp.bfloat16
    close(out, whole(q, k, v, mask, 0.4), BFLOAT16)


def test_keys_that_no_query_may_see_are_not_read():
    """What lies behind the mask of whole blocks may be anything, NaN too: it is never visited."""
    rng = np.random.default_rng(2)
    q, k, v = operands(rng, 64, 600)
    mask = jnp.zeros((2, 64, 600), bool).at[:, :, 250:300].set(True)
    want = blockwise.attend(q, k, v, mask, 0.4)
    k, v = k.at[:, :, 450:].set(jnp.nan), v.at[:, :, 450:].set(jnp.nan)
    np.testing.assert_array_equal(blockwise.attend(q, k, v, mask, 0.4), want)


def test_no_array_of_queries_times_keys_floats_is_made():
    t = 4096
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 1, 4, t, 8), (1, 1, t, 8))]
    mask = jax.ShapeDtypeStruct((1, t, t), bool)

    def loss(q, k, v, mask):
        return blockwise.attend(q, k, v, mask, 0.4).sum()

    q, k = shapes
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, mask).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * t * t  # logits: 4 heads of 4·t·t


def test_long_attention_goes_block_by_block_and_changes_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    normal = lambda *s: jnp.asarray(rng.normal(size=s), np.float32)  # noqa: E731
    b, t = 2, 40
    segments = jnp.asarray(np.repeat([[1, 2, 3, 4]], t // 4, 1).reshape(1, t).repeat(b, 0))
    mask = causal_mask(segments)
    part = LatentPart(normal(b, t, 6), normal(b, t, 2), mask)
    mla = (normal(b, t, 3, 4), normal(b, t, 3, 2), part, normal(6, 3, 4), normal(6, 3, 5))
    kv = KVPart(normal(b, t, 2, 8), normal(b, t, 2, 8), mask)

    def results():
        q, r, part, uk, uv = mla
        return (
            mla_naive(q, r, part, uk, uv, scale=0.3),
            mla_absorbed(q, r, (part,), uk, uv, scale=0.3),
            gqa(kv_queries, (kv,), scale=0.3),
        )

    kv_queries = normal(b, t, 4, 8)
    want, visits = results(), []
    real = attention.attend
    monkeypatch.setattr(attention, "LONG", t * t)
    monkeypatch.setattr(attention, "attend", lambda *a: (visits.append(1), real(*a))[1])
    for got, exact in zip(results(), want, strict=True):
        close(got, exact, FLOAT32)
    assert len(visits) == 3


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_rows_of_a_batch_may_lie_on_different_devices(kind):
    rng = np.random.default_rng(4)
    q, k, v = operands(rng, 130, 300, b=8)
    mask = jnp.asarray(masks(rng, 8, 130, 300)["padded"])

    def loss(q, k, v, mask):
        return (blockwise.attend(q, k, v, mask, 0.4) ** 2).sum()

    step = jax.value_and_grad(loss, argnums=(0, 1, 2))
    want = jax.jit(step)(q, k, v, mask)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P("data"))
        got = jax.jit(step)(*jax.device_put((q, k, v, mask), rows))
    for one, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(one, exact, 1e-5)
