# SPDX-License-Identifier: Apache-2.0
"""Paged latent attention: every backend against numpy in float64; lengths, pages, queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import Backend, Unsupported, shapes
from pallas_kernels.mla_decode import PagedLatents, merge, mla_decode, tpu
from tests.kernels import chip_compiler
from tests.kernels.conformance import BACKENDS, FLOAT32_ERROR, TPU, XLA, error
from tests.kernels.paged import (
    LENGTHS,
    PAGES,
    ROWS,
    SCALE,
    SIZE,
    cache_of,
    check,
    found,
    queries_of,
    table_of,
)

everywhere = pytest.mark.parametrize("backend", BACKENDS)


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("queries", "splits"), [pytest.param(1, 1, marks=pytest.mark.slow), (3, 3)]
)
def test_it_is_attention_over_the_pages(queries, splits, dtype, backend):
    q_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    check(
        queries_of(ROWS, queries, 4, 48, 16, dtype=q_dtype),
        cache_of(ROWS * PAGES, SIZE, 48, 16, dtype=dtype),
        table_of(),
        LENGTHS,
        splits=splits,
        keys=64,
        backend=backend,
    )


@everywhere
def test_rows_may_share_pages(backend):
    """The samples of one prompt point to one copy of it."""
    table = table_of()
    table[:, :3] = table[0, :3]
    check(queries_of(ROWS, 2, 4, 16, 8), cache_of(30, SIZE, 16, 8), table, [100, 97, 192, 96, 130],
          keys=64, backend=backend)  # fmt: skip


@everywhere
def test_the_named_tiny_shape(backend):
    b, t, h, length, c, r = shapes.MLA_DECODE["tiny"]
    table = np.arange(b * length // 16).reshape(b, -1)
    check(queries_of(b, t, h, c, r), cache_of(table.size, 16, c, r), table, [length] * b,
          backend=backend)  # fmt: skip


@settings(max_examples=8)
@given(st.data())
def test_any_lengths_queries_and_splits(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    b, t, pages, size = draw(1, 3), draw(1, 8), draw(1, 4), draw(1, 9)
    lengths = [draw(0, pages * size) for _ in range(b)]
    table = np.reshape([draw(0, 5) for _ in range(b * pages)], (b, pages))
    check(queries_of(b, t, 2, 3, 2), cache_of(6, size, 3, 2), table, lengths,
          splits=draw(1, 5), backend=XLA)  # fmt: skip


@pytest.mark.slow
@given(st.data())
def test_any_lengths_queries_and_splits_on_tpu(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    b, t, pages = draw(1, 4), draw(1, 8), draw(1, 9)
    lengths = [draw(0, pages * 16) for _ in range(b)]
    table = np.reshape([draw(0, 11) for _ in range(b * pages)], (b, pages))
    check(queries_of(b, t, 2, 24, 8), cache_of(12, 16, 24, 8), table, lengths,
          splits=draw(1, 4), keys=draw(1, 80), backend=TPU)  # fmt: skip


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_what_lies_behind_the_end_does_not_matter(dtype, backend):
    """Neither NaN in slots never written nor table entries never filled."""
    queries = queries_of(ROWS, 2, 4, 16, 8)
    cache, latents = cache_of(30, SIZE, 16, 8, dtype=dtype)
    table = table_of()
    spoilt = PagedLatents(*(None if x is None else np.array(x) for x in cache))
    entries = np.array(table)
    for row, length in enumerate(LENGTHS):
        for s in range(length, PAGES * SIZE):
            for x in spoilt:
                if x is not None:
                    x[table[row, s // SIZE], s % SIZE] = np.nan
        entries[row, -(-length // SIZE) :] = [-1, 10**6, 30, -(10**9), 29, 31][
            : PAGES - -(-length // SIZE)
        ]
    spoilt = jax.tree.map(jnp.asarray, spoilt)
    call = lambda cache, table: found(  # noqa: E731
        queries, cache, (table, np.asarray(LENGTHS)), (None, 64), backend
    )
    got = call(spoilt, entries)
    assert np.isfinite(got[0]).all()
    for a, b in zip(got, call(cache, table), strict=True):
        np.testing.assert_array_equal(a, b)


@everywhere
def test_a_length_beyond_the_table_is_the_table(backend):
    queries, (cache, _), table = (
        queries_of(ROWS, 1, 4, 16, 8),
        cache_of(30, SIZE, 16, 8),
        table_of(),
    )
    more, most = (
        found(queries, cache, (table, np.full(ROWS, n)), (None, 64), backend) for n in (999, 192)
    )
    for got, want in zip(more, most, strict=True):
        np.testing.assert_array_equal(got, want)


def test_verification_is_decoding_token_by_token():
    queries, (cache, _), table = (
        queries_of(ROWS, 4, 4, 16, 8),
        cache_of(30, SIZE, 16, 8),
        table_of(),
    )
    lengths = np.asarray([4, 9, 75, 64, 192])
    whole = found(queries, cache, (table, lengths), (None, None), XLA)
    for t in range(4):
        one = [q[:, t : t + 1] for q in queries]
        alone = found(one, cache, (table, lengths - 3 + t), (None, None), XLA)
        for a, b in zip(alone, whole, strict=True):
            np.testing.assert_allclose(a[:, 0], b[:, t], rtol=1e-5, atol=1e-6)


def test_huge_and_infinite_logits():
    """Scores of ±1e30 do not overflow; a NaN query is NaN alone."""
    queries, (cache, _), table = (
        queries_of(ROWS, 1, 4, 16, 8),
        cache_of(30, SIZE, 16, 8),
        table_of(),
    )
    queries[0] = queries[0].at[2].multiply(1e30).at[3, 0, 1, 0].set(np.nan)
    for backend in (XLA, TPU):
        out, lse = found(queries, cache, (table, np.asarray(LENGTHS)), (None, 64), backend)
        nan = np.zeros((ROWS, 1, 4), bool)
        nan[3, 0, 1] = True
        assert (np.isnan(out).all(-1) == nan).all()
        assert (np.isnan(out).any(-1) == nan).all()
        assert (np.isnan(lse) == nan).all()


def test_merging_is_attention_over_all_keys():
    """Over three sets of keys, one of them empty, against the softmax over all."""
    rng = np.random.default_rng(0)
    s, v = rng.normal(size=(2, 9)) * 9, rng.normal(size=(9, 4))
    cuts = [slice(0, 5), slice(5, 5), slice(5, 9)]
    e = [np.exp(s[:, cut]) for cut in cuts]
    out = np.stack([
        x @ v[cut] / x.sum(-1, keepdims=True) if x.size else np.zeros((2, 4))
        for x, cut in zip(e, cuts, strict=True)
    ])  # fmt: skip
    with np.errstate(divide="ignore"):
        lse = np.stack([np.log(x.sum(-1)) for x in e])
    got, got_lse = merge(jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32))
    whole = np.exp(s)
    np.testing.assert_allclose(got, whole @ v / whole.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(got_lse, np.log(whole.sum(-1)), rtol=1e-6)
    nothing, lse = merge(jnp.zeros((2, 3)), jnp.full((2,), -jnp.inf))
    assert not nothing.any()
    assert np.isneginf(lse)


def test_the_gradient_of_the_reference_is_that_of_attention():
    queries, (cache, _), table = (
        queries_of(ROWS, 2, 4, 16, 8),
        cache_of(30, SIZE, 16, 8),
        table_of(),
    )
    lengths = np.asarray([2, 5, 75, 64, 192])

    def dense(q_latent, q_rope, latent, rope):
        flat = lambda x: x[table].reshape(ROWS, -1, x.shape[-1])  # noqa: E731
        s = jnp.einsum("bthc,bsc->bths", q_latent, flat(latent))
        s += jnp.einsum("bthr,bsr->bths", q_rope, flat(rope))
        seen = np.arange(PAGES * SIZE) < (lengths[:, None] - 1 + np.arange(2))[..., None]
        w = jax.nn.softmax(jnp.where(seen[:, :, None], s * SCALE, -1e30))
        return jnp.einsum("bths,bsc->bthc", w, flat(latent))

    def paged(q_latent, q_rope, latent, rope):
        return mla_decode(
            q_latent, q_rope, PagedLatents(latent, rope), table, lengths, scale=SCALE
        )[0]

    def gradient(f):
        loss = lambda *x: jnp.sin(f(*x)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*queries, *cache[:2])

    got, want = gradient(paged), gradient(dense)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < FLOAT32_ERROR


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(q_latent=(2, 9, 4, 16), q_rope=(2, 9, 4, 8)), r"1 to 8 .*\[2, 9, 4, 16\]"),
        (dict(q_rope=(2, 1, 3, 8)), r"share \[B, T, H\].*\[2, 1, 4, 16\].*\[2, 1, 3, 8\]"),
        (dict(latent=(6, 32, 17)), r"share C and R.*\[2, 1, 4, 16\].*\[6, 32, 17\]"),
        (dict(rope=(6, 16, 8)), r"share \[N, S\].*\[6, 32, 16\].*\[6, 16, 8\]"),
        (dict(table=(3, 3)), r"share B.*\[3, 3\].*\[2\]"),
        (dict(lengths=(2, 1)), r"\[B\] expected.*\[2, 1\]"),
        (dict(scale=(6, 32)), r"scales belong.*\[6, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(wrong, message):
    sizes = dict(q_latent=(2, 1, 4, 16), q_rope=(2, 1, 4, 8), latent=(6, 32, 16), rope=(6, 32, 8),
                 scale=None, table=(2, 3), lengths=(2,)) | wrong  # fmt: skip
    integer = ("table", "lengths")
    q_latent, q_rope, latent, rope, scale, table, lengths = (
        None if v is None else np.zeros(v, np.int32 if k in integer else np.float32)
        for k, v in sizes.items()
    )
    with pytest.raises(ValueError, match=message):
        mla_decode(q_latent, q_rope, PagedLatents(latent, rope, scale), table, lengths, scale=1.0)


@pytest.mark.parametrize(("size", "pages"), [(12, 3), (16, 2**17)])
def test_what_the_tpu_kernel_cannot_is_unsupported(size, pages):
    """Pages that cut a register's rows; a table that scalar memory does not hold."""
    abstract = jax.ShapeDtypeStruct
    call = functools.partial(mla_decode, scale=1.0, implementation=Backend("tpu", chip="v6e"))
    with pytest.raises(Unsupported, match="use .*'xla'"):
        jax.eval_shape(
            call,
            *(abstract((2, 1, 4, width), "float32") for width in (16, 8)),
            PagedLatents(*(abstract((6, size, width), "float32") for width in (16, 8))),
            abstract((2, pages), "int32"),
            abstract((2,), "int32"),
        )


