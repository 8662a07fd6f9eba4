# SPDX-License-Identifier: Apache-2.0
"""The schema: one tree of frozen dataclasses, each checked where its fields are.

Only programs (`r1jax.train`, `r1jax.eval`) see the whole; a module is given its own small
sub-config and an op is given scalars.
"""

from r1jax.config.mesh import MeshConfig, SamplerConfig, check_rebalance, check_redundant
from r1jax.config.model import DenseConfig, FP8Config, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from r1jax.config.plan import PlanConfig
from r1jax.config.presets import laptop_model, laptop_student, quickstart
from r1jax.config.recipe import EvalConfig, RecipeConfig, RejectionConfig, StudentsConfig
from r1jax.config.runs import (
    QUESTION_SETS,
    REWARD_LOSSES,
    RUNS,
    AnswerData,
    DPORun,
    GRPORun,
    MeasureConfig,
    PPORun,
    QuestionData,
    RewardModelRun,
    RunConfig,
    SFTRun,
    StartConfig,
)
from r1jax.config.tasks import LARGEST_INTEGER, Difficulty, TaskConfig, TraceMix
from r1jax.config.training import (
    LANGUAGES,
    OBJECTIVES,
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
from r1jax.config.tree import from_config_dict, to_config_dict

__all__ = [
    "QUESTION_SETS",
    "REWARD_LOSSES",
    "RUNS",
    "AnswerData",
    "DPORun",
    "GRPORun",
    "MeasureConfig",
    "PPORun",
    "QuestionData",
    "RewardModelRun",
    "RunConfig",
    "SFTRun",
    "StartConfig",
    "LANGUAGES",
    "LARGEST_INTEGER",
    "OBJECTIVES",
    "DenseConfig",
    "Difficulty",
    "EvalConfig",
    "FP8Config",
    "GRPOConfig",
    "MLAConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "PPOUpdateConfig",
    "PairsConfig",
    "PlanConfig",
    "RecipeConfig",
    "RejectionConfig",
    "RewardConfig",
    "RopeConfig",
    "SFTConfig",
    "SamplerConfig",
    "SamplingConfig",
    "StudentsConfig",
    "TaskConfig",
    "TraceMix",
    "UpdateConfig",
    "check_rebalance",
    "check_redundant",
    "from_config_dict",
    "laptop_model",
    "laptop_student",
    "quickstart",
    "to_config_dict",
]
