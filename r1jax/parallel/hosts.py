# SPDX-License-Identifier: Apache-2.0
"""Several processes as one machine: joining them, and what they have to tell each other.

All processes run the same program on the same config. What they say to each other here is small,
and every one of them must come to each call, in the same order; alone, each call answers at once.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from r1jax.parallel import peers
from r1jax.parallel.peers import Peers

AUTO, NONE = "auto", "none"
HEARTBEAT = 100  # seconds after which the runtime gives a process up; `peers` is sooner
GOODBYE = 60  # seconds that a process waits at its end for the others'


class Launch(NamedTuple):
    """Who a process is among others; all None: the environment knows."""

    coordinator: str | None  # "host:port" of process 0
    processes: int | None
    process: int | None


def launched(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> Launch | None:
    """How this process was started: one of several, or alone (None).

    Args:
        coordinator: "host:port" of process 0; "auto": the environment must know (TPU pod, Slurm,
            Open MPI, Kubernetes); "none": alone, whatever the environment says; None: one of
            several if the environment says plainly that there are several.
        processes: of the run.
        process: number of this one, from 0.
        environ: also read for JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which
            stand in for the three.

    Raises:
        ValueError: some but not all of the three are given, or they do not go together.
    """
    if coordinator == NONE:
        return None
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(processes, "JAX_NUM_PROCESSES", environ)
    process = _number(process, "JAX_PROCESS_ID", environ)
    given = (coordinator, processes, process)
    if coordinator == AUTO or given == (None, None, None):
        if given[1:] != (None, None):
            raise ValueError("processes and process are not given where the environment knows them")
        known = coordinator == AUTO or _cluster(environ) is not None
        return Launch(None, None, None) if known else None
    if None in given:
        raise ValueError(
            f"coordinator, processes and process go together, got {coordinator!r}, {processes}, "
            f"{process}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    if processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    if not 0 <= process < processes:
        raise ValueError(f"process must lie in 0..{processes - 1}, got {process}")
    return Launch(*given) if processes > 1 else None


def _number(given: int | None, name: str, environ: Mapping[str, str]) -> int | None:
    if given is not None or name not in environ:
        return given
    if not environ[name].isdigit():
        raise ValueError(f"the variable {name}={environ[name]!r} must be a number")
    return int(environ[name])


def _cluster(environ: Mapping[str, str]) -> str | None:
    """The environment that says, by itself, that this is one of several processes."""

    def several(name: str) -> bool:
        return environ.get(name, "").isdigit() and int(environ[name]) > 1

    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    if several("MEGASCALE_NUM_SLICES") or "," in workers:
        return "a TPU pod"
    if several("SLURM_STEP_NUM_TASKS") and "SLURM_PROCID" in environ:
        return "Slurm"
    return "Open MPI" if several("OMPI_COMM_WORLD_SIZE") else None


_peers: Peers | None = None  # of this process, as `jax.distributed` is


def start(launch: Launch, *, patience: float = peers.PATIENCE, timeout: int = 300) -> bool:
    """Joins the processes of a run, and watches them; before anything touches a device.

    Args:
        launch: from `launched`.
        patience: as in `Peers`.
        timeout: seconds to wait for all to come.

    Returns:
        Whether there are others. If not all come in time, the process ends and says so.

    Raises:
        ValueError: the environment does not know who takes part, or another program listens at
            the port of process 0.
    """
    global _peers
    if launch.process == 0:
        _check_port(launch.coordinator)
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    where = f" to {launch.coordinator}" if launch.coordinator else ""
    why = f"not all processes came{where} in {timeout} s; start the same command for each of them"
    alarm = threading.Timer(timeout, peers.end, (peers.FAILED, why))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            *launch,
            initialization_timeout=timeout + GOODBYE,  # the runtime would abort, with a stack trace
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=GOODBYE,
        )
    except ValueError as error:
        raise ValueError(
            f"the environment does not say who takes part in the run ({error}); say it by "
            "coordinator, processes and process"
        ) from error
    finally:
        alarm.cancel()
    if several():
        hub = peers.hub() if is_first() else None
        where = exchanged(None if hub is None else hub.invitation())[0]
        _peers = Peers(jax.process_index(), jax.process_count(), hub, where, patience=patience)
    return several()


def _check_port(coordinator: str) -> None:
    """Refuses a port that is taken: the runtime would share it with another run, or crash."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        why = os.strerror(error.errno)
        raise ValueError(
            f"coordinator={coordinator}: process 0 cannot listen there: {why}; choose another port"
        ) from error


