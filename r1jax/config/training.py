# SPDX-License-Identifier: Apache-2.0
"""Settings of the trainers and of the sampler."""

from dataclasses import dataclass, field

from r1jax.config.check import activations, divides, fraction, positive


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with global-norm clipping; warm-up, then constant or cosine (DeepSeek-V3, 4.2)."""

    learning_rate: float = 2.2e-4
    final_fraction: float = 1.0  # of learning_rate, at the end of the cosine; 1 = constant
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: str = "float32"  # of Adam's moments; "bfloat16" as DeepSeek-V3 (section 3.3.2)

    def __post_init__(self):
        positive(self, "eps", "clip_norm")
        activations(self.moment_dtype, "optim.moment_dtype")
        fraction(self, "b1", "b2", "final_fraction")
        if self.learning_rate < 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError("optim.learning_rate, warmup_steps and weight_decay must be >= 0")


@dataclass(frozen=True)
class SFTConfig:
    """Next-token training on packed rows: pre-training (what follows a question) and SFT."""

    steps: int = 1000
    examples: int = 10_000  # documents generated for it
    batch_size: int = 32  # packed rows a step
    micro_batches: int = 1
    length: int = 128  # tokens of a packed row
    mtp_weight: float = 0.3  # λ, eq. 25
    bias_freeze: float = 0.034  # last share of the steps in which the router bias stands still
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        positive(self, "examples", "batch_size", "micro_batches", "length")
        fraction(self, "bias_freeze")
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        divides(self.batch_size, "batch_size", self.micro_batches, "micro_batches")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn. `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    prompt_length: int = 24
    max_new_tokens: int = 96

    def __post_init__(self):
        positive(self, "prompt_length", "max_new_tokens")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature must be >= 0, got {self.temperature}")
        if self.top_k is not None:
            positive(self, "top_k")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.top_p must lie in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class UpdateConfig:
    """What one call of the compiled GRPO step does with a batch of rollouts.

    The rows are split into `minibatches` updates, gone over `epochs` times; each update is computed
    in `micro_batches` pieces.
    """

    minibatches: int = 1
    epochs: int = 1
    micro_batches: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.001  # weight of the KL to the reference

    def __post_init__(self):
        positive(self, "minibatches", "epochs", "micro_batches")
        if self.clip_low < 0 or self.clip_high < 0 or self.beta < 0:
            raise ValueError("update.clip_low, update.clip_high and update.beta must be >= 0")


@dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimisation (arXiv 2402.03300, eq. 3); the defaults are R1-Zero's."""

    steps: int = 100
    prompts: int = 32
    group_size: int = 16
    reference_every: int = 400  # steps after which the reference becomes the policy; 0 = never
    accuracy_weight: float = 1.0
    format_weight: float = 1.0
    update: UpdateConfig = field(default_factory=UpdateConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=3e-6, weight_decay=0.0)
    )

    def __post_init__(self):
        positive(self, "prompts", "group_size")
        if self.steps < 0 or self.reference_every < 0:
            raise ValueError("steps and reference_every must be >= 0")
        divides(
            self.prompts * self.group_size,
            "prompts × group_size",
            self.update.minibatches * self.update.micro_batches,
            "update.minibatches × update.micro_batches",
        )
