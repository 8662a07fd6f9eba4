# SPDX-License-Identifier: Apache-2.0
"""The warden's loop: one job after another from standard input, one result each to standard output.

A job is a frame (JSON: sizes and limits) followed by the raw program, its input and the tests. The
warden reads the frame alone. It forks a supervisor; that forks the checker (which waits) and the
program, which reads its own text from the stream and lets the stream go before running it; only
then does the checker read the tests. So no process that ever runs a program has seen a test, and
the warden's memory, of which every program is a copy, holds neither programs nor tests.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time

from jail import checker, confine, kernel, program, wire

# Imported once; programs, being forks, have them for nothing. Each page makes every fork dearer, so
# what few programs want and what brings libraries along is left to them, if they can read it.
_PRELOADED = (
    *("abc", "bisect", "cmath", "collections", "contextlib", "copy", "dataclasses", "datetime"),
    *("decimal", "enum", "fractions", "functools", "heapq", "io", "itertools", "math", "numbers"),
    *("operator", "random", "re", "string", "time", "traceback", "typing"),
)
_RARER = (
    *("array", "base64", "calendar", "csv", "hashlib", "inspect", "json", "pprint", "queue"),
    *("statistics", "struct", "textwrap", "threading", "unicodedata", "uuid", "zlib"),
)
_READY = 5  # descriptor on which a program's process says that it has its text


def main() -> None:
    """Arguments of the command line: the warden's folder, then layers to leave out."""
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    home, without = sys.argv[1], set(sys.argv[2:])
    sys.argv = ["program.py"]
    for name in _PRELOADED:
        importlib.import_module(name)
    missing = confine.settle(home, without)
    closed = not confine.stdlib_is_readable(missing)
    missing["imports"] = "programs may not read the standard library" if closed else ""
    for name in _RARER if closed else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    os.environ.clear()
    gc.collect()
    gc.freeze()
    wire.send(out, json.dumps(missing).encode())
    while True:
        try:
            job = json.loads(wire.receive(0))
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            try:
                _supervise(job, confine.Cell(missing, home, job["limits"]), out)
            finally:
                os._exit(1)  # unless it ended well before
        _, status = os.waitpid(pid, 0)
        if status:  # the stream may be out of step: the trainer starts another warden
            return


class _Pipes:
    """The pipes of one run, each a (reader, writer) pair."""

    def __init__(self):
        self.out, self.err, self.ready = os.pipe(), os.pipe(), os.pipe()
        self.requests, self.replies = os.pipe(), os.pipe()
        self.go, self.verdict = os.pipe(), os.pipe()

    def writers(self) -> list[int]:
        """The ends that the supervisor must not hold if it is to see the others' end."""
        kept = (self.out, self.err, self.ready, self.replies, self.verdict)
        return [self.requests[0], self.requests[1], self.replies[0]] + [w for _, w in kept]


def _supervise(job: dict, cell: confine.Cell, out: int) -> None:
    os.setsid()
    kernel.die_with_parent()
    kernel.adopt_orphans()
    began = time.monotonic()
    pipes = _Pipes()
    judged = job["sizes"][2] > 0
    judge = _fork_checker(job, pipes, out) if judged else 0
    pid = cell.fork()
    if pid == 0:
        _become_program(job, cell, pipes)
    for fd in pipes.writers():
        os.close(fd)
    watch = _Watch(pid, pipes, job["limits"], began)
    watch.until_ready()
    if judged:
        os.write(pipes.go[1], b"g")
        watch.until_judged()
    else:
        watch.until_exit()
    seconds = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.kill(judge or pid, signal.SIGKILL)
    exit_status = watch.exit_status
    cell.sweep(pid)
    watch.drain()
    result = {
        "status": watch.status,
        "in_step": watch.in_step,
        "exit": exit_status,
        "seconds": seconds,
        "verdict": watch.verdict.decode("utf-8", "replace"),
        "sizes": [len(watch.text["out"]), len(watch.text["err"])],
    }
    wire.send(out, json.dumps(result).encode())
    wire.write_all(out, bytes(watch.text["out"]) + bytes(watch.text["err"]))
    os._exit(not watch.in_step)


