# SPDX-License-Identifier: Apache-2.0
"""A watchdog: when a process of a run dies, fails or hangs, the others end, and say where it was.

A star of plain sockets around process 0, in a thread beside the work. A process that is killed
closes its socket, which is noticed at once; one that is stopped, or whose machine is gone, gives
no sign of life. A process hangs when another has long been waiting where it does not come.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

PATIENCE = 45.0  # seconds that all may wait for one
SILENCE = 30.0  # seconds without a sign of life after which a process is given up
# Times the patience while programs are compiled, in the first step of a stage, and while a process
# does alone what takes as long as it takes.
FIRST = 10.0
PULSE = 1.0  # seconds between two signs of life
LAST_WORDS = 5.0  # seconds that process 0 stays for the others to end first
FAILED, WRONG = 1, 2  # exit statuses, as the command line has them

End = Callable[[int, str], None]


class Status(NamedTuple):
    """Where a process says that it is.

    Attributes:
        count: of all waits so far: the same on all processes that have come as far.
        stage, step: as in the metrics.
        doing: "working", or what it waits for.
        first: whether no step of the stage has been done yet, or it is `unhurried`.
    """

    count: int = 0
    stage: str = "start"
    step: int = 0
    doing: str = "working"
    first: bool = True

    def place(self) -> str:
        """In words."""
        return f"stage {self.stage}, step {self.step}, {self.doing}"


class Seen(NamedTuple):
    """What is known of a process: its status, since when, and when it was last heard (seconds)."""

    status: Status
    since: float
    heard: float


def verdict(seen: dict[int, Seen], now: float, patience: float) -> str | None:
    """Why the run must end, if it must: a process is silent, or does not come where others wait."""
    for index, one in seen.items():
        if now - one.heard > SILENCE:
            return f"process {index} gives no sign of life; last heard of in {one.status.place()}"
    ahead = max(seen.values(), key=lambda s: (s.status.count, -s.since))
    for index, one in seen.items():
        early = one.status.first or ahead.status.first
        limit = patience * (FIRST if early else 1.0)
        waited = now - max(one.since, ahead.since)
        if one.status.count < ahead.status.count and waited > limit:
            return (
                f"process {index} hangs in {one.status.place()}: the others have been waiting for "
                f"it for {waited:.0f} s"
            )
    return None


class Hub:
    """Where the others come to: a socket of process 0 that listens, and a word to know them by."""

    def __init__(self):
        self.server = socket.create_server(("", 0), backlog=1024)
        self.word = secrets.token_hex(8)

    def invitation(self) -> dict[str, Any]:
        """What the others need to come."""
        return {"port": self.server.getsockname()[1], "word": self.word, "hosts": _addresses()}


def hub() -> Hub:
    """Opens it, on process 0."""
    return Hub()


def _addresses() -> list[str]:
    """Names under which other machines, or this one, may find this one; the likeliest first."""
    found = [socket.gethostname(), socket.getfqdn()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: it tells the way out
            found.insert(0, probe.getsockname()[0])
        except OSError:
            found.append("127.0.0.1")
    return list(dict.fromkeys([*found, "127.0.0.1"]))


class _Line:
    """Messages, a JSON object a line, over one socket."""

    def __init__(self, sock: socket.socket):
        self.sock, self._rest, self._lock = sock, b"", threading.Lock()
        sock.settimeout(LAST_WORDS)

    def send(self, **message: Any) -> None:
        try:
            with self._lock:
                self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # whoever reads will see that it is closed

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come; None: it is closed, or no process of a run is at its other end."""
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None


