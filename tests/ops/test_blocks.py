# SPDX-License-Identifier: Apache-2.0
"""Weights that stay in blocks: what a pass makes of them each time, and those of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops.blocks import Blocks, in_blocks
from r1jax.ops.experts import fp8_experts
from r1jax.ops.linear import FP8, linear, seen
from r1jax.ops.quant import BLOCK, BlockScaled, Layout, quantise

RECIPES = {"plain": FP8(4, False), "powers": FP8(8, True)}


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "inputs"),
    [
        ("btd,df->btf", (2, 3, 10), (10, 6), 1),
        ("btd,dhk->bthk", (2, 3, 8), (8, 3, 5), 1),
        ("bthv,hvd->btd", (2, 3, 3, 6), (3, 6, 7), 2),
    ],
)
def test_products_are_those_of_the_weight(equation, x_shape, w_shape, inputs, dtype, recipe):
    fp8 = RECIPES[recipe]
    x, w = drawn(0, x_shape, w_shape)
    x, held = x.astype(dtype), in_blocks(w, w.ndim, inputs, fp8.block)
    assert (held.shape, held.ndim, held.size) == (w.shape, w.ndim, w.size)
    found, wanted = (linear(equation, x, v, fp8) for v in (held, w))
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(seen(held, fp8), seen(w, fp8, axes=inputs))


def test_a_stack_is_each_of_its_layers():
    (w,) = drawn(1, (3, 2, 9, 5))
    whole = in_blocks(w, 2, 1, 4)
    assert whole.values.shape == (3, 2, 12, 8)
    assert whole.shape == w.shape
    for i in np.ndindex(3, 2):
        one = in_blocks(w[i], 2, 1, 4)
        part = jax.tree.map(lambda x, i=i: x[i], whole)
        assert part.shape == (9, 5)
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_are_those_of_the_weights(recipe):
    """An expert without a row and rows without an expert included."""
    fp8 = RECIPES[recipe]
    index = jnp.array([[0, 4], [4, 4], [3, 0], [4, 3], [0, 4], [4, 4]], jnp.int32)
    x, weight, *weights = drawn(2, (6, 6), (6, 2), (4, 6, 5), (4, 6, 5), (4, 5, 6))
    held = tuple(in_blocks(w, 2, 1, fp8.block) for w in weights)
    run = lambda weights: fp8_experts(x, index, weight, weights, fp8=fp8)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(run)(held), jax.jit(run)(tuple(weights)))


def test_they_have_no_gradient_and_activations_have():
    x, w = drawn(3, (2, 8), (8, 4))
    held = in_blocks(w, 2, 1, 4)

    def loss(x, w):
        return (linear("bd,df->bf", x, w, RECIPES["plain"]) ** 2).sum()

    np.testing.assert_array_equal(*(jax.jit(jax.grad(loss))(x, w) for w in (w, held)))
    for call in (jax.grad(loss, argnums=1), jax.jit(jax.grad(loss, argnums=(0, 1)))):
        with pytest.raises(ValueError, match="no derivative"):
            call(x, held)


def test_only_the_whole_can_be_read():
    held = in_blocks(*drawn(4, (8, 4)), 2, 1, 4)
    assert held[...] is held
    with pytest.raises(ValueError, match="read whole"):
        held[0]


# Matrices of V3's kinds, smaller: rank 64, heads of 128 + 128, a rotated part of 32.
STORED = {
    "plain": (Layout((256, 384)), 1, True),
    "ragged": (Layout((200, 300)), 1, True),
    "output": (Layout((300, 256), (2, 128, 300)), 2, True),
    "latent": (Layout((160, 256), None, (0, 128)), 1, True),
    "rotated": (Layout((160, 256), None, (128, 160)), 1, True),
    "keys": (Layout((512, 64), (64, 2, 256), (0, 128)), 1, True),
    "values": (Layout((512, 64), (64, 2, 256), (128, 256)), 1, True),
    "halves": (Layout((100, 512), swapped=True), 1, True),
    "narrow heads": (Layout((256, 64), (64, 2, 128), (64, 128)), 1, False),
    "rotated across": (Layout((160, 256), None, (100, 160)), 1, False),
    "odd halves": (Layout((100, 300), swapped=True), 1, False),
}


@pytest.mark.parametrize("name", STORED)
def test_blocks_of_a_checkpoint_are_taken_as_they_are(name):
    """Where they do not lie across ours; then values are what stands for them, quantised anew."""
    layout, inputs, kept = STORED[name]
    (w,) = drawn(5, layout.matrix)
    # Scales that differ by more than an ulp: one block cannot be taken for another.
    w = np.asarray(w) * np.geomspace(1, 50, w.shape[0])[:, None] * np.geomspace(1, 9, w.shape[1])
    values, scale = quantise(w)
    # No value is as large as its scale allows: blocks made anew would be others.
    values = (values.astype(np.float32) / 1.3).astype(values.dtype)
    stored = BlockScaled(jnp.asarray(layout.apply(values))[None], jnp.asarray(scale)[None], layout)
    held = in_blocks(stored, len(layout.shape), inputs, BLOCK)
    assert isinstance(held, Blocks)
    assert held.shape == stored.shape
    wanted, found = (np.asarray(x.astype(jnp.float32)) for x in (stored, held))
    if kept:
        np.testing.assert_array_equal(found, wanted)
        assert set(np.asarray(held.scale).ravel()) <= set(scale.ravel())
    else:
        assert not np.array_equal(found, wanted)
        np.testing.assert_allclose(found, wanted, atol=np.abs(wanted).max() / 16)
    other = in_blocks(stored, len(layout.shape), inputs, 64)  # of another size: made anew
    np.testing.assert_allclose(
        np.asarray(other.astype(jnp.float32)), wanted, atol=np.abs(wanted).max() / 16
    )
