# SPDX-License-Identifier: Apache-2.0
"""Metrics as JSON lines: one row per logged step, cut back to the checkpoint when a run resumes.

    {"stage": "grpo", "step": 12, "reward": 0.5, "kl": null, "expert_load": [[…], …]}

A row is flushed when written, so a killed process loses none. JSON has no NaN: a number that is not
finite is written as `null` and read as NaN. A float32 is written as the shortest decimal that reads
back as the same float32.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends rows to one file.

    To resume exactly, a checkpoint keeps `writer.position` in its meta, and the resumed run gives
    it back: rows written after that checkpoint are dropped, so the file becomes the one an
    uninterrupted run would have left, whatever stage or kind of row came after. (The step alone
    would not do: rows of the next stage may follow.)
    """

    def __init__(self, path: str | Path, *, position: int | None = None):
        """Opens the file for appending.

        Args:
          path: the file; it and its folder are made if absent.
          position: bytes to keep, as read from `position` by the run that wrote them; 0 starts
            anew, None keeps every whole row.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        size = path.stat().st_size
        if position is None:
            position = path.read_bytes().rfind(b"\n") + 1
        elif position > size:
            _log.warning(
                "%s has %d bytes, its checkpoint knew %d: rows were lost", path, size, position
            )
            position = path.read_bytes().rfind(b"\n") + 1
        self.path = path
        self._file = path.open("r+b")
        self._file.truncate(position)
        self._file.seek(position)

    def write(self, *, stage: str, step: int, **values: Any) -> None:
        """Appends one row.

        Args:
          stage: name of the stage.
          step: step in that stage.
          **values: numbers, text, or numpy and jax arrays, which become nested lists.
        """
        row = {"stage": stage, "step": int(step)} | {k: plain(v) for k, v in values.items()}
        self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        self._file.flush()

    @property
    def position(self) -> int:
        """Bytes written so far, for the meta of a checkpoint."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file; more than once does no harm."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetrics:
    """A `MetricsWriter` of a process that has nothing to write: another writes for it."""

    position = 0

    def write(self, *, stage: str, step: int, **values: Any) -> None:
        """Forgets the row."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def read(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a metrics file, in order; a torn last line is left out.

    Raises:
      ValueError: a line is not JSON (path and line number are named).
      FileNotFoundError: no such file.
    """
    rows = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or torn
        try:
            rows.append({k: _not_finite_as_nan(v) for k, v in json.loads(line).items()})
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is not a row of metrics: {error}") from error
    return rows


def plain(value: Any) -> Any:
    """What JSON can say of numbers, arrays, lists and dicts; a number not finite becomes None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    array = np.asarray(value)
    if array.ndim:
        return [plain(v) for v in array]
    if array.dtype.kind in "iub":
        return array.item()
    # str() of a numpy float is its shortest exact decimal; bfloat16 and float8 are widened first.
    number = float(
        str(array[()] if array.dtype in (np.float32, np.float64) else array.astype(np.float32)[()])
    )
    return number if math.isfinite(number) else None


def _not_finite_as_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_not_finite_as_nan(v) for v in value]
    return math.nan if value is None else value