class _Watch:
    """What the supervisor sees: output up to a cap, the verdict, the clock."""

    def __init__(self, pid: int, pipes: _Pipes, limits: dict, began: float):
        self.pid, self.limits = pid, limits
        self.deadline = began + limits["wall_seconds"]
        self.status, self.exit_status, self.in_step = "finished", None, True
        self.text = {"out": bytearray(), "err": bytearray()}
        self.verdict = bytearray()
        self._ready, self._verdict = pipes.ready[0], pipes.verdict[0]
        self._streams = {pipes.out[0]: "out", pipes.err[0]: "err"}
        for fd in self._streams:
            os.set_blocking(fd, False)
        try:
            self._life = os.pidfd_open(pid)
        except OSError:
            self._life = None  # an old kernel: ask every few milliseconds

    def until_ready(self) -> None:
        """Until the program has taken its text off the stream."""
        word = os.read(self._ready, 1000) if self._wait_for(self._ready) else b""
        if word != b"r":
            self.status, self.in_step = "broken", False
            self.verdict += b"F" + word

    def until_judged(self) -> None:
        """Until the checker has said its word or is gone."""
        said = bytearray()
        while self.status == "finished" and self._wait_for(self._verdict):
            part = os.read(self._verdict, 1 << 16)
            said += part
            if not part:
                break
        self.in_step = self.in_step and said[:1] == b"r"
        self.verdict += said[1:]

    def until_exit(self) -> None:
        """Until the program's first process has ended."""
        if self._wait_for(self._life):
            _, status = os.waitpid(self.pid, 0)
            self.exit_status = os.waitstatus_to_exitcode(status)

    def drain(self) -> None:
        """What is left in the pipes; every writer is gone by now."""
        for fd in list(self._streams):
            while fd in self._streams and self._read(fd):
                pass

    def _wait_for(self, fd) -> bool:
        """Serves output until `fd` is readable (None: the program ended); False if stopped."""
        poll = select.poll()
        for stream in (*self._streams, *([] if fd is None else [fd])):
            poll.register(stream, select.POLLIN)
        while self.status == "finished":
            left = self.deadline - time.monotonic()
            if left <= 0:
                self._stop("deadline")
                break
            events = poll.poll(min(left, 0.01 if fd is None else left) * 1000)
            if fd in [found for found, _ in events]:
                return True
            for stream, _ in events:
                if not self._read(stream):
                    poll.unregister(stream)
            if fd is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
        return False

    def _read(self, fd: int) -> bool:
        """Takes what a stream holds; False once nothing more is to be had from it."""
        try:
            part = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        text, cap = self.text[self._streams[fd]], self.limits["output_bytes"]
        if len(text) + len(part) > cap:
            self._stop("output")
        text += part[: cap - len(text)]
        if not part or self.status == "output":
            del self._streams[fd]
            return False
        return True

    def _stop(self, status: str) -> None:
        if self.status == "finished":
            self.status = status


def _fork_checker(job: dict, pipes: _Pipes, out: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    kernel.die_with_parent()
    os.close(out)
    verdict = pipes.verdict[1]
    for fd in (*pipes.out, *pipes.err, *pipes.ready, pipes.go[1], pipes.verdict[0]):
        os.close(fd)
    os.close(pipes.requests[0])
    os.close(pipes.replies[1])
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if os.read(pipes.go[0], 1) != b"g":
        os._exit(1)
    tests = wire.read_exactly(0, job["sizes"][2])
    os.write(verdict, b"r")
    memory = job["limits"]["memory_bytes"]
    confine.lower_limit(resource.RLIMIT_AS, (memory, memory))
    try:
        checker.check(json.loads(tests), pipes.requests[1], pipes.replies[0])
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"[:2000]
        wire.write_all(verdict, b"F" + text.encode("utf-8", "replace"))
        os._exit(1)
    os.write(verdict, b"P")
    os._exit(0)


def _become_program(job: dict, cell: confine.Cell, pipes: _Pipes) -> None:
    """Never returns, and never lets an exception of ours reach the supervisor's frames."""
    try:
        source = wire.read_exactly(0, job["sizes"][0])
        text = wire.read_exactly(0, job["sizes"][1])
        for fd, target in ((_as_file(text), 0), (pipes.out[1], 1), (pipes.err[1], 2)):
            os.dup2(fd, target)
        kept = (pipes.requests[0], pipes.replies[1], pipes.ready[1])
        kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in kept]
        for fd, target in zip(kept, (program.REQUESTS, program.REPLIES, _READY), strict=True):
            os.dup2(fd, target)
        os.closerange(_READY + 1, 256)
        try:
            cell.enter()
        except (OSError, ValueError) as error:
            os.write(_READY, str(error).encode())
            os._exit(1)
        os.write(_READY, b"r")
        os.close(_READY)
        if job["sizes"][2]:
            program.as_functions(source)
        os.close(program.REQUESTS)
        os.close(program.REPLIES)
        program.as_script(source)
    finally:
        os._exit(1)


def _as_file(text: bytes) -> int:
    """Standard input as a file; the program may seek in it."""
    if not text:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        fd = os.memfd_create("input")
    except OSError:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        os.write(writer, text)
        return reader
    wire.write_all(fd, text)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
