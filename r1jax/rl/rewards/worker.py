# SPDX-License-Identifier: Apache-2.0
"""What a worker process of the pool runs: a script that sees neither r1jax nor JAX.

    python -P worker.py JUDGE.py LIMITS PARENT

Standard input is a socket. Each message, in both directions, is four bytes of length and JSON: one
item comes, one reply goes. The judge is a Python file with `judge(item) -> float`. Nothing that
comes over the socket is ever run as code.
"""

import ctypes
import importlib.util
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

PR_SET_PDEATHSIG = 1
# What a judge has no business doing. Refused by an audit hook: a second fence, not a sandbox.
REFUSED_EVENTS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.bind",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.kill",
    "ctypes.dlopen",
)


def die_with(parent: int) -> None:
    """The kernel kills this process when the thread that started it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def refuse(event: str, arguments: tuple) -> None:
    """The audit hook: raises on what no judge may do."""
    if event in REFUSED_EVENTS:
        raise PermissionError(f"{event} in a worker")


def lower_limits(memory_bytes: int) -> None:
    """Address space bounded; no file grows, no core is left."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def allow_cpu(seconds: float) -> None:
    """From now on `seconds` of processor time, then SIGXCPU ends the process."""
    used = time.process_time()
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds) + 1, hard))


def resident_bytes() -> int:
    """Memory that the process holds now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes; at the end of the stream the process ends."""
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 16))
        if not part:
            os._exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def send(connection: socket.socket, message: dict) -> None:
    """One message."""
    data = json.dumps(message).encode()
    connection.sendall(len(data).to_bytes(4, "big") + data)


def load(path: str) -> Callable[[object], float]:
    """The function `judge` of a Python file."""
    spec = importlib.util.spec_from_file_location("judge", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.judge


def answer(judge: Callable[[object], float], item: object) -> dict:
    """The reply to an item: its score, or what was raised."""
    try:
        reply = {"score": float(judge(item))}
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return reply | {"resident": resident_bytes()}


def main(judge_path: str, limits_json: str, parent: str) -> NoReturn:
    """Tells that it is ready, then answers item after item until the socket closes."""
    die_with(int(parent))
    connection = socket.socket(fileno=os.dup(0))
    limits = json.loads(limits_json)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # a library that prints cannot reach the socket
        os.dup2(null, descriptor)
    try:
        judge = load(judge_path)  # before files may not grow: Python keeps the bytecode
        lower_limits(limits["memory_bytes"])
    except Exception as error:
        send(connection, {"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    sys.addaudithook(refuse)
    send(connection, {"ready": os.getpid()})
    while True:
        count = int.from_bytes(receive(connection, 4), "big")
        item = json.loads(receive(connection, count))
        allow_cpu(limits["deadline_s"])
        send(connection, answer(judge, item))


if __name__ == "__main__":
    main(*sys.argv[1:])
