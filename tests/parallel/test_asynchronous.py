# SPDX-License-Identifier: Apache-2.0
"""Asynchronous GRPO: which weights draw a batch, what is learnt from it, and what is resumed."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from r1jax import optim
from r1jax.config import MeshConfig, RewardConfig, SamplerConfig, UpdateConfig
from r1jax.data.template import R1
from r1jax.io import metrics
from r1jax.io.model import Model, save_model
from r1jax.nn.param import as_used, leaves, resident, specs
from r1jax.nn.value import trunk_of, valued
from r1jax.ops.blocks import Blocks
from r1jax.parallel.mesh import entered
from r1jax.rl.rollout import laid_out_rollout
from r1jax.sharding import place
from r1jax.train import grpo as grpo_module
from r1jax.train import sampler as sampler_module
from r1jax.train import stages
from r1jax.train.behind import Apart
from r1jax.train.collect import Collector
from r1jax.train.grpo import compile_grpo, grpo_step
from r1jax.train.judge import Rules, by_task
from r1jax.train.runs import run_trainer
from r1jax.train.sampler import Sampler
from r1jax.train.start import Start, save_reward_model, state_of
from r1jax.train.state import Controls, restart
from r1jax.train.trained import task_words
from tests.nn import tiny as models
from tests.nn.test_fp8 import CFG as FP8
from tests.nn.test_fp8 import linear_weight
from tests.parallel.test_runs import online, values
from tests.parallel.test_training import CFG as MOE
from tests.parallel.test_training import QWEN2 as DENSE
from tests.train import tiny
from tests.train.test_runs import Cut
from tests.train.test_stages import Watch, rows, run_in

CFG = tiny.recipe()
WORDS = tiny.words(CFG)
STEPS, CAP = 4, 2.0
UPDATE = dataclasses.replace(CFG.rl_1.update, importance_cap=CAP)
# The sampler's program and the trainer's round otherwise.
FLOAT32 = 1e-4


def fresh(index, n, step):
    return WORDS.asked(WORDS.problems(n, index, "train"))


class Stage:
    """Four steps of GRPO on one device, and, asynchronous, on another that samples."""

    def __init__(self, lr, *, pieces=1):
        how = dataclasses.replace(CFG.rl_1.optim, learning_rate=lr, final_fraction=1.0)
        self.cfg = dataclasses.replace(
            CFG.rl_1, steps=STEPS, optim=how, update=UPDATE, reference_every=0, pieces=pieces
        )
        self.seen, self.rules = (
            [],
            Rules(RewardConfig(), WORDS.template, by_task(WORDS.template), max_length=8),
        )
        self.collector = Collector(
            self.cfg, Sampler(CFG.sampling, WORDS.ending()), fresh, self.judge, seed=5
        )

    def judge(self, step, asked, done):
        self.seen.append((step, tuple(asked.prompts), tuple(done.texts)))
        reward_B = np.array([t.count("7") + len(t) % 3 / 4 for t in done.texts], np.float32)
        verdict = self.rules(step, asked, done)()
        return lambda: verdict._replace(reward_B=reward_B)

    def run(self, out, *, behind, watch=None, every=1e9, speed=0.0):
        apart = Apart(MeshConfig(), SamplerConfig(data=1)) if behind else None
        return stages.grpo(
            run_in(out, watch, every=every), "g", tiny.state(CFG.model), self.cfg, self.collector,
            bias_speed=speed, apart=apart,
        )[0]  # fmt: skip


@pytest.mark.parametrize("pieces", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_at_learning_rate_zero_asynchronous_is_in_turns(tmp_path, pieces):
    """Exactly: the same completions, and a policy that nobody is behind of."""
    turns, apart = Stage(0.0, pieces=pieces), Stage(0.0, pieces=pieces)
    chex.assert_trees_all_equal(
        apart.run(tmp_path / "apart", behind=True), turns.run(tmp_path / "turns", behind=False)
    )
    assert apart.seen == turns.seen
    both = zip(rows(tmp_path / "apart"), rows(tmp_path / "turns"), strict=True)
    for number, (a, b) in enumerate(both):
        assert a.pop("staleness") == min(number, 1)
        assert a == b
        np.testing.assert_allclose(a["importance"], 1.0, atol=FLOAT32)
        assert a["truncated"] == 0.0


def test_each_batch_is_drawn_with_the_weights_of_one_step_before(tmp_path):
    """Against the same steps one after the other, by hand, on one device."""
    stage = Stage(0.02)
    found = stage.run(tmp_path, behind=True, speed=0.01)
    optimizer = optim.adamw(stage.cfg.optim)
    learn, reference = compile_grpo(UPDATE, optimizer), tiny.state(CFG.model).params
    state, before = restart(tiny.state(CFG.model), optimizer), None
    for step in range(STEPS):
        asked = fresh(step, stage.cfg.prompts, step)
        with_ = tiny.state(CFG.model) if before is None else before
        hot = [stage.cfg.temperature] * stage.cfg.group_size
        done = stage.collector.sampler(with_, asked.ids, (5, step), hot)
        assert stage.seen[step] == (step, tuple(asked.repeated(4).prompts), tuple(done.texts))
        before = jax.tree.map(lambda x: x.copy(), state.slim())
        rate = np.float32(optim.learning_rate(stage.cfg.optim, step, STEPS))
        reward_B = stage.judge(step, asked.repeated(4), done)().reward_B
        state, _ = learn(
            state, reference, done.rollout, reward_B, Controls(rate, np.float32(0.01)),
            temperature=np.float32(1.0),
        )  # fmt: skip
    chex.assert_trees_all_equal(found, state)
    assert max(row["sampler_error"] for row in rows(tmp_path)[1:]) > 10 * FLOAT32  # it is behind


@pytest.mark.parametrize(("at", "how", "every"), [(2, "signal", 1e9), (3, "fault", 0.0)])
def test_a_resumed_run_learns_from_the_batch_that_was_in_flight(tmp_path, at, how, every):
    stage = Stage(0.02)
    whole = stage.run(tmp_path / "whole", behind=True)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        Stage(0.02).run(tmp_path / "cut", behind=True, watch=Watch(at, how), every=every)
    again = Stage(0.02)
    chex.assert_trees_all_equal(again.run(tmp_path / "cut", behind=True), whole)
    assert again.seen == stage.seen[-len(again.seen) :]
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "cut")) == STEPS


@pytest.mark.parametrize(
    ("mesh", "sampler"),
    [
        (MeshConfig(fsdp=2, tensor=2), SamplerConfig(data=2, tensor=2)),
        pytest.param(MeshConfig(fsdp=4), SamplerConfig(data=1, expert=4), marks=pytest.mark.slow),
        pytest.param(MeshConfig(expert=2, fsdp=2), SamplerConfig(data=3), marks=pytest.mark.slow),
        (MeshConfig(), SamplerConfig(data=7)),
    ],
    ids=["tensor", "experts", "whole", "one"],
)
def test_weights_cross_over_piece_by_piece(mesh, sampler):
    """Each piece that a sampler's device wants lies on one of the trainer's: no host cuts it."""
    cfg = dataclasses.replace(MOE, dtype="bfloat16")
    state = tiny.state(cfg)
    with entered(mesh, spare=sampler.devices):
        state, apart = place(state, specs(state)), Apart(mesh, sampler)
        found = apart.weights(state)
        given = apart._give(state.slim())
    wanted = as_used(tiny.state(cfg).model())
    for a, b in zip(jax.tree.leaves(found.model()), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    theirs = set(jax.devices()[mesh.devices : mesh.devices + sampler.devices])
    pieces = lambda x: {str(s.index) for s in x.addressable_shards}  # noqa: E731
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True):
        assert a.sharding.device_set == theirs
        assert pieces(a) <= pieces(b)
    cut = found.params["moe_layers"]["feed_forward"]["w_gate"][...]
    assert cut.addressable_shards[0].data.size * sampler.expert * sampler.tensor == cut.size


@pytest.mark.parametrize(
    ("mesh", "sampler"),
    [
        (MeshConfig(data=3), SamplerConfig(data=1, expert=3)),
        pytest.param(MeshConfig(fsdp=4), SamplerConfig(data=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(), SamplerConfig(data=1), marks=pytest.mark.slow),
    ],
    ids=["experts", "tensor", "one"],
)
def test_samplers_hold_fp8_weights_in_blocks(mesh, sampler):
    """Those of one device, also where 8 values along "embed" are not cut evenly by 3 ranks; and
    what is drawn is traced with them as they are."""
    cfg = dataclasses.replace(
        FP8, moe=dataclasses.replace(FP8.moe, n_routed_experts=6, n_group=3, topk_group=2)
    )
    state = tiny.state(cfg)
    with entered(mesh, spare=sampler.devices):
        apart = Apart(mesh, sampler)
        found = apart.weights(place(state, specs(state))).model()
    wanted = resident(tiny.state(cfg).model())
    for path, variable in leaves(wanted).items():
        a, b = leaves(found)[path].get_value(), variable.get_value()
        assert isinstance(a, Blocks) == linear_weight(path)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    rows = np.ones((6, 4), np.int32), np.ones((6, 4), bool)
    rules = dict(max_new_tokens=2, eos_ids=(1,), pad_id=0)
    with jax.set_mesh(apart.mesh):
        draw = lambda *args: laid_out_rollout(*args, **rules)  # noqa: E731
        made = jax.eval_shape(draw, found, *rows, jax.random.key(0), np.ones(6, np.float32))
    assert made.tokens_BT.shape == (6, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with experts, and a reward model of its vocabulary."""
    path = tmp_path_factory.mktemp("folder")
    arch = dataclasses.replace(MOE, vocab_size=tiny.VOCAB + tiny.VOCAB % 2)
    save_model(path / "moe", Model(arch, models.model(arch), task_words(R1)))
    arch = dataclasses.replace(DENSE, vocab_size=arch.vocab_size)
    start = Start(Model(arch, models.model(arch), task_words(R1)), None)
    key = jax.random.key(0)
    judge = valued(trunk_of(start.model.module), key, std=1.0)
    save_reward_model(path / "judge", start, state_of(judge))
    return path


