# SPDX-License-Identifier: Apache-2.0
"""A pool of worker processes for verifiers that may hang, crash or eat memory.

Each worker is a fresh interpreter (not a fork: JAX has threads) that imports no JAX, has limits of
memory and processor time, and is watched by one thread here. An item that is not answered by its
deadline costs its worker: it is killed, replaced, and the item gets the score of a failure.
"""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

WORKER = Path(__file__).with_name("worker.py")
MAX_REPLY_BYTES = 1 << 16
Status = Literal["ok", "late", "died", "error"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one worker may take.

    Attributes:
      deadline_s: seconds of wall clock an item may take, from when a ready worker receives it. The
        same number, and up to two more, bounds its processor time should the parent be stopped.
      memory_bytes: address space of a worker (RLIMIT_AS).
      start_s: seconds a worker may take to start.
      items_per_worker: a worker is replaced after so many items.
      resident_bytes: a worker that holds more memory than this after an item is replaced.
      failed_score: score of an item that was late, raised, or whose worker died. NaN is a choice
        too: `group_advantages` leaves such rows out, so that a slow machine punishes nobody.
    """

    deadline_s: float = 3.0
    memory_bytes: int = 1 << 30
    start_s: float = 60.0
    items_per_worker: int = 10_000
    resident_bytes: int = 400 << 20
    failed_score: float = 0.0

    def __post_init__(self):
        for name in ("deadline_s", "memory_bytes", "start_s", "items_per_worker", "resident_bytes"):
            if not (value := dataclasses.asdict(self)[name]) > 0:
                raise ValueError(f"limits.{name} must be positive, got {value}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an item.

    Attributes:
      score: the judge's, or `failed_score` unless the status is "ok".
      status: "ok", "late" (killed at the deadline), "died" (the worker ended: memory, processor
        time, a crash) or "error" (the judge raised).
      detail: what the judge raised, else "".
    """

    score: float
    status: Status
    detail: str = ""


class _Worker:
    """One process and the socket to it."""

    def __init__(self, judge: Path, limits: Limits):
        self.limits = limits
        self.items = 0
        self.resident = 0
        self.connection, theirs = socket.socketpair()
        # Only what finds the packages: a judge sees no secret of the parent's environment.
        paths = os.pathsep.join(p for p in sys.path if p)
        settings = json.dumps(dataclasses.asdict(limits))
        command = [sys.executable, "-P", str(WORKER), str(judge), settings, str(os.getpid())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": paths},
                cwd="/",
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )

    def wait_ready(self) -> None:
        """Raises RuntimeError if the worker does not come up."""
        try:
            reply = self._receive(time.monotonic() + self.limits.start_s)
        except (OSError, ValueError) as error:  # it closed, or what it wrote is no reply
            raise RuntimeError(f"a worker did not start: {error!r}") from error
        if "ready" not in reply:
            raise RuntimeError(f"a worker did not start: {reply.get('error', reply)}")

    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, message: bytes) -> Outcome:
        """Sends one item and waits for its answer, at most until the deadline."""
        failed = self.limits.failed_score
        deadline = time.monotonic() + self.limits.deadline_s
        self.items += 1
        try:
            self.connection.settimeout(self.limits.deadline_s)
            self.connection.sendall(message)
            reply = self._receive(deadline)
            self.resident = reply["resident"]
            if "error" in reply:
                return Outcome(failed, "error", reply["error"])
            return Outcome(reply["score"], "ok")
        except TimeoutError:
            self.kill()
            return Outcome(failed, "late")
        except (OSError, ValueError, KeyError):  # it closed, or what it wrote is no reply
            self.kill()
            return Outcome(failed, "died")

    def worn(self) -> bool:
        """Whether it has served its time, or grown."""
        grown = self.resident > self.limits.resident_bytes
        return grown or self.items >= self.limits.items_per_worker

    def kill(self) -> None:
        """Ends the process and waits for it: no zombie stays."""
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _receive(self, deadline: float) -> dict:
        count = int.from_bytes(self._read(4, deadline), "big")
        if count > MAX_REPLY_BYTES:
            raise ValueError(f"a reply of {count} bytes")
        return json.loads(self._read(count, deadline))

    def _read(self, count: int, deadline: float) -> bytes:
        data = b""
        while len(data) < count:
            # Never 0, which would mean not to wait at all and raise another error.
            self.connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self.connection.recv(count - len(data))
            if not part:
                raise ConnectionError("the worker closed its end")
            data += part
        return data


