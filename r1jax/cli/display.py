# SPDX-License-Identifier: Apache-2.0
"""Progress on stderr: live on a terminal, a plain line every few seconds elsewhere."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_INTERVAL = 5.0  # seconds between plain lines
_FIRST = "the first step waits for the compiler"
_SHOWN = 5  # numbers beside a step
# A program reports all its metrics; these say how it goes, the most telling first.
_TELLING = ("reward", "loss", "accuracy", "format", "mean_tokens", "kl", "grad_norm")


def open_display(stream: TextIO) -> "LiveDisplay | PlainDisplay":
    """The display that fits the stream. With NO_COLOR set it is as live, without colour."""
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return LiveDisplay(stream)
    return PlainDisplay(stream)


class LiveDisplay:
    """One bar per stage, the finished ones kept above; a `r1jax.train.progress.Progress`."""

    def __init__(self, stream: TextIO):
        self._progress = Progress(
            TextColumn("[bold]{task.description}", table_column=_whole()),
            BarColumn(bar_width=16, table_column=_whole(min_width=16)),
            MofNCompleteColumn(table_column=_whole()),
            TimeElapsedColumn(table_column=_whole()),
            TimeRemainingColumn(compact=True, table_column=_whole()),
            # On a narrow terminal the numbers are what is cut off.
            TextColumn("[dim]{task.fields[numbers]}", table_column=Column(no_wrap=True, ratio=1)),
            console=Console(file=stream),
            refresh_per_second=4,
            expand=True,
        )
        self._task: TaskID | None = None

    def stage(self, name: str, total_steps: int) -> None:
        """Ends the bar of the last stage and begins one."""
        self._end_stage()
        self._progress.start()
        self._task = self._progress.add_task(
            escape(name), total=total_steps or None, numbers=_FIRST
        )

    def step(self, step: int, **numbers: float) -> None:
        """Moves the bar of the stage to `step` and shows the numbers beside it."""
        if self._task is not None:
            self._progress.update(self._task, completed=step, numbers=escape(shown(numbers)))

    def message(self, text: str) -> None:
        """Prints a line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the last picture on the screen and gives the terminal back."""
        self._end_stage()
        self._progress.stop()

    def _end_stage(self) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
            self._task = None


class PlainDisplay:
    """A line per stage, per few seconds, and per message; a `r1jax.train.progress.Progress`."""

    def __init__(
        self,
        stream: TextIO,
        *,
        interval: float = _INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Writes to `stream`, at most one step line per `interval` seconds of `clock`."""
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._began = self._written = clock()
        self._name, self._total = "", 0
        self._waited = False  # for the compiler, so far as the lines say

    def stage(self, name: str, total_steps: int) -> None:
        """Says that a stage begins."""
        self._name, self._total = name, total_steps
        waits = "" if self._waited else f"; {_FIRST}"
        self._waited = True
        self._line(f"{name}: {total_steps} steps{waits}" if total_steps else name)

    def step(self, step: int, **numbers: float) -> None:
        """Says where the stage is, if the last line is old enough or the stage is done."""
        if step == self._total or self._clock() - self._written >= self._interval:
            of = f"/{self._total}" if self._total else ""
            self._line(f"{self._name} {step}{of}  {shown(numbers)}".rstrip())

    def message(self, text: str) -> None:
        """Writes the line."""
        self._line(text)

    def close(self) -> None:
        """Nothing to give back."""

    def _line(self, text: str) -> None:
        self._written = self._clock()
        minutes, seconds = divmod(int(self._written - self._began), 60)
        self._stream.write(f"[{minutes:02d}:{seconds:02d}] {text}\n")
        self._stream.flush()


class LogToDisplay(logging.Handler):
    """Shows log records of the library as messages, so that they do not tear the live picture."""

    def __init__(self, display: LiveDisplay | PlainDisplay):
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one record."""
        self._display.message(f"{record.levelname.lower()}: {record.getMessage()}")


def _whole(min_width: int | None = None) -> Column:
    return Column(no_wrap=True, min_width=min_width, overflow="ignore")


def shown(numbers: Mapping[str, float]) -> str:
    """The few numbers that tell most, as `reward 0.512  kl 0.01`; any others if none is known."""
    telling = [name for name in _TELLING if name in numbers] or list(numbers)
    return "  ".join(f"{name} {float(numbers[name]):.3g}" for name in telling[:_SHOWN])
