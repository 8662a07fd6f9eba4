# SPDX-License-Identifier: Apache-2.0
"""Experts dealt out anew: the same function, and devices with equal loads."""

import dataclasses

import jax
import numpy as np
import pytest

from r1jax.config import (
    AnswerData,
    MeshConfig,
    SamplerConfig,
    SamplingConfig,
    SFTRun,
    StartConfig,
    check_rebalance,
    check_redundant,
)
from r1jax.io import metrics
from r1jax.nn.param import specs
from r1jax.train import runs
from r1jax.train.rebalance import Rebalance, fullest
from r1jax.train.runs import run_trainer
from tests.parallel.test_runs import EIGHT, RUNS, folder, values  # noqa: F401
from tests.parallel.test_training import (
    AUTO,
    CFG,
    EXPLICIT,
    QWEN2,
    assert_same,
    batches,
    on,
    supervised,
)
from tests.train import tiny
from tests.train.test_stages import Watch

# Two experts of eight get most: in one group, on one of four devices.
SKEWED = np.array([[5, 5, 40, 40, 1, 1, 30, 2], [1, 2, 3, 4, 5, 60, 7, 80]], np.float32)


def skewed(state):
    """A state whose router biases send tokens about as `SKEWED` says."""
    rows = iter(SKEWED)
    bias = lambda x: np.broadcast_to(next(rows) / 100, x.shape).copy()  # noqa: E731
    return dataclasses.replace(state, router=jax.tree.map(bias, state.router))


@jax.jit
def logits(state, batch):
    model = state.model()
    out = model(batch["tokens"][0], batch["positions"][0], batch["segments"][0])
    return out.hidden_BTD @ model.head_DN()


def check(mesh, kind=AUTO, cfg=CFG):
    """Loss, gradients and logits of the state in its new order; its loads in that order."""
    batch = batches()
    before = skewed(tiny.state(cfg))
    expected, expected_report = supervised(cfg, before, batch)
    with on(mesh, kind):
        own = jax.tree.map(np.array, before)  # the state is given away
        state = jax.device_put(own, specs(before))
        reference = jax.tree.map(lambda x: x.copy(), state.params)
        lay = [x.sharding for x in jax.tree.leaves(state)]
        carry = {"state": state, "reference": reference, "drawn": 3}
        load_LE = np.asarray(expected_report["load"])
        moved = Rebalance(1, cfg.moe.n_group)(carry, load_LE)
        assert moved["drawn"] == 3
        lies = [x.sharding for x in jax.tree.leaves(moved["state"])]
        for a, b, x in zip(lay, lies, jax.tree.leaves(moved["state"]), strict=True):
            assert a.is_equivalent_to(b, x.ndim)
        assert_same(moved["reference"], moved["state"].params)
        found, report = supervised(cfg, moved["state"], batch)
    for name in ("loss", "mtp_loss", "balance", "grad_norm"):
        np.testing.assert_allclose(report[name], expected_report[name], rtol=1e-5)
    new_LE = np.asarray(report["load"])
    np.testing.assert_array_equal(np.sort(new_LE), np.sort(load_LE))
    # The update, moments and biases went with their experts, so that the models still agree.
    one = jax.tree.map(np.asarray, found)
    np.testing.assert_allclose(logits(one, batch), logits(expected, batch), atol=2e-5)
    second = supervised(cfg, expected, batch)[1], supervised(cfg, one, batch)[1]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(second[1][name], second[0][name], rtol=1e-5)
    return fullest(load_LE, mesh.expert), fullest(new_LE, mesh.expert)


def test_the_same_function_with_equal_loads():
    """Groups of two experts go to two devices: 4 groups of loads, dealt out by twos."""
    before, after = check(MeshConfig(expert=2, fsdp=4))
    assert after < before


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("mesh", "n_group"),
    [
        (MeshConfig(expert=4, tensor=2), 4),  # a group each: nothing to gain
        (MeshConfig(expert=4, fsdp=2), 2),  # two devices a group
        (MeshConfig(expert=2, context=2, data=2), 4),
        (MeshConfig(expert=8), 1),
    ],
)
def test_every_mesh(mesh, n_group, kind):
    moe = dataclasses.replace(CFG.moe, n_group=n_group, topk_group=min(2, n_group))
    before, after = check(mesh, kind, dataclasses.replace(CFG, moe=moe))
    assert after <= before + 1e-6


def test_fullest_by_hand():
    """Layer 1: 50 and 50 of 100 on two devices; layer 2: 90 and 10: (50 + 90) · 2 / 200."""
    assert fullest(np.array([[25, 25, 50, 0], [60, 30, 5, 5]]), 2) == pytest.approx(1.4)
    assert fullest(np.zeros((1, 4)), 2) == 0.0


