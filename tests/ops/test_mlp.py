# SPDX-License-Identifier: Apache-2.0
"""SwiGLU against numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.ops.mlp import gated, swiglu

# Three float32 products with sums of 6 terms of order 1.
FLOAT32 = 1e-5
# Three bfloat16 roundings of 8 bits in a row.
BFLOAT16 = 3e-2


def reference(x, w_gate, w_up, w_down):
    x, w_gate, w_up, w_down = (np.asarray(a, np.float64) for a in (x, w_gate, w_up, w_down))
    gate = x @ w_gate
    return (gate / (1 + np.exp(-gate)) * (x @ w_up)) @ w_down


def arguments(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (2, 3, 4), (4, 6), (4, 6), (6, 4)
    return [rng.normal(size=s).astype(dtype) for s in shapes]


def test_swiglu_is_the_formula():
    args = arguments()
    np.testing.assert_allclose(swiglu(*args), reference(*args), rtol=FLOAT32, atol=FLOAT32)
    swapped = reference(args[0], args[2], args[1], args[3])  # the gate is the activated one
    assert np.abs(np.asarray(swiglu(*args)) - swapped).max() > 0.1


def test_weights_are_cast_to_the_activations():
    args = arguments()
    out = swiglu(jnp.asarray(args[0], jnp.bfloat16), *args[1:])
    assert out.dtype == jnp.bfloat16
    expected = reference(*args)
    np.testing.assert_allclose(
        out.astype(jnp.float32), expected, rtol=BFLOAT16, atol=BFLOAT16 * np.abs(expected).max()
    )


def test_the_gradient_written_down_is_that_of_the_formula():
    rng = np.random.default_rng(1)
    gate, up, given = (jnp.asarray(8 * rng.normal(size=(5, 7)), jnp.float32) for _ in range(3))
    got = jax.jit(lambda *x: jax.vjp(gated, *x)[1](given))(gate, up)
    want = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)[1](given)
    for one, exact in zip(got, want, strict=True):
        np.testing.assert_allclose(one, exact, rtol=FLOAT32, atol=FLOAT32)