def test_stretches_cover_every_block_once():
    for length, block, splits in [(0, 4, 1), (1, 4, 3), (17, 4, 2), (17, 4, 7), (64, 4, 3)]:
        covered = []
        for split in range(splits):
            first, count = (int(x) for x in tpu.stretch(length, split, block=block, splits=splits))
            assert count >= 1
            covered += range(first, first + count)
        blocks = -(-length // block)
        assert [x for x in covered if x < blocks] == list(range(blocks))
        assert len(set(covered)) == len(covered)


@pytest.mark.slow
@pytest.mark.parametrize("chip", chip_compiler.TOPOLOGIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("name", "page"), [("v3-4k", 64), ("v3-4k-verify", 128)])
def test_the_chips_compiler_takes_it(name, page, dtype, chip, capsys):
    b, t, h, length, c, r = shapes.MLA_DECODE[name]
    r = max(r, 128)  # padded, as the docstring advises
    pages = b * length // page
    cache = PagedLatents(
        ((pages, page, c), dtype),
        ((pages, page, r), "bfloat16"),
        ((pages, page), "float32") if dtype == "float8_e4m3fn" else None,
    )
    report = chip_compiler.compiled(
        functools.partial(mla_decode, scale=SCALE, implementation=Backend("tpu", chip=chip)),
        (
            *(((b, t, h, width), "bfloat16") for width in (c, r)),
            cache,
            ((b, length // page), "int32"),
            ((b,), "int32"),
        ),
        chip,
    )
    with capsys.disabled():
        print(f"\nmla_decode {name} {dtype} {chip}: {report}")  # noqa: T201
    assert report.kernels == 1
    assert report.temporaries < pages * page * c / 4  # the cache is not copied; queries may be
