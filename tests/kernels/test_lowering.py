# SPDX-License-Identifier: Apache-2.0
"""TPU kernels become Mosaic programs at V3's shapes: a check that needs neither chip nor compiler.

`test_compile` hands the same programs to the real compiler, where it is installed.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import Backend, shapes
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_linear
from pallas_kernels.fp8_matmul import fp8_linear
from pallas_kernels.grouped_matmul import grouped_matmul

V5E = Backend("tpu", chip="v5e")


def kernels(layer, x, w, dy, *sizes):
    """How many kernels the forward and backward pass of a layer have."""

    def both_ways(x, w, dy, *sizes):
        y, pull = jax.vjp(lambda x, w: layer(x, w, *sizes), x, w)
        return y, pull(dy)

    arguments = [jax.ShapeDtypeStruct(*a) for a in (x, w, dy, *sizes)]
    lowered = jax.jit(both_ways).trace(*arguments).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("tpu_custom_call")


def test_layers_lower_for_tpu():
    m, k, n = shapes.MATMUL["v3-dense-up"]
    dense = ((m, k), jnp.bfloat16), ((k, n), jnp.float32), ((m, n), jnp.bfloat16)
    assert kernels(lambda x, w: fp8_linear(x, w, implementation=V5E), *dense) == 6
    m, k, n, e = shapes.GROUPED["v3-up"]
    x, w, dy = ((m, k), jnp.bfloat16), ((e, k, n), jnp.bfloat16), ((m, n), jnp.bfloat16)
    options = dict(tail=True, implementation=V5E)
    for layer, count in ((grouped_matmul, 3), (fp8_grouped_linear, 6)):
        call = lambda x, w, s, layer=layer: layer(x, w, s, **options)  # noqa: E731
        assert kernels(call, x, w, dy, ((e,), jnp.int32)) == count
