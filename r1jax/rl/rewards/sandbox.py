# SPDX-License-Identifier: Apache-2.0
"""Runs untrusted programs beside the trainer: limited, watched, swept away afterwards.

A pool of wardens (see `jail.warden`), each a bare Python process that forks one program at a time.
A program gets: a process of its own in its own PID namespace, no network, a root that holds only
the standard library (read-only), an own temporary folder that vanishes, an own user id where the
warden is root, limits on processor seconds, memory, file sizes, open files and threads, an empty
environment, a filter of system calls (no new processes, sockets, signals to others, tracing), a cap
on its output, and a deadline on the wall clock after which all of it is killed. Where bubblewrap is
installed, a warden itself stands in one. Each of these layers stands alone; those the kernel or a
container refuses are named once in the log, as warning.

What this does not protect against:

- A hole in the kernel. Programs share it; for hostile programs use a virtual machine around it all.
- With no namespaces and no root: programs keep the trainer's user id. The filter and Landlock then
  keep them from processes, sockets, signals and files; where those are refused too, only limits,
  the deadline and a sweep of children stand, and a program can read the trainer's files.
- With root but no mount namespace or Landlock: a program reads what every user may read. And if the
  interpreter stands in a folder closed to other users, programs import only what the warden has
  imported for them, and a rare codec or module is missing: the log says `imports`.
- Timing: a program can see how busy the machine is, and the deadline depends on it.
- Load: a program may use one core for `cpu_seconds`, and `memory_bytes` of memory, per worker.
- Side channels of the processor, and the contents of the standard library's folder.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import queue
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from r1jax.rl.rewards import bubblewrap

_log = logging.getLogger(__name__)
_HERE = Path(__file__).parent
_QUIET = ("", "not needed", bubblewrap.NOT_INSTALLED)  # reasons for a layer's absence
# Behind the standard library, whose `math` must not be ours, and off the path before any program.
_BOOT = (
    "import sys; sys.path.append(sys.argv.pop(1)); from jail import warden; "
    "sys.path.pop(); warden.main()"
)
_START_SECONDS = 60.0
_GRACE_SECONDS = 10.0  # for the warden to sweep and answer after a run's deadline


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes:
      wall_seconds: deadline of the run on the wall clock, start to verdict.
      cpu_seconds: processor seconds of the program.
      memory_bytes: address space of the program.
      folder_bytes: each file, and where the folder is a mount of its own all files together.
      output_bytes: of standard output and of standard error, each; more ends the run.
      open_files: descriptors.
      processes: threads of the program.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 8.0
    memory_bytes: int = 1 << 30
    folder_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    open_files: int = 64
    processes: int = 32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"limits.{field.name} must be > 0")


@dataclasses.dataclass(frozen=True)
class Run:
    """What became of a program.

    Attributes:
      status: "finished", "deadline", "output" (over the cap) or "broken" (the sandbox failed).
      passed: the checker's verdict; False without a checker.
      detail: why not passed, for people.
      exit_status: of a program without checker: its exit code, negative for a signal; else None.
      stdout: bytes, capped.
      stderr: bytes, capped.
      seconds: wall clock from start to verdict.
    """

    status: str
    passed: bool = False
    detail: str = ""
    exit_status: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    seconds: float = 0.0


class Sandbox:
    """A pool of wardens: `submit` programs, collect futures.

    Results are those of the futures, in whatever order they are asked for. A program that hangs
    holds one worker until its deadline, no other.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        without: Sequence[str] = (),
    ):
        """Starts nothing yet; the first program does.

        Args:
          limits: of each run unless it brings its own.
          workers: programs at a time; None: one per processor, two at least.
          without: layers to leave out, to test the others.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"{workers=} must be >= 1")
        self.limits = limits or Limits()
        self.workers = workers or max(2, os.cpu_count() or 2)
        self._without = tuple(without)
        self._idle: queue.SimpleQueue[_Warden] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")

    def submit(
        self,
        program: str,
        *,
        stdin: str = "",
        checker: Mapping[str, object] | None = None,
        limits: Limits | None = None,
    ) -> Future[Run]:
        """Begins a run.

        Args:
          program: Python source, untrusted.
          stdin: standard input of a program without checker.
          checker: `given`, `remote`, `tests` of `jail.checker.check`, trusted; the program then
            answers calls, and passes if the tests hold.
          limits: in place of the pool's.

        Returns:
          a future of `Run`; it raises RuntimeError where no warden can be started.
        """
        parts = [
            text.encode("utf-8", "surrogatepass")
            for text in (program, stdin, json.dumps(checker) if checker else "")
        ]
        return self._threads.submit(self._run, parts, limits or self.limits)

    def run(self, program: str, **options) -> Run:
        """`submit` and wait."""
        return self.submit(program, **options).result()

    def layers(self) -> dict[str, str]:
        """Layer of the fence → "" where it stands, else why not."""
        return self._threads.submit(self._layers).result()

    def close(self) -> None:
        """Waits for what runs, then ends the wardens."""
        self._threads.shutdown()
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def __enter__(self) -> "Sandbox":
        """The pool itself."""
        return self

    def __exit__(self, *_) -> None:
        """Closes it."""
        self.close()

    def _warden(self) -> "_Warden":
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return _Warden(self._without)

    def _layers(self) -> dict[str, str]:
        warden = self._warden()
        self._idle.put(warden)
        return warden.missing

    def _run(self, parts: list[bytes], limits: Limits) -> Run:
        try:
            return self._run_once(parts, limits)
        except (EOFError, OSError) as error:  # the kernel may end a warden for want of memory
            _log.warning("a warden of the sandbox was lost (%s): the program runs again", error)
        try:
            return self._run_once(parts, limits)
        except (EOFError, OSError) as error:
            return Run("broken", detail=f"the warden was lost twice: {error}")

    def _run_once(self, parts: list[bytes], limits: Limits) -> Run:
        warden = self._warden()
        try:
            result = warden.run(parts, limits)
        except BaseException:
            warden.close()
            raise
        if result.status == "broken":
            _log.warning("the sandbox failed: %s", result.detail)
        if warden.in_step:
            self._idle.put(warden)
        else:
            warden.close()
        return result


class _Warden:
    """One warden process and the talk with it."""

    def __init__(self, without: Sequence[str]):
        self._home = tempfile.mkdtemp(prefix="r1jax-sandbox-")
        os.chmod(self._home, 0o711)  # another user's program must reach its folder inside
        # -S -s -P -B: no site, no user's folder, nothing of ours on the path. A fixed hash seed:
        # the order of a set of strings is the same in every run.
        options = ["-S", "-s", "-P", "-B", "-X", "utf8", "-c", _BOOT, str(_HERE)]
        layers = [layer for layer in without if layer != "bubblewrap"]
        command = [bubblewrap.interpreter(), *options, self._home, *layers]
        outer = "left out" if "bubblewrap" in without else bubblewrap.refusal()
        self._process = subprocess.Popen(
            command if outer else bubblewrap.wrapped(command, self._home, _HERE / "jail"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._received = bytearray()
        self.in_step = True  # whether the next job would be read from its beginning
        try:
            inner = json.loads(self._frame(b"", time.monotonic() + _START_SECONDS))
        except (EOFError, TimeoutError) as error:
            self.close()
            raise RuntimeError(f"the sandbox did not start: {error}") from error
        self.missing: dict[str, str] = {"bubblewrap": outer, **inner}
        _warn_once(tuple(self.missing.items()))

    def run(self, parts: list[bytes], limits: Limits) -> Run:
        """One job and its result; raises EOFError or TimeoutError where the warden is lost."""
        job = {"sizes": [len(part) for part in parts], "limits": dataclasses.asdict(limits)}
        head = json.dumps(job).encode()
        data = b"".join((len(head).to_bytes(8, "little"), head, *parts))
        deadline = time.monotonic() + limits.wall_seconds + _GRACE_SECONDS
        result = json.loads(self._frame(data, deadline))
        out, err = result["sizes"]
        text = self._take(out + err, b"", deadline)
        verdict, self.in_step = result["verdict"], result["in_step"]
        return Run(
            status=result["status"],
            passed=result["status"] == "finished" and verdict == "P",
            detail=verdict[1:] if result["status"] != "deadline" else "past the deadline",
            exit_status=result["exit"],
            stdout=text[:out],
            stderr=text[out:],
            seconds=result["seconds"],
        )

    def close(self) -> None:
        """Ends the warden; a run in progress dies with it."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        with contextlib.suppress(RecursionError):  # a program's folders, if the warden was lost
            shutil.rmtree(self._home, ignore_errors=True)

    def _frame(self, data: bytes, deadline: float) -> bytes:
        size = int.from_bytes(self._take(8, data, deadline), "little")
        return self._take(size, b"", deadline)

    def _take(self, size: int, data: bytes, deadline: float) -> bytes:
        """Writes `data` while waiting for `size` bytes."""
        source, sink = self._process.stdout.fileno(), self._process.stdin.fileno()
        rest = memoryview(data)
        while len(self._received) < size or rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer within the deadline")
            readable, writable, _ = _ready(source, sink if rest else None, left)
            if writable:
                rest = rest[os.write(sink, rest[: 1 << 16]) :]
            if readable:
                part = os.read(source, 1 << 16)
                if not part:
                    raise EOFError("its process ended")
                self._received += part
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken


def _ready(source: int, sink: int | None, seconds: float) -> tuple[bool, bool, bool]:
    """Whether the one can be read and the other written; the last: neither."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    if sink is not None:
        poll.register(sink, select.POLLOUT)
    found = [fd for fd, _ in poll.poll(seconds * 1000)]
    return source in found, sink in found, not found


@functools.cache
def _warn_once(missing: tuple[tuple[str, str], ...]) -> None:
    lacking = [f"{name} ({why})" for name, why in missing if why not in _QUIET]
    if lacking:
        _log.warning("the code sandbox runs without: %s", ", ".join(lacking))
