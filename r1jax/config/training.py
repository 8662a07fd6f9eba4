# SPDX-License-Identifier: Apache-2.0
"""Settings of the trainers and of the sampler."""

from dataclasses import dataclass, field
from typing import Any

from r1jax.config.check import activations, divides, fraction, one_of, positive


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
    examples: int = 10_000  # documents generated for it; of a file, at most so many
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


LAYOUTS = ("decoding", "training")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn, at the temperature that a stage has.

    `layout` says where the weights of a mesh lie meanwhile: "decoding" lays them out anew once a
    rollout, whole but for experts and heads; "training" needs no memory for that, and gathers every
    layer at every token.

    `redundant_experts` are copies of those experts that training lately sent most tokens to. While
    completions are drawn, each device of the mesh's expert axis holds its share of them beside its
    own experts, and gets about as many tokens as the others.
    """

    top_k: int | None = None
    top_p: float | None = None
    prompt_length: int = 24
    max_new_tokens: int = 96
    layout: str = "decoding"
    redundant_experts: int = 0

    def __post_init__(self):
        positive(self, "prompt_length", "max_new_tokens")
        if self.redundant_experts < 0:
            raise ValueError(
                f"sampling.redundant_experts must be >= 0, got {self.redundant_experts}"
            )
        if self.redundant_experts and self.layout != "decoding":
            raise ValueError(
                f"sampling.redundant_experts={self.redundant_experts} are laid out for decoding; "
                f"with sampling.layout={self.layout!r} set it to 0"
            )
        one_of(self, "layout", LAYOUTS)
        if self.top_k is not None:
            positive(self, "top_k")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.top_p must lie in (0, 1], got {self.top_p}")


OBJECTIVES = (
    "grpo",
    "output_grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "gspo_token",
    "cispo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
)
"""What `update.objective` may be; `r1jax.train.objective` says what each is made of."""

KL_ESTIMATORS = ("k1", "k2", "k3", "k3_corrected")
LANGUAGES = ("ar", "el", "en", "hi", "ja", "ko", "ru", "th", "zh")
"""What `reward.target_language` may be: those that `r1jax.rl.rewards.language` can tell apart."""


@dataclass(frozen=True)
class UpdateConfig:
    """What one call of the compiled GRPO step does with a batch of rollouts.

    The rows are split into `minibatches` updates, gone over `epochs` times; each update is computed
    in `micro_batches` pieces.
    """

    objective: str = "grpo"
    minibatches: int = 1
    epochs: int = 1
    micro_batches: int = 1
    clip_low: float | None = None  # distance of the ratio's lower bound from 1; None: that of the
    clip_high: float | None = None  # objective's paper (`r1jax.train.objective`); and of the upper
    beta: float = 0.001  # weight of the KL to the reference; at 0 no reference is held
    kl: str = "k3"  # its estimator, where the objective has the KL in the loss
    scale: str = "group"  # advantages over the deviation of the group, of the batch, or "none"
    ddof: int = 0  # 0 divides its squares by the number of rewards (the papers), 1 by one less
    eps: float = 1e-6  # added to it
    importance_cap: float | None = None  # of π_trainer / π_sampler, per token; None: no correction

    def __post_init__(self):
        positive(self, "minibatches", "epochs", "micro_batches", "eps")
        one_of(self, "objective", OBJECTIVES)
        one_of(self, "kl", KL_ESTIMATORS)
        one_of(self, "scale", ("group", "batch", "none"))
        if min(self.clip_low or 0, self.clip_high or 0, self.beta) < 0:
            raise ValueError("update.clip_low, update.clip_high and update.beta must be >= 0")
        if self.ddof not in (0, 1):
            raise ValueError(f"update.ddof must be 0 or 1, got {self.ddof}")
        if self.importance_cap is not None and self.importance_cap < 1:
            raise ValueError(f"update.importance_cap must be >= 1, got {self.importance_cap}")


@dataclass(frozen=True)
class RewardConfig:
    """The weight of each reward; one of weight 0 is not computed.

    Attributes:
      accuracy: 1 for a right answer: by math-verify, unit tests or the task's own verifier.
      format: 1 for a completion that follows the template to the letter.
      language: share of words in `target_language` of the chain of thought (R1, section 2.3.2).
      overlong: DAPO's soft punishment over the last `overlong_buffer` tokens of the length limit.
      repetition: −1..0 for chains of thought that run in circles.
      model: score of the reward model in the folder `model_path`, from step `model_from` on: of
        general prompts where the data has them (`data.general`), else of all.
      safe_path: the reward model of general prompts of the kind "safe"; its weight is `model` too.
    """

    accuracy: float = 1.0
    format: float = 1.0
    language: float = 0.0
    target_language: str = "en"
    overlong: float = 0.0
    overlong_buffer: int = 64
    repetition: float = 0.0
    model: float = 0.0
    model_path: str = ""
    safe_path: str = ""
    model_from: int = 0

    def __post_init__(self):
        positive(self, "overlong_buffer")
        one_of(self, "target_language", LANGUAGES)
        names = ("accuracy", "format", "language", "overlong", "repetition", "model")
        if not any(vars(self)[name] for name in names):
            raise ValueError(f"every weight of reward is 0; set one of {', '.join(names)}")
        if self.model_from < 0:
            raise ValueError(f"reward.model_from must be >= 0, got {self.model_from}")
        if bool(self.model) != bool(self.model_path):
            raise ValueError(
                f"reward.model={self.model} and reward.model_path={self.model_path!r} belong "
                "together: set both or none"
            )
        if self.safe_path and not self.model:
            raise ValueError(f"reward.safe_path={self.safe_path!r} needs reward.model, its weight")


def rollouts_fit(owner: Any, minibatches: int, micro_batches: int) -> None:
    """Checks what a stage that learns from rollouts says of their number."""
    positive(owner, "prompts", "group_size", "pieces")
    for name in ("steps", "reference_every"):
        if getattr(owner, name) < 0:
            raise ValueError(f"{name} must be >= 0, got {getattr(owner, name)}")
    if owner.temperature <= 0:
        raise ValueError(
            f"temperature={owner.temperature} must be positive: greedy answers to a prompt are all "
            "the same, so nothing is learnt from them"
        )
    divides(
        owner.prompts * owner.group_size,
        "prompts × group_size",
        minibatches * micro_batches,
        "update.minibatches × update.micro_batches",
    )
    divides(owner.prompts, "prompts", owner.pieces, "pieces")


@dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimisation (arXiv 2402.03300, eq. 3); the defaults are R1-Zero's."""

    steps: int = 100
    prompts: int = 32
    group_size: int = 16
    temperature: float = 1.0
    pieces: int = 1  # of a step's prompts: one is judged while the next is sampled
    refill: int = 0  # most batches sampled in place of groups without contrast (DAPO)
    reference_every: int = 400  # steps after which the reference becomes the policy; 0 = never
    reward: RewardConfig = field(default_factory=RewardConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=3e-6, weight_decay=0.0)
    )

    def __post_init__(self):
        rollouts_fit(self, self.update.minibatches, self.update.micro_batches)
        if self.refill < 0:
            raise ValueError(f"refill must be >= 0, got {self.refill}")
        if self.group_size == 1 and self.update.objective != "reinforce_pp":
            raise ValueError(
                f"group_size=1 leaves update.objective={self.update.objective!r} no answer to "
                "compare with; set group_size to 2 or more, or the objective to reinforce_pp"
            )


