# SPDX-License-Identifier: Apache-2.0
"""Presets are functions: the laptop models and the quickstart recipe."""

from r1jax.config.model import DenseConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from r1jax.config.recipe import EvalConfig, RecipeConfig, RejectionConfig, StudentsConfig
from r1jax.config.tasks import Difficulty, TaskConfig, TraceMix
from r1jax.config.training import (
    GRPOConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    UpdateConfig,
)


def laptop_model() -> ModelConfig:
    """A DeepSeek-V3-shaped model of 0.4M parameters with every mechanism switched on."""
    return ModelConfig(
        vocab_size=384,
        num_layers=4,
        first_k_dense=1,
        hidden_size=64,
        intermediate_size=192,
        max_position=512,
        init_std=0.1,
        mtp_depth=1,
        dtype="float32",
        remat=False,
        scan_unroll=4,
        rope=RopeConfig(),
        mla=MLAConfig(
            num_heads=4,
            q_lora_rank=48,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
        ),
        moe=MoEConfig(
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
            moe_intermediate_size=32,
            bias_update_speed=0.01,
        ),
    )


def laptop_student(*, qkv_bias: bool) -> DenseConfig:
    """A dense student: Qwen2-shaped with biases and tied embeddings, else Llama-shaped."""
    return DenseConfig(
        vocab_size=384,
        num_layers=4,
        hidden_size=64,
        intermediate_size=192,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        qkv_bias=qkv_bias,
        tie_embeddings=qkv_bias,
        max_position=512,
        init_std=0.1,
        dtype="float32",
        remat=False,
        scan_unroll=4,
        rope=RopeConfig(),
    )


def quickstart() -> RecipeConfig:
    """The whole recipe in minutes on two CPU cores: `r1jax quickstart`."""

    def sft(steps: int, lr: float, batch_size: int = 8, length: int = 128, **changes) -> SFTConfig:
        optim = OptimConfig(
            learning_rate=lr, final_fraction=0.1, warmup_steps=20, weight_decay=0.01
        )
        return SFTConfig(steps=steps, batch_size=batch_size, length=length, optim=optim, **changes)

    def rl(steps: int, lr: float) -> GRPOConfig:
        return GRPOConfig(
            steps=steps,
            prompts=16,
            group_size=8,
            reward=RewardConfig(format=0.2),
            reference_every=0,
            update=UpdateConfig(beta=0.01),
            optim=OptimConfig(
                learning_rate=lr, final_fraction=0.1, warmup_steps=2, weight_decay=0.0
            ),
        )

    return RecipeConfig(
        tasks=TaskConfig(
            names=("arithmetic",),
            weights=(1.0,),
            difficulty=Difficulty(
                arithmetic_operations=(2, 3),
                arithmetic_largest=5,
                countdown_numbers=(3,),
                countdown_largest=9,
                countdown_target=50,
            ),
            mix=TraceMix(checked=0.9, retry=0.2, max_tries=2),
        ),
        model=laptop_model(),
        students=StudentsConfig(laptop_student(qkv_bias=True), laptop_student(qkv_bias=False)),
        sampling=SamplingConfig(prompt_length=12, max_new_tokens=72),
        evaluation=EvalConfig(problems=48, samples=16),
        pretrain=sft(1500, 5e-3, 16, 64, examples=48_000),
        cold_start=sft(150, 3e-3, examples=4_000),
        rl_1=rl(30, 6e-4),
        rejection=RejectionConfig(problems=512, samples=8, keep=4),
        sft_2=sft(150, 3e-3),
        rl_2=rl(30, 6e-4),
        distill_data=RejectionConfig(problems=1280, samples=2, keep=2),
        student_pretrain=sft(1500, 5e-3, 12, 64, examples=45_000),
        distill=sft(450, 3e-3),
    )
