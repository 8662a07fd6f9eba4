# SPDX-License-Identifier: Apache-2.0
"""RMSNorm against numpy, and its statistics in float32 whatever the input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops.norm import rms_norm

# A dozen float32 operations.
FLOAT32 = 2e-6
# A float32 finite difference with steps of 1e-2 on numbers of order 1.
DIFFERENCE = 2e-3


def reference(x, weight, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_is_the_formula(scale):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 2, 5)) * scale).astype(np.float32)
    weight = rng.normal(size=5).astype(np.float32)
    for eps in (1e-6, 0.1):
        np.testing.assert_allclose(
            rms_norm(x, weight, eps), reference(x, weight, eps), rtol=FLOAT32
        )


def test_zero_rows_stay_zero():
    out, back = jax.vjp(lambda x: rms_norm(x, jnp.ones(4)), jnp.zeros((1, 4)))
    assert not out.any()
    assert jnp.isfinite(back(jnp.ones_like(out))[0]).all()


def test_bfloat16_is_rounded_once():
    """The squares of 4,096 bfloat16 numbers lose their tail when they are summed in bfloat16."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 4096)) + 3.0, jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=4096), jnp.float32)
    out = rms_norm(x, weight)
    assert out.dtype == jnp.bfloat16
    exact = jnp.asarray(reference(x, np.asarray(weight), 1e-6), jnp.bfloat16)
    # A float32 result next to a rounding boundary may fall to either side: one place in 128.
    np.testing.assert_allclose(
        out.astype(jnp.float32), exact.astype(jnp.float32), rtol=2**-7, atol=0
    )
    assert (out != exact).mean() < 1e-3


def test_gradient_by_differences():
    rng = np.random.default_rng(2)
    x, direction, cotangent = rng.normal(size=(3, 6)).astype(np.float32)
    weight = rng.normal(size=6).astype(np.float32)
    f = lambda x: float(reference(x, weight, 1e-6) @ cotangent)  # noqa: E731
    slope = (f(x + 1e-4 * direction) - f(x - 1e-4 * direction)) / 2e-4
    gradient = jax.grad(lambda x: rms_norm(x, weight) @ cotangent)(x)
    np.testing.assert_allclose(gradient @ direction, slope, rtol=DIFFERENCE)
