# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by Orbax: one folder a step, whole or absent, refused if another config made them.

    PATH/00000400/tree    the arrays (Orbax)
    PATH/00000400/meta    JSON: the caller's `meta`, and type and checksum of every leaf

Orbax writes into a temporary folder and renames it, so a folder whose name is a number is complete
unless the disk damaged it afterwards. Orbax pads, crops and casts what does not fit its target;
here that is an error, which is what the types in the JSON are for. Writing is synchronous: a laptop
run saves a megabyte in 0.1 to 0.2 s and leaves no threads behind at exit.
"""

import json
import logging
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from r1jax.io.same_config import check_config, config_difference
from r1jax.parallel import hosts

_log = logging.getLogger(__name__)

PyTree = Any
SMALL = 1 << 20  # bytes
_NAME = re.compile(r"(\d{8,})(?:-(\d+))?")  # step, and which replacement of it


class Restored(NamedTuple):
    """What `restore_latest` found."""

    step: int
    tree: PyTree
    meta: dict[str, Any]


def save(path: str | Path, step: int, tree: PyTree, *, meta: dict[str, Any], keep: int = 2) -> Path:
    """Writes `tree` and `meta` as PATH/STEP, all or nothing, then deletes what is no longer needed.

    Deleted are steps before the newest `keep`, and steps after this one: they belong to a future
    that was given up when the run resumed from an earlier checkpoint.

    Args:
      path: the folder of this series of checkpoints; made if absent.
      step: counted from 0. One of the same step is replaced, whole by whole.
      tree: dicts, lists, tuples and NamedTuples of jax or numpy arrays and Python numbers, as made
        by `nnx.to_pure_dict` and optax. An array on one device is written from the host; a sharded
        one by the processes that hold its shards. Orbax refuses arrays with no element.
      meta: JSON-able. `meta["config"]`, a nested dict, is what `check_config` compares.
      keep: how many steps stay on disk, at least 1. Two, so that a damaged newest one has a
        predecessor.

    Returns:
      the folder of the step.
    """
    if keep < 1:
        raise ValueError(
            f"{keep=} must be at least 1: a checkpoint that is deleted at once saves nothing"
        )
    # The first process has the last word on what is there: others may see it late.
    target = Path(hosts.by_first(lambda: str(_free_folder(path, step))))
    tree = jax.tree.map(_to_host, tree)
    # JSON first: a value that cannot be written must fail before anything on disk is touched.
    record = json.loads(json.dumps({"meta": meta, "leaves": _leaf_table(tree)}, allow_nan=False))
    items = ocp.args.Composite(tree=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(record))
    with hosts.awaiting("a checkpoint to be written"), ocp.Checkpointer(_handler()) as writer:
        writer.save(target, args=items)
    if hosts.is_first():
        with hosts.unhurried():
            _prune(Path(path), step, keep)
    return target


def restore(path: str | Path, step: int, abstract_tree: PyTree) -> PyTree:
    """Reads PATH/STEP into the structure, shapes and dtypes of `abstract_tree`, bit for bit.

    Args:
      path: the folder given to `save`.
      step: which one.
      abstract_tree: as saved; leaves are arrays (values unused) or `jax.ShapeDtypeStruct`.

    Returns:
      the tree. A leaf is a `jax.Array` with the sharding of its abstract leaf (the default device
      if it names none), or a numpy array or Python number where the abstract leaf is one.

    Raises:
      ValueError: no such step; structure, shape or dtype differ from what was saved; damaged files.
    """
    folder = _folder(path, step)
    if not folder.is_dir():
        raise ValueError(f"no checkpoint of step {step} in {path}; it has {steps(path)}")
    saved = _record(path, step)["leaves"]
    _check_types(saved, _leaf_table(abstract_tree), folder)
    return _read(folder, saved, abstract_tree)


def restore_latest(
    path: str | Path, abstract_tree: PyTree, *, config: Mapping[str, Any] | None = None
) -> Restored | None:
    """Reads the newest checkpoint that can be read; each one that cannot is logged as a warning.

    Args:
      path: the folder given to `save`; may be absent.
      abstract_tree: as for `restore`.
      config: if given, the config of the run that asks, as nested dict; compared with
        `meta["config"]`.

    Returns:
      (step, tree, meta), or None if there is no checkpoint at all.

    Raises:
      ValueError: the checkpoint is of another config (the differing fields are named), or there are
        checkpoints and none of them can be read.
    """
    found = hosts.by_first(lambda: steps(path))
    for step in reversed(found):
        record = _record_or_none(path, step)
        if record is None:
            continue
        folder = _folder(path, step)
        if config is not None:
            check_config(record["meta"].get("config", {}), config, where=folder)
        _check_types(record["leaves"], _leaf_table(abstract_tree), folder)
        try:
            return Restored(step, _read(folder, record["leaves"], abstract_tree), record["meta"])
        except ValueError as error:
            _log.warning("%s; going on from the checkpoint before it", error)
    if found:
        raise ValueError(
            f"none of the checkpoints {found} in {path} can be read; use --force to start anew"
        )
    return None


def latest(path: str | Path) -> int | None:
    """The newest step in PATH whose meta can be read, or None; damaged ones are logged."""
    found = hosts.by_first(lambda: steps(path))
    return next((s for s in reversed(found) if _record_or_none(path, s) is not None), None)


def steps(path: str | Path) -> list[int]:
    """The steps saved in PATH, ascending; [] if there is no such folder."""
    return sorted(_folders(path))


def read_meta(path: str | Path, step: int) -> dict[str, Any]:
    """The JSON saved beside the tree.

    Raises:
      ValueError: no such step, or its meta is missing or damaged.
    """
    return _record(path, step)["meta"]


def _folders(path: str | Path) -> dict[int, list[Path]]:
    """{step: its folders, the newest last}. More than one: a writer died before it pruned."""
    path = Path(path).absolute()
    found: dict[int, list[tuple[int, Path]]] = {}
    for folder in path.iterdir() if path.is_dir() else ():
        if match := _NAME.fullmatch(folder.name):
            found.setdefault(int(match[1]), []).append((int(match[2] or 0), folder))
    return {step: [folder for _, folder in sorted(pairs)] for step, pairs in found.items()}


def _folder(path: str | Path, step: int) -> Path:
    folders = _folders(path).get(step)
    return folders[-1] if folders else Path(path).absolute() / f"{step:08d}"


def _free_folder(path: str | Path, step: int) -> Path:
    """A name not yet taken: the old folder of the same step stays until the new one is complete."""
    folders = _folders(path).get(step, [])
    if not folders:
        return _folder(path, step)
    used = int(_NAME.fullmatch(folders[-1].name)[2] or 0)
    return folders[-1].with_name(f"{step:08d}-{used + 1}")


def _record(path: str | Path, step: int) -> dict[str, Any]:
    """What `save` wrote as JSON: {"meta": the caller's, "leaves": see `_leaf_table`}."""
    folder = _folder(path, step)
    try:
        with _reader() as reader:
            record = reader.restore(folder, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
                "meta"
            ]
    except Exception as error:  # damaged files raise whatever their reader raises
        raise ValueError(f"checkpoint {folder} cannot be read: {_first_line(error)}") from error
    if not isinstance(record, dict) or {"meta", "leaves"} - record.keys():
        raise ValueError(f"checkpoint {folder} cannot be read: its meta is not one of ours")
    return record


def _record_or_none(path: str | Path, step: int) -> dict[str, Any] | None:
    """The record of a step, None where a process of the run cannot read it."""
    record, why = None, ""
    try:
        record = _record(path, step)
    except ValueError as error:
        why = str(error)
    if why := _told(why):
        _log.warning("%s; passed over", why)
    return None if why else record


def _told(why: str) -> str:
    """Why this process, or else another, cannot read something: all of them give it up then."""
    return next(filter(None, [why, *hosts.exchanged(why)]), "")


def _read(folder: Path, saved: Mapping[str, Any], abstract_tree: PyTree) -> PyTree:
    tree, why = None, ""
    with hosts.awaiting("a checkpoint to be read"):
        try:
            tree = _read_here(folder, saved, jax.tree.map(_target, abstract_tree))
        except Exception as error:  # as in _record
            why = f"checkpoint {folder} cannot be read: {_first_line(error)}"
    if why := _told(why):
        raise ValueError(why)
    return jax.tree.map(_like, tree, abstract_tree)


def _read_here(folder: Path, saved: Mapping[str, Any], target: PyTree) -> PyTree:
    """What of the tree this process holds."""
    items = ocp.args.Composite(
        tree=ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
        )
    )
    with _reader() as reader:
        tree = reader.restore(folder, args=items)["tree"]
    for key, leaf in _leaf_table(tree).items():
        if None not in (sums := (leaf["crc32"], saved[key]["crc32"])) and sums[0] != sums[1]:
            raise ValueError(f"the checksum of {key} is wrong")
    return tree


