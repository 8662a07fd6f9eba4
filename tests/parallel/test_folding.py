# SPDX-License-Identifier: Apache-2.0
"""Folded rows: where positions go and that they come back; attention is as much work for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import MeshConfig
from r1jax.parallel.folding import all_positions, folded, straight, stretches
from r1jax.parallel.mesh import make_mesh
from r1jax.sharding import local, spec


def on_ranks(fn, x, n, out=("batch", "length")):
    """`fn` of the pieces that n devices have of x."""
    with jax.set_mesh(make_mesh(MeshConfig(context=n, data=8 // n))):
        return np.asarray(jax.jit(local(fn, (spec("batch", "length"),), spec(*out)))(x))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_each_device_has_a_stretch_from_the_front_and_one_from_the_back(n):
    row = np.broadcast_to(np.repeat(np.arange(2 * n), 3), (8, 6 * n)).astype(np.float32)
    lies = on_ranks(folded, row, n)
    ends = [[i] * 3 + [2 * n - 1 - i] * 3 for i in range(n)]
    np.testing.assert_array_equal(lies, np.broadcast_to(np.concatenate(ends), row.shape))
    np.testing.assert_array_equal(on_ranks(lambda x: straight(folded(x)), row, n), row)
    whole = on_ranks(lambda x: all_positions(folded(x)), row, n, out=("batch", None))
    np.testing.assert_array_equal(whole, row)

    def numbers(x):
        return jnp.broadcast_to(jnp.repeat(jnp.array(stretches(6)), 3), x.shape)

    np.testing.assert_array_equal(on_ranks(numbers, row, n), lies)


def test_gradients_come_back_to_their_positions():
    row = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)

    def pulled(x):
        given = folded(x) * 2 + 1
        return jax.vjp(folded, x)[1](given)[0] - (2 * x + 1)

    np.testing.assert_allclose(on_ranks(pulled, row, 4), 0, atol=1e-6)


def test_pieces_that_cannot_be_halved_lie_straight():
    row = np.arange(8 * 12.0).reshape(8, 12)
    np.testing.assert_array_equal(on_ranks(folded, row, 4), row)
    whole = on_ranks(all_positions, row, 4, out=("batch", None))
    np.testing.assert_array_equal(whole, row)
    assert stretches(3) == (0,)
