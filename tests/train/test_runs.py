# SPDX-License-Identifier: Apache-2.0
"""Runs of one trainer, end to end on the smallest model: files in, a model folder out."""

import dataclasses
import json

import numpy as np
import pytest

from r1jax.config import (
    LANGUAGES,
    QUESTION_SETS,
    AnswerData,
    Difficulty,
    DPORun,
    GRPOConfig,
    GRPORun,
    MeasureConfig,
    OptimConfig,
    PairsConfig,
    PPOConfig,
    PPORun,
    QuestionData,
    RewardConfig,
    RewardModelRun,
    SamplingConfig,
    SFTConfig,
    SFTRun,
    StartConfig,
    UpdateConfig,
)
from r1jax.data.datasets import QUESTIONS
from r1jax.data.tasks import TASKS
from r1jax.data.template import R1
from r1jax.io import metrics
from r1jax.io.model import Model, open_model, save_model
from r1jax.nn.param import leaves
from r1jax.rl.rewards.language import SCRIPTS
from r1jax.train.asked import training_questions
from r1jax.train.progress import Silent
from r1jax.train.runs import run_trainer
from r1jax.train.trained import open_run, task_words
from tests.nn import tiny as models
from tests.train import tiny

ARCH = models.dense_config(qwen2=True, vocab_size=tiny.VOCAB, num_layers=1)
FAST = OptimConfig(learning_rate=0.01, weight_decay=0.0)
SAMPLING = SamplingConfig(prompt_length=8, max_new_tokens=6)
# The models here know nothing: some completions hold a word, some only numbers.
BY_WORDS = RewardConfig(language=1.0, overlong=1.0)
DATA = QuestionData(difficulty=Difficulty(arithmetic_operations=(1,)))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model folder with the tasks' words."""
    path = tmp_path_factory.mktemp("models") / "start"
    save_model(path, Model(ARCH, models.model(ARCH), task_words(R1)))
    return StartConfig(path=str(path), remat=False)


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def rows_to(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs_file(path, n=6):
    rows = [
        {
            "prompt": f"compute {i} + 1",
            "chosen": f"<think> {i} </think> <answer> {i + 1} </answer>",
            "rejected": "<think> 1 </think> <answer> 0 </answer>",
        }
        for i in range(n)
    ]
    return rows_to(path, rows)


def grpo_run(start, **changes):
    stage = dict(
        steps=2, prompts=2, group_size=4, optim=FAST, update=UpdateConfig(beta=0.0),
        reward=BY_WORDS,
    )  # fmt: skip
    return GRPORun(
        start=start, data=DATA, sampling=SAMPLING, grpo=GRPOConfig(**stage | changes),
        measure=MeasureConfig(questions=3, samples=1),
    )  # fmt: skip


def moved(start, out):
    """How far the trained parameters are from the start's, at most."""
    before, after = (leaves(open_model(p).module) for p in (start.path, out / "model"))
    assert before.keys() == after.keys()
    return max(float(np.abs(np.asarray(after[k][...] - before[k][...])).max()) for k in before)


def test_grpo_leaves_a_model_and_is_not_run_twice(tmp_path, start):
    out, heard = tmp_path / "run", Heard()
    summary = run_trainer(grpo_run(start), out, display=heard)
    assert [s["name"] for s in summary["stages"]] == ["start", "grpo"]
    assert {"pass_at_1", "greedy", "format_rate", "mean_tokens"} <= summary["stages"][1].keys()
    rows = metrics.read(out / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2]
    assert {"overlong", "accuracy", "entropy", "clip_fraction", "grad_norm"} <= rows[0].keys()
    assert "kl" not in rows[0]  # beta 0: there is no reference
    assert 0 < moved(start, out) < 1
    assert (out / "curves.png").stat().st_size > 1000
    again = run_trainer(grpo_run(start), out, display=Heard())
    assert again == summary
    with pytest.raises(ValueError, match="seed"):
        run_trainer(dataclasses.replace(grpo_run(start), seed=1), out)


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["own", "shared"])
def test_ppo_leaves_a_policy_without_its_critic(tmp_path, start, critic):
    ppo = PPOConfig(
        steps=2, prompts=4, critic=critic, optim=FAST, value_optim=FAST, reward=BY_WORDS
    )
    run = PPORun(
        start=start, data=DATA, sampling=SAMPLING, ppo=ppo,
        measure=MeasureConfig(questions=3, samples=1),
    )  # fmt: skip
    summary = run_trainer(run, tmp_path / "run")
    assert summary["stages"][1]["parameters"] == summary["stages"][0]["parameters"]
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert {"value_loss", "explained_variance", "kl", "reward"} <= rows[1].keys()
    assert 0 < moved(start, tmp_path / "run") < 1


