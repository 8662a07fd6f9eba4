# SPDX-License-Identifier: Apache-2.0
"""Runs of one trainer: a model, its data, its settings. `trainer` says which is meant.

Of all of them: `checkpoint_every` seconds all is saved; every `rebalance_every` steps experts are
dealt out anew to the devices of `mesh.expert`, by their loads (`r1jax.train.rebalance`; 0: never).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from r1jax.config.check import activations, one_of, positive
from r1jax.config.mesh import MeshConfig, SamplerConfig
from r1jax.config.model import FP8Config
from r1jax.config.tasks import Difficulty
from r1jax.config.training import GRPOConfig, PairsConfig, PPOConfig, SamplingConfig, SFTConfig

QUESTION_SETS = (
    "task:arithmetic",
    "task:countdown",
    "task:quadratic",
    "gsm8k",
    "math",
    "math500",
    "aime",
    "amc",
    "minerva",
    "humaneval",
    "mbpp",
    "cruxeval",
    "questions",
    "scripts",
    "choices",
)
"""Generated tasks, then the readers of `r1jax.data.datasets.QUESTIONS`."""
TEMPLATES = ("r1", "primer", "plain")
REWARD_LOSSES = ("pairwise", "pointwise")


@dataclass(frozen=True)
class StartConfig:
    """The model that a run starts from.

    Attributes:
      path: a folder of ours, of Hugging Face, a .gguf file, or RUN/STAGE of a recipe's run.
      dtype: of activations; "" is the checkpoint's. Trained parameters are float32.
      remat: whether layers are computed again in the backward pass: less memory, more time.
      fp8: the recipe of the linear layers; a checkpoint's weights in FP8 blocks do not turn it on.
      redundant_experts: copies of the experts that most of a batch's tokens go to, dealt out in
        every pass to the devices of mesh.expert beside their own. Sampling has its own.
    """

    path: str = ""
    dtype: str = ""
    remat: bool = True
    fp8: FP8Config = field(default_factory=FP8Config)
    redundant_experts: int = 0

    def __post_init__(self):
        if not self.path:
            raise ValueError("start.path names no model; set it to a model folder or RUN/STAGE")
        if self.redundant_experts < 0:
            raise ValueError(f"start.redundant_experts must be >= 0, got {self.redundant_experts}")
        if self.dtype:
            activations(self.dtype, "start.dtype")


@dataclass(frozen=True)
class QuestionData:
    """Questions whose answers can be checked, and prompts whose answers cannot.

    Attributes:
      dataset: a generated task, or what the files hold; "questions" is data of your own.
      path: the file of a data set; none for a task.
      heldout: the file that is measured on; a task has problems of its own. "": nothing is.
      general: a file of prompts that reward models judge, "" for none; in training they take the
        place of questions from step `reward.model_from` on (R1, section 2.3.4).
      general_share: of a step's prompts.
      skip: leave bad rows out, and count them, instead of refusing the file.
      system: a system turn before each question.
      instruction: text behind each question and an empty line; none behind general prompts.
      template: the tags of completions, "r1" or "primer"; "plain" for text without.
      difficulty: of a task's problems.
    """

    dataset: str = "task:arithmetic"
    path: str = ""
    heldout: str = ""
    general: str = ""
    general_share: float = 0.5
    skip: bool = False
    system: str = ""
    instruction: str = ""
    template: str = "r1"
    difficulty: Difficulty = field(default_factory=Difficulty)

    def __post_init__(self):
        one_of(self, "dataset", QUESTION_SETS)
        one_of(self, "template", TEMPLATES)
        if self.dataset.startswith("task:"):
            if self.path or self.heldout:
                raise ValueError(f"data.dataset={self.dataset!r} is generated: it has no file")
            if self.template == "plain":
                raise ValueError("data.template: a task's answers stand in tags; 'r1' or 'primer'")
        elif not self.path:
            raise ValueError(f"data.dataset={self.dataset!r} needs data.path, the file to read")
        if not 0.0 < self.general_share < 1.0:
            raise ValueError(f"data.general_share must lie in (0, 1), got {self.general_share}")


@dataclass(frozen=True)
class AnswerData:
    """Answers that are given: a JSONL or Parquet file.

    Attributes:
      path: conversations to imitate; pairs with `chosen` and `rejected`; or labelled completions.
      heldout: a file of the same kind that is measured on, or "".
      skip: leave bad and overlong rows out, and count them, instead of refusing the file.
    """

    path: str = ""
    heldout: str = ""
    skip: bool = False

    def __post_init__(self):
        if not self.path:
            raise ValueError("data.path names no file; set it to a .jsonl or .parquet file")


@dataclass(frozen=True)
class MeasureConfig:
    """Held-out measurement before and after training."""

    questions: int = 64
    samples: int = 4  # at the stage's temperature; one greedy answer beside them

    def __post_init__(self):
        positive(self, "questions", "samples")


def _checked(run: Any) -> None:
    if run.trainer != run.TRAINER:
        raise ValueError(f"trainer must be {run.TRAINER!r} in this config, got {run.trainer!r}")
    positive(run, "checkpoint_every")
    if run.rebalance_every < 0:
        raise ValueError(f"rebalance_every must be >= 0, got {run.rebalance_every}")
    if run.rebalance_every and run.mesh.expert == 1:
        raise ValueError(
            f"rebalance_every={run.rebalance_every} deals experts out to the devices of "
            "mesh.expert, which is 1; set mesh.expert, or rebalance_every=0"
        )
    if not 0 <= run.seed < 2**31:
        raise ValueError(f"seed must lie in 0..{2**31 - 1}, got {run.seed}")


def _judged(run: Any, stage: Any) -> None:
    _checked(run)
    untagged = run.data.template == "plain"
    if untagged and (stage.reward.format or stage.reward.language):
        raise ValueError(
            "data.template='plain' has no tags to reward; set reward.format and reward.language to "
            "0"
        )
    if run.data.general and not stage.reward.model:
        raise ValueError(
            f"data.general={run.data.general!r} has no answers to check; set reward.model and "
            "reward.model_path, the reward model that judges them"
        )
    if stage.reward.safe_path and not run.data.general:
        raise ValueError("reward.safe_path judges general prompts; set data.general to their file")


def _asynchronous(run: Any) -> None:
    """What a sampler that is one step behind asks of a run."""
    why = f"sampler.data={run.sampler.data} samples one step behind the trainer"
    if run.grpo.update.importance_cap is None:
        raise ValueError(
            f"{why}, which has to be corrected; set grpo.update.importance_cap, for example to 2.0"
        )
    if run.grpo.refill:
        raise ValueError(
            f"{why}, before it is known whether grpo.refill={run.grpo.refill} wants more of the "
            "last batch; set one of them to 0"
        )
    if run.sampling.layout != "decoding":
        raise ValueError(
            f"sampling.layout={run.sampling.layout!r} is of a mesh that trains and samples; with "
            f"sampler.data={run.sampler.data} set it to 'decoding'"
        )


@dataclass(frozen=True)
class SFTRun:
    """Supervised fine-tuning, distillation included: what it learns is in the file.

    `epochs`, if not 0, says how long: passes over the packed rows in place of `sft.steps`.
    """

    TRAINER: ClassVar[str] = "sft"
    trainer: str = "sft"
    seed: int = 0
    start: StartConfig = field(default_factory=StartConfig)
    data: AnswerData = field(default_factory=AnswerData)
    epochs: float = 0.0
    sft: SFTConfig = field(default_factory=SFTConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rebalance_every: int = 0
    checkpoint_every: float = 30.0

    def __post_init__(self):
        _checked(self)
        if self.epochs < 0:
            raise ValueError(f"epochs must be >= 0, got {self.epochs}")


@dataclass(frozen=True)
class GRPORun:
    """GRPO and its kin (`grpo.update.objective`) on questions that can be checked.

    With `sampler.data` it is asynchronous: see `SamplerConfig`.
    """

    TRAINER: ClassVar[str] = "grpo"
    trainer: str = "grpo"
    seed: int = 0
    start: StartConfig = field(default_factory=StartConfig)
    data: QuestionData = field(default_factory=QuestionData)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    rebalance_every: int = 0
    checkpoint_every: float = 30.0

    def __post_init__(self):
        _judged(self, self.grpo)
        if self.sampler.data:
            _asynchronous(self)


@dataclass(frozen=True)
class PPORun:
    """PPO with a critic on questions that can be checked."""

    TRAINER: ClassVar[str] = "ppo"
    trainer: str = "ppo"
    seed: int = 0
    start: StartConfig = field(default_factory=StartConfig)
    data: QuestionData = field(default_factory=QuestionData)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rebalance_every: int = 0
    checkpoint_every: float = 30.0

    def __post_init__(self):
        _judged(self, self.ppo)


@dataclass(frozen=True)
class DPORun:
    """DPO, cDPO or IPO from pairs of answers."""

    TRAINER: ClassVar[str] = "dpo"
    trainer: str = "dpo"
    seed: int = 0
    start: StartConfig = field(default_factory=StartConfig)
    data: AnswerData = field(default_factory=AnswerData)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rebalance_every: int = 0
    checkpoint_every: float = 30.0

    def __post_init__(self):
        _checked(self)
        if self.pairs.loss in REWARD_LOSSES:
            raise ValueError(
                f"pairs.loss={self.pairs.loss!r} trains a reward model; take a config of the "
                "trainer reward_model, or set pairs.loss to dpo, cdpo or ipo"
            )


@dataclass(frozen=True)
class RewardModelRun:
    """A reward model: pairwise (helpfulness) or pointwise (safety), R1 section 2.3.4."""

    TRAINER: ClassVar[str] = "reward_model"
    trainer: str = "reward_model"
    seed: int = 0
    start: StartConfig = field(default_factory=StartConfig)
    data: AnswerData = field(default_factory=AnswerData)
    pairs: PairsConfig = field(default_factory=lambda: PairsConfig(loss="pairwise"))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rebalance_every: int = 0
    checkpoint_every: float = 30.0

    def __post_init__(self):
        _checked(self)
        if self.pairs.loss not in REWARD_LOSSES:
            raise ValueError(
                f"pairs.loss={self.pairs.loss!r} trains a policy; take a config of the trainer "
                "dpo, or set pairs.loss to pairwise or pointwise"
            )


RunConfig = SFTRun | GRPORun | PPORun | DPORun | RewardModelRun
RUNS: dict[str, type] = {
    run.TRAINER: run for run in (SFTRun, GRPORun, PPORun, DPORun, RewardModelRun)
}
