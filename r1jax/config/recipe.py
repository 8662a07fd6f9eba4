# SPDX-License-Identifier: Apache-2.0
"""The whole recipe: one field a stage."""

from dataclasses import dataclass, field

from r1jax.config.check import positive
from r1jax.config.model import DenseConfig, ModelConfig
from r1jax.config.tasks import TaskConfig
from r1jax.config.training import GRPOConfig, SamplingConfig, SFTConfig


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation after each stage: `samples` at temperature 1 and one greedy a problem."""

    problems: int = 96
    samples: int = 16
    shown: int = 6  # problems whose answers before and after RL go into the report

    def __post_init__(self):
        positive(self, "problems", "samples", "shown")


@dataclass(frozen=True)
class RejectionConfig:
    """Rejection sampling: sample, verify, keep up to `keep` distinct correct traces a problem."""

    problems: int = 256
    samples: int = 8
    keep: int = 2

    def __post_init__(self):
        positive(self, "problems", "samples", "keep")
        if self.keep > self.samples:
            raise ValueError(f"rejection.keep={self.keep} exceeds rejection.samples={self.samples}")


@dataclass(frozen=True)
class StudentsConfig:
    """The two students that the teacher's correct traces are distilled into."""

    qwen2: DenseConfig = field(default_factory=DenseConfig)
    llama: DenseConfig = field(default_factory=lambda: DenseConfig(qkv_bias=False))


@dataclass(frozen=True)
class RecipeConfig:
    """The R1 recipe: one field a stage, in order."""

    seed: int = 0
    tasks: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    students: StudentsConfig = field(default_factory=StudentsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    pretrain: SFTConfig = field(default_factory=SFTConfig)
    cold_start: SFTConfig = field(default_factory=SFTConfig)
    rl_1: GRPOConfig = field(default_factory=GRPOConfig)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    sft_2: SFTConfig = field(default_factory=SFTConfig)
    rl_2: GRPOConfig = field(default_factory=GRPOConfig)
    distill_data: RejectionConfig = field(default_factory=RejectionConfig)
    student_pretrain: SFTConfig = field(default_factory=SFTConfig)  # as Qwen and Llama came
    distill: SFTConfig = field(default_factory=SFTConfig)
    checkpoint_every: float = 30.0  # seconds between checkpoints inside a stage

    def __post_init__(self):
        positive(self, "checkpoint_every")
        if not 0 <= self.seed < 2**20:  # each stage takes a million seeds of its own
            raise ValueError(f"seed must lie in 0..{2**20 - 1}, got {self.seed}")
        if self.sampling.redundant_experts:
            raise ValueError(
                f"sampling.redundant_experts={self.sampling.redundant_experts} are for devices "
                "that share experts, and a recipe runs on one; set it to 0"
            )
        total = self.sampling.prompt_length + self.sampling.max_new_tokens
        for name, model in self.models():
            if total > model.max_position:
                raise ValueError(
                    f"{name}.max_position={model.max_position} is shorter than "
                    f"sampling.prompt_length + max_new_tokens = {total}; raise {name}.max_position"
                )
        for name, sft in (("sft_2", self.sft_2), ("distill", self.distill)):
            if sft.length < total:
                raise ValueError(
                    f"{name}.length={sft.length} cannot hold every sampled trace: "
                    f"sampling.prompt_length + max_new_tokens = {total}; raise {name}.length"
                )

        for name, rl in (("rl_1", self.rl_1), ("rl_2", self.rl_2)):
            if rl.reward.model:
                raise ValueError(
                    f"{name}.reward.model={rl.reward.model}: the recipe has no reward model; train "
                    "its stages one by one, by configs with trainer='grpo'"
                )

    def models(self) -> tuple[tuple[str, ModelConfig | DenseConfig], ...]:
        """The three models with the paths of their fields."""
        students = self.students
        return (
            ("model", self.model),
            ("students.qwen2", students.qwen2),
            ("students.llama", students.llama),
        )
