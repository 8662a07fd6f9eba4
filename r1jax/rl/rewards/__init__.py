# SPDX-License-Identifier: Apache-2.0
"""Rule-based rewards: functions from lists of completions to float32 arrays [B]."""

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
from r1jax.rl.rewards.sandbox import Limits, Sandbox

__all__ = [
    "FunctionTests",
    "Limits",
    "Sandbox",
    "ScriptTests",
    "accuracy",
    "code_reward",
    "combine",
    "cruxeval_tests",
    "extract_code",
    "format_reward",
    "humaneval_tests",
    "mbpp_tests",
    "submit_code",
]
