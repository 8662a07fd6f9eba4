# SPDX-License-Identifier: Apache-2.0
"""The training step compiled for TPUs that are not there, by the compiler in libtpu."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding

from r1jax.config import FP8Config, MeshConfig, OptimConfig
from r1jax.infer.redundant import served
from r1jax.nn.param import RouterBias, specs
from r1jax.nn.transformer import Transformer
from r1jax.optim import adamw
from r1jax.parallel import costs, roofline
from r1jax.parallel.hlo import parse
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.rounds import ROUNDS
from r1jax.parallel.schedule import scheduled
from r1jax.parallel.topology import CHIPS
from r1jax.sharding import DECODING, ruled, spec
from r1jax.train.plan import turns, used
from r1jax.train.rebalance import compile_rebalance
from r1jax.train.state import Controls, TrainState
from r1jax.train.supervised import supervised_step
from tests.parallel.test_training import REMADE

OPTIMIZER = adamw(OptimConfig(moment_dtype="bfloat16"))


def placed(where, x):
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(jax.sharding.get_mesh(), where)
    )


def nowhere(cfg):
    """The state of a model that is nowhere."""

    def make():
        graphdef, params, router = nnx.split(Transformer(cfg), nnx.Param, RouterBias)
        return TrainState(jnp.int32(0), params, router, OPTIMIZER.init(params), graphdef)

    state = jax.eval_shape(make)
    return jax.tree.map(placed, specs(state), state)


def lowered(cfg, *, rows: int, length: int):
    """The step of a model that is nowhere, for a mesh of chips that are nowhere."""
    state = nowhere(cfg)
    row = functools.partial(jax.ShapeDtypeStruct, (1, rows, length))
    lies = spec(None, "batch", "length")
    batch = {n: placed(lies, row(jnp.int32)) for n in ("tokens", "targets", "positions")}
    batch |= {"segments": batch["tokens"], "mask": placed(lies, row(jnp.float32))}
    number = jax.ShapeDtypeStruct((), jnp.float32)
    step = functools.partial(supervised_step, optimizer=OPTIMIZER, mtp_weight=0.3)
    return jax.jit(step, donate_argnums=0).lower(state, batch, Controls(number, number))


@pytest.fixture
def eight():
    """Eight chips that are nowhere, four to share the experts."""
    pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5:2x2x2")
    with jax.set_mesh(make_mesh(MeshConfig(expert=4, fsdp=2), topology.devices)):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True], ids=["wide", "fp8"])
def test_the_sparse_dispatch_compiles_for_a_tpu(eight, fp8):
    """And is there: tokens travel by the ragged exchange, in rounds, and by no other way."""
    cfg = dataclasses.replace(REMADE, fp8=FP8Config(enabled=fp8))
    compiled = lowered(cfg, rows=32, length=128).compile()
    text = compiled.as_text()
    sent = [line for line in text.splitlines() if "ragged-all-to-all-start(" in line]
    assert sent
    assert any("f8e4m3fn" in line for line in sent) == fp8
    assert any("f8e4m3fn" in line for line in text.splitlines() if " all-gather" in line) == fp8
    assert ROUNDS in text
    assert "conditional(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("copies", [0, 4])
def test_what_goes_to_experts_is_sent_beside_products(eight, copies):
    """By the compiler's schedule hardly any of it is waited for, nor are the copies of experts."""
    moe = dataclasses.replace(REMADE.moe, moe_intermediate_size=512, redundant_experts=copies)
    moe = dataclasses.replace(moe, dispatch_pieces=4, dispatch_slack=1.25)
    cfg = dataclasses.replace(REMADE, hidden_size=1024, num_layers=3, dtype="bfloat16", moe=moe)
    text = parse(lowered(cfg, rows=32, length=2048).compile().as_text())
    where = roofline.spots(jax.sharding.get_mesh().devices.flat)
    rules = costs.Rules(8, turns(4), 0.8, roofline.counterparts(where), used(4))
    found = scheduled(text, rules, CHIPS["v5p"], where)
    assert found.moved["ragged-all-to-all"] > found.seconds / 10
    assert found.waited["ragged-all-to-all"] < found.moved["ragged-all-to-all"] / 10


@pytest.mark.slow
@pytest.mark.parametrize("why", ["training", "sampling"])
def test_experts_move_by_the_ragged_exchange(eight, why):
    """Weights, and moments in training, go where they are to lie; no device gathers them.

    In training a layer at a time, in place: little is held beside the state.
    """
    wide = dataclasses.replace(REMADE.moe, moe_intermediate_size=1024)
    state = nowhere(dataclasses.replace(REMADE, hidden_size=512, moe=wide, num_layers=17))
    load = jax.ShapeDtypeStruct((17, 8), jnp.float32)
    if why == "training":
        compiled = compile_rebalance(groups=4).lower({"state": state}, load).compile()
    else:

        def run(state, load):
            with ruled(DECODING):
                return served(state.model(), load, redundant=4)

        compiled = jax.jit(run).lower(state, load).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert "ragged-all-to-all" in text
    if why == "training":
        assert "all-gather" not in text
        assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 4
