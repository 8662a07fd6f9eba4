# SPDX-License-Identifier: Apache-2.0
"""Weights that cross devices in E4M3: the blocks of the whole weight, and its gradient."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from r1jax.config import MeshConfig
from r1jax.ops.blocks import in_blocks
from r1jax.ops.linear import FP8, linear
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.weights import blocks_spec, crossed, cut_of
from r1jax.sharding import local, spec

BLOCK, FLOAT32 = 16, 2e-5
# How a weight lies: its logical axes, how many of its own are contracted, its shape. Of 160 values
# pieces end with blocks where there are two of them, in blocks where there are four or eight.
WEIGHTS = {
    "rows": (("embed", "mlp"), 1, (160, 40)),
    "columns": (("mlp", "embed"), 1, (40, 160)),
    "heads": (("latent", "heads", None), 1, (160, 4, 9)),
    "out": (("heads", None, "embed"), 2, (4, 9, 160)),
    "experts": (("expert", "embed", "mlp"), 1, (4, 160, 40)),
    "experts' columns": (("expert", "mlp", "embed"), 1, (4, 40, 160)),
}
MESHES = {
    "2": MeshConfig(fsdp=2),
    "4": MeshConfig(fsdp=4),
    "8": MeshConfig(fsdp=8),
    "2 x 2 x 2": MeshConfig(fsdp=2, expert=2, context=2),
}
RECIPE = FP8(BLOCK, power_of_two=False)


def drawn(shape):
    """A weight with a block of zeros, and values of all sizes beside each other."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 9, shape)
    w[..., :BLOCK] = 0
    return w.astype(np.float32)


def on(mesh):
    mesh = MESHES[mesh]
    return jax.set_mesh(make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.expert * mesh.context]))


def made(w, axes, inputs):
    """(values, scale) of the blocks that every device holds of the whole weight."""

    def run(part):
        how = cut_of(axes, inputs, BLOCK)
        assert how is not None
        found = crossed(part, how)
        own = len(axes) - axes.count("expert")
        assert (found.shape[-own:], found.inputs) == (w.shape[-own:], inputs)
        return found.values, found.scale

    first = spec(axes[0], None, None) if axes[0] == "expert" else spec(None, None)
    return jax.jit(local(run, (spec(*axes),), (first, first)))(w)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_blocks_are_those_of_the_whole_weight(weight, mesh):
    axes, inputs, shape = WEIGHTS[weight]
    w = drawn(shape)
    own = len(axes) - axes.count("expert")
    whole = jax.jit(in_blocks, static_argnums=(1, 2, 3))(w, own, inputs, BLOCK)
    with on(mesh):
        values, scale = made(w, axes, inputs)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), whole.values.view(np.uint8))
    np.testing.assert_array_equal(scale, whole.scale)


@pytest.mark.parametrize("mesh", ["2", "8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen_in_its_block_alone(bad, mesh):
    w = drawn((160, 40))
    w[21, 33] = bad
    with on(mesh):
        values, scale = made(w, ("embed", "mlp"), 1)
    assert np.argwhere(np.isnan(scale)).tolist() == [[1, 2]]
    assert np.isfinite(values.astype(np.float32)).all()


@pytest.mark.parametrize("mesh", ["2", "8", "2 x 2 x 2"])
@pytest.mark.parametrize("weight", ["rows", "heads", "out"])
def test_the_gradient_comes_back_in_parts(weight, mesh):
    """Every device multiplies the same rows: the sum of what they bring is so many times one's."""
    axes, inputs, shape = WEIGHTS[weight]
    w = drawn(shape)
    k = math.prod(shape[:inputs])
    x, given = drawn((24, k)), drawn((24, math.prod(shape[inputs:])))

    def loss(w, x, made):
        named = "abc"[: len(shape)]
        equation = f"t{named[:inputs]},{named}->t{named[inputs:]}"
        y = linear(equation, x.reshape(-1, *shape[:inputs]), made(w), RECIPE)
        return (y.reshape(given.shape) * given).sum()

    alone = jax.jit(jax.grad(lambda w, x: loss(w, x, lambda w: w), (0, 1)))(w, x)

    def run(part, x):
        how = cut_of(axes, inputs, BLOCK)
        return jax.grad(lambda w, x: loss(w, x, lambda w: crossed(w, how)), (0, 1))(part, x)

    with on(mesh):
        n = jax.sharding.get_mesh().size
        rows = spec(None, None)
        found = jax.jit(local(run, (spec(*axes), rows), (spec(*axes), rows)))(w, x)
    for f, e in zip(found, (alone[0] * n, alone[1]), strict=True):
        np.testing.assert_allclose(f, e, rtol=FLOAT32, atol=FLOAT32 * np.abs(e).max())


def test_what_is_stored_ends_with_blocks_or_is_not_stored():
    """Of what heads and hidden values are cut into; (K, N) whole, cut into four, into eight."""
    named = functools.partial(blocks_spec, inputs=1, block=BLOCK)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=4, fsdp=2))):
        assert named(("embed", "mlp"), (40, 128)) == PartitionSpec(None, "tensor")
        assert named(("mlp", "embed"), (128, 40)) == PartitionSpec("tensor", None)
        assert named(("latent", "heads", None), (40, 8, 8)) == PartitionSpec(None, "tensor")
        assert named(("layers", "expert", "embed", "mlp"), (40, 64)) == PartitionSpec(
            None, None, None, "tensor"
        )
        assert named(("embed", "mlp"), (40, 96)) is None
        assert named(("embed", "mlp"), (40, 60)) is None  # filled up there would be four blocks
        assert named(("embed", None, "heads"), (40, 2, 64)) is None  # not in one piece
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):
        assert named(("embed", "mlp"), (40, 60)) == PartitionSpec(None, None)


def test_what_is_not_cut_or_cut_otherwise_does_not_cross_so():
    ask = functools.partial(cut_of, inputs=1, block=BLOCK)
    found = {}

    def run(x):
        found["rows"] = ask(("embed", "mlp")) is not None
        found["not cut"] = ask((None, "mlp"))
        found["part of K"] = ask(("embed", None, "mlp"), inputs=2)
        found["in the middle"] = ask((None, "embed", "mlp"))
        return x

    assert ask(("embed", "mlp")) is None  # no region
    with on("2"):
        jax.eval_shape(local(run, (spec("embed"),), spec("embed")), jnp.zeros(8))
    assert found == {"rows": True, "not cut": None, "part of K": None, "in the middle": None}


@pytest.mark.parametrize(
    ("mesh", "float32"),
    [("2", 160 * 48 // BLOCK**2), ("4", 160 * 48 // BLOCK)],
    ids=["scales", "largest of rows"],
)
def test_four_bytes_a_value_do_not_cross(mesh, float32):
    """In the compiled program, with its gradient; a CPU sends E4M3 as float16."""
    w, x = drawn((160, 48)), drawn((24, 160))

    def run(part, x):
        how = cut_of(("embed", "mlp"), 1, BLOCK)
        of = lambda w: linear("tk,kn->tn", x, crossed(w, how), RECIPE)  # noqa: E731
        y, back = jax.vjp(of, part)
        return back(y)[0]

    with on(mesh):
        where = spec("embed", "mlp"), spec(None, None)
        text = jax.jit(local(run, where, where[0])).lower(w, x).compile().as_text()
    sent = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    sizes = {dtype: math.prod(map(int, shape.split(","))) for dtype, shape in sent}
    assert sizes.pop("f32") == float32
    assert list(sizes.values()) == [160 * 48]
