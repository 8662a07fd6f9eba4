# SPDX-License-Identifier: Apache-2.0
"""Rows out of files: JSON lines, JSON lists (both also gzipped) and Parquet.

What is in a file decides, not its name, save that Parquet ends in `.parquet`. A file that is
damaged as a whole is refused; a row that cannot be read comes out as `Skipped`.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from r1jax.data.datasets.records import Rows, Skipped, settled

T = TypeVar("T")
Row = Mapping[str, Any]
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_SUFFIXES = (".jsonl", ".gz", ".parquet")
_HINTS = 5  # files that a refusal names
_SHOWN = 80  # characters of a fault that is quoted


def read_rows(path: str | Path) -> Iterator[tuple[str, Row | Skipped]]:
    """(where, row) of every row in order, or the reason why it is none.

    Blank lines are no rows. A byte order mark and carriage returns do no harm.

    Args:
      path: of a file.

    Raises:
      ValueError: there is no such file, it is damaged, or it needs what is not installed.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
        hint = f": {', '.join(inside[:_HINTS])}" if inside else ""
        raise ValueError(f"{path}: is a folder; name a file in it{hint}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".parquet":
        return _parquet(path)
    return _json(path)


def read(path: str | Path, parse: Callable[[Row], T], *, skip: bool = False) -> Rows[T]:
    """Every row of a file through `parse`.

    Args:
      path: of a file.
      parse: makes a record of a row; its ValueError says what is wrong with it.
      skip: leave bad rows out instead of refusing the file; they are listed in the result.

    Raises:
      ValueError: as `read_rows`, or of bad rows, or there is no row.
    """
    items, places, bad = [], [], []
    for where, row in read_rows(path):
        try:
            if isinstance(row, Skipped):
                bad.append(row)
            else:
                items.append(parse(row))
                places.append(where)
        except ValueError as error:
            bad.append(Skipped(where, str(error)))
    return dataclasses.replace(settled(items, bad, of=path, skip=skip), places=tuple(places))


def _json(path: Path) -> Iterator[tuple[str, Row | Skipped]]:
    try:
        with _opened(path) as file:
            begun = False
            # Lines of bytes end in \n alone: a string may hold U+2028, which JSON leaves as it is.
            for number, line in enumerate(file, 1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if not line.strip():
                    continue
                if not begun and line.lstrip().startswith(b"["):
                    yield from _listed(path, line + file.read())
                    return
                begun = True
                yield _row(f"{path}:{number}", *_parsed(line))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _opened(path: Path) -> BinaryIO:
    file = path.open("rb")
    packed = file.read(len(_GZIP)) == _GZIP
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if packed else file


def _listed(path: Path, raw: bytes) -> Iterator[tuple[str, Row | Skipped]]:
    rows, fault = _parsed(raw)
    if fault:
        raise ValueError(f"{path}: is not a JSON list: {fault}")
    for number, row in enumerate(rows, 1):
        yield _row(f"{path} item {number}", row)


def _row(where: str, row: Any, fault: str = "") -> tuple[str, Row | Skipped]:
    if fault:
        return where, Skipped(where, f"is not JSON: {fault}")
    if not isinstance(row, dict):
        return where, Skipped(where, f"must hold a JSON object, got {type(row).__name__}")
    return where, row


def _parsed(raw: bytes) -> tuple[Any, str]:
    """(value, what is wrong with it)."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse), ""
    except RecursionError:
        return None, "nested too deeply"
    except ValueError as error:
        return None, str(error)[:_SHOWN] or "no value"


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet files need pyarrow: pip install 'r1jax[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        fault = " ".join(str(error).split())[:_SHOWN]
        raise ValueError(f"{path}: is no readable Parquet file: {fault}") from error
