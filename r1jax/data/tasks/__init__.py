# SPDX-License-Identifier: Apache-2.0
"""Reasoning tasks with exact verifiers: each is a module with the functions of `Task`."""

from collections.abc import Mapping, Sequence

from r1jax.data.tasks import arithmetic, countdown, quadratic
from r1jax.data.tasks.problem import (
    DEFAULT_DIFFICULTY,
    HIGH,
    LOW,
    Difficulty,
    Document,
    Problem,
    Task,
    Trace,
    TraceMix,
    split_of,
)

TASKS: dict[str, Task] = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "quadratic": quadratic,
}

__all__ = [
    "DEFAULT_DIFFICULTY",
    "HIGH",
    "LOW",
    "TASKS",
    "Difficulty",
    "Document",
    "Problem",
    "Task",
    "Trace",
    "TraceMix",
    "arithmetic",
    "countdown",
    "mixture",
    "quadratic",
    "split_of",
]


def mixture(tasks: Sequence[str] | Mapping[str, float]) -> tuple[tuple[str, ...], list[float]]:
    """The names and probabilities that a `tasks` argument stands for.

    Args:
      tasks: names (equal shares) or name -> weight (any positive scale).

    Returns:
      (names, probabilities), the probabilities summing to 1.

    Raises:
      ValueError: no task, an unknown name, a name twice, or a weight that is not positive.
    """
    names = tuple(tasks)
    weights = [float(tasks[name]) for name in names] if isinstance(tasks, Mapping) else None
    weights = [1.0] * len(names) if weights is None else weights
    unknown = [name for name in names if name not in TASKS]
    if not names or unknown or len(set(names)) < len(names):
        raise ValueError(f"tasks must be distinct names out of {sorted(TASKS)}, got {tasks!r}")
    if not all(0.0 < weight < float("inf") for weight in weights):
        raise ValueError(f"the weights of tasks must be positive numbers, got {tasks!r}")
    return names, [weight / sum(weights) for weight in weights]
