# SPDX-License-Identifier: Apache-2.0
"""The accuracy reward: does the answer solve the problem."""

from collections.abc import Sequence

import numpy as np

from r1jax.data.tasks import TASKS, Problem
from r1jax.data.template import Template, parse


def accuracy(
    problems: Sequence[Problem], completions: Sequence[str], template: Template
) -> np.ndarray:
    """1 where the answer block of a completion solves its problem, else 0.

    The completion need not be well formed, but it has exactly one answer block and that stands
    outside the reasoning. DeepSeek-R1 (2501.12948), section 2.2.2, "accuracy rewards".

    Args:
      problems: B problems.
      completions: B texts, `completions[i]` answering `problems[i]`.
      template: the tags of the completions.

    Returns:
      float32 [B].

    Raises:
      ValueError: problems and completions differ in number.
    """
    if len(problems) != len(completions):
        raise ValueError(f"got {len(problems)} problems but {len(completions)} completions")
    return np.array(
        [
            TASKS[problem.task].verify(problem, parse(text, template).answer)
            for problem, text in zip(problems, completions, strict=True)
        ],
        np.float32,
    )
