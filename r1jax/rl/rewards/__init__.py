# SPDX-License-Identifier: Apache-2.0
"""Rule-based rewards: functions from lists of completions to float32 arrays [B].

The rewards that stand in a config are `(prompts, completions, answers) -> float32 [B]` once their
settings are bound by `functools.partial`; `combine` weights and adds what they return.
"""

from r1jax.rl.rewards.accuracy import accuracy
from r1jax.rl.rewards.code import (
    FunctionTests,
    ScriptTests,
    code_reward,
    cruxeval_tests,
    extract_code,
    humaneval_tests,
    mbpp_tests,
    submit_code,
)
from r1jax.rl.rewards.combine import combine
from r1jax.rl.rewards.format import format_reward
from r1jax.rl.rewards.language import language_reward, language_share
from r1jax.rl.rewards.math import (
    PendingRewards,
    final_answer,
    math_pool,
    math_reward,
    submit_math,
)
from r1jax.rl.rewards.pool import Limits as WorkerLimits
from r1jax.rl.rewards.pool import Outcome, WorkerPool
from r1jax.rl.rewards.repetition import overlong_reward, repeated_share, repetition_penalty
from r1jax.rl.rewards.sandbox import Limits as SandboxLimits
from r1jax.rl.rewards.sandbox import Sandbox

__all__ = [
    "FunctionTests",
    "Outcome",
    "PendingRewards",
    "Sandbox",
    "SandboxLimits",
    "ScriptTests",
    "WorkerLimits",
    "WorkerPool",
    "accuracy",
    "code_reward",
    "combine",
    "cruxeval_tests",
    "extract_code",
    "final_answer",
    "format_reward",
    "humaneval_tests",
    "language_reward",
    "language_share",
    "math_pool",
    "math_reward",
    "mbpp_tests",
    "overlong_reward",
    "repeated_share",
    "repetition_penalty",
    "submit_code",
    "submit_math",
]
