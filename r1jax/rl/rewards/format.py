# SPDX-License-Identifier: Apache-2.0
"""The format reward: does the completion follow the template to the letter."""

from collections.abc import Sequence

import numpy as np

from r1jax.data.template import Template, parse


def format_reward(completions: Sequence[str], template: Template) -> np.ndarray:
    """1 where a completion is well formed as `parse` has it, else 0.

    Empty, repeated, nested or unclosed tags, an answer inside the reasoning and several answers
    all earn nothing. DeepSeek-R1 (2501.12948), section 2.2.2, "format rewards".

    Args:
      completions: B texts.
      template: the tags to look for.

    Returns:
      float32 [B].
    """
    return np.array([parse(text, template).well_formed for text in completions], np.float32)