def several() -> bool:
    """Whether this is one of several processes."""
    return jax.process_count() > 1


def number() -> int:
    """Of this process, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes and tells what all of them know."""
    return jax.process_index() == 0


def at(stage: str, step: int, *, first: bool = False) -> None:
    """Says where this process is, for the watchdog and its message.

    Args:
        stage: as in the metrics.
        step: the last that is done.
        first: programs are yet to be compiled.
    """
    if _peers is not None:
        _peers.at(stage, step, first=first)


def awaiting(what: str) -> contextlib.AbstractContextManager[None]:
    """Where this process waits for all; whoever does not come there hangs."""
    return contextlib.nullcontext() if _peers is None else _peers.awaiting(what)


def unhurried() -> contextlib.AbstractContextManager[None]:
    """Where this process does alone what may take long, as deleting large files; others may come
    to where they wait for it."""
    return contextlib.nullcontext() if _peers is None else _peers.unhurried()


def leave(code: int, why: str) -> None:
    """Says goodbye; with a reason the others end too, with the same exit status.

    Args:
        code: exit status of the process.
        why: "" where all is well and every process comes to its end by itself.
    """
    if _peers is not None:
        _peers.leave(code, why)


# --------------------------------------------------------------------- what all come together for


def exchanged(value: Any) -> list[Any]:
    """What each process says here, in their order; JSON can hold it."""
    if not several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with awaiting("the other processes"):
        sizes = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
        # Sizes of a few kinds: each is compiled for.
        padded = np.zeros(1 << max(int(sizes.max()) - 1, 255).bit_length(), np.uint8)
        padded[: len(text)] = text
        rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def by_first(do: Callable[[], Any]) -> Any:
    """What `do()` gives on process 0, which alone runs it; JSON can hold it.

    Raises:
        ValueError: on all processes, if it raised one on process 0.
    """
    if not several():
        return do()
    said: dict[str, Any] = {}
    if is_first():
        try:
            with unhurried():
                said["value"] = do()
        except ValueError as error:
            said["error"] = str(error)
    said = exchanged(said)[0]
    if "error" in said:
        raise ValueError(said["error"])
    return said["value"]


def check_same(value: Any, what: str) -> None:
    """Refuses what should be, and is not, the same on all processes.

    Raises:
        ValueError: on all of them.
    """
    said = exchanged(json.loads(json.dumps(value)))
    other = next((i for i, each in enumerate(said) if each != said[0]), None)
    if other is not None:
        raise ValueError(f"{what} of process {other} is another than process 0's")


def read(x: Any) -> np.ndarray:
    """All of an array, wherever its parts lie."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    with awaiting("the device"):
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def own_rows(x: jax.Array | np.ndarray) -> np.ndarray:
    """Numbers of the rows that are this process's to work on: each is of exactly one process."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.arange(len(x))
    mine = [_span(s.index, len(x)) for s in x.addressable_shards if s.replica_id == 0]
    return np.unique(np.concatenate([np.arange(0), *mine]))


def local_rows(x: jax.Array | np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of `own_rows`, read without a word to others. They must be cut along no other axis."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)[rows]
    found = np.empty((len(x), *x.shape[1:]), x.dtype)
    with awaiting("the device"):
        for shard in x.addressable_shards:
            found[_span(shard.index, len(x))] = np.asarray(shard.data)
    return found[rows]


def _span(index: tuple[slice, ...], size: int) -> np.ndarray:
    return np.arange(size)[index[0]]