def _reader() -> ocp.Checkpointer:
    """One that waits for no other process: who cannot read must be there to say so."""
    me = hosts.number()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return ocp.Checkpointer(_handler(), multiprocessing_options=alone)


def _handler() -> ocp.CompositeCheckpointHandler:
    # Weights do not compress; leaving compression out halves the time.
    tree = ocp.PyTreeCheckpointHandler(use_compression=False)
    handlers = ocp.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        handlers.add("tree", args, tree)
    return ocp.CompositeCheckpointHandler(handler_registry=handlers)


def _prune(path: Path, step: int, keep: int) -> None:
    folders = _folders(path)
    newest = [s for s in sorted(folders) if s <= step][-keep:]
    kept = {folders[s][-1] for s in newest}
    for old in (f for same in folders.values() for f in same if f not in kept):
        old.rename(old.with_name(f"{old.name}.deleted"))  # at once; rmtree takes its time
    for pattern in ("*.deleted", "*.orbax-checkpoint-tmp*"):  # the second: a killed writer
        for leftover in path.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _leaf_table(tree: PyTree) -> dict[str, dict[str, Any]]:
    """{path: {"type": `float32[3,2]` or `int`, "crc32": of the bytes if they are on the host}}."""
    table = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, bool | int | float):
            kind, crc = type(leaf).__name__, None
        else:
            kind = f"{leaf.dtype.name}{list(leaf.shape)}".replace(" ", "")
            crc = zlib.crc32(_bytes(np.asarray(leaf))) if _in_host_memory(leaf) else None
        table[jax.tree_util.keystr(path)] = {"type": kind, "crc32": crc}
    return table


