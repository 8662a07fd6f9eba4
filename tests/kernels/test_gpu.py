# SPDX-License-Identifier: Apache-2.0
"""Hopper kernels without a GPU: they lower for CUDA, and where JAX can simulate them are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Backend, Unsupported, _compat
from pallas_kernels.fp8_matmul import fp8_dgrad, fp8_fprop, fp8_linear, fp8_wgrad
from pallas_kernels.fp8_quantize import quantize_blocks, quantize_both, quantize_tiles
from tests.kernels.conformance import FLOAT32_ERROR, XLA, error, normal, of_blocks, of_tiles

HOPPER = Backend("gpu", "h100")
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


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("block", [128, 256])
def test_products_of_the_quantised_operands(block):
    x, w, dy = normal(2, 70, 256), normal(3, 256, 256), normal(4, 70, 256)
    options = dict(block=block, implementation=XLA)
    x, w, dy = (
        quantize_tiles(x, **options),
        quantize_blocks(w, **options),
        quantize_tiles(dy, **options),
    )
    options = dict(block=block, dtype=jnp.float32, implementation=SIMULATED)
    wide = of_blocks(w, block)
    assert error(fp8_fprop(x, w, **options), of_tiles(x, block) @ wide) <= FLOAT32_ERROR
    assert error(fp8_dgrad(dy, w, **options), of_tiles(dy, block) @ wide.T) <= FLOAT32_ERROR
    turned = quantize_tiles(normal(5, 40, 256), block=block, implementation=XLA)
    want = of_tiles(turned, block) @ of_tiles(dy, block).T
    assert error(fp8_wgrad(turned, dy, **options), want) <= FLOAT32_ERROR


def test_what_the_kernels_cannot():
    with pytest.raises(Unsupported, match="block=64"):
        quantize_tiles(jnp.ones((64, 64)), block=64, implementation=HOPPER)
    with pytest.raises(Unsupported, match="block=256"):
        quantize_tiles(jnp.ones((64, 256)), block=256, implementation=HOPPER)
