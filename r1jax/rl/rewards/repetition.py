# SPDX-License-Identifier: Apache-2.0
"""Rewards, never positive, for completions that run in circles or run too long."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from r1jax.rl.advantages import overlong_penalty

# A word, or one character of a script without spaces, or one sign: loops show in any language.
UNITS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+|[^\w\s]|_")


def repeated_share(units: Sequence[object], n: int) -> float:
    """1 − distinct n-grams / all n-grams; 0 with fewer than two n-grams. Linear in the length."""
    total = len(units) - n + 1
    if total < 2:
        return 0.0
    return 1.0 - len({tuple(units[i : i + n]) for i in range(total)}) / total


def repetition_penalty(
    prompts: Sequence[str],
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    n: int = 20,
    free: float = 0.1,
) -> np.ndarray:
    """−max(0, share − free) / (1 − free), with share = 1 − distinct / all n-grams of words.

    Short phrases recur in honest reasoning; twenty words in a row do not. The n-gram penalty of
    Yeo et al. (2502.03373, section 4), per completion. DeepSeek-R1 has no such reward.

    Args:
      prompts: B prompts; not read.
      completions: B texts, split into words, single Chinese or Japanese characters, and signs.
      answers: B references; not read.
      n: words in an n-gram, at least 1.
      free: the share that costs nothing, in [0, 1).

    Returns:
      float32 [B] in [−1, 0].

    Raises:
      ValueError: `n` or `free` out of range.
    """
    if n < 1 or not 0 <= free < 1:
        raise ValueError(f"{n=} must be at least 1 and {free=} in [0, 1)")
    share_B = np.array([repeated_share(UNITS.findall(t), n) for t in completions], np.float32)
    return -np.maximum(share_B - np.float32(free), 0) / np.float32(1 - free)


def overlong_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    length: Callable[[str], int],
    max_length: int,
    buffer: int,
) -> np.ndarray:
    """DAPO's soft punishment of long outputs (2503.14476, eq. 13), of texts.

    The same numbers as `r1jax.rl.overlong_penalty`, which takes lengths that are known already.

    Args:
      prompts: B prompts; not read.
      completions: B texts.
      answers: B references; not read.
      length: the tokens of a text, by the tokenizer of the policy.
      max_length: L_max, in tokens.
      buffer: L_cache, in tokens, the width of the ramp.

    Returns:
      float32 [B] in [−1, 0].

    Raises:
      ValueError: `buffer` is not between 1 and `max_length`.
    """
    length_B = np.array([length(text) for text in completions], np.int32)
    return overlong_penalty(length_B, max_length=max_length, buffer=buffer)