class Peers:
    """The watchdog of one process. Its own thread ends the process: the main one may be stuck."""

    def __init__(
        self,
        index: int,
        count: int,
        hub: Hub | None,
        invitation: dict[str, Any],
        *,
        patience: float = PATIENCE,
        on_end: End | None = None,
    ):
        """Goes to process 0, or, being it, waits for the others to come.

        Args:
            index: number of this process.
            count: of all.
            hub: of process 0, on it.
            invitation: what process 0 said.
            patience: seconds that the others may wait for one process; `FIRST` times as long while
                programs are compiled. Longer waits for rewards want more.
            on_end: takes the place of `end`; for tests.

        Raises:
            ValueError: process 0 cannot be reached.
        """
        self.index, self.patience, self._end = index, patience, on_end or end
        self._lock = threading.Lock()
        self._status, self._since = Status(), time.monotonic()
        self._left: tuple[int, str] | None = None
        self._gone = threading.Event()
        self._lines: dict[int, _Line] = {}
        self._seen: dict[int, Seen] = {}
        self._byes: set[int] = set()
        if hub is None:
            self._lines[0] = _joined(invitation, index)
        else:
            self._lines = _met(hub, count)
        now = time.monotonic()
        self._seen = {i: Seen(Status(), now, now) for i in self._lines}
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def at(self, stage: str, step: int, *, first: bool) -> None:
        """This process now works on what comes after `step` of a stage."""
        with self._lock:
            self._status = Status(self._status.count, stage, step, first=first)

    @contextlib.contextmanager
    def awaiting(self, what: str) -> Iterator[None]:
        """This process waits for all others meanwhile."""
        with self._lock:
            count, self._since = self._status.count + 1, time.monotonic()
            self._status = self._status._replace(count=count, doing=f"waiting for {what}")
        yield
        with self._lock:
            self._status = self._status._replace(doing=Status().doing)

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """This process does something alone meanwhile, which may take long."""
        with self._lock:
            before, self._status = self._status.first, self._status._replace(first=True)
        try:
            yield
        finally:
            with self._lock:
                self._status = self._status._replace(first=before)

    def leave(self, code: int, why: str) -> None:
        """Goodbye, or the end of all."""
        if not why:
            for line in list(self._lines.values()):  # the thread may take one out
                line.send(bye=True)
            return
        self._left = (code, f"process {self.index}, in {self._status.place()}: {why}")
        self._gone.wait(2 * LAST_WORDS)

    # ------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for i, line in self._lines.items():
            selector.register(line.sock, selectors.EVENT_READ, i)
        pulse = 0.0
        while self._lines:
            for key, _ in selector.select(PULSE / 4):
                if not self._heard(key.data):
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if self._left is not None:
                self._tell(*self._left)
                self._gone.set()
                return
            if now - pulse > PULSE:
                pulse = now
                for line in self._lines.values():
                    line.send(status=self._status)
                self._judge(now)
        self._gone.set()

    def _heard(self, index: int) -> bool:
        """Takes what a process says; whether its line is still open."""
        line, now = self._lines[index], time.monotonic()
        messages = line.receive()
        if messages is None:
            del self._lines[index]
            last = self._seen.pop(index).status
            if index not in self._byes:
                self._over(FAILED, f"process {index} is dead; last heard of in {last.place()}")
            return False
        for message in messages:
            if "status" in message:
                status, old = Status(*message["status"]), self._seen[index]
                since = now if status.count > old.status.count else old.since
                self._seen[index] = Seen(status, since, now)
            elif "bye" in message:
                self._byes.add(index)
            else:
                self._over(message["end"], message["why"])
        return True

    def _judge(self, now: float) -> None:
        """Process 0 compares all; the others mind that it lives."""
        busy = {i: s for i, s in self._seen.items() if i not in self._byes}
        if self.index == 0:
            busy[0] = Seen(self._status, self._since, now)
        why = verdict(busy, now, self.patience) if busy else None
        if why is not None:
            self._over(FAILED, why)

    def _over(self, code: int, why: str) -> None:
        """Ends this process, which says why and where it is itself."""
        self._tell(code, why)
        hint = "" if code == WRONG else "; the same command resumes"
        self._end(code, f"{why}; process {self.index} was in {self._status.place()}{hint}")

    def _tell(self, code: int, why: str) -> None:
        """Tells the others; process 0, which the runtime of all hangs by, lets them end first."""
        for line in self._lines.values():
            line.send(end=code, why=why)
        deadline = time.monotonic() + LAST_WORDS
        for line in self._lines.values() if self.index == 0 else ():
            while time.monotonic() < deadline and line.receive() is not None:
                time.sleep(0.01)


def _joined(invitation: dict[str, Any], index: int) -> _Line:
    for host in invitation["hosts"]:
        try:
            sock = socket.create_connection((host, invitation["port"]), timeout=LAST_WORDS)
        except OSError:
            continue
        line = _Line(sock)
        line.send(word=invitation["word"], index=index)
        answer = line.receive()
        if answer and answer[0].get("word") == invitation["word"]:
            return line
        sock.close()
    raise ValueError(
        f"process {index} cannot reach process 0 at {', '.join(invitation['hosts'])}, port "
        f"{invitation['port']}; the machines of a run must reach each other on any port"
    )


def _met(hub: Hub, count: int) -> dict[int, _Line]:
    """The lines of all others; whoever does not know the word is turned away."""
    lines: dict[int, _Line] = {}
    hub.server.settimeout(SILENCE)
    while len(lines) < count - 1:
        try:
            line = _Line(hub.server.accept()[0])
        except TimeoutError:
            missing = sorted(set(range(1, count)) - set(lines))
            raise ValueError(
                f"processes {missing} cannot reach process 0; the machines of a run must reach "
                "each other on any port"
            ) from None
        hello = line.receive()
        if hello and hello[0].get("word") == hub.word:
            line.send(word=hub.word)
            lines[hello[0]["index"]] = line
        else:
            line.sock.close()
    hub.server.close()
    return lines


def end(code: int, why: str) -> None:
    """Ends this process now, its threads and what they wait for with it, and says why."""
    os.write(sys.stderr.fileno(), f"r1jax: {why}\n".encode())
    os._exit(code)