def eight(folder, **changes):
    """Four devices that train, four that sample."""
    run = online(folder, "moe")
    grpo = dataclasses.replace(run.grpo, update=UpdateConfig(importance_cap=CAP))
    how = dict(grpo=grpo, mesh=MeshConfig(data=2, fsdp=2), sampler=SamplerConfig(data=2, expert=2))
    return dataclasses.replace(run, **how | dict(checkpoint_every=1e9) | changes)


@pytest.fixture
def traces(monkeypatch):
    """Calls of the rollout by mesh and rows; a second trace of the step fails."""
    seen, drawn = [], sampler_module.laid_out_rollout

    def counted(*args, **kwargs):
        seen.append((jax.sharding.get_abstract_mesh(), args[-1].shape))
        return drawn(*args, **kwargs)

    for cached in (sampler_module.compile_rollout, compile_grpo):
        cached.cache_clear()
    monkeypatch.setattr(sampler_module, "laid_out_rollout", counted)
    monkeypatch.setattr(grpo_module, "grpo_step", chex.assert_max_traces(grpo_step, n=1))
    yield seen
    for cached in (sampler_module.compile_rollout, compile_grpo):
        cached.cache_clear()


@pytest.mark.slow
def test_eight_devices_and_each_program_is_traced_once(tmp_path, folder, traces):
    """The step on four, and the reward model's scores; the rollout on the other four, and once on
    the trainer's, to measure."""
    watch, run = Watch(), eight(folder)
    reward = RewardConfig(accuracy=0.0, format=0.0, model=1.0, model_path=str(folder / "judge"))
    run = dataclasses.replace(run, grpo=dataclasses.replace(run.grpo, reward=reward))
    run_trainer(run, tmp_path / "run", display=watch)
    assert watch.compiled[0] == watch.compiled[-1]
    assert len(traces) == len(set(traces)) == 2
    found = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["staleness"] for row in found] == [0.0, 1.0, 1.0]
    assert found[0]["sampler_error"] < FLOAT32 < found[1]["sampler_error"]
    assert all(0.9 < row["importance"] < 1.1 for row in found)
    assert all(row["model"] == pytest.approx(row["reward"]) != 0 for row in found)


