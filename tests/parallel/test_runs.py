# SPDX-License-Identifier: Apache-2.0
"""`r1jax train` on a mesh of 8 devices: the run on one, resumed, and its model opened on one."""

import dataclasses

import jax
import numpy as np
import pytest

from r1jax.config import (
    AnswerData,
    DPORun,
    GRPOConfig,
    GRPORun,
    MeasureConfig,
    MeshConfig,
    OptimConfig,
    PairsConfig,
    PPOConfig,
    PPORun,
    RewardConfig,
    RewardModelRun,
    SFTConfig,
    SFTRun,
    StartConfig,
    UpdateConfig,
)
from r1jax.data.template import R1
from r1jax.io import metrics
from r1jax.io.model import Model, open_model, save_model
from r1jax.nn.param import leaves
from r1jax.train.runs import run_trainer
from r1jax.train.trained import task_words
from tests.nn import tiny as models
from tests.parallel.test_training import CFG, QWEN2
from tests.train import tiny
from tests.train.test_runs import DATA, SAMPLING, pairs_file, rows_to
from tests.train.test_stages import COMPILED, Watch

SLOW = OptimConfig(learning_rate=1e-3, weight_decay=0.0, eps=1e-3)
EIGHT = MeshConfig(data=2, fsdp=2, expert=2)
CUT = MeshConfig(fsdp=2, tensor=2, context=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models that start, and files of answers."""
    path = tmp_path_factory.mktemp("folder")
    for name, cfg in (("moe", CFG), ("dense", QWEN2)):
        arch = dataclasses.replace(cfg, vocab_size=tiny.VOCAB + tiny.VOCAB % 2)
        save_model(path / name, Model(arch, models.model(arch), task_words(R1)))
    pairs_file(path / "pairs.jsonl", 12)
    rows = [{"prompt": f"compute {i}", "completion": f"<think> {i} </think>"} for i in range(20)]
    rows_to(path / "sft.jsonl", rows)
    return path


def online(folder, which, **changes):
    start = StartConfig(path=str(folder / which), remat=False)
    stage = dict(
        steps=3, prompts=8, group_size=4, optim=SLOW,
        reward=RewardConfig(accuracy=0.0, format=0.0, language=1.0, overlong=1.0),
    )  # fmt: skip
    how = dict(start=start, data=DATA, sampling=SAMPLING, measure=MeasureConfig(3, 1))
    if changes.pop("critic", None):
        return PPORun(ppo=PPOConfig(**stage, value_optim=SLOW, **changes), **how)
    update = UpdateConfig(micro_batches=2, minibatches=2)
    return GRPORun(grpo=GRPOConfig(**stage, update=update, **changes), **how)


def answered(folder, which, trainer):
    start = StartConfig(path=str(folder / which), remat=False)
    if trainer == "sft":
        sft = SFTConfig(steps=3, batch_size=16, micro_batches=2, length=16, optim=SLOW)
        return SFTRun(start=start, data=AnswerData(path=str(folder / "sft.jsonl")), sft=sft)
    path = str(folder / "pairs.jsonl")
    kind, loss = (DPORun, "dpo") if trainer == "dpo" else (RewardModelRun, "pairwise")
    pairs = PairsConfig(steps=3, batch_size=16, micro_batches=2, length=32, loss=loss, optim=SLOW)
    return kind(start=start, data=AnswerData(path=path, heldout=path), pairs=pairs)


def values(out):
    found = leaves(open_model(out / "model").module)
    return {name: np.asarray(v[...], np.float64) for name, v in found.items()}


RUNS = {
    "sft": lambda f, w: answered(f, w, "sft"),
    "dpo": lambda f, w: answered(f, w, "dpo"),
    "reward_model": lambda f, w: answered(f, w, "reward_model"),
    "grpo": online,
    "ppo": lambda f, w: online(f, w, critic="own"),
}


def check(tmp_path, run, mesh):
    """Metrics and parameters of the run on a mesh are those on one device; all is compiled once."""
    one = run_trainer(run, tmp_path / "one")
    watch = Watch()
    COMPILED.clear()
    many = run_trainer(dataclasses.replace(run, mesh=mesh), tmp_path / "many", display=watch)
    assert watch.compiled[1] == watch.compiled[-1]
    assert COMPILED.count("jit(run)") <= 2  # the trainer's sampler, and the measure's
    assert COMPILED.count("jit(grpo_step)") <= 1
    for a, b in zip(one["stages"], many["stages"], strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"name", "seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    rows = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "many")]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys() - {"fullest_device"}
        but = {"stage", "seconds", "sampler_error"}
        # A policy that is its reference ties all pairs: rounding, if anything, says which are won.
        if abs(a.get("margin", 1.0)) < 1e-6:
            assert abs(b["margin"]) < 1e-6
            but.add("accuracy")
        for name in a.keys() - but:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
    ours, theirs = values(tmp_path / "one"), values(tmp_path / "many")
    for name, value in ours.items():
        assert np.abs(value - theirs[name]).max() < 1e-5, name
    assert len(jax.tree.leaves(theirs)) == len(ours)


@pytest.mark.slow
def test_sft_on_a_mesh_is_sft_on_one_device(tmp_path, folder):
    check(tmp_path, RUNS["sft"](folder, "moe"), EIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "sft"])
def test_a_run_on_a_mesh_is_the_run_on_one_device(tmp_path, folder, name):
    check(tmp_path, RUNS[name](folder, "moe"), EIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "reward_model", "grpo"])
def test_a_dense_model_cut_in_heads_and_positions(tmp_path, folder, name):
    check(tmp_path, RUNS[name](folder, "dense"), CUT)


@pytest.mark.slow
def test_a_run_goes_on_where_there_are_other_devices(tmp_path, folder):
    """Begun on one mesh, cut by a signal, ended on another: to the rounding of its sums."""
    run = RUNS["sft"](folder, "moe")
    run_trainer(run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_trainer(dataclasses.replace(run, mesh=EIGHT), tmp_path / "cut", display=Watch(at=1))
    other = dataclasses.replace(run, mesh=MeshConfig(fsdp=2, context=2, tensor=2))
    run_trainer(other, tmp_path / "cut")
    assert [row["step"] for row in metrics.read(tmp_path / "cut" / "metrics.jsonl")] == [1, 2, 3]
    ours, theirs = values(tmp_path / "whole"), values(tmp_path / "cut")
    for name, value in ours.items():
        assert np.abs(value - theirs[name]).max() < 1e-5, name


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, folder):
    run = RUNS["sft"](folder, "moe")
    run = dataclasses.replace(run, sft=dataclasses.replace(run.sft, micro_batches=4))
    for mesh, said in (
        (MeshConfig(fsdp=3), "takes 3 devices, 8 are there; change mesh.fsdp, for example to 8"),
        (MeshConfig(tensor=8), "must be divisible by mesh.tensor=8"),
        (MeshConfig(data=8), "rows of a micro-batch=4 must be divisible by"),
    ):
        with pytest.raises(ValueError, match=said):
            run_trainer(dataclasses.replace(run, mesh=mesh), tmp_path / "run")
    assert not (tmp_path / "run").exists()
