# SPDX-License-Identifier: Apache-2.0
"""The reward that training sees: a weighted sum."""

from collections.abc import Sequence

import numpy as np


def combine(weights: Sequence[float], *rewards: np.ndarray) -> np.ndarray:
    """Σ_i weights_i · rewards_i.

    Args:
      weights: one number for each reward.
      *rewards: arrays [B] of any numeric dtype; fractions survive.

    Returns:
      float32 [B].

    Raises:
      ValueError: weights and rewards differ in number, or the rewards in shape.
    """
    if not rewards or len(weights) != len(rewards):
        raise ValueError(f"expected one weight per reward, got {len(weights)} for {len(rewards)}")
    arrays_B = [np.asarray(reward, np.float32) for reward in rewards]
    if len({array.shape for array in arrays_B}) > 1:
        raise ValueError(f"rewards differ in shape: {[array.shape for array in arrays_B]}")
    total_B = np.zeros(arrays_B[0].shape, np.float32)
    for weight, array_B in zip(weights, arrays_B, strict=True):
        total_B += np.float32(weight) * array_B
    return total_B
