# SPDX-License-Identifier: Apache-2.0
"""The three FP8 products and the layer against float64, on every backend; what is refused."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Unsupported, shapes
from pallas_kernels.fp8_matmul import fp8_dgrad, fp8_fprop, fp8_linear, fp8_wgrad
from pallas_kernels.fp8_matmul import tpu as kernel
from pallas_kernels.fp8_quantize import quantize_blocks, quantize_tiles, quantize_transposed
from pallas_kernels.scaled import Scaled
from tests.kernels.conformance import (
    BFLOAT16_ERROR,
    FLOAT32_ERROR,
    FP8_BACKENDS,
    TPU,
    TPU_FP8,
    XLA,
    error,
    normal,
    of_blocks,
    of_tiles,
)

END_TO_END = 0.04  # E4M3 of normal numbers: 2.6 % an operand, two operands


def products(x, w, dy, options):
    """((y, dx, dw) computed, the same in float64) of the quantised operands."""
    quantised = dict(block=options["block"], implementation=XLA)
    qx, qdy = quantize_tiles(x, **quantised), quantize_tiles(dy, **quantised)
    xt, dyt = quantize_transposed(x, **quantised), quantize_transposed(dy, **quantised)
    qw, block = quantize_blocks(w, **quantised), options["block"]
    got = fp8_fprop(qx, qw, **options), fp8_dgrad(qdy, qw, **options), fp8_wgrad(xt, dyt, **options)
    w = of_blocks(qw, block)
    return got, (
        of_tiles(qx, block) @ w,
        of_tiles(qdy, block) @ w.T,
        of_tiles(xt, block) @ of_tiles(dyt, block).T,
    )


@pytest.mark.parametrize("backend", FP8_BACKENDS)
@pytest.mark.parametrize(
    ("size", "block", "dtype"),
    [
        (shapes.MATMUL["tiny"], 128, jnp.float32),
        ((1, 256, 128), 128, jnp.bfloat16),
        pytest.param((300, 512, 256), 256, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_products_of_the_quantised_operands(backend, size, block, dtype):
    m, k, n = size
    x, w, dy = normal(0, m, k, spread=2.0), normal(1, k, n, spread=1.0), normal(2, m, n)
    options = dict(block=block, dtype=dtype, implementation=backend)
    bound = BFLOAT16_ERROR if dtype == jnp.bfloat16 else FLOAT32_ERROR
    for got, want in zip(*products(x, w, dy, options), strict=True):
        assert got.dtype == dtype
        assert error(got, want) <= bound


@pytest.mark.slow
@hypothesis.given(
    st.integers(1, 140), st.integers(1, 3), st.integers(1, 2), st.floats(0, 4), st.integers(0, 99)
)
def test_random_shapes(m, k, n, spread, seed):
    x, w = normal(seed, m, 128 * k, spread=spread), normal(seed + 1, 128 * k, 128 * n)
    x[seed % m] = 0
    x, w = quantize_tiles(x, implementation=XLA), quantize_blocks(w, implementation=XLA)
    want = of_tiles(x, 128) @ of_blocks(w, 128)
    for backend in (XLA, TPU):
        got = fp8_fprop(x, w, dtype=jnp.float32, implementation=backend)
        assert error(got, want) <= FLOAT32_ERROR


@pytest.mark.parametrize("backend", FP8_BACKENDS)
def test_sums_over_7168_are_float32(backend):
    """What a bfloat16 sum across the 56 blocks would cost is not paid."""
    x = quantize_tiles(normal(3, 16, 7168), implementation=XLA)
    w = quantize_blocks(normal(4, 7168, 128), implementation=XLA)
    want = of_tiles(x, 128) @ of_blocks(w, 128)
    narrow = jnp.zeros(want.shape, jnp.bfloat16)
    for i in range(0, 7168, 128):
        part = of_tiles(x, 128)[:, i : i + 128] @ of_blocks(w, 128)[i : i + 128]
        narrow = (narrow.astype(jnp.float32) + np.float32(part)).astype(jnp.bfloat16)
    got = error(fp8_fprop(x, w, dtype=jnp.float32, implementation=backend), want)
    assert got <= FLOAT32_ERROR
    assert error(narrow, want) >= 30 * got


@pytest.mark.parametrize("backend", FP8_BACKENDS)
@pytest.mark.parametrize(
    ("size", "power_of_two", "dtype"),
    [((40, 256, 128), False, jnp.float32), ((2, 9, 144, 72), True, jnp.bfloat16)],
)
def test_linear_and_its_gradients(backend, size, power_of_two, dtype):
    """K and N that the block does not divide, leading axes, a float32 master weight."""
    *lead, k, n = size
    x, w, dy = normal(5, *lead, k), normal(6, k, n), normal(7, *lead, n)
    layer = functools.partial(fp8_linear, power_of_two=power_of_two, implementation=backend)
    y, pull = jax.vjp(jax.jit(layer), jnp.asarray(x, dtype), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy, dtype))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    rows, grads = x.reshape(-1, k).astype(np.float64), dy.reshape(-1, n).astype(np.float64)
    bound = END_TO_END + (BFLOAT16_ERROR if dtype == jnp.bfloat16 else 0)
    assert error(y.reshape(-1, n), rows @ w) <= bound
    assert error(dx.reshape(-1, k), grads @ w.T) <= bound
    assert error(dw, rows.T @ grads) <= bound
    options = dict(block=128, dtype=jnp.float32, implementation=XLA)
    if dtype == jnp.float32 and not power_of_two:  # exactly the recipe's products, nothing more
        for got, want in zip((y, dx, dw), products(x, w, dy, options)[1], strict=True):
            assert error(got, want) <= FLOAT32_ERROR


@pytest.mark.parametrize("backend", FP8_BACKENDS)
def test_blocks_made_before_are_read_and_the_weight_is_not(backend):
    x, w, dy = normal(5, 24, 200), normal(6, 200, 72), normal(7, 24, 72)
    layer = functools.partial(fp8_linear, implementation=backend)
    blocks = quantize_blocks(np.pad(w, ((0, 56), (0, 56))), implementation=XLA)
    y, pull = jax.vjp(layer, x, w)
    made, pulled = jax.vjp(lambda x, w: layer(x, w, blocks=blocks), x, np.full_like(w, np.nan))
    for got, want in zip((made, *pulled(dy)), (y, *pull(dy)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_is_kept_for_the_backward_pass_is_fp8():
    x, w = jnp.ones((256, 512), jnp.bfloat16), jnp.ones((512, 256))
    _, pull = jax.eval_shape(lambda x, w: jax.vjp(fp8_linear, x, w), x, w)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    assert kept <= (x.size + w.size) * 1.05  # a byte each, and the scales


def test_a_tile_with_nan_spoils_its_row_and_no_other():
    x = normal(8, 4, 256)
    x[2, 130] = np.inf
    for backend in (XLA, TPU):
        y = fp8_linear(x, normal(9, 256, 128), implementation=backend)
        assert np.isnan(y[2]).all()
        assert np.isfinite(y[np.array([0, 1, 3])]).all()


@pytest.mark.parametrize(
    "backend", [pytest.param(XLA, id="xla"), pytest.param(TPU_FP8, id="tpu7x")]
)
@pytest.mark.parametrize("made", [False, True])
def test_under_scan_remat_and_shard_map(backend, made):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    x, w = normal(10, 8, 128), normal(11, 2, 128, 128) / 11

    @jax.checkpoint
    def layer(x, w):
        blocks = quantize_blocks(jax.lax.stop_gradient(w), implementation=backend) if made else None
        return fp8_linear(x, w, blocks=blocks, implementation=backend), None

    checked = backend == XLA  # JAX then adds the sum over devices; simulation cannot be checked

    def local(x, w):
        loss = lambda w: jax.lax.scan(layer, x, w)[0].sum()  # noqa: E731
        dw = jax.grad(loss)(w)
        return dw if checked else jax.lax.psum(dw, "data")

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec(), check_vma=checked
    )
    got = jax.jit(sharded)(x, w)
    h = np.float64(x) @ w[0]
    dw = np.float64(x).T @ (np.ones((8, 1)) * w[1].sum(1)), h.T @ np.ones((8, 128))
    assert error(got, np.stack(dw)) <= 2 * END_TO_END  # the second layer sees the first's error


ONES = Scaled(jnp.ones((4, 256), jnp.float8_e4m3fn), jnp.ones((4, 2)))
WEIGHT = Scaled(jnp.ones((256, 128), jnp.float8_e4m3fn), jnp.ones((2, 1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fp8_fprop(ONES._replace(scale=jnp.ones((4, 1))), WEIGHT),
            r"x: values \(4, 256\).*need scale \(4, 2\), got \(4, 1\)",
        ),
        (
            lambda: fp8_fprop(ONES, WEIGHT._replace(scale=jnp.ones((2, 2)))),
            r"w: values \(256, 128\).*need scale \(2, 1\), got \(2, 2\)",
        ),
        (lambda: fp8_fprop(ONES, WEIGHT, block=96), r"256 is not a multiple of block=96"),
        (lambda: fp8_dgrad(ONES, WEIGHT), r"dy \(4, 256\) and w \(256, 128\) do not contract"),
        (
            lambda: fp8_wgrad(ONES, Scaled(ONES.values[:, :128], ONES.scale[:, :1])),
            r"xt \(4, 256\) and dyt \(4, 128\) do not contract",
        ),
        (lambda: fp8_fprop(ONES._replace(values=jnp.ones((4, 256))), WEIGHT), "values float32"),
        (lambda: fp8_fprop(ONES, WEIGHT, dtype=jnp.float16), "the result has dtype float16"),
        (lambda: fp8_linear(jnp.ones((4, 8)), jnp.ones((9, 8))), r"x \(4, 8\) and w \(9, 8\)"),
        (lambda: fp8_linear(jnp.ones((4, 8), jnp.int32), jnp.ones((8, 8))), "x has dtype int32"),
        (
            lambda: fp8_linear(jnp.ones((4, 8)), jnp.ones((8, 8)), blocks=WEIGHT),
            r"blocks \(256, 128\) are not of w, filled up \(128, 128\)",
        ),
        (
            lambda: fp8_linear(
                jnp.ones((4, 256)),
                jnp.ones((256, 128)),
                blocks=WEIGHT._replace(scale=jnp.ones((1, 1))),
            ),
            r"need scale \(2, 1\), got \(1, 1\)",
        ),
        (
            lambda: jax.grad(lambda s: fp8_fprop(ONES._replace(scale=s), WEIGHT).sum())(ONES.scale),
            "differentiate fp8_linear",
        ),
        (lambda: kernel.check_tiles((100, 128, 128), (256, 128, 256), 128), "tm and tn must be"),
        (lambda: kernel.check_tiles((128, 128, 384), (256, 128, 512), 128), "tk a multiple"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kernel_that_is_asked_for_is_not_replaced():
    with pytest.raises(Unsupported, match="needs a TPU"):
        fp8_fprop(ONES, WEIGHT, implementation="tpu")
    with pytest.raises(Unsupported, match="block=64"):
        fp8_linear(jnp.ones((4, 64)), jnp.ones((64, 64)), block=64, implementation=TPU)
