# SPDX-License-Identifier: Apache-2.0
"""Logical axes on no mesh, Auto meshes and Explicit meshes; the model's numbers do not notice."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from r1jax.nn.transformer import Transformer
from r1jax.sharding import DECODING, RULES, constrain, einsum, ruled, spec, take
from tests.nn import tiny

# Partial sums of a sharded contraction are added in another order.
FLOAT32 = 2e-5
MODES = {"none": None, "auto": AxisType.Auto, "explicit": AxisType.Explicit}
all_modes = pytest.mark.parametrize("mode", MODES)


def mesh_of(mode, shape=(2, 2, 2), names=("data", "fsdp", "tensor")):
    """A context with the 8 devices as a mesh, or without one."""
    if MODES[mode] is None:
        return contextlib.nullcontext()
    return jax.set_mesh(jax.make_mesh(shape, names, axis_types=(MODES[mode],) * len(names)))


def test_spec_without_a_mesh_shards_nothing():
    assert spec("batch", "length", "embed") == PartitionSpec(None, None, None)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_spec_names_the_axes_that_the_mesh_has(mode):
    with mesh_of(mode):
        assert spec("batch", "length", None) == PartitionSpec(("data", "fsdp"), None, None)
        # The batch has taken fsdp already: one mesh axis carries one dimension.
        assert spec("batch", "embed") == PartitionSpec(("data", "fsdp"), None)
        assert spec("embed", "mlp") == PartitionSpec("fsdp", "tensor")
        assert spec("expert", "embed", "mlp") == PartitionSpec(None, "fsdp", "tensor")
        assert spec("heads", "mlp") == PartitionSpec("tensor", None)
    with mesh_of(mode, (8,), ("fsdp",)):
        assert spec("batch", "length") == PartitionSpec("fsdp", None)
        assert spec("vocab", "embed") == PartitionSpec(None, "fsdp")


def test_another_table_is_in_force_where_it_is_entered():
    with mesh_of("auto", (2, 2, 2), ("fsdp", "expert", "context")):
        with ruled(DECODING):
            assert spec("expert", "embed", "latent") == PartitionSpec("expert", None, None)
            assert spec("batch", "length") == PartitionSpec(("fsdp", "expert", "context"), None)
        assert spec("expert", "embed") == PartitionSpec("expert", ("fsdp", "context"))


def test_a_dimension_is_cut_as_far_as_it_goes():
    with mesh_of("auto", (2, 4), ("data", "fsdp")):
        for rows, pieces in ((16, 8), (6, 2), (5, 1)):
            x = jax.jit(lambda x: constrain(x, "batch"))(jnp.zeros(rows))
            assert len({str(s.index) for s in x.addressable_shards}) == pieces


def test_every_axis_of_the_model_has_a_rule():
    model = jax.eval_shape(lambda: Transformer(tiny.model_config()))
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    variables = jax.tree.leaves(nnx.state(model), is_leaf=is_variable)
    named = {axis for v in variables for axis in v.out_sharding if axis is not None}
    assert named <= dict(RULES).keys()
    assert dict(DECODING).keys() == dict(RULES).keys()
    with pytest.raises(KeyError, match="bathc"):
        spec("bathc")


@all_modes
def test_constrain_einsum_and_take_keep_the_numbers(mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4, 16)).astype(np.float32)
    w = rng.normal(size=(16, 6)).astype(np.float32)
    index = rng.integers(0, 16, (8, 4)).astype(np.int32)

    @jax.jit
    def f(x, w, index):
        x, w = constrain(x, "batch", "length", "embed"), constrain(w, "embed", "mlp")
        index = constrain(index, "batch", "length")
        y = einsum("btd,df->btf", x, w, out=("batch", "length", "mlp"))
        return y, take(w, index, "batch", "length", "mlp")

    with mesh_of(mode):
        y, rows = f(x, w, index)
        if mode != "none":
            assert y.sharding.spec == spec("batch", "length", "mlp")
            assert len({s.device for s in rows.addressable_shards}) == 8
    np.testing.assert_allclose(y, x @ w, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_array_equal(rows, w[index])


def placed(model, *, sharded):
    """The model on the mesh in force: parameters replicated, or laid out by their logical axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return model
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731

    def place(v):
        where = spec(*v.out_sharding) if sharded else PartitionSpec()
        return v.replace(jax.device_put(v[...], where))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(place, state, is_leaf=is_variable))


@pytest.mark.parametrize(("mode", "sharded"), [("auto", True), ("explicit", False)])
def test_the_model_gives_the_same_numbers_on_a_mesh(mode, sharded):
    """Data-parallel on both kinds of mesh, all parameters cut on the Auto one."""
    cfg = tiny.model_config(num_layers=2, first_k_dense=0, mtp_depth=0, vocab_size=14)
    model = tiny.model(cfg)
    batch = tiny.whole_rows(tiny.tokens(30, 8, 4))
    f = jax.jit(lambda m, *batch: m(*batch))
    expected = f(model, *batch)
    with mesh_of(mode):
        on_mesh = [jax.device_put(x, spec("batch", "length")) for x in batch]
        found = f(placed(model, sharded=sharded), *on_mesh)
    np.testing.assert_allclose(found.hidden_BTD, expected.hidden_BTD, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_array_equal(found.stats.load, expected.stats.load)
    assert jnp.isfinite(found.hidden_BTD).all()
