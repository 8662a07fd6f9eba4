# SPDX-License-Identifier: Apache-2.0
"""One command started in several processes: how they find each other, and how they end."""

import argparse
import os
import signal
import sys
import time

from r1jax.train.failure import Preempted

HELP = """\
On several machines start the same command on each. On TPU pods, under Slurm (srun) and Open
MPI they find each other; on Google's TPU machines and Kubernetes say --coordinator=auto; by hand
give --coordinator, --processes and --process. DIR must be one folder that all of them see. When
a process dies or hangs, the others end; SIGTERM to any of them saves all, with exit status 0.
"""
_SETTLE = 2.0  # seconds in which the watchdog, which knows the cause, may end this process first


def add_flags(verb: argparse.ArgumentParser) -> None:
    """The flags of a verb that can run in several processes."""
    add = verb.add_argument
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0; auto: ask the environment; none: run alone",
    )
    add("--processes", type=int, metavar="N", help="how many processes take part")
    add("--process", type=int, metavar="I", help="number of this one, from 0")
    add(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="how long all may wait for one process (default: 45)",
    )


_number: int | None = None  # of this process, if there are others


def several() -> bool:
    """Whether this command has joined others."""
    return _number is not None


def name() -> str:
    """What its messages begin with."""
    return "" if _number is None else f"process {_number}: "


def join(args: argparse.Namespace) -> bool:
    """Joins the others, before a device is touched: whether there are any.

    Raises:
        ValueError: the flags or the environment do not say who takes part.
    """
    from r1jax.parallel import hosts, peers

    global _number
    launch = hosts.launched(args.coordinator, args.processes, args.process)
    patience = peers.PATIENCE if args.patience is None else args.patience
    if not patience > 0:  # nor is nan
        raise ValueError(f"--patience must be positive, got {patience}")
    if launch is None or not hosts.start(launch, patience=patience):
        return False
    _number = hosts.number()
    signal.signal(signal.SIGTERM, _wanted_back)
    return True


def _wanted_back(number, frame) -> None:
    """SIGTERM outside the loop of a stage, which has a handler of its own."""
    raise Preempted


def settle() -> None:
    """What failed here may only be that another process is gone: then its death is the message."""
    time.sleep(_SETTLE)


def leave(code: int, why: str) -> None:
    """Says goodbye to the others. With a reason all end, this process at once: the runtime would
    wait for them."""
    from r1jax.parallel import hosts

    hosts.leave(code, why)
    if why:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