@pytest.mark.slow
def test_eight_devices_learn_what_two_learn(tmp_path, folder):
    """To rounding, and a token that it turned would be seen."""
    run_trainer(eight(folder), tmp_path / "eight")
    run_trainer(eight(folder, mesh=MeshConfig(), sampler=SamplerConfig(data=1)), tmp_path / "two")
    both = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("eight", "two"))
    for a, b in zip(*both, strict=True):
        for name in a.keys() - {"stage", "seconds", "sampler_error"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_eight_devices_cut_and_resumed_also_on_others(tmp_path, folder):
    run = eight(folder, checkpoint_every=1e-9)
    run = dataclasses.replace(run, grpo=dataclasses.replace(run.grpo, steps=4))
    run_trainer(run, tmp_path / "whole")
    for name in ("cut", "moved"):
        with pytest.raises(RuntimeError, match="the power went"):
            run_trainer(run, tmp_path / name, display=Cut())
    run_trainer(run, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    ours, theirs = values(tmp_path / "whole"), values(tmp_path / "cut")
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    elsewhere = dict(mesh=MeshConfig(fsdp=2), sampler=SamplerConfig(data=2))
    run_trainer(dataclasses.replace(run, **elsewhere), tmp_path / "moved")
    theirs = values(tmp_path / "moved")
    for name, value in ours.items():
        assert np.abs(value - theirs[name]).max() < 1e-5, name
    turns = dataclasses.replace(run, mesh=MeshConfig(fsdp=2), sampler=SamplerConfig())
    with pytest.raises(ValueError, match=r"sampler\.data: saved some, asked for 0"):
        run_trainer(turns, tmp_path / "moved")


def test_what_cannot_be_asynchronous_is_refused_by_name(tmp_path, folder):
    run = eight(folder)
    for changes, said in (
        (dict(sampler=SamplerConfig(data=8)), "mesh takes 4 devices and sampler 8, 8 are there"),
        (dict(sampler=SamplerConfig(data=3)), r"rows of a piece=32 must be divisible by sampler"),
        (dict(sampler=SamplerConfig(data=1, expert=3)), r"n_routed_experts=8 .* sampler\.expert=3"),
        (dict(sampler=SamplerConfig(data=1, tensor=4)), r"moe_intermediate|num_heads|sampler\.ten"),
        (
            dict(mesh=MeshConfig(fsdp=2), sampler=SamplerConfig(data=1, expert=4)),
            r"devices of mesh=2 must be divisible by sampler\.expert × tensor=4",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            run_trainer(dataclasses.replace(run, **changes), tmp_path / "run")
    for section, changes, said in (
        ("grpo", dict(refill=1), r"sampler\.data=2 samples .* grpo\.refill=1"),
        ("sampling", dict(layout="training"), r"sampling\.layout='training'.*sampler\.data=2"),
    ):
        part = dataclasses.replace(getattr(run, section), **changes)
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(run, **{section: part})
    with pytest.raises(ValueError, match=r"sampler\.data=2 .* set grpo\.update\.importance_cap"):
        dataclasses.replace(online(folder, "moe"), sampler=SamplerConfig(data=2))
    with pytest.raises(ValueError, match=r"SamplerConfig\.data to the copies of the model"):
        SamplerConfig(tensor=2)
    assert not (tmp_path / "run").exists()
