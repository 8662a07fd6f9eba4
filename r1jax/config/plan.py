# SPDX-License-Identifier: Apache-2.0
"""What `r1jax plan` compiles: a model, how it is cut over a pod, the shapes of three programs."""

from dataclasses import dataclass, field

from r1jax.config.check import divides, positive
from r1jax.config.mesh import MeshConfig
from r1jax.config.model import ModelConfig
from r1jax.config.training import GRPOConfig, OptimConfig, SamplingConfig


@dataclass(frozen=True)
class PlanConfig:
    """A training step, a GRPO step and a step of decoding on one mesh.

    Attributes:
        mesh: sizes of its axes; all 1: what suits the program on the pod it is planned for.
        rows_per_device: packed rows of a training step, over devices.
        length: tokens of a packed row.
        micro_batches: pieces that a training step's rows are computed in, one after the other.
        mtp_weight: λ of the loss of the second next token.
        optim: of the training step.
        grpo: prompts and samples of each, micro-batches, optimizer.
        sampling: tokens of a prompt and of a completion, for GRPO and for decoding.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rows_per_device: int = 4
    length: int = 4096
    micro_batches: int = 1
    mtp_weight: float = 0.3
    optim: OptimConfig = field(default_factory=OptimConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(prompt_length=1024, max_new_tokens=31_744)
    )

    def __post_init__(self):
        positive(self, "rows_per_device", "length", "micro_batches")
        divides(self.rows_per_device, "rows_per_device", self.micro_batches, "micro_batches")
        if self.mtp_weight < 0:
            raise ValueError(f"mtp_weight must be >= 0, got {self.mtp_weight}")
        for name, length in (("length", self.length), ("sampling", self.sampled_length)):
            if length > self.model.max_position:
                raise ValueError(
                    f"{name}: {length} tokens exceed model.max_position={self.model.max_position}"
                )

    @property
    def sampled_length(self) -> int:
        """Tokens of a prompt with its completion."""
        return self.sampling.prompt_length + self.sampling.max_new_tokens