def check_resumed(out, run, whole):
    """Stopped in the middle and gone on with, it leaves the model of the whole run bit by bit."""
    with pytest.raises(KeyboardInterrupt):
        run_trainer(run, out, display=Watch(at=2))
    run_trainer(run, out)
    again = values(out)
    for name, value in values(whole).items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["sft", "grpo"])
def test_a_run_that_deals_experts_out(folder, tmp_path, trainer):  # noqa: F811
    """It learns what one without does, compiles nothing twice, and resumed is the same bit by bit.

    Groups of two experts lie on two devices, one column of loads each way.
    """
    run = RUNS[trainer](folder, "moe")
    run_trainer(run, tmp_path / "never")
    run = dataclasses.replace(run, mesh=EIGHT, rebalance_every=1)
    watch = Watch()
    run_trainer(run, tmp_path / "always", display=watch)
    assert watch.compiled[2] == watch.compiled[-1]
    rows = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("never", "always")]
    moved = 0
    for a, b in zip(*rows, strict=True):
        moved += not np.allclose(a["expert_load"], b["expert_load"], atol=1e-4)
        for name in a.keys() - {"stage", "seconds", "sampler_error", "expert_load"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert moved
    check_resumed(tmp_path / "cut", run, tmp_path / "always")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(rebalance_every=2), "set mesh.expert, or rebalance_every=0"),
        (dict(rebalance_every=-1), "rebalance_every must be >= 0"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(changes, said):
    run = SFTRun(start=StartConfig(path="x"), data=AnswerData(path="y"))
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(run, **changes)


def test_experts_that_cannot_be_held_evenly_are_refused():
    three = dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, n_group=4))
    for model, every, mesh, said in (
        (QWEN2, 1, MeshConfig(expert=2), "has no routed experts"),
        (three, 1, MeshConfig(expert=3), "model.moe.n_group=4 and mesh.expert=3 one must divide"),
    ):
        with pytest.raises(ValueError, match=said):
            check_rebalance(model, every, mesh)
    for model, redundant, n, said in (
        (QWEN2, 2, 2, "has no routed experts"),
        (CFG, 2, 1, "set mesh.expert, or it to 0"),
        (CFG, 3, 4, "8 are 11 together, which mesh.expert=4 must divide; set it to 4"),
    ):
        with pytest.raises(ValueError, match=said):
            check_redundant(model, "copies", redundant, "mesh.expert", n)
    check_redundant(CFG, "copies", 4, "mesh.expert", 4)
    check_redundant(QWEN2, "copies", 0, "mesh.expert", 4)
    with pytest.raises(ValueError, match="sampling.layout='training' set it to 0"):
        SamplingConfig(redundant_experts=2, layout="training")


@pytest.mark.slow
def test_a_run_with_redundant_experts_draws_and_learns_the_same(folder, tmp_path):  # noqa: F811
    """Of eight experts four are held twice on the two devices of mesh.expert; and resumed."""
    run = dataclasses.replace(RUNS["grpo"](folder, "moe"), mesh=EIGHT)
    run_trainer(run, tmp_path / "once")
    sampling = dataclasses.replace(run.sampling, redundant_experts=4)
    run = dataclasses.replace(run, sampling=sampling, rebalance_every=2)
    watch = Watch()
    run_trainer(run, tmp_path / "twice", display=watch)
    assert watch.compiled[2] == watch.compiled[-1]
    rows = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("once", "twice")]
    for a, b in zip(*rows, strict=True):
        for name in a.keys() - {"stage", "seconds", "sampler_error", "expert_load"}:
            if name != "fullest_device":
                np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
    check_resumed(tmp_path / "cut", run, tmp_path / "twice")


@pytest.mark.slow
def test_copies_are_for_devices_that_sample_and_a_finished_stage_is_read_again(
    folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Ten slots go to two devices that sample, not to the four that train and measure; and killed
    between the end of training and that of the run it goes on."""
    run = RUNS["grpo"](folder, "moe")
    update = dataclasses.replace(run.grpo.update, importance_cap=2.0)
    run = dataclasses.replace(
        run,
        grpo=dataclasses.replace(run.grpo, update=update),
        sampling=dataclasses.replace(run.sampling, redundant_experts=2),
        mesh=MeshConfig(expert=4),
        sampler=SamplerConfig(data=2, expert=2),
        rebalance_every=1,
    )

    def killed(*_):
        raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_leave", killed)
        with pytest.raises(RuntimeError, match="the power went"):
            run_trainer(run, tmp_path / "run")
    again = run_trainer(run, tmp_path / "run")
    assert [stage["name"] for stage in again["stages"]] == ["start", "grpo"]
    once = dataclasses.replace(
        run, sampling=dataclasses.replace(run.sampling, redundant_experts=0), rebalance_every=0
    )
    run_trainer(once, tmp_path / "once")
    rows = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("once", "run")]
    for a, b in zip(*rows, strict=True):
        for name in ("loss", "reward", "grad_norm", "importance", "staleness", "kl"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