def _bytes(leaf: np.ndarray | np.generic) -> np.ndarray:
    """The bytes of an array, seen and not copied: it may be half of the memory."""
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _check_types(saved: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    types = [{key: leaf["type"] for key, leaf in table.items()} for table in (saved, asked)]
    different = config_difference(*types)
    if different:
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(
            f"checkpoint {folder} holds another tree: {'; '.join(different[:3])}{more}"
        )


def _to_host(leaf: Any) -> Any:
    # Orbax copies arrays of numpy before it writes them. Small ones are written twice as fast that
    # way; of large ones it would be a second copy of the model.
    if isinstance(leaf, jax.Array) and leaf.nbytes <= SMALL and _on_one_device(leaf):
        return np.asarray(leaf)
    return leaf


def _on_one_device(leaf: jax.Array) -> bool:
    return leaf.is_fully_addressable and len(leaf.devices()) == 1


def _in_host_memory(leaf: Any) -> bool:
    """Whether the bytes can be summed without a transfer."""
    if isinstance(leaf, np.ndarray | np.generic):
        return True
    on_device = isinstance(leaf, jax.Array) and _on_one_device(leaf)
    return on_device and next(iter(leaf.devices())).platform == "cpu"


def _target(abstract: Any) -> Any:
    """The abstract leaf for Orbax: a sharded array stays sharded, the rest goes to the host."""
    if isinstance(abstract, bool | int | float):
        return abstract
    on_device = (
        isinstance(abstract, jax.Array | jax.ShapeDtypeStruct) and abstract.sharding is not None
    )
    sharding = abstract.sharding if on_device and len(abstract.sharding.device_set) > 1 else None
    return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=sharding)


def _like(value: Any, abstract: Any) -> Any:
    if isinstance(value, jax.Array) or not isinstance(abstract, jax.Array | jax.ShapeDtypeStruct):
        return value
    # As free to move as what it replaces, or a step compiled for that would be compiled again.
    free = isinstance(abstract, jax.Array) and not abstract.committed
    # A copy, never a view of the reader's buffer: training donates these arrays.
    return jax.device_put(value, None if free else abstract.sharding, may_alias=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
