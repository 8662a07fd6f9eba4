# SPDX-License-Identifier: Apache-2.0
"""Rule-based rewards: functions from lists of completions to float32 arrays [B]."""

from r1jax.rl.rewards.accuracy import accuracy
from r1jax.rl.rewards.combine import combine
from r1jax.rl.rewards.format import format_reward

__all__ = ["accuracy", "combine", "format_reward"]
