# SPDX-License-Identifier: Apache-2.0
"""Rows of text as JSON lines: traces and other data sets that a run makes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows all or nothing; the folder is made if absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        ValueError: a line is not a JSON object (path and line are named).
    """
    rows = []
    # Not splitlines(): a string may hold U+2028, which JSON leaves as it is.
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} must hold a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows
