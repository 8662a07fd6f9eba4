# SPDX-License-Identifier: Apache-2.0
"""R1's stages with the numbers as published (arXiv 2501.12948 v2 and its supplement), for 671B.

Where the paper is silent the field keeps its default, and the config files say so.
"""

from r1jax.config.runs import (
    AnswerData,
    GRPORun,
    MeasureConfig,
    QuestionData,
    RewardModelRun,
    SFTRun,
    StartConfig,
)
from r1jax.config.training import (
    GRPOConfig,
    OptimConfig,
    PairsConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    UpdateConfig,
)

BASE = "models/DeepSeek-V3-Base"
CONTEXT = 32_768
ASK = (
    "Reason about the question first and answer it then: the reasoning inside <think> </think>, "
    "the answer inside <answer> </answer>."
)
"""What the paper's template (table 1) tells a base model, which has never seen the tags."""
LEARNING_RATES = {
    "qwen2.5_math_1.5b": 1e-4,
    "qwen2.5_math_7b": 8e-5,
    "qwen2.5_14b": 7e-5,
    "qwen2.5_32b": 6e-5,
    "llama3.1_8b": 5e-5,
    "llama3.3_70b": 2e-5,
}
"""Of the six students' distillation."""


def _grpo(
    *,
    start: str,
    steps: int,
    temperature: float,
    clip: float,
    reward: RewardConfig,
    max_new_tokens: int = CONTEXT,
    general: str = "",
    seed: int = 0,
    ask: str = "",
) -> GRPORun:
    """What all RL stages share: 32 questions of 16 samples, KL 0.001, one epoch of 16 minibatches.

    8,192 rollouts are drawn and split into 16 minibatches of 512; the reference becomes the policy
    every 400 steps. A step here is one such rollout, 16 updates.
    """
    return GRPORun(
        seed=seed,
        start=StartConfig(path=start, dtype="bfloat16"),
        data=QuestionData(
            dataset="questions",
            path="data/reasoning.jsonl",
            general=general,
            skip=True,
            instruction=ask,
        ),
        sampling=SamplingConfig(prompt_length=2048, max_new_tokens=max_new_tokens),
        grpo=GRPOConfig(
            steps=steps // 16,
            prompts=512,
            group_size=16,
            temperature=temperature,
            pieces=16,
            reference_every=400 // 16,
            reward=reward,
            update=UpdateConfig(
                minibatches=16, micro_batches=8, clip_low=clip, clip_high=clip, beta=0.001
            ),
            optim=OptimConfig(learning_rate=3e-6, weight_decay=0.0),
        ),
        measure=MeasureConfig(questions=64, samples=16),
    )


def r1_zero() -> GRPORun:
    """R1-Zero: 10,400 updates from the base model, accuracy and format rewards of equal weight.

    The length limit is 32,768 tokens, and 65,536 from update 8,200 on (`r1_zero_long`).
    """
    return _grpo(start=BASE, steps=8_200, temperature=1.0, clip=0.2, reward=RewardConfig(), ask=ASK)


def r1_zero_long() -> GRPORun:
    """R1-Zero's updates from 8,200 to 10,400, with the longer limit.

    Another seed, for other questions than the first of `r1_zero`.
    """
    return _grpo(
        start="runs/r1_zero_671b/model",
        steps=2_200,
        temperature=1.0,
        clip=0.2,
        reward=RewardConfig(),
        max_new_tokens=65_536,
        seed=1,
        ask=ASK,
    )


def r1_stage1() -> GRPORun:
    """The first RL stage of R1: as R1-Zero with ε = 10, and the language reward added."""
    return _grpo(
        start="models/r1-cold-start",
        steps=10_400,
        temperature=1.0,
        clip=10.0,
        reward=RewardConfig(language=1.0),
    )


def r1_stage2() -> GRPORun:
    """The second RL stage: temperature 0.7, 1,700 updates.

    In the last 400 general prompts are mixed in, judged by a reward model for helpfulness or by one
    for safety; reasoning prompts go on being judged by rules.
    """
    reward = RewardConfig(
        language=1.0,
        model=1.0,
        model_path="runs/reward_helpful_671b/model",
        safe_path="runs/reward_safe_671b/model",
        model_from=1_300 // 16,
    )
    return _grpo(
        start="models/r1-sft-2",
        steps=1_700,
        temperature=0.7,
        clip=0.2,
        reward=reward,
        general="data/general.jsonl",
    )


def _sft(*, start: str, path: str, batch_size: int, rate: float, epochs: float) -> SFTRun:
    return SFTRun(
        start=StartConfig(path=start, dtype="bfloat16"),
        data=AnswerData(path=path, skip=True),
        epochs=epochs,
        sft=SFTConfig(
            examples=1_000_000,
            batch_size=batch_size,
            micro_batches=batch_size // 16,
            length=CONTEXT,
            optim=OptimConfig(learning_rate=rate, final_fraction=0.1),
        ),
    )


def r1_cold_start() -> SFTRun:
    """Cold-start SFT: two to three epochs, cosine from 5e-5 to 5e-6, context 32,768, batch 128."""
    return _sft(start=BASE, path="data/cold_start.jsonl", batch_size=128, rate=5e-5, epochs=2.0)


def r1_sft2() -> SFTRun:
    """The second SFT, from the base model: 600k reasoning and 200k other samples, as the first."""
    return _sft(
        start=BASE,
        path="runs/rejection_671b/traces.jsonl",
        batch_size=128,
        rate=5e-5,
        epochs=2.0,
    )


def distill(student: str, start: str) -> SFTRun:
    """Distillation: SFT of a student on the 800k samples, cosine to a tenth, batch 64."""
    return _sft(
        start=start,
        path="runs/rejection_671b/traces.jsonl",
        batch_size=64,
        rate=LEARNING_RATES[student],
        epochs=2.0,
    )


def reward_helpful() -> RewardModelRun:
    """The helpfulness reward model: 66k pairs, batch 256, 6e-6, one epoch, 8,192 tokens."""
    return _reward_model("data/helpful_pairs.jsonl", "pairwise", 66_000)


def reward_safe() -> RewardModelRun:
    """The safety reward model: 106k labelled answers, pointwise, otherwise as the helpful one."""
    return _reward_model("data/safe_labels.jsonl", "pointwise", 106_000)


def _reward_model(path: str, loss: str, rows: int) -> RewardModelRun:
    return RewardModelRun(
        start=StartConfig(path="models/r1-sft-2", dtype="bfloat16"),
        data=AnswerData(path=path, skip=True),
        pairs=PairsConfig(
            loss=loss,
            steps=rows // 256,
            batch_size=256,
            micro_batches=32,
            length=8_192,
            optim=OptimConfig(learning_rate=6e-6, weight_decay=0.0),
        ),
    )
