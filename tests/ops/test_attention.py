# SPDX-License-Identifier: Apache-2.0
"""Attention cores: naive = absorbed, parts = one piece, both = a loop; masks and empty rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from r1jax.ops.attention import (
    KVPart,
    LatentPart,
    causal_mask,
    gqa,
    mla_absorbed,
    mla_naive,
)

# Sums of up to 30 float32 products of order 1, taken in another order.
FLOAT32 = 1e-5
SCALE = 0.3


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def mask_with_a_key(rng, *shape):
    """A random mask in which every query has at least one key."""
    mask = rng.random(shape) < 0.6
    mask[..., 0] |= ~mask.any(-1)
    return mask


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


# ------------------------------------------------------------------------------------------ MLA

LATENT_SIZES = dict(h=3, k=4, r=2, v=5, c=6)


def latents(rng, sizes, *, batch, queries, parts):
    """(q_nope, q_rope, parts, w_uk, w_uv); `parts` is a list of (rows, keys)."""
    h, k, r, v, c = (sizes[n] for n in "hkrvc")
    made = tuple(
        LatentPart(
            normal(rng, rows, s, c),
            normal(rng, rows, s, r),
            mask_with_a_key(rng, batch, queries, s),
        )
        for rows, s in parts
    )
    q = normal(rng, batch, queries, h, k), normal(rng, batch, queries, h, r)
    return *q, made, normal(rng, c, h, k), normal(rng, c, h, v)


def repeated(part, batch):
    """The part with its shared rows written out, one for each query row."""
    times = batch // part[0].shape[0]
    return type(part)(*(np.repeat(x, times, axis=0) for x in part[:2]), part[2])


def joined(parts, batch):
    """All parts as one whose batch is B."""
    whole = [repeated(p, batch) for p in parts]
    return type(parts[0])(
        *(np.concatenate([p[i] for p in whole], axis=1) for i in range(2)),
        np.concatenate([p[2] for p in whole], axis=-1),
    )


def mla_by_hand(q_nope, q_rope, part, w_uk, w_uv):
    """Equations 1-11 of DeepSeek-V3, one query of one head at a time, in float64."""
    out = np.zeros((*q_nope.shape[:3], w_uv.shape[-1]))
    q_nope, q_rope, c, k_rope, w_uk, w_uv = (
        np.asarray(x, np.float64) for x in (q_nope, q_rope, part.c_PSC, part.k_rope_PSR, w_uk, w_uv)
    )
    for b, t, h in np.ndindex(out.shape[:3]):
        seen = np.flatnonzero(part.mask_BTS[b, t])
        keys = [np.concatenate([c[b, s] @ w_uk[:, h], k_rope[b, s]]) for s in seen]
        query = np.concatenate([q_nope[b, t, h], q_rope[b, t, h]])
        weights = softmax(np.array([query @ key for key in keys]) * SCALE)
        out[b, t, h] = sum(w * (c[b, s] @ w_uv[:, h]) for w, s in zip(weights, seen, strict=True))
    return out


def on_joined_parts(q_nope, q_rope, parts, w_uk, w_uv):
    """`mla_naive`, which takes one part of the queries' batch."""
    batch = q_nope.shape[0]
    whole = [
        (*(jnp.repeat(x, batch // x.shape[0], axis=0) for x in p[:2]), p.mask_BTS) for p in parts
    ]
    part = LatentPart(
        jnp.concatenate([w[0] for w in whole], 1),
        jnp.concatenate([w[1] for w in whole], 1),
        jnp.concatenate([w[2] for w in whole], -1),
    )
    return mla_naive(q_nope, q_rope, part, w_uk, w_uv, scale=SCALE)


def on_parts(q_nope, q_rope, parts, w_uk, w_uv):
    return mla_absorbed(q_nope, q_rope, parts, w_uk, w_uv, scale=SCALE)


@jax.jit
def both_mla(*args):
    return on_joined_parts(*args), on_parts(*args)


@settings(max_examples=12, phases=[Phase.generate])  # each is a compilation: no shrinking
@given(
    seed=st.integers(0, 2**16),
    prompts=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    queries=st.sampled_from([1, 2]),
    keys=st.sampled_from([(3,), (4, 2), (2, 1, 3)]),
    sizes=st.fixed_dictionaries({n: st.sampled_from([1, 4]) for n in "hkrvc"}),
)
def test_naive_is_absorbed(seed, prompts, group, queries, keys, sizes):
    """Over parts shared by a group, parts of each row's own, and a part shared by all rows."""
    rng = np.random.default_rng(seed)
    batch = prompts * group
    parts = list(zip([prompts, batch, 1], keys, strict=False))
    naive, absorbed = both_mla(*latents(rng, sizes, batch=batch, queries=queries, parts=parts))
    assert naive.dtype == absorbed.dtype == jnp.float32
    np.testing.assert_allclose(naive, absorbed, rtol=FLOAT32, atol=FLOAT32)


def test_naive_is_absorbed_in_every_gradient():
    rng = np.random.default_rng(4)
    args = latents(rng, LATENT_SIZES, batch=4, queries=2, parts=[(2, 3), (4, 2)])
    cotangent = normal(rng, 4, 2, LATENT_SIZES["h"], LATENT_SIZES["v"])
    masks = [p.mask_BTS for p in args[2]]

    @jax.jit
    def gradients(floats):
        def loss(floats, f):
            q_nope, q_rope, parts, w_uk, w_uv = floats
            parts = tuple(LatentPart(*x, m) for x, m in zip(parts, masks, strict=True))
            return jnp.sum(f(q_nope, q_rope, parts, w_uk, w_uv) * cotangent)

        return [jax.grad(loss)(floats, f) for f in (on_joined_parts, on_parts)]

    floats = (*args[:2], tuple(p[:2] for p in args[2]), *args[3:])
    naive, absorbed = gradients(floats)
    for a, b in zip(jax.tree.leaves(naive), jax.tree.leaves(absorbed), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)
        assert np.abs(b).max() > 0.01


def test_both_mla_follow_the_equations():
    rng = np.random.default_rng(0)
    q_nope, q_rope, parts, w_uk, w_uv = latents(
        rng, LATENT_SIZES, batch=4, queries=2, parts=[(2, 5), (4, 3)]
    )
    whole = joined(parts, 4)
    expected = mla_by_hand(q_nope, q_rope, whole, w_uk, w_uv)
    naive = mla_naive(q_nope, q_rope, whole, w_uk, w_uv, scale=SCALE)
    absorbed = mla_absorbed(q_nope, q_rope, parts, w_uk, w_uv, scale=SCALE)
    np.testing.assert_allclose(naive, expected, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(absorbed, expected, rtol=FLOAT32, atol=FLOAT32)


def test_a_group_reads_its_own_prompt():
    """Row b of 4 over 2 shared prompts sees prompt b // 2: changing prompt 1 moves rows 2 and 3."""
    rng = np.random.default_rng(1)
    q_nope, q_rope, (part,), w_uk, w_uv = latents(
        rng, LATENT_SIZES, batch=4, queries=1, parts=[(2, 3)]
    )
    other = part._replace(c_PSC=part.c_PSC + np.array([0.0, 1.0], np.float32)[:, None, None])
    a, b = (mla_absorbed(q_nope, q_rope, (p,), w_uk, w_uv, scale=SCALE) for p in (part, other))
    moved = np.abs(np.asarray(a - b)).max(axis=(1, 2, 3)) > 0
    assert moved.tolist() == [False, False, True, True]


# ------------------------------------------------------------------------------------------ GQA


def kv(rng, *, batch, queries, heads, kv_heads, parts, k=4):
    made = tuple(
        KVPart(
            normal(rng, rows, s, kv_heads, k),
            normal(rng, rows, s, kv_heads, k),
            mask_with_a_key(rng, batch, queries, s),
        )
        for rows, s in parts
    )
    return normal(rng, batch, queries, heads, k), made


def gqa_by_hand(q, part):
    out = np.zeros(q.shape)
    heads, kv_heads = q.shape[2], part.k_PSJK.shape[2]
    for b, t, h in np.ndindex(out.shape[:3]):
        j = h // (heads // kv_heads)
        seen = np.flatnonzero(part.mask_BTS[b, t])
        logits = [q[b, t, h].astype(np.float64) @ part.k_PSJK[b, s, j] for s in seen]
        weights = softmax(np.array(logits) * SCALE)
        out[b, t, h] = sum(w * part.v_PSJK[b, s, j] for w, s in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("few", [128, 3])  # all keys few, or some parts' many
def test_gqa_is_the_loop(monkeypatch, heads, kv_heads, few):
    monkeypatch.setattr("r1jax.ops.attention.FEW_KEYS", few)
    rng = np.random.default_rng(heads)
    q, parts = kv(
        rng, batch=4, queries=2, heads=heads, kv_heads=kv_heads, parts=[(2, 5), (4, 2), (1, 3)]
    )
    whole = joined(parts, 4)
    expected = gqa_by_hand(q, whole)
    np.testing.assert_allclose(gqa(q, parts, scale=SCALE), expected, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(gqa(q, (whole,), scale=SCALE), expected, rtol=FLOAT32, atol=FLOAT32)


def test_gqa_gradients_do_not_depend_on_the_cut_into_parts():
    rng = np.random.default_rng(5)
    q, (part,) = kv(rng, batch=2, queries=2, heads=4, kv_heads=2, parts=[(2, 5)])
    cotangent = normal(rng, *q.shape)

    @jax.jit
    def gradients(q, k, v):
        def cut(q, k, v, at):
            pieces = [(slice(None, at)), (slice(at, None))]
            parts = tuple(KVPart(k[:, p], v[:, p], part.mask_BTS[..., p]) for p in pieces)
            return jnp.sum(gqa(q, parts, scale=SCALE) * cotangent)

        return [
            jax.grad(functools.partial(cut, at=at), argnums=(0, 1, 2))(q, k, v) for at in (5, 2)
        ]

    whole, cut = gradients(q, part.k_PSJK, part.v_PSJK)
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)


# ---------------------------------------------------------------------------------------- masks


def attend(kind, q_scale, mask):
    """One query over two keys with the given mask, for a gradient in the query's size."""
    rng = np.random.default_rng(7)
    dtype = q_scale.dtype
    x = lambda *shape: jnp.asarray(normal(rng, *shape), dtype)  # noqa: E731
    if kind == "gqa":
        return gqa(
            x(1, 1, 2, 4) * q_scale, (KVPart(x(1, 2, 1, 4), x(1, 2, 1, 4), mask),), scale=1.0
        )
    part = LatentPart(x(1, 2, 3), x(1, 2, 2), mask)
    args = x(1, 1, 2, 4) * q_scale, x(1, 1, 2, 2)
    if kind == "naive":
        return mla_naive(*args, part, x(3, 2, 4), x(3, 2, 5), scale=1.0)
    return mla_absorbed(*args, (part,), x(3, 2, 4), x(3, 2, 5), scale=1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["naive", "absorbed", "gqa"])
def test_a_query_without_keys_gives_numbers(kind, dtype):
    """A left-padded query sees nothing: neither its output nor any gradient may be NaN."""
    f = lambda s: attend(kind, s, jnp.zeros((1, 1, 2), bool))  # noqa: E731
    total = lambda s: f(s).astype(jnp.float32).sum()  # noqa: E731
    out, gradient = jax.jit(lambda s: (f(s), jax.grad(total)(s)))(jnp.ones((), dtype))
    assert out.dtype == jnp.dtype(dtype)
    assert jnp.isfinite(out).all()
    assert jnp.isfinite(gradient)


@pytest.mark.parametrize("kind", ["naive", "absorbed", "gqa"])
def test_one_key_is_taken_whole(kind):
    """With one visible key the softmax weight is 1, so the query does not matter."""
    mask = jnp.array([[[False, True]]])
    a, b = (attend(kind, jnp.float32(s), mask) for s in (1.0, -20.0))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, attend(kind, jnp.float32(1.0), ~mask))


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_causal_mask_keeps_documents_apart(segments):
    mask = causal_mask(jnp.array([segments]))[0]
    for t, s in np.ndindex(6, 6):
        assert mask[t, s] == (s <= t and segments[s] == segments[t] > 0), (t, s)