class _Supervisor(threading.Thread):
    """The thread that owns one worker at a time. It starts it: the worker dies with it."""

    def __init__(self, pool: "WorkerPool"):
        super().__init__(daemon=True, name="verifier")
        self.pool = pool
        self.worker: _Worker | None = None

    def run(self) -> None:
        self._warm()  # begin now, not with the first item
        try:
            while (job := self.pool.jobs.get()) is not None:
                self._serve(*job)
        finally:
            self._drop()

    def _serve(self, message: bytes, future: "Future[Outcome]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            worker = self._ready()
        except (RuntimeError, OSError) as error:
            future.set_exception(error)
            return
        outcome = worker.ask(message)
        if spent := not worker.alive() or worker.worn():
            self._drop()
        if self.pool.closing.is_set() and outcome.status == "died":
            future.set_exception(RuntimeError("the pool was closed before the item was done"))
            return
        self.pool.count(outcome.status)
        future.set_result(outcome)
        if spent:
            self._warm()

    def _warm(self) -> None:
        """Starts a worker before an item needs it. Its error is told on that item."""
        with contextlib.suppress(RuntimeError, OSError):
            self._ready()

    def _ready(self) -> _Worker:
        """A live worker; one that was killed while idle is replaced at no item's cost."""
        if self.worker is not None and not self.worker.alive():
            self._drop()
        if self.worker is None:
            with self.pool.lock:  # close() either sees this worker or is seen here
                if self.pool.closing.is_set():
                    raise RuntimeError("the pool is closed")
                self.worker = _Worker(self.pool.judge, self.pool.limits)
            self.pool.count("started")
            try:
                self.worker.wait_ready()
            except RuntimeError:
                self._drop()
                raise
        return self.worker

    def _drop(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker = None


class WorkerPool:
    """Runs `judge(item) -> float` of a Python file in worker processes.

    A context manager: on leaving, every worker is killed and waited for. Should this process die
    instead, the kernel kills the workers (Linux), and elsewhere the closed socket ends them.

    What it does not protect against: a judge is trusted code on untrusted data. It is no sandbox
    for programs written by a model.

    Args:
      judge: a Python file that imports no r1jax and has `judge(item) -> float`; the item is what
        JSON makes of it.
      workers: number of processes. They start at once, in the background.
      limits: of each worker.

    Raises:
      ValueError: fewer than one worker.
    """

    def __init__(self, judge: Path, *, workers: int = 2, limits: Limits | None = None):
        if workers < 1:
            raise ValueError(f"{workers=} must be at least 1")
        self.judge = Path(judge)
        self.limits = limits or Limits()
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._counts: collections.Counter[str] = collections.Counter()
        self._supervisors = [_Supervisor(self) for _ in range(workers)]
        for supervisor in self._supervisors:
            supervisor.start()

    def submit(self, item: object) -> "Future[Outcome]":
        """Queues an item; the future's result is its `Outcome`.

        The future raises RuntimeError if no worker can be started (the verifier's package is not
        installed, say) or the pool was closed. `TypeError` here: the item is not JSON.
        """
        if self.closing.is_set():
            raise RuntimeError("the pool is closed")
        data = json.dumps(item).encode()
        future: Future[Outcome] = Future()
        self.jobs.put((len(data).to_bytes(4, "big") + data, future))
        return future

    def map(self, items: Iterable[object]) -> list[Outcome]:
        """The outcomes of the items, in their order."""
        futures = [self.submit(item) for item in items]
        return [future.result() for future in futures]

    def count(self, what: str) -> None:
        """Adds one to a count; the supervisors call this."""
        with self.lock:
            self._counts[what] += 1

    def counts(self) -> dict[str, int]:
        """How many items ended in each status, and how many workers were `started`."""
        with self.lock:
            return dict(self._counts)

    def pids(self) -> list[int]:
        """Process ids of the workers that live now."""
        workers = [s.worker for s in self._supervisors]
        return [w.process.pid for w in workers if w is not None and w.alive()]

    def close(self) -> None:
        """Kills all workers, cancels what is queued, and returns when no process is left."""
        with self.lock:
            self.closing.set()
            workers = [s.worker for s in self._supervisors if s.worker is not None]
        with contextlib.suppress(queue.Empty):
            while True:
                job = self.jobs.get_nowait()
                if job is not None:
                    job[1].cancel()
        for worker in workers:
            worker.process.kill()  # its supervisor, waiting for it, sees the socket close
        for _ in self._supervisors:
            self.jobs.put(None)
        for supervisor in self._supervisors:
            supervisor.join()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
