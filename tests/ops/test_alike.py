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


def test_pieces_of_one_size_share_a_kernel_whatever_their_shape():
    def cut(x, y):
        return [jnp.sin(a).sum() + jnp.cos(b).sum() for a, b in pieces((x, y))]

    text = jax.jit(cut).lower(jnp.ones((2, 4, 16)), jnp.ones((2, 64))).compile().as_text()
    assert len(set(re.findall(r"= (\S+) dynamic-slice\(", text))) == 1


def test_nothing_has_no_pieces():
    assert pieces({"a": jnp.zeros((0, 3)), "b": jnp.zeros((0, 2, 2))}) == []


def test_pieces_may_be_empty():
    first, second = pieces([jnp.zeros((2, 0)), jnp.arange(2)])
    assert first[0].shape == (0,)
    assert int(second[1]) == 1


def test_arrays_that_devices_share_are_cut_as_they_lie():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    lies = jax.NamedSharding(mesh, jax.P(None, None, "x"))
    x = jax.device_put(jnp.arange(96.0).reshape(3, 4, 8), lies)
    for i, piece in enumerate(jax.jit(pieces)(x)):
        np.testing.assert_array_equal(piece, np.asarray(x)[i])
