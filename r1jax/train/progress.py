# SPDX-License-Identifier: Apache-2.0
"""What a program tells while it runs. It prints nothing: its caller shows what it likes."""

from typing import Protocol


class Progress(Protocol):
    """Told what a program is doing, in this order: a stage, its steps, the next stage, …, close."""

    def stage(self, name: str, total_steps: int) -> None:
        """A stage begins.

        Args:
          name: as in the summary.
          total_steps: how many steps it will take, 0 if that is unknown.
        """

    def step(self, step: int, **numbers: float) -> None:
        """A step is done.

        Args:
          step: counted from 1; the first one told after a resume may be higher.
          **numbers: what to show beside it, e.g. `reward`, `loss`.
        """

    def message(self, text: str) -> None:
        """One line worth keeping: resumed from …, held-out pass@1 …, a warning."""

    def close(self) -> None:
        """Nothing more will come. Called more than once, or without any stage, it does no harm."""


class Silent:
    """A `Progress` that shows nothing: for tests and for use as a library."""

    def stage(self, name: str, total_steps: int) -> None:
        """Ignored."""

    def step(self, step: int, **numbers: float) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""

    def close(self) -> None:
        """Ignored."""
