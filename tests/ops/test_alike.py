# SPDX-License-Identifier: Apache-2.0
"""`ops.alike`: pieces of a tree, their gradient, and that equal pieces share kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.ops.alike import pieces


def test_pieces_are_the_places_of_the_leading_axis():
    tree = {"a": jnp.arange(12.0).reshape(3, 2, 2), "b": jnp.arange(3.0)}
    for i, piece in enumerate(pieces(tree)):
        jax.tree.map(lambda x, p, i=i: np.testing.assert_array_equal(x[i], p), tree, piece)


def test_gradient_is_put_together_in_order():
    x = jnp.arange(6.0).reshape(3, 2)
    scale = jnp.array([2.0, 3.0, 5.0])

    def loss(x):
        return sum((s * p**2).sum() for s, p in zip(scale, pieces(x), strict=True))

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), 2 * scale[:, None] * x)


def test_equal_pieces_share_a_kernel():
    def both(x):
        return [jnp.sin(p) for p in pieces(x)]

    text = jax.jit(both).lower(jnp.ones((2, 64))).compile().as_text()
    assert text.count("dynamic-slice(") == 2
    assert not re.search(r" slice\(", text)
