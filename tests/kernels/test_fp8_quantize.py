# SPDX-License-Identifier: Apache-2.0
"""Quantisation against numpy, value for value, on every backend; what odd numbers become."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import Backend, Unsupported
from pallas_kernels.fp8_quantize import (
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
)
from r1jax.ops.quant import dequantise, quantise
from tests.kernels.conformance import BACKENDS, TPU, XLA, normal, of_blocks, of_tiles

ULP = 2.0**-23  # the scale is amax · (1/448): within an ulp of amax / 448
HALF_STEP = 2.0**-4  # E4M3 has three bits of fraction


def check(x, values, scale, power_of_two=False):
    """`x` [T, b] float32 tiles, one a row: scale against amax / 448, values against ml_dtypes."""
    x, scale = np.float32(x), np.asarray(scale).reshape(-1)
    x = np.where(np.abs(x) < 2.0**-126, np.float32(0), x)  # denormals are flushed
    values = np.asarray(values).astype(ml_dtypes.float8_e4m3fn)
    finite = np.isfinite(x).all(1)
    amax = np.abs(np.float64(np.where(finite[:, None], x, 0))).max(1)
    want = amax / 448
    if power_of_two:
        want = 2.0 ** np.ceil(np.log2(np.maximum(want * (1 - ULP), 2.0**-200)))
    want = np.where(want >= 2.0**-126, want, 1.0)
    np.testing.assert_array_equal(np.isnan(scale), ~finite)
    np.testing.assert_allclose(scale[finite], want[finite], rtol=ULP)
    ratio = np.clip(x[finite] / scale[finite, None], -448, 448)
    np.testing.assert_array_equal(
        np.float32(values[finite]), np.float32(ratio.astype(ml_dtypes.float8_e4m3fn))
    )
    np.testing.assert_array_equal(np.float32(values[~finite]), 0)


def odd_rows():
    """[40, 256]: wide ranges, zeros, denormals, the largest and smallest numbers, Inf, NaN."""
    x = normal(0, 40, 256, spread=4.0)
    x[3] = 0
    x[4, :128] = 0
    x[5] = 1e-40
    x[6], x[6, 7] = 0, 2.0**-126
    x[7], x[7, 200] = 1, 3e38
    x[8] *= 1e-36
    x[9, 5], x[10, 200], x[11, 255] = np.inf, -np.inf, np.nan
    x[12] = 448.0 * 2.0**3
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("block", "power_of_two", "dtype"),
    [(128, False, jnp.float32), (128, True, jnp.bfloat16), (256, True, jnp.float32)],
)
def test_tiles_and_transpose(backend, block, power_of_two, dtype):
    x = jnp.asarray(odd_rows(), dtype)
    options = dict(block=block, power_of_two=power_of_two, implementation=backend)
    both = jax.jit(functools.partial(quantize_both, **options))
    straight, turned = both(x)
    x = np.float32(x)
    check(x.reshape(-1, block), straight.values.reshape(-1, block), straight.scale, power_of_two)
    filled = np.pad(x, ((0, block - len(x)), (0, 0)))
    check(filled.T, turned.values, turned.scale, power_of_two)
    alone = [f(x, **options) for f in (quantize_tiles, quantize_transposed)]
    if dtype == jnp.float32:
        for one, pair in zip(alone, (straight, turned), strict=True):
            np.testing.assert_array_equal(np.float32(one.values), np.float32(pair.values))
            np.testing.assert_array_equal(one.scale, pair.scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks(backend):
    w = normal(1, 2, 256, 384, spread=2.0)
    w[1, :128, :128] = 0
    w[0, 128, 300] = np.nan
    out = quantize_blocks(jnp.asarray(w), implementation=backend)
    assert out.values.shape == w.shape
    assert out.scale.shape == (2, 2, 3)
    cut = lambda a: np.asarray(a).reshape(2, 2, 128, 3, 128).swapaxes(2, 3).reshape(12, -1)  # noqa: E731
    check(cut(w), cut(out.values), out.scale)


def test_blocks_are_a_checkpoints():
    """The same format as `r1jax.ops.quant`'s, to the ulp of the scale that XLA's division costs."""
    w = normal(2, 256, 128)
    w[128:] = 0
    ours, (values, scale) = quantize_blocks(w), quantise(w)
    np.testing.assert_allclose(ours.scale, scale, rtol=ULP)
    equal = np.asarray(ours.scale) == scale
    assert np.mean(np.float32(ours.values) == np.float32(values)) > 0.99
    assert equal[1].all()
    np.testing.assert_allclose(of_blocks(ours, 128), dequantise(values, scale), rtol=2 * HALF_STEP)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_after_the_last_row_is_not_read(backend):
    x = normal(3, 40, 128)
    dirty = x.copy()
    dirty[20:] = np.nan
    x[20:] = 0
    quantize = jax.jit(functools.partial(quantize_both, implementation=backend))
    for got, want in zip(
        jax.tree.leaves(quantize(dirty, rows=jnp.int32(20))),
        jax.tree.leaves(quantize_both(x, implementation=XLA)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.float32(got), np.float32(want))


@pytest.mark.slow
@hypothesis.given(st.integers(1, 70), st.integers(1, 3), st.booleans(), st.integers(0, 2**31))
def test_random_shapes_are_alike_on_all_backends(m, tiles, power_of_two, seed):
    x = normal(seed, m, 128 * tiles, spread=3.0)
    options = dict(power_of_two=power_of_two)
    want = quantize_tiles(x, implementation=XLA, **options)
    got = quantize_tiles(x, implementation=TPU, **options)
    check(x.reshape(-1, 128), want.values.reshape(-1, 128), want.scale, power_of_two)
    np.testing.assert_array_equal(np.float32(got.values), np.float32(want.values))
    np.testing.assert_array_equal(got.scale, want.scale)
    largest = np.repeat(np.float64(want.scale), 128, 1) * 448
    assert (np.abs(of_tiles(want, 128) - x) <= HALF_STEP * np.abs(x) + largest * 2.0**-18).all()


def test_the_reference_has_any_block():
    x = normal(4, 6, 48)
    out = quantize_tiles(x, block=16, implementation="xla")
    check(x.reshape(-1, 16), out.values.reshape(-1, 16), out.scale)
    with pytest.raises(Unsupported, match="block=16"):
        quantize_tiles(x, block=16, implementation=TPU)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_tiles(jnp.ones((4, 100))), r"\(4, 100\): 100 is not a multiple of block"),
        (lambda: quantize_blocks(jnp.ones((128, 100))), r"\(128, 100\): 100 is not a multiple"),
        (lambda: quantize_blocks(jnp.ones((100, 128))), r"\(100, 128\): 100 is not a multiple"),
        (lambda: quantize_tiles(jnp.ones((4, 128), jnp.int8)), "int8, expected one of bfloat16"),
        (lambda: quantize_tiles(jnp.ones((4, 128), jnp.float16)), "float16"),
        (lambda: quantize_tiles(jnp.ones(128)), r"x of shape \(128,\): expected \[M, K\]"),
        (lambda: quantize_tiles(jnp.ones((4, 128)), block=0), "block=0"),
        (
            lambda: jax.grad(lambda x: quantize_tiles(x).scale.sum())(jnp.ones((4, 128))),
            "no derivative",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kernel_that_is_asked_for_is_not_replaced():
    with pytest.raises(Unsupported, match="needs a TPU"):
        quantize_tiles(jnp.ones((4, 128)), implementation="tpu")
    with pytest.raises(Unsupported, match="VMEM"):  # 227 KiB: a GPU's
        quantize_tiles(jnp.ones((256, 4096)), implementation=Backend("tpu", "h100"))
