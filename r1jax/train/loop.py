# SPDX-License-Identifier: Apache-2.0
"""The loop of every stage: resume, step, log, checkpoint; nothing is lost to an interruption."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from r1jax.io import checkpoint
from r1jax.io.metrics import MetricsWriter, NoMetrics
from r1jax.parallel import hosts
from r1jax.train.failure import Preempted
from r1jax.train.progress import Progress
from r1jax.train.rebalance import Rebalance


@dataclasses.dataclass
class Run:
    """Where a run keeps things, and the config that its checkpoints belong to."""

    out: Path
    config: Mapping[str, Any]
    progress: Progress
    checkpoint_every: float  # seconds
    metrics_position: int = 0  # bytes of metrics.jsonl that belong to finished stages
    rebalance: Rebalance | None = None  # None: experts stay where they are

    def folder(self, stage: str) -> Path:
        """The checkpoints of a stage."""
        return self.out / "checkpoints" / stage


def plain(tree: Any) -> Any:
    """A tree in which every `nnx.State` is a pure dict: what is written to disk."""
    is_state = lambda x: isinstance(x, nnx.State)  # noqa: E731
    return jax.tree.map(lambda x: nnx.to_pure_dict(x) if is_state(x) else x, tree, is_leaf=is_state)


def saved_form(carry: Mapping[str, Any]) -> dict[str, Any]:
    """What of a carry goes into a checkpoint: a state becomes its fields but the static one."""

    def one(value):
        if dataclasses.is_dataclass(value):
            return {name: plain(getattr(value, name)) for name in _saved(value)}
        return plain(value)

    return {k: one(v) for k, v in carry.items()}


def restored(carry: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """`carry` with the arrays of `tree`, which has the form of `saved_form(carry)`."""
    return {
        k: jax.tree.unflatten(jax.tree.structure(v), _ordered(v, tree[k])) for k, v in carry.items()
    }


def _ordered(value: Any, tree: Any) -> list[Any]:
    if not dataclasses.is_dataclass(value):
        return jax.tree.leaves(tree)
    return [leaf for name in _saved(value) for leaf in jax.tree.leaves(tree[name])]


def _saved(value: Any) -> list[str]:
    """Fields of a state that hold something and are not known from the config."""
    names = [f.name for f in dataclasses.fields(value) if f.name != "graphdef"]
    return [name for name in names if getattr(value, name) is not None]


def finished(run: Run, stage: str) -> dict[str, Any] | None:
    """The record that a stage left when it ended, or None."""
    step = checkpoint.latest(run.folder(stage))
    meta = {} if step is None else checkpoint.read_meta(run.folder(stage), step)
    if "record" in meta:
        run.metrics_position = meta["metrics_position"]
    return meta.get("record")


def load(run: Run, stage: str, carry: Mapping[str, Any]) -> dict[str, Any]:
    """The carry that a finished stage left."""
    found = checkpoint.restore_latest(run.folder(stage), saved_form(carry), config=run.config)
    if found is None:
        raise ValueError(f"no checkpoint of stage {stage} in {run.folder(stage)}")
    return restored(carry, found.tree)


def run_stage(
    run: Run,
    stage: str,
    carry: dict[str, Any],
    step_fn: Callable[[int, dict[str, Any]], tuple[dict[str, Any], Callable[[], dict[str, Any]]]],
    *,
    steps: int,
    log_every: int = 1,
) -> tuple[dict[str, Any], float]:
    """Runs `step_fn(step, carry) -> (carry, row)` to the end, from where the last run stopped.

    Everything that the next step depends on is in `carry` or is a function of `step`, so a resumed
    run is the uninterrupted one. `row()` gives the step's metrics; it is called, and waits for the
    device, on every `log_every`-th step and before experts are dealt out anew. Of several processes
    the first writes the metrics, and all write each checkpoint, of a step that they agree on.

    Returns:
        (carry, seconds spent in this stage over all its runs).

    Raises:
        KeyboardInterrupt: after saving; on all processes, whichever was told to stop. Of SIGTERM it
            is a `Preempted`.
    """
    hosts.at(stage, 0, first=True)
    found = checkpoint.restore_latest(run.folder(stage), saved_form(carry), config=run.config)
    step, before, position = 0, 0.0, run.metrics_position
    if found is not None:
        step, before = found.step, found.meta["seconds"]
        position = found.meta["metrics_position"]
        carry = restored(carry, found.tree)
        run.progress.message(f"{stage}: resumed at step {step}")
    hosts.at(stage, step, first=True)
    run.progress.stage(stage, steps)
    begun = saved_at = time.monotonic()
    seconds = lambda: before + time.monotonic() - begun  # noqa: E731

    with open_metrics(run, position) as metrics, stop_between_steps() as stop:
        while step < steps:
            carry, row = step_fn(step, carry)
            step += 1
            moving = run.rebalance and run.rebalance.due(step) and step < steps
            logged = step % log_every == 0 or step == steps
            values = _read(row()) if logged or moving else {}
            if moving:
                carry = run.rebalance(carry, values["expert_load"])
            if logged:
                metrics.write(stage=stage, step=step, seconds=round(seconds(), 3), **values)
                shown = {k: float(v) for k, v in values.items() if np.ndim(v) == 0}
                run.progress.step(step, **shown)
            hosts.at(stage, step)
            due, told = agreed(time.monotonic() - saved_at > run.checkpoint_every, stop)
            if (due and step < steps) or told:
                meta = {"seconds": seconds(), "metrics_position": metrics.position}
                meta["config"] = run.config
                checkpoint.save(run.folder(stage), step, saved_form(carry), meta=meta)
                saved_at = time.monotonic()
            if told:
                raise told(f"{stage}: saved at step {step}")
        run.metrics_position = metrics.position
    return carry, seconds()


def _read(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: hosts.read(v) if isinstance(v, jax.Array) else v for k, v in row.items()}


class Stop:
    """Whether an interruption was asked for: `KeyboardInterrupt`, or `Preempted` by SIGTERM."""

    asked: type[KeyboardInterrupt] | None = None


def agreed(due: bool, stop: Stop) -> tuple[bool, type[KeyboardInterrupt] | None]:
    """(whether to save, whether to stop), the same on all processes at the end of a step: the first
    has the clock, and whoever is told to stop stops all."""
    kinds = (None, KeyboardInterrupt, Preempted)
    said = hosts.exchanged([due, kinds.index(stop.asked)])
    return said[0][0], kinds[max(kind for _, kind in said)]


def open_metrics(run: Run, position: int) -> MetricsWriter | NoMetrics:
    """The run's metrics, from a position on; of several processes the first writes them."""
    if not hosts.is_first():
        return NoMetrics()
    return MetricsWriter(run.out / "metrics.jsonl", position=position)


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM wait for the end of the step: in the middle of one, its donated state is
    neither old nor new. A second Ctrl-C does not wait. Outside the main thread nothing is caught.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number, frame):
        if stop.asked:
            raise stop.asked
        stop.asked = Preempted if number == signal.SIGTERM else KeyboardInterrupt

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def finish(run: Run, stage: str, carry: dict[str, Any], steps: int, record: dict[str, Any]) -> None:
    """Writes the last checkpoint of a stage with its record: from here on it is never run again."""
    meta = {
        "seconds": record["seconds"],
        "metrics_position": run.metrics_position,
        "record": record,
        "config": run.config,
    }
    checkpoint.save(run.folder(stage), steps, saved_form(carry), meta=meta, keep=1)