class Cut(Silent):
    """The power goes in the third step of training."""

    def step(self, step, **numbers):
        if step == 3:
            raise RuntimeError("the power went")


def ppo_run(start, path, critic):
    ppo = PPOConfig(
        steps=4, prompts=4, critic=critic, optim=FAST, value_optim=FAST, reward=BY_WORDS,
        reference_every=3,
    )  # fmt: skip
    return PPORun(
        start=start, data=DATA, sampling=SAMPLING, ppo=ppo,
        measure=MeasureConfig(questions=3, samples=1),
    )  # fmt: skip


def pairs_run(start, path, loss):
    pairs = PairsConfig(loss=loss, steps=5, batch_size=4, length=24, optim=FAST)
    kind = RewardModelRun if loss == "pairwise" else DPORun
    return kind(start=start, data=AnswerData(path=path), pairs=pairs)


@pytest.mark.parametrize(
    ("make", "how"),
    [
        pytest.param(ppo_run, "own", marks=pytest.mark.slow),
        pytest.param(ppo_run, "shared", marks=pytest.mark.slow),
        (pairs_run, "dpo"),
        pytest.param(pairs_run, "pairwise", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_cut_ends_as_if_it_was_not(tmp_path, start, make, how):
    """Critic, moments, reference, questions, noise and metrics: to the bit."""
    run = make(start, pairs_file(tmp_path / "pairs.jsonl"), how)
    run = dataclasses.replace(run, checkpoint_every=1e-9)
    run_trainer(run, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the power went"):
        run_trainer(run, tmp_path / "cut", display=Cut())
    run_trainer(run, tmp_path / "cut", display=(heard := Heard()))
    assert any("resumed at step 2" in line for line in heard.lines)
    whole, cut = (
        [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in metrics.read(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert cut == whole
    found, wanted = (
        leaves(open_model(tmp_path / name / "model").module) for name in ("cut", "whole")
    )
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name][...], value[...], err_msg=name)
    assert moved(start, tmp_path / "cut") > 0


def test_dpo_learns_what_is_preferred(tmp_path, start):
    pairs = PairsConfig(steps=8, batch_size=4, length=24, optim=FAST)
    path = pairs_file(tmp_path / "pairs.jsonl")
    run = DPORun(start=start, data=AnswerData(path=path, heldout=path), pairs=pairs)
    summary = run_trainer(run, tmp_path / "run")
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert rows[-1]["loss"] < 0.5
    assert summary["stages"][0]["heldout_accuracy"] == 1.0


@pytest.mark.slow
def test_a_reward_model_is_trained_and_rewards(tmp_path, start):
    """It ranks its pairs, is opened again, and its score is a reward of GRPO."""
    pairs = PairsConfig(loss="pairwise", steps=12, batch_size=4, length=24, optim=FAST)
    path = pairs_file(tmp_path / "pairs.jsonl")
    run = RewardModelRun(start=start, data=AnswerData(path=path, heldout=path), pairs=pairs)
    summary = run_trainer(run, tmp_path / "judge")
    assert summary["stages"][0]["heldout_accuracy"] == 1.0
    reward = RewardConfig(model=1.0, model_path=str(tmp_path / "judge" / "model"), model_from=1)
    run_trainer(grpo_run(start, reward=reward), tmp_path / "run")
    first, second = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert "model" not in first
    assert np.isfinite(second["model"])
    assert second["reward"] == pytest.approx(
        second["accuracy"] + second["format"] + second["model"], rel=1e-5
    )


@pytest.mark.slow
def test_general_prompts_are_judged_by_their_reward_models(tmp_path, start):
    """R1's second stage: from a step on they take the place of questions."""
    pairs = PairsConfig(loss="pairwise", steps=1, batch_size=4, length=24, optim=FAST)
    data = AnswerData(path=pairs_file(tmp_path / "pairs.jsonl"))
    run_trainer(RewardModelRun(start=start, data=data, pairs=pairs), tmp_path / "judge")
    rows = [{"prompt": "compute 7 - 1", "kind": kind} for kind in ("helpful", "safe")]
    asked = dataclasses.replace(DATA, general=rows_to(tmp_path / "general.jsonl", rows))
    judge = str(tmp_path / "judge" / "model")
    reward = RewardConfig(model=0.5, model_path=judge, model_from=1)
    run = dataclasses.replace(grpo_run(start, reward=reward), data=asked)
    refused(tmp_path, run, "safe_path")
    refused(
        tmp_path,
        dataclasses.replace(
            run,
            grpo=dataclasses.replace(
                run.grpo, reward=dataclasses.replace(reward, safe_path=start.path)
            ),
        ),
        "reward.safe_path=.*it is no reward model",
    )
    reward = dataclasses.replace(reward, safe_path=judge)
    run_trainer(
        dataclasses.replace(run, grpo=dataclasses.replace(run.grpo, reward=reward)),
        tmp_path / "run",
    )
    first, second = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert "model" not in first
    # Of two prompts one is general: accuracy and score are each of half the rows.
    half = (second["accuracy"] + 0.5 * second["model"]) / 2
    assert second["reward"] == pytest.approx(half + second["format"], rel=1e-5)
    with pytest.raises(ValueError, match=r"data\.general=.* has no answers to check"):
        dataclasses.replace(grpo_run(start), data=asked)


def test_sft_goes_through_the_data_by_epochs(tmp_path, start):
    rows = [{"prompt": "compute 1 + 1", "completion": f"<think> {i} </think>"} for i in range(8)]
    rows[0]["prompt"] = "compute 你好"
    rows.insert(2, {"prompt": "compute 1 + 1"})
    path, heard = rows_to(tmp_path / "sft.jsonl", rows), Heard()
    sft = SFTConfig(batch_size=2, length=16, optim=FAST)
    run = SFTRun(start=start, data=AnswerData(path=path, skip=True), epochs=3, sft=sft)
    summary = run_trainer(run, tmp_path / "run", display=heard)
    assert summary["stages"][0]["steps"] == 12  # one example a row, 8 rows, 2 a step
    losses = [r["loss"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.2
    assert any("sft.jsonl:3" in line and "1 rows skipped" in line for line in heard.lines)
    ours, folder = (
        m.module for m in (open_run(tmp_path / "run"), open_model(tmp_path / "run/model"))
    )
    assert all((v == leaves(folder)[k]).all() for k, v in leaves(ours).items()), "RUN is RUN/model"
    (warning,) = (line for line in heard.lines if line.startswith("warning"))
    assert f"{path}: 1 of 86 tokens are <unk>, text that the model's tokenizer" in warning
    strict = dataclasses.replace(run, data=AnswerData(path=path))
    with pytest.raises(ValueError, match=r"sft\.jsonl:3"):
        run_trainer(strict, tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


def test_sft_says_what_of_a_file_it_leaves_out(tmp_path, start):
    rows = [{"prompt": "compute 1 + 1", "completion": f"<think> {i} </think>"} for i in range(5)]
    path, heard = rows_to(tmp_path / "sft.jsonl", rows), Heard()
    sft = SFTConfig(steps=0, examples=3, batch_size=2, length=16, optim=FAST)
    run = SFTRun(start=start, data=AnswerData(path=path), sft=sft)
    run_trainer(run, tmp_path / "run", display=heard)
    assert any("first 3 of 5 conversations" in line for line in heard.lines)


def test_runs_of_other_seeds_are_asked_other_questions(start):
    """Not even later: seed 1 is not seed 0 one batch on."""
    words = open_model(start.path).tokenizer
    data = QuestionData(difficulty=Difficulty(arithmetic_operations=(3, 4)))
    how = dict(longest=32, progress=Silent())
    batches = [
        tuple(training_questions(data, words, seed=seed, **how)(index, 8, 0).prompts)
        for seed in (0, 1, 2)
        for index in range(4)
    ]
    assert len(set(batches)) == len(batches)


def test_what_is_too_long_is_named_by_its_line(tmp_path, start):
    """Also behind a row that was skipped before."""
    fits = {"prompt": "compute 1 + 1", "completion": "<think> 1 </think>"}
    rows = [{"prompt": "compute 1 + 1"}, fits, fits | {"completion": "1 " * 40}]
    path, heard = rows_to(tmp_path / "sft.jsonl", rows), Heard()
    sft = SFTConfig(steps=0, batch_size=2, length=16, optim=FAST)
    run = SFTRun(start=start, data=AnswerData(path=path, skip=True), sft=sft)
    run_trainer(run, tmp_path / "run", display=heard)
    assert any("2 rows skipped, the first" in line for line in heard.lines)
    path = rows_to(tmp_path / "long.jsonl", rows[1:])
    refused(
        tmp_path / "no", dataclasses.replace(run, data=AnswerData(path=path)), r"long\.jsonl:2: "
    )
    pair = {"prompt": "compute 1 + 1", "chosen": "1 " * 40, "rejected": "2"}
    path = rows_to(tmp_path / "pairs.jsonl", [pair | {"chosen": "3"}, pair])
    refused(
        tmp_path / "no",
        DPORun(start=start, data=AnswerData(path=path), pairs=PairsConfig(length=16)),
        r"pairs\.jsonl:2: ",
    )


def refused(tmp_path, run, message):
    with pytest.raises(ValueError, match=message):
        run_trainer(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path, start):
    long = SamplingConfig(prompt_length=8, max_new_tokens=10**6)
    refused(tmp_path, dataclasses.replace(grpo_run(start), sampling=long), "positions")
    short = SamplingConfig(prompt_length=2, max_new_tokens=4)
    asked = rows_to(tmp_path / "q.jsonl", [{"question": "compute 1 + 1", "answer": "2"}])
    data = QuestionData(dataset="questions", path=asked)
    run = dataclasses.replace(grpo_run(start), sampling=short, data=data)
    refused(tmp_path, run, "prompt_length=2")
    refused(tmp_path, dataclasses.replace(run, data=DATA), "a prompt has . tokens.*prompt_length=2")
    many = dataclasses.replace(grpo_run(start), measure=MeasureConfig(questions=10**4))
    refused(tmp_path, many, r"measure\.questions=10000: task 'arithmetic' has only")
    empty = rows_to(tmp_path / "empty.jsonl", [])
    data = QuestionData(dataset="questions", path=empty)
    refused(tmp_path, dataclasses.replace(run, data=data), "holds no rows")
    no_answer = rows_to(tmp_path / "na.jsonl", [{"question": "compute 1 + 1"}])
    data = QuestionData(dataset="questions", path=no_answer)
    refused(tmp_path, dataclasses.replace(run, data=data), r"na\.jsonl:1")
    same = [{"prompt": "compute 1 + 1", "chosen": "2", "rejected": "2"}]
    data = AnswerData(path=rows_to(tmp_path / "same.jsonl", same))
    refused(
        tmp_path, DPORun(start=start, data=data, pairs=PairsConfig(length=40)), r"same\.jsonl:1"
    )
    pairs = AnswerData(path=pairs_file(tmp_path / "pairs.jsonl"))
    endless = PairsConfig(length=ARCH.max_position + 1)
    refused(tmp_path, DPORun(start=start, data=pairs, pairs=endless), r"pairs\.length=\d+ exceeds")
    tight = PairsConfig(length=4)
    refused(tmp_path, DPORun(start=start, data=pairs, pairs=tight), r"pairs\.jsonl:1: has .*=4;")
    talk = [{"prompt": "compute 1", "completion": "1 " * ARCH.max_position}]
    data = AnswerData(path=rows_to(tmp_path / "talk.jsonl", talk))
    sft = SFTConfig(length=4 * ARCH.max_position)
    refused(
        tmp_path,
        SFTRun(start=start, data=data, sft=sft),
        rf"talk\.jsonl:1: .*={ARCH.max_position};",
    )
    nowhere = dataclasses.replace(start, path=str(tmp_path / "none"))
    refused(tmp_path, grpo_run(nowhere), "no such model folder")
    reward = RewardConfig(model=1.0, model_path=start.path)
    refused(tmp_path, grpo_run(start, reward=reward), "no reward model")


def test_the_languages_of_the_config_are_those_that_are_told_apart():
    assert set(LANGUAGES) == set(SCRIPTS)


def test_the_question_sets_of_the_config_are_those_that_are_read():
    assert set(QUESTION_SETS) == {f"task:{name}" for name in TASKS} | set(QUESTIONS)
