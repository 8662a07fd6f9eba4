# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: whose it is, how far it got, and what in it may be deleted.

    run.json        written first: this folder is a run of r1jax, made by this config
    checkpoints/    traces/  metrics.jsonl  samples.json
    summary.json    written last: the run is finished
    report.html     curves.png

and of rejection sampling:

    samples/  traces.jsonl  pairs.jsonl
    statistics.json  written last

The same command resumes; another config, or a folder that is not ours, is refused; so is a folder
in which another process is at work; nothing is overwritten unless asked, and then only these names
are deleted.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from r1jax.io.same_config import check_config
from r1jax.parallel import hosts

MARKER = "run.json"
SUMMARY = "summary.json"
SAMPLES, TRACES, STATISTICS = "samples", "traces.jsonl", "statistics.json"
PAIRS = "pairs.jsonl"
LOCK = ".lock"
# All that a run leaves in its folder, and all that `force` deletes.
ARTEFACTS = (
    MARKER,
    SUMMARY,
    "metrics.jsonl",
    "samples.json",
    "checkpoints",
    "model",
    "traces",
    SAMPLES,
    TRACES,
    PAIRS,
    STATISTICS,
    "report.html",
    "curves.png",
    "tokenizer.json",
)
State = Literal["new", "resume", "finished"]


def inspect(out: str | Path, config: Mapping[str, Any]) -> State:
    """What running `config` in `out` would mean. Looks only; writes nothing.

    Args:
      out: the folder; may be absent.
      config: the run's config as nested dict.

    Returns:
      "new": absent or empty; "resume": a half-done run of this config; "finished": a whole one.

    Raises:
      ValueError: `out` is a file, holds something that is not a run, or a run of another config.
    """
    out = Path(out)
    names = _names(out)
    if not names:
        return "new"
    marker = _marker(out)
    if marker is None:
        raise ValueError(
            f"out={str(out)!r} is not empty and not a run of r1jax; choose another --out"
        )
    if marker.get("clearing"):
        return "new"
    check_config(marker["config"], config, where=f"out={str(out)!r}")
    return "finished" if names & {SUMMARY, STATISTICS} else "resume"


def claim(out: str | Path, config: Mapping[str, Any], *, force: bool = False) -> State:
    """Makes `out` the folder of this run, as `inspect` allows, and says how to go on.

    Args:
      out: the folder; made, with its parents, if absent.
      config: the run's config as nested dict.
      force: delete what an earlier run left there (ARTEFACTS, nothing else) and start anew. A
        folder that is not ours is refused all the same.

    Returns:
      as `inspect`; "new" after `force`.

    Raises:
      ValueError: as `inspect`, or the folder cannot be written.
    """
    out = Path(out)
    state = _found(out, config, force)
    if state == "finished":
        return state  # nothing will be written: reading is enough
    try:
        out.mkdir(parents=True, exist_ok=True)
        if state == "new":
            # Before the first deletion: a kill in between must not leave a run to resume.
            write_json(out / MARKER, {"program": "r1jax", "clearing": True, "config": config})
            _clear(out)
        write_json(out / MARKER, {"program": "r1jax", "config": config})
    except OSError as error:
        raise _unwritable(out, error) from error
    return state


@contextlib.contextmanager
def held(out: str | Path, config: Mapping[str, Any], *, force: bool = False) -> Iterator[State]:
    """`claim`s the folder, and keeps other processes from claiming it while the context lasts.

    The lock is the kernel's (flock): it is gone with its process, however that ends. On a file
    system that has no locks there is none. Of the several processes of a run the first holds it
    for all; the folder must be one that all of them see.

    Args:
      as `claim`.

    Yields:
      as `claim` returns.

    Raises:
      ValueError: as `claim`, or another process is at work in the folder.
    """
    with contextlib.ExitStack() as stack:
        one = functools.partial(_held, Path(out), config, force)
        state = hosts.by_first(lambda: stack.enter_context(one()))
        if not all(hosts.exchanged((Path(out) / MARKER).is_file())):
            raise ValueError(
                f"out={str(out)!r} is not the same folder on all machines; name one that they share"
            )
        yield state


@contextlib.contextmanager
def _held(out: Path, config: Mapping[str, Any], force: bool) -> Iterator[State]:
    if _found(out, config, force) == "finished":
        yield "finished"
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _locked(out / LOCK)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield claim(out, config, force=force)
    finally:
        (out / LOCK).unlink(missing_ok=True)
        os.close(lock)


def _found(out: Path, config: Mapping[str, Any], force: bool) -> State:
    """As `inspect`; with `force` a run of any config is as good as nothing."""
    return "new" if force and _marker(out) is not None else inspect(out, config)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock at `path`."""
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ValueError(
                f"out={str(path.parent)!r}: another process is at work in it; wait for its end or "
                "choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                os.close(lock)
                raise
            return lock
        with contextlib.suppress(OSError):  # its last holder may have deleted it a moment ago
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file all or nothing: a neighbour is written, flushed to disk and renamed."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object that a run left; ValueError where the file is damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); --force starts anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: no JSON object; --force starts anew")
    return value


def _names(out: Path) -> set[str]:
    """What lies in the folder but the lock, unfinished drafts and the desktop's droppings."""
    try:
        names = {p.name for p in out.iterdir()} if out.exists() else set()
    except OSError as error:  # a file, or a folder that may not be read
        raise _unwritable(out, error) from error
    ours = (LOCK, ".draft", "DS_Store")
    return {n for n in names if not (n.startswith(".") and n.endswith(ours))}


def _marker(out: Path) -> dict[str, Any] | None:
    """The marker, or None if the folder has none of ours."""
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
        return marker if marker["program"] == "r1jax" and marker["config"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _clear(out: Path) -> None:
    """Deletes all artefacts but the marker."""
    for path in (out / name for name in ARTEFACTS if name != MARKER):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> ValueError:
    return ValueError(
        f"out={str(out)!r} cannot be used: {error.strerror or error}; choose another --out"
    )
