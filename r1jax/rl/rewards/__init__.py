# SPDX-License-Identifier: Apache-2.0
"""Rule-based rewards: functions from lists of completions to float32 arrays [B].

The rewards that stand in a config are `(prompts, completions, answers) -> float32 [B]` once their
settings are bound by `functools.partial`; `combine` weights and adds what they return.
"""

from r1jax.rl.rewards.accuracy import accuracy
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
from r1jax.rl.rewards.pool import Limits, Outcome, WorkerPool
from r1jax.rl.rewards.repetition import overlong_reward, repeated_share, repetition_penalty

__all__ = [
    "Limits",
    "Outcome",
    "PendingRewards",
    "WorkerPool",
    "accuracy",
    "combine",
    "final_answer",
    "format_reward",
    "language_reward",
    "language_share",
    "math_pool",
    "math_reward",
    "overlong_reward",
    "repeated_share",
    "repetition_penalty",
    "submit_math",
]
