# SPDX-License-Identifier: Apache-2.0
"""Redundant experts in training: hot experts on several devices, and the same step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from r1jax.config import MeshConfig, StartConfig
from r1jax.io import metrics
from r1jax.parallel import dispatch, relocation
from r1jax.parallel.relocation import with_copies
from r1jax.train.runs import run_trainer
from tests.parallel.test_runs import EIGHT, RUNS, folder  # noqa: F401
from tests.parallel.test_training import (
    AUTO,
    CFG,
    EXPLICIT,
    REMADE,
    check_supervised,
    on_one_device,
)
from tests.train.test_stages import Watch


def copied(cfg, n):
    return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, redundant_experts=n))


def ragged_all_to_all(operand, output, *way, axis_name):
    """The primitive, which XLA:CPU lacks: rows of all, one by one."""
    begin_n, send_n, there_n, receive_n = way
    me = jax.lax.axis_index(axis_name)
    whole = lambda x: jax.lax.all_gather(x, axis_name)  # noqa: E731
    rows, begin, send, there = map(whole, (operand, begin_n, send_n, there_n))
    received_n = jnp.zeros_like(receive_n)
    for sender in range(len(send_n)):
        for i in range(operand.shape[0]):
            real = i < send[sender, me]
            to = jnp.where(real, there[sender, me] + i, len(output))
            row = rows[sender, jnp.minimum(begin[sender, me] + i, len(operand) - 1)]
            output = output.at[to].set(row, mode="drop")
            received_n = received_n.at[sender].add(real)
    # What a rank says that it receives is what the others send it.
    return jnp.where((received_n == receive_n).all(), output, jnp.nan)


@pytest.mark.parametrize("way", ["cpu", "tpu"])
def test_copies_are_their_experts_and_give_their_gradients_back(way, monkeypatch):
    """Four devices of two experts and two slots; expert 5 is on all of them, a slot is empty."""
    monkeypatch.setattr(relocation, "platform", lambda: way)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    expert_nX = jnp.array([[5, 2], [5, 7], [0, 5], [8, 5]])
    mesh = jax.make_mesh((4,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:4])
    rng = np.random.default_rng(0)
    x, given = rng.normal(size=(8, 6, 3)), rng.normal(size=(16, 6, 3))

    def run(x, given):
        out, pull = jax.vjp(lambda x: with_copies(x, expert_nX), x)
        return out, pull(given)[0]

    cut = PartitionSpec("expert")
    with jax.set_mesh(mesh):
        run = jax.shard_map(run, in_specs=cut, out_specs=cut, check_vma=False)
        out, back = jax.jit(run)(x.astype(np.float32), given.astype(np.float32))
    where = np.concatenate([np.arange(8).reshape(4, 2), expert_nX], 1).reshape(-1)
    padded = np.concatenate([x, np.zeros_like(x[:1])])
    np.testing.assert_array_equal(out, padded.astype(np.float32)[where])
    sums = np.zeros_like(padded)
    np.add.at(sums, where, given)
    np.testing.assert_allclose(back, sums[:8], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_step_with_copies():
    """All tokens ask for two experts, of which both devices of the mesh's axis get copies."""
    check_supervised(MeshConfig(expert=2, fsdp=4), cfg=copied(CFG, 2), worst=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("worst", [False, True], ids=["even", "worst"])
@pytest.mark.parametrize(
    ("mesh", "copies"),
    [
        (MeshConfig(expert=8), 8),
        (MeshConfig(expert=4, fsdp=2), 8),
        (MeshConfig(expert=2, context=2, tensor=2), 4),
        (MeshConfig(slices=2, fsdp=2, expert=2), 2),
    ],
    ids=["expert8", "expert4_fsdp2", "expert2_context2_tensor2", "slices2_fsdp2_expert2"],
)
def test_every_mesh(mesh, copies, worst, kind):
    check_supervised(mesh, kind, copied(CFG, copies), worst=worst)


@pytest.mark.slow
@pytest.mark.parametrize("copies", [0, 8])
def test_the_way_of_tpus_with_copies(copies, monkeypatch):
    """Layers computed again, exchanges in rounds, all by the primitive that TPUs have. Where every
    token asks for the two experts of one of four devices only copies keep buffers from
    overflowing that hold half as much again as a balanced load."""
    moe = dataclasses.replace(REMADE.moe, dispatch_slack=1.5, redundant_experts=copies)
    cfg = dataclasses.replace(REMADE, moe=moe)
    on_one_device(cfg, True)
    monkeypatch.setattr(relocation, "platform", lambda: "tpu")
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    monkeypatch.setattr(dispatch, "FEW", 8)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    mesh = MeshConfig(expert=4, fsdp=2)
    _, metrics = check_supervised(mesh, cfg=cfg, worst=True, but=("overflow",))
    assert (metrics["overflow"] > 0) == (copies == 0)


def with_start(run, **changes):
    return dataclasses.replace(run, start=dataclasses.replace(run.start, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["sft", "ppo"])
def test_a_run_with_copies_learns_what_one_without_does(folder, tmp_path, trainer):  # noqa: F811
    """Policy, critic and reference; experts are dealt out anew too, and nothing compiles twice."""
    run = dataclasses.replace(RUNS[trainer](folder, "moe"), mesh=EIGHT)
    run_trainer(run, tmp_path / "once")
    watch = Watch()
    run = dataclasses.replace(with_start(run, redundant_experts=4), rebalance_every=2)
    run_trainer(run, tmp_path / "copies", display=watch)
    assert watch.compiled[2] == watch.compiled[-1]
    rows = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("once", "copies")]
    but = {"stage", "seconds", "sampler_error", "expert_load", "fullest_device"}
    for a, b in zip(*rows, strict=True):
        for name in a.keys() - but:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_copies_that_cannot_be_held_evenly_are_refused(folder, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"start\.redundant_experts must be >= 0, got -1"):
        StartConfig(path="model", redundant_experts=-1)
    with pytest.raises(ValueError, match=r"model\.moe\.redundant_experts must be >= 0, got -1"):
        copied(CFG, -1)
    for mesh, cfg, said in (
        (MeshConfig(expert=4), copied(CFG, 2), "mesh.expert=4 must divide; set it to 4"),
        (MeshConfig(fsdp=4), copied(CFG, 4), "set mesh.expert, or it to 0"),
    ):
        with pytest.raises(ValueError, match=said):
            mesh.check(cfg, rows=8, length=8)
    for model, said in (("dense", "has no routed experts"), ("moe", "set it to 4")):
        run = with_start(RUNS["sft"](folder, model), redundant_experts=3)
        run = dataclasses.replace(run, mesh=EIGHT)
        with pytest.raises(ValueError, match=f"start.redundant_experts=3.*{said}"):
            run_trainer(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
