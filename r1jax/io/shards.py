# SPDX-License-Identifier: Apache-2.0
"""A folder of safetensors shards: read tensor by tensor, written shard by shard.

The `safetensors` library checks each header (lengths, offsets, overlaps); the bytes of one tensor
are then read by themselves, so that no more than one is in memory and none is mapped.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from r1jax.parallel import hosts

# The stems of a folder's files. transformers opens the first's only, and calls a tensor that its
# model has no place for unexpected: so a multi-token-prediction layer may lie apart.
MODEL, MTP = "model", "mtp"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}


def single_name(stem: str) -> str:
    """The file of a stem that is not sharded."""
    return f"{stem}.safetensors"


def index_name(stem: str) -> str:
    """The index of a stem's shards."""
    return f"{stem}.safetensors.index.json"


class Source(Protocol):
    """A checkpoint in Hugging Face's names and shapes, wherever it comes from."""

    path: Path
    config: Mapping[str, Any]

    def shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """{name: (dtype, shape)} of all tensors, in the order they are best read in."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the checkpoint's layout."""

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""


class _Entry(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


class Shards:
    """A Hugging Face model folder; every header is read and checked when it is opened.

    Raises:
        ValueError: no or damaged config.json, index or header, a shard that is missing or cut
            short, a tensor of an unknown dtype or in two shards: the file and the tensor are named.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self._entries: dict[str, _Entry] = {}
        for file, expected in (self._files(MODEL) | self._files(MTP)).items():
            found = _header(file)
            if expected is not None and (missing := expected - found.keys()):
                raise ValueError(f"{file}: lacks {min(missing)}, which the index says it holds")
            for name, entry in found.items():
                if name in self._entries:
                    other = self._entries[name].file.name
                    raise ValueError(f"{file}: {name} is in {other} too")
                self._entries[name] = entry

    def _files(self, stem: str) -> dict[Path, set[str] | None]:
        """{shard: tensors that the index says it holds, None without an index}."""
        single, index = self.path / single_name(stem), self.path / index_name(stem)
        if not index.exists():
            if single.is_file():
                return {single: None}
            if stem == MODEL:
                raise ValueError(f"{self.path}: neither {single.name} nor {index.name} is there")
            return {}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map is missing or empty")
        files: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index}: {name} lies in {file!r}, which is no file name")
            files.setdefault(self.path / file, set()).add(name)
        return files

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{name: (dtype, shape)}, shard by shard in the order of their bytes."""
        ordered = sorted(self._entries.items(), key=lambda item: (item[1].file, item[1].offset))
        return {name: (DTYPES[e.dtype].name, e.shape) for name, e in ordered}

    def read(self, name: str) -> np.ndarray:
        """One tensor, read from the disk into memory of its own."""
        entry = self._entries[name]
        dtype, count = DTYPES[entry.dtype], int(np.prod(entry.shape, dtype=np.int64))
        try:
            with entry.file.open("rb") as file:
                flat = np.fromfile(file, dtype, count, offset=entry.offset)
        except OSError as error:
            raise ValueError(f"{entry.file}: cannot be read: {error.strerror}") from error
        if flat.size != count:
            raise ValueError(f"{entry.file}: {name} is cut short")
        return flat.reshape(entry.shape)

    def file_of(self, name: str) -> Path:
        """The shard of a tensor, or the folder if none has it."""
        entry = self._entries.get(name)
        return entry.file if entry else self.path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError with the file's name where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _header(file: Path) -> dict[str, _Entry]:
    """The entries of a shard, after the library has found its header sound."""
    try:
        with safetensors.safe_open(file, "np") as shard:
            names = set(shard.keys())
        with file.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
    except FileNotFoundError as error:
        raise ValueError(f"{file}: this shard is missing") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: is damaged: {' '.join(str(error).split())[:200]}") from error
    found = {}
    for name in names:
        kind, shape = header[name]["dtype"], tuple(header[name]["shape"])
        if kind not in DTYPES:
            raise ValueError(f"{file}: {name} has the dtype {kind}, expected one of {list(DTYPES)}")
        found[name] = _Entry(file, kind, shape, 8 + length + header[name]["data_offsets"][0])
    return found


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    stem: str = MODEL,
    shard_bytes: int = 4 << 30,
) -> int:
    """Writes tensors in order as shards with an index, or as one file if it is but one.

    No more than one shard is in memory.

    Args:
        folder: an existing folder.
        tensors: (name, array), made one by one.
        stem: of the files' names.
        shard_bytes: a shard is closed before it would exceed this.

    Returns:
        bytes of all tensors.
    """
    weight_map: dict[str, str] = {}
    drafts: list[Path] = []
    waiting: dict[str, np.ndarray] = {}
    total = held = 0

    def close() -> None:
        draft = folder / f".shard-{len(drafts)}"
        save_file(waiting, draft, metadata={"format": "pt"})
        drafts.append(draft)
        weight_map.update(dict.fromkeys(waiting, len(drafts)))
        waiting.clear()

    for name, array in tensors:
        if waiting and held + array.nbytes > shard_bytes:
            close()
            held = 0
        waiting[name] = np.ascontiguousarray(array)
        held += array.nbytes
        total += array.nbytes
    close()
    n = len(drafts)
    names = (
        [single_name(stem)]
        if n == 1
        else [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    )
    for draft, name in zip(drafts, names, strict=True):
        draft.rename(folder / name)
    if n > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[i - 1] for name, i in weight_map.items()},
        }
        (folder / index_name(stem)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def free(path: Path) -> None:
    """ValueError if anything but an empty folder lies at `path`."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists already; choose another name or delete it")


class Draft:
    """A folder that appears under its final name whole, or not at all. Several processes that write
    into it come here, and leave it, together; the first makes it.

        with Draft(path) as folder: ...

    Raises:
        ValueError: something lies at the final name already, or it cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.folder = Path(hosts.by_first(self._made))
        return self.folder

    def _made(self) -> str:
        free(self.path)
        folder = self.path.with_name(f".{self.path.name}.draft-{os.getpid()}")
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written: {error.strerror}") from error
        return str(folder)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            hosts.by_first(self._placed)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _placed(self) -> None:
        if self.path.is_dir():
            self.path.rmdir()  # it was empty
        self.folder.rename(self.path)