@dataclass(frozen=True)
class PPOUpdateConfig:
    """What one call of the compiled PPO step does with a batch of rollouts."""

    minibatches: int = 1
    epochs: int = 1
    micro_batches: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.2  # ε of the critic, in units of the reward
    gamma: float = 1.0
    lam: float = 0.95  # λ of GAE
    beta: float = 0.001  # weight of the KL in the reward; at 0 no reference is held

    def __post_init__(self):
        positive(self, "minibatches", "epochs", "micro_batches", "value_clip")
        fraction(self, "gamma", "lam")
        if self.clip_low < 0 or self.clip_high < 0 or self.beta < 0:
            raise ValueError("update.clip_low, update.clip_high and update.beta must be >= 0")


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation with a critic (arXiv 1707.06347).

    Attributes:
      critic: "own", a second model of the policy's size, or "shared", a head on its trunk.
      value_weight: of the critic's loss, where the trunk is shared.
      value_optim: of the critic, where it is its own.
    """

    steps: int = 100
    prompts: int = 512
    group_size: int = 1
    temperature: float = 1.0
    pieces: int = 1
    reference_every: int = 0
    critic: str = "own"
    value_weight: float = 0.5
    reward: RewardConfig = field(default_factory=RewardConfig)
    update: PPOUpdateConfig = field(default_factory=PPOUpdateConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=1e-6, weight_decay=0.0)
    )
    value_optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=1e-5, weight_decay=0.0)
    )

    def __post_init__(self):
        rollouts_fit(self, self.update.minibatches, self.update.micro_batches)
        one_of(self, "critic", ("own", "shared"))
        positive(self, "value_weight")


@dataclass(frozen=True)
class PairsConfig:
    """Training on pairs of answers, or on single ones with a label.

    Attributes:
      loss: "dpo", "cdpo" or "ipo" for a policy; "pairwise" (helpfulness) or "pointwise" (safety)
        for a reward model.
      beta: strength of the tie to the reference, reward per nat; policies only.
      label_smoothing: P(a label is wrong); cdpo only.
    """

    steps: int = 100
    batch_size: int = 32  # pairs, or labelled answers
    micro_batches: int = 1
    length: int = 512  # tokens of prompt and answer
    loss: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.1
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=5e-7, weight_decay=0.0)
    )

    def __post_init__(self):
        positive(self, "batch_size", "micro_batches", "length", "beta")
        one_of(self, "loss", ("dpo", "cdpo", "ipo", "pairwise", "pointwise"))
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        divides(self.batch_size, "batch_size", self.micro_batches, "micro_batches")
