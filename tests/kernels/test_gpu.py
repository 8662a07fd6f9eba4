# SPDX-License-Identifier: Apache-2.0
"""Hopper kernels: they lower for CUDA, are right where JAX can simulate them, and on the chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Backend, Unsupported, _compat
from pallas_kernels.fp8_grouped_matmul import (
    fp8_grouped_dgrad,
    fp8_grouped_fprop,
    fp8_grouped_linear,
    fp8_grouped_wgrad,
)
from pallas_kernels.fp8_matmul import fp8_dgrad, fp8_fprop, fp8_linear, fp8_wgrad
from pallas_kernels.fp8_quantize import (
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
)
from tests.kernels.conformance import FLOAT32_ERROR, XLA, error, normal, of_blocks, of_tiles

HOPPER = Backend("gpu", "h100")
# A tensor core keeps some 14 bits of the sum of one `wgmma`: 2^-14 with room for how sums grow.
CHIP_ERROR = 2e-4
SIMULATED = Backend("gpu", "h100", interpret=True)
simulated = pytest.mark.skipif(
    _compat.gpu_interpret_params() is None, reason="this JAX does not simulate Mosaic GPU"
)


def lowered(call, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("mosaic_gpu_v2") or text.count("mosaic_gpu")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_the_layer_lowers_for_cuda(dtype):
    """Forward and backward at V3's shape: six kernels of quantisation, three products."""

    def both_ways(x, w, dy):
        y, pull = jax.vjp(lambda x, w: fp8_linear(x, w, implementation=HOPPER), x, w)
        return y, pull(dy)

    m, k, n = 4096, 7168, 18432
    kernels = lowered(both_ways, ((m, k), dtype), ((k, n), jnp.float32), ((m, n), dtype))
    assert kernels >= 8


def test_quantisation_lowers_for_cuda_with_odd_sizes():
    options = dict(power_of_two=True, implementation=HOPPER)
    assert lowered(lambda x: quantize_both(x, **options), ((300, 384), jnp.float32)) >= 2


@simulated
def test_quantisation_is_the_references():
    x = normal(0, 70, 256, spread=3.0)
    x[3], x[5, 7], x[6, 200] = 0, np.nan, np.inf
    want = quantize_both(x, power_of_two=True, implementation=XLA)
    got = quantize_both(x, power_of_two=True, implementation=SIMULATED)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.scale, other.scale)
        # The simulation's quotients are an ulp off now and then: a tie falls the other way.
        different = np.float32(one.values) != np.float32(other.values)
        assert different.mean() < 1e-3
    w = normal(1, 2, 128, 256)
    for one, other in zip(
        quantize_blocks(w, implementation=SIMULATED),
        quantize_blocks(w, implementation=XLA),
        strict=True,
    ):
        np.testing.assert_array_equal(np.float32(one), np.float32(other))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_the_experts_layer_lowers_for_cuda(dtype):
    """Forward and backward at V3's shape on one of eight devices: three products of groups."""

    def both_ways(x, w, dy, sizes):
        call = lambda x, w: fp8_grouped_linear(x, w, sizes, tail=True, implementation=HOPPER)  # noqa: E731
        y, pull = jax.vjp(call, x, w)
        return y, pull(dy)

    m, k, n, e = 4096, 7168, 2048, 32
    arrays = ((m, k), dtype), ((e, k, n), jnp.float32), ((m, n), dtype), ((e,), jnp.int32)
    assert lowered(both_ways, *arrays) >= 8


def products(x, w, dy, block, implementation):
    """The errors of fprop, dgrad and wgrad against float64 of the quantised operands."""
    options = dict(block=block, implementation=XLA)
    x, w, dy = (
        quantize_tiles(x, **options),
        quantize_blocks(w, **options),
        quantize_tiles(dy, **options),
    )
    options = dict(block=block, dtype=jnp.float32, implementation=implementation)
    wide = of_blocks(w, block)
    turned = quantize_tiles(normal(5, 40, dy.values.shape[1]), block=block, implementation=XLA)
    return (
        error(fp8_fprop(x, w, **options), of_tiles(x, block) @ wide),
        error(fp8_dgrad(dy, w, **options), of_tiles(dy, block) @ wide.T),
        error(fp8_wgrad(turned, dy, **options), of_tiles(turned, block) @ of_tiles(dy, block).T),
    )


def grouped_products(m, sizes, implementation):
    """The same of ragged groups, against "xla"."""
    k, n, sizes = 256, 384, jnp.asarray(sizes)
    x, dy, w = normal(6, m, k), normal(7, m, n), normal(8, len(sizes), k, n)
    qx, qdy = (quantize_tiles(v, implementation=XLA) for v in (x, dy))
    xt, dyt = (quantize_transposed(v, implementation=XLA) for v in (x, dy))
    qw = quantize_blocks(w, implementation=XLA)
    both = [
        (
            fp8_grouped_fprop(qx, qw, sizes, tail=True, dtype=jnp.float32, implementation=i),
            fp8_grouped_dgrad(qdy, qw, sizes, tail=True, dtype=jnp.float32, implementation=i),
            fp8_grouped_wgrad(xt, dyt, sizes, dtype=jnp.float32, implementation=i),
        )
        for i in (implementation, XLA)
    ]
    assert not np.asarray(both[0][0])[int(sizes.sum()) :].any()  # the tail
    return [error(got, np.float64(want)) for got, want in zip(*both, strict=True)]


# The last has results of three warpgroups.
RAGGED = [(300, [0, 70, 130, 5]), (40, [3, 0, 20, 0]), (400, [1, 64, 0, 335]), (600, [70, 400])]


@simulated
@pytest.mark.slow
@pytest.mark.parametrize(("m", "sizes"), RAGGED)
def test_products_of_ragged_groups(m, sizes):
    assert max(grouped_products(m, sizes, SIMULATED)) <= FLOAT32_ERROR


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "sizes"), RAGGED)
def test_products_of_ragged_groups_on_a_gpu(m, sizes):
    assert max(grouped_products(m, sizes, "gpu")) <= CHIP_ERROR


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "k", "n"), [(300, 768, 384), (77, 256, 640), (512, 7168, 256)])
def test_products_on_a_gpu(m, k, n):
    """Rows and columns that results do not divide; the longest sums."""
    assert (
        max(products(normal(2, m, k), normal(3, k, n), normal(4, m, n), 128, "gpu")) <= CHIP_ERROR
    )


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("block", [128, 256])
def test_products_of_the_quantised_operands(block):
    x, w, dy = normal(2, 70, 256), normal(3, 256, 256), normal(4, 70, 256)
    assert max(products(x, w, dy, block, SIMULATED)) <= FLOAT32_ERROR


def test_what_the_kernels_cannot():
    with pytest.raises(Unsupported, match="block=64"):
        quantize_tiles(jnp.ones((64, 64)), block=64, implementation=HOPPER)
    with pytest.raises(Unsupported, match="block=256"):
        quantize_tiles(jnp.ones((64, 256)), block=256, implementation=HOPPER)
    xt, dyt = (quantize_tiles(normal(i, 192, 128), implementation=XLA) for i in (0, 1))
    with pytest.raises(Unsupported, match="k=192"):
        fp8_grouped_wgrad(xt, dyt, jnp.array([100]), implementation=HOPPER)
