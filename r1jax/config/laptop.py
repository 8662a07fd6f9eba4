# SPDX-License-Identifier: Apache-2.0
"""Scaled-down runs of one trainer, on what the quickstart leaves in `runs/quickstart`."""

from r1jax.config.runs import (
    AnswerData,
    DPORun,
    GRPORun,
    MeasureConfig,
    PPORun,
    QuestionData,
    RewardModelRun,
    SFTRun,
    StartConfig,
)
from r1jax.config.tasks import Difficulty
from r1jax.config.training import (
    GRPOConfig,
    OptimConfig,
    PairsConfig,
    PPOConfig,
    PPOUpdateConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    UpdateConfig,
)

QUICKSTART = "runs/quickstart"


def start(stage: str) -> StartConfig:
    """A stage of the quickstart."""
    return StartConfig(path=f"{QUICKSTART}/{stage}", remat=False)


def arithmetic() -> QuestionData:
    """The quickstart's own task."""
    easy = Difficulty(arithmetic_operations=(2, 3), arithmetic_largest=5)
    return QuestionData(dataset="task:arithmetic", difficulty=easy)


def sampling() -> SamplingConfig:
    """Room for the quickstart's prompts and completions."""
    return SamplingConfig(prompt_length=12, max_new_tokens=72)


def optim(rate: float, **changes) -> OptimConfig:
    """A rate for so small a model: a hundred times and more that of a large one."""
    return OptimConfig(
        learning_rate=rate, final_fraction=0.1, warmup_steps=2, weight_decay=0.0, **changes
    )


def grpo(stage: str = "cold_start", **changes) -> GRPORun:
    """GRPO with R1's rewards from a stage; `changes` are fields of `GRPOConfig`."""
    settings = dict(
        steps=30,
        prompts=16,
        group_size=8,
        reference_every=0,
        reward=RewardConfig(format=0.2),
        update=UpdateConfig(beta=0.01),
        optim=optim(6e-4),
    )
    return GRPORun(
        start=start(stage),
        data=arithmetic(),
        sampling=sampling(),
        grpo=GRPOConfig(**settings | changes),
        measure=MeasureConfig(questions=48, samples=8),
    )


def ppo(**changes) -> PPORun:
    """PPO with as many samples a step as `grpo`; `changes` are fields of `PPOConfig`."""
    settings = dict(
        steps=30,
        prompts=128,
        group_size=1,
        reward=RewardConfig(format=0.2),
        update=PPOUpdateConfig(beta=0.01, lam=1.0),
        optim=optim(6e-4),
        value_optim=optim(2e-3),
    )
    return PPORun(
        start=start("cold_start"),
        data=arithmetic(),
        sampling=sampling(),
        ppo=PPOConfig(**settings | changes),
        measure=MeasureConfig(questions=48, samples=8),
    )


def dpo(path: str, **changes) -> DPORun:
    """DPO on pairs in a file; `changes` are fields of `PairsConfig`."""
    settings = dict(steps=60, batch_size=32, length=84, beta=0.1, optim=optim(3e-4))
    return DPORun(
        start=start("cold_start"),
        data=AnswerData(path=path),
        pairs=PairsConfig(**settings | changes),
    )


def reward_model(path: str, **changes) -> RewardModelRun:
    """A pairwise reward model; `changes` are fields of `PairsConfig`."""
    settings = dict(steps=100, batch_size=32, length=84, loss="pairwise", optim=optim(1e-3))
    return RewardModelRun(
        start=start("cold_start"),
        data=AnswerData(path=path),
        pairs=PairsConfig(**settings | changes),
    )


def distill(path: str, **changes) -> SFTRun:
    """The Qwen2-shaped student on traces in a file; `changes` are fields of `SFTConfig`."""
    settings = dict(batch_size=8, length=128, optim=optim(3e-3))
    return SFTRun(
        start=start("base_qwen2"),
        data=AnswerData(path=path),
        epochs=3.0,
        sft=SFTConfig(**settings | changes),
    )
