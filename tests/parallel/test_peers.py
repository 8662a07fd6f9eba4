# SPDX-License-Identifier: Apache-2.0
"""The watchdog: who is dead, silent or late, and that it says so everywhere."""

import queue
import socket
import threading
import time

import pytest

from r1jax.parallel import peers
from r1jax.parallel.peers import Peers, Seen, Status, verdict

PATIENCE = 10.0


def seen(count, since, *, heard=100.0, first=False, step=4):
    return Seen(Status(count, "sft", step, "working", first), since, heard)


@pytest.mark.parametrize(
    ("late", "early", "said"),
    [
        (seen(5, 90), seen(5, 0), None),  # both wait for the device
        (seen(4, 50), seen(5, 95), None),  # the others have just come
        (seen(4, 95), seen(5, 50), None),  # it was there a moment ago
        (seen(4, 50), seen(5, 80), "process 1 hangs in stage sft, step 4, working: the others"),
        (seen(4, 50, first=True), seen(5, 80), None),  # it compiles
        (seen(4, 0, first=True), seen(5, 0, first=True), None),
        (seen(4, -9, first=True), seen(5, -1, first=True), "hangs"),
        (seen(5, 90, heard=60), seen(5, 90), "process 1 gives no sign of life; last heard of in"),
        (seen(6, 50, heard=71), seen(5, 50), "process 0 hangs"),
    ],
)
def test_the_verdict(late, early, said):
    found = verdict({0: early, 1: late}, 100.0, PATIENCE)
    assert found is None if said is None else said in found


class Two:
    """Two watchdogs in one process, whose ends are noted."""

    def __init__(self, **how):
        self.ends = [queue.Queue(), queue.Queue()]
        hub = peers.hub()
        made = []
        other = threading.Thread(target=lambda: made.append(self._one(1, None, hub, how)))
        other.start()
        self.of = [self._one(0, hub, hub, how)]
        other.join()
        self.of += made

    def _one(self, index, own, hub, how):
        note = lambda code, why: self.ends[index].put((code, why))  # noqa: E731
        return Peers(index, 2, own, hub.invitation(), on_end=note, **how)

    def end(self, index):
        return self.ends[index].get(timeout=20)


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(peers, "LAST_WORDS", 0.5)
    return Two


@pytest.mark.parametrize("who", [0, 1])
def test_a_closed_line_is_a_death(two, who):
    both = two()
    both.of[who].at("grpo", 7, first=False)
    time.sleep(2 * peers.PULSE)
    for line in list(both.of[who]._lines.values()):
        line.sock.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that is killed
    code, why = both.end(1 - who)
    assert code == 1
    assert why.startswith(f"process {who} is dead; last heard of in stage grpo, step 7, working")
    assert f"process {1 - who} was in stage start, step 0" in why


def test_a_goodbye_is_none(two):
    both = two()
    for one in both.of:
        one.leave(0, "")
    time.sleep(1)
    for line in list(both.of[1]._lines.values()):
        line.sock.shutdown(socket.SHUT_RDWR)
    time.sleep(1)
    assert all(ends.empty() for ends in both.ends)


@pytest.mark.parametrize("who", [0, 1])
def test_a_reason_ends_the_other_with_the_same_status(two, who):
    both = two()
    both.of[who].leave(2, "the file is damaged")
    code, why = both.end(1 - who)
    assert code == 2
    assert f"process {who}, in stage start, step 0, working: the file is damaged" in why
    assert both.ends[who].empty()  # its main thread ends it


@pytest.mark.parametrize("who", [0, 1])
def test_who_does_not_come_is_told_by_all(two, who):
    both = two(patience=1.0)
    for one in both.of:
        one.at("sft", 4, first=False)
    both.of[1 - who].awaiting("the device").__enter__()
    for index in range(2):
        code, why = both.end(index)
        assert code == 1
        assert f"process {who} hangs in stage sft, step 4, working" in why


@pytest.mark.parametrize("who", [0, 1])
def test_who_works_alone_has_time(two, who):
    """As for deleting an old checkpoint; not for ever, and no longer than that."""
    both = two(patience=0.5)
    for one in both.of:
        one.at("sft", 4, first=False)
    alone = both.of[who].unhurried()
    alone.__enter__()
    both.of[1 - who].awaiting("the device").__enter__()
    time.sleep(3)
    assert all(ends.empty() for ends in both.ends)
    alone.__exit__(None, None, None)
    code, why = both.end(0)
    assert code == 1
    assert f"process {who} hangs in stage sft, step 4, working" in why


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n", b"7\n", b"[1]\n", b"\xff\n"])
def test_who_speaks_another_language_is_turned_away(monkeypatch, said):
    """Somebody scans the machine's ports."""
    monkeypatch.setattr(peers, "LAST_WORDS", 0.5)
    monkeypatch.setattr(peers, "SILENCE", 1.0)
    hub = peers.hub()
    with socket.create_connection(("127.0.0.1", hub.invitation()["port"])) as scanner:
        scanner.sendall(said)
        with pytest.raises(ValueError, match=r"processes \[1\] cannot reach process 0"):
            Peers(0, 2, hub, {})


def test_a_stranger_is_turned_away(monkeypatch):
    monkeypatch.setattr(peers, "LAST_WORDS", 0.5)
    monkeypatch.setattr(peers, "SILENCE", 1.0)
    hub = peers.hub()
    stranger = dict(hub.invitation(), word="guess")
    told = []

    def come():
        try:
            Peers(1, 2, None, stranger)
        except ValueError as error:
            told.append(str(error))

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(ValueError, match=r"processes \[1\] cannot reach process 0"):
        Peers(0, 2, hub, {})
    thread.join()
    assert "process 1 cannot reach process 0 at" in told[0]
