# SPDX-License-Identifier: Apache-2.0
"""The reasoning tasks: how hard, in which words, and how cold-start traces are written."""

from dataclasses import dataclass, field

LARGEST_INTEGER = 144
"""Integers that tasks write lie in ±144: the tokenizer has one token for each."""


@dataclass(frozen=True)
class TraceMix:
    """How cold-start traces are composed; every probability is in 0..1.

    Attributes:
      first_right: P(the first try is right).
      checked: P(a try is followed by its check and verdict); an unchecked try is answered at once.
      retry: P(a checked wrong try is followed by `wait` and another try); otherwise the writer
        gives up and answers with the wrong candidate. At 0 no trace contains `wait`.
      retry_right: P(a retry is right).
      max_tries: most tries in one trace.
    """

    first_right: float = 0.35
    checked: float = 0.5
    retry: float = 0.15
    retry_right: float = 0.5
    max_tries: int = 5

    def __post_init__(self):
        for name in ("first_right", "checked", "retry", "retry_right"):
            value = vars(self)[name]
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a probability in 0..1, got {value}")
        if self.max_tries < 1:
            raise ValueError(f"max_tries must be at least 1, got {self.max_tries}")


@dataclass(frozen=True)
class Difficulty:
    """How large the problems are.

    Attributes:
      countdown_numbers: how many numbers a countdown problem may give, one drawn per problem.
      countdown_largest: the largest given number, at most 12.
      countdown_target: the largest target; targets start at 1.
      quadratic_root: the largest absolute value of a root, at most 12.
      arithmetic_operations: how many operations a chain may have, the product included.
      arithmetic_largest: the largest operand of a chain, at most 12.
    """

    countdown_numbers: tuple[int, ...] = (3, 4)
    countdown_largest: int = 12
    countdown_target: int = 99
    quadratic_root: int = 12
    arithmetic_operations: tuple[int, ...] = (2, 3, 4)
    arithmetic_largest: int = 12

    def __post_init__(self):
        for name, low, high in (
            ("countdown_largest", 3, 12),
            ("countdown_target", 10, LARGEST_INTEGER),
            ("quadratic_root", 2, 12),
            ("arithmetic_largest", 2, 12),
        ):
            value = vars(self)[name]
            if not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {value}")
        for name, low, high in (("countdown_numbers", 2, 4), ("arithmetic_operations", 1, 4)):
            value = vars(self)[name]
            if not value or any(not low <= n <= high for n in value):
                raise ValueError(f"{name} must hold numbers in {low}..{high}, got {value}")


@dataclass(frozen=True)
class TaskConfig:
    """What is to be reasoned about, and in which words."""

    names: tuple[str, ...] = ("arithmetic", "countdown", "quadratic")
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    template: str = "r1"  # "r1": <think>, <answer>; "primer": <reasoning_process>, <answer>
    difficulty: Difficulty = field(default_factory=Difficulty)
    mix: TraceMix = field(default_factory=TraceMix)

    def __post_init__(self):
        if len(self.names) != len(self.weights):
            raise ValueError(
                f"tasks.weights must have one number for each of tasks.names={self.names}, "
                f"got {self.weights}"
            )
        if self.template not in ("r1", "primer"):
            raise ValueError(f"tasks.template must be 'r1' or 'primer', got {self.template!r}")
