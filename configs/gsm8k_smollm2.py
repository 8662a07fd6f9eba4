# SPDX-License-Identifier: Apache-2.0
"""GRPO on GSM8K with a small pretrained model (Cobbe et al., 2110.14168; 2402.03300, section 4).

Command:   r1jax train --config=configs/gsm8k_smollm2.py --config.data.path=gsm8k/train.jsonl
                       --config.data.heldout=gsm8k/test.jsonl
Hardware:  one accelerator of 40 GB or more (not measured by us); on 2 CPU cores it starts, rolls
           out, scores and steps with the settings of tests/train/test_gsm8k.py, in minutes
Expected:  a model of 135M parameters answers few of GSM8K's questions; what is to be seen first is
           the format reward rising
Needs:     SmolLM2-135M-Instruct.Q4_1.gguf (extra gguf) or a Hugging Face folder of any chat model
"""

from r1jax.config import (
    GRPOConfig,
    GRPORun,
    MeasureConfig,
    OptimConfig,
    QuestionData,
    RewardConfig,
    SamplingConfig,
    StartConfig,
    UpdateConfig,
    to_config_dict,
)

ASK = (
    "Think step by step inside <think> </think>, then give the final number inside "
    "<answer> </answer>."
)


def get_config():
    """DeepSeekMath's settings with R1's rewards, scaled to the model."""
    return to_config_dict(
        GRPORun(
            start=StartConfig(path="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16"),
            data=QuestionData(
                dataset="gsm8k", path="gsm8k/train.jsonl", instruction=ASK, skip=True
            ),
            sampling=SamplingConfig(prompt_length=256, max_new_tokens=256),
            grpo=GRPOConfig(
                steps=500,
                prompts=32,
                group_size=16,
                pieces=4,
                reference_every=0,
                reward=RewardConfig(accuracy=1.0, format=0.5),
                update=UpdateConfig(minibatches=2, micro_batches=8, beta=0.01),
                optim=OptimConfig(learning_rate=2e-6, warmup_steps=10, weight_decay=0.0),
            ),
            measure=MeasureConfig(questions=256, samples=4),
        )
    )
