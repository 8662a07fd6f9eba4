# SPDX-License-Identifier: Apache-2.0
"""Several processes as one machine: joining them, and feeding each its own rows."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from r1jax.sharding import spec

PATIENCE = 30  # seconds without a sign of life after which a process is given up
CLUSTERS = (
    "SLURM_JOB_ID",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
    "KUBERNETES_SERVICE_HOST",
)
"""Variables by which the environments that JAX knows are told."""


def start(
    coordinator: str | None = None,
    *,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 300,
) -> bool:
    """Joins the processes of a run; must come before anything touches a device.

    With nothing given it asks the environment: TPU pods, Slurm, Open MPI, Kubernetes. The others
    notice a process that dies within `PATIENCE` seconds and a few more, and end.

    Args:
        coordinator: "host:port" of process 0.
        processes: of the run.
        process: number of this one, from 0.
        timeout: seconds to wait for all to come.

    Returns:
        Whether there are others; nothing is done if none is given and no environment known.

    Raises:
        ValueError: some but not all of the three are given.
        TimeoutError: the others did not come.
    """
    given = (coordinator, processes, process)
    if any(x is None for x in given):
        if any(x is not None for x in given):
            raise ValueError(
                f"coordinator, processes and process go together, got {coordinator!r}, "
                f"{processes}, {process}"
            )
        if not any(name in os.environ for name in CLUSTERS):
            return False
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=PATIENCE,
        )
    except RuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(
            f"process {process} of {processes}: not all came to {coordinator} in {timeout} s"
        ) from error
    return jax.process_count() > 1


def rows_of_host(rows: int) -> slice:
    """Which of a batch's rows this process feeds: an equal part, in the order of processes.

    Raises:
        ValueError: they cannot be dealt out evenly.
    """
    n = jax.process_count()
    if rows % n:
        raise ValueError(f"batch_size={rows} must be divisible by the {n} processes that feed it")
    return slice(jax.process_index() * rows // n, (jax.process_index() + 1) * rows // n)


def whole(mine: Mapping[str, np.ndarray], mesh: Mesh, *axes: str | None) -> dict[str, Any]:
    """Global arrays of what each process has of them.

    Args:
        mine: {name: this process's part}, cut along "batch" as `rows_of_host` says.
        mesh: of all processes, in force; its first axes are those of "batch".
        axes: logical axes of every array.
    """
    where = NamedSharding(mesh, spec(*axes))
    make = jax.make_array_from_process_local_data
    return {name: make(where, np.asarray(x)) for name, x in mine.items()}
