# SPDX-License-Identifier: Apache-2.0
"""Grouped matmuls, high precision and FP8, against a loop over the groups in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Backend, Unsupported
from pallas_kernels.fp8_grouped_matmul import (
    fp8_grouped_dgrad,
    fp8_grouped_fprop,
    fp8_grouped_linear,
    fp8_grouped_wgrad,
)
from pallas_kernels.fp8_quantize import quantize_blocks, quantize_tiles, quantize_transposed
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_outer
from pallas_kernels.scaled import Scaled
from tests.kernels.conformance import (
    BACKENDS,
    BFLOAT16_ERROR,
    FLOAT32_ERROR,
    FP8_BACKENDS,
    TPU,
    XLA,
    error,
    normal,
    of_blocks,
    of_tiles,
)

END_TO_END = 0.04
# (M, K, N, sizes): empty groups first, between and last; tiles that three groups share; a tail.
CASES = {
    "ragged": (150, 256, 128, [0, 30, 1, 0, 60, 45, 0, 0]),
    "decode": (5, 256, 128, [0, 2, 0, 3, 0]),
    "long": (300, 128, 256, [100, 0, 131, 20]),
    "nothing": (8, 128, 128, [0, 0]),
}
slow = pytest.mark.slow
NAMES = [*list(CASES)[:2], *(pytest.param(name, marks=slow) for name in list(CASES)[2:])]


def loop(x, w, dy, sizes):
    """(y, dx, dw) in float64."""
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros(x.shape), np.zeros(w.shape)
    x, w, dy = np.float64(x), np.float64(w), np.float64(dy)
    ends = np.cumsum(sizes)
    for e, (a, b) in enumerate(zip(ends - sizes, ends, strict=True)):
        y[a:b], dx[a:b], dw[e] = x[a:b] @ w[e], dy[a:b] @ w[e].T, x[a:b].T @ dy[a:b]
    return y, dx, dw


def case(name, seed=0):
    """(x, w, dy, sizes); the tail of x and dy is NaN, the weights of groups without rows too."""
    m, k, n, sizes = CASES[name]
    x, w, dy = normal(seed, m, k), normal(seed + 1, len(sizes), k, n), normal(seed + 2, m, n)
    x[sum(sizes) :], dy[sum(sizes) :] = np.nan, np.nan
    return x, w, dy, np.array(sizes, np.int32)


def ways(layer, x, w, dy, sizes):
    """(y, dx, dw) under jit: the sizes are not known."""

    @jax.jit
    def call(x, w, dy, sizes):
        y, pull = jax.vjp(lambda x, w: layer(x, w, sizes, tail=True), x, w)
        return y, *pull(dy)

    return call(x, w, dy, sizes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grouped_matmul_and_gradients(backend, name, dtype):
    if dtype == jnp.bfloat16 and name != "decode":
        pytest.skip("one shape shows the dtype")
    x, w, dy, sizes = case(name)
    x, w, dy = (jnp.asarray(a, dtype) for a in (x, w, dy))
    layer = functools.partial(grouped_matmul, implementation=backend)
    bound = FLOAT32_ERROR if dtype == jnp.float32 else BFLOAT16_ERROR
    for got, want in zip(ways(layer, x, w, dy, sizes), loop(x, w, dy, sizes), strict=True):
        assert got.dtype == dtype
        assert error(got, want) <= bound


@pytest.mark.parametrize("backend", FP8_BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_fp8_grouped_linear_and_gradients(backend, name):
    x, w, dy, sizes = case(name)
    layer = functools.partial(fp8_grouped_linear, implementation=backend)
    got = ways(layer, *map(jnp.asarray, (x, w, dy)), sizes)
    for one, want in zip(got, loop(x, w, dy, sizes), strict=True):
        assert error(one, want) <= END_TO_END
    real = int(sizes.sum())  # the recipe's products of what was quantised, nothing more
    x[real:], dy[real:] = 0, 0
    x, dy = (of_tiles(quantize_tiles(a, implementation=XLA), 128) for a in (x, dy))
    y, dx, _ = loop(x, of_blocks(quantize_blocks(w, implementation=XLA), 128), dy, sizes)
    assert error(got[0], y) <= FLOAT32_ERROR
    assert error(got[1], dx) <= FLOAT32_ERROR


@pytest.mark.parametrize("backend", FP8_BACKENDS)
def test_blocks_made_before_are_read_and_the_weights_are_not(backend):
    x, w, dy, sizes = case("ragged")
    blocks = quantize_blocks(w, implementation=XLA)
    layer = functools.partial(fp8_grouped_linear, implementation=backend)
    wanted = ways(layer, x, w, dy, sizes)
    layer = functools.partial(layer, blocks=blocks)
    for got, want in zip(ways(layer, x, np.full_like(w, np.nan), dy, sizes), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradients_of_the_quantised_operands(backend):
    x, w, dy, sizes = case("ragged")
    xt, dyt = (quantize_transposed(a, rows=sizes.sum(), implementation=XLA) for a in (x, dy))
    got = fp8_grouped_wgrad(xt, dyt, sizes, implementation=backend)
    rows = [of_tiles(a, 128).T[: len(x)] for a in (xt, dyt)]
    assert error(got, loop(rows[0], w, rows[1], sizes)[2]) <= FLOAT32_ERROR
    assert not np.asarray(got)[sizes == 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", [grouped_matmul, fp8_grouped_linear])
def test_experts_without_rows_are_not_read(backend, layer):
    x, w, _, sizes = case("decode")
    w[sizes == 0] = np.nan
    y = layer(x, w, sizes, implementation=backend)
    assert np.isfinite(y).all()
    assert error(y, loop(x, np.nan_to_num(w), np.zeros(y.shape), sizes)[0]) <= END_TO_END


@slow
@hypothesis.given(
    st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 9), st.integers(1, 200)
)
def test_random_groups(sizes, tail, n):
    m = sum(sizes) + tail
    x, w = normal(m, m, 64), normal(n, len(sizes), 64, n)
    sizes = np.array(sizes, np.int32)
    for backend in (XLA, TPU):
        y = grouped_matmul(x, w, sizes, tail=True, implementation=backend)
        assert error(y, loop(x, w, np.zeros((m, n)), sizes)[0]) <= FLOAT32_ERROR


X, W = jnp.ones((8, 128)), jnp.ones((2, 128, 128))
QX = Scaled(jnp.ones((8, 128), jnp.float8_e4m3fn), jnp.ones((8, 1)))
QW = Scaled(jnp.ones((2, 128, 128), jnp.float8_e4m3fn), jnp.ones((2, 1, 1)))
HALVES = jnp.array([4, 4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped_matmul(X, W, jnp.array([3, 4])), "sum to 7, x has 8 rows"),
        (lambda: grouped_matmul(X, W, jnp.array([8])), r"group_sizes \(1,\)"),
        (lambda: grouped_matmul(X[:, :64], W, HALVES), r"x \(8, 64\) and w \(2, 128, 128\)"),
        (lambda: grouped_matmul(X, W.astype(jnp.bfloat16), HALVES), "expected one dtype"),
        (lambda: grouped_matmul(X.astype(int), W.astype(int), HALVES), "x has dtype int32"),
        (lambda: grouped_outer(X, X[:4], HALVES), r"x \(8, 128\) and dy \(4, 128\)"),
        (lambda: fp8_grouped_linear(X, W, jnp.array([9, 0])), "sum to 9"),
        (lambda: fp8_grouped_linear(X, W[0], HALVES), r"w \(128, 128\)"),
        (
            lambda: fp8_grouped_linear(X, W, HALVES, blocks=Scaled(QW.values[:1], QW.scale[:1])),
            r"blocks \(1, 128, 128\) are not of w, filled up \(2, 128, 128\)",
        ),
        (
            lambda: fp8_grouped_fprop(QX, QW._replace(scale=jnp.ones((2, 1, 2))), HALVES),
            r"need scale \(2, 1, 1\), got \(2, 1, 2\)",
        ),
        (
            lambda: fp8_grouped_dgrad(QX._replace(scale=jnp.ones((8, 2))), QW, HALVES),
            r"dy: values \(8, 128\).*need scale \(8, 1\), got \(8, 2\)",
        ),
        (lambda: fp8_grouped_fprop(QX, QW, jnp.array([4, 3])), "sum to 7"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_rows_at_all():
    for layer in (grouped_matmul, fp8_grouped_linear):
        y, pull = jax.vjp(lambda w, layer=layer: layer(X[:0], w, jnp.array([0, 0])), W)
        assert y.shape == (0, 128)
        assert not pull(y)[0].any()


def test_a_kernel_that_is_asked_for_is_not_replaced():
    with pytest.raises(Unsupported, match="GPU kernel"):
        grouped_matmul(X, W, HALVES, implementation=Backend("gpu", "h100"))
    with pytest.raises(Unsupported, match="block=64"):
        fp8_grouped_linear(X, W, HALVES, block=64, implementation=Backend("gpu", "h100"))
