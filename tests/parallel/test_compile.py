# SPDX-License-Identifier: Apache-2.0
"""The training step compiled for TPUs that are not there, by the compiler in libtpu."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding

from r1jax.config import MeshConfig, OptimConfig
from r1jax.nn.param import RouterBias, specs
from r1jax.nn.transformer import Transformer
from r1jax.optim import adamw
from r1jax.parallel.dispatch import ROUNDS
from r1jax.parallel.mesh import make_mesh
from r1jax.sharding import spec
from r1jax.train.state import Controls, TrainState
from r1jax.train.supervised import supervised_step
from tests.parallel.test_training import REMADE

OPTIMIZER = adamw(OptimConfig(moment_dtype="bfloat16"))


def lowered(cfg, mesh, *, rows: int, length: int):
    """The step of a model that is nowhere, for a mesh of chips that are nowhere."""

    def make():
        graphdef, params, router = nnx.split(Transformer(cfg), nnx.Param, RouterBias)
        return TrainState(jnp.int32(0), params, router, OPTIMIZER.init(params), graphdef)

    def abstract(where, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, where))

    state = jax.eval_shape(make)
    state = jax.tree.map(abstract, specs(state), state)
    row = functools.partial(jax.ShapeDtypeStruct, (1, rows, length))
    lies = spec(None, "batch", "length")
    batch = {n: abstract(lies, row(jnp.int32)) for n in ("tokens", "targets", "positions")}
    batch |= {"segments": batch["tokens"], "mask": abstract(lies, row(jnp.float32))}
    number = jax.ShapeDtypeStruct((), jnp.float32)
    step = functools.partial(supervised_step, optimizer=OPTIMIZER, mtp_weight=0.3)
    return jax.jit(step, donate_argnums=0).lower(state, batch, Controls(number, number))


@pytest.mark.slow
def test_the_sparse_dispatch_compiles_for_a_tpu():
    """And is there: tokens travel by the ragged exchange, in rounds, and by no other way."""
    pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5:2x2x2")
    mesh = make_mesh(MeshConfig(expert=4, fsdp=2), topology.devices)
    with jax.set_mesh(mesh):
        compiled = lowered(REMADE, mesh, rows=32, length=128).compile()
    text = compiled.as_text()
    assert "ragged-all-to-all" in text
    assert ROUNDS in text
    assert "conditional(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes > 0
