# SPDX-License-Identifier: Apache-2.0
"""The pool of verifiers: late, dead and greedy workers, order, and nothing left behind."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1jax.rl.rewards.pool import Limits, WorkerPool

JUDGE = '''
"""A judge that does as it is told."""
import os, sys, time

def judge(item):
    match item:
        case ["score", score, seconds]:
            time.sleep(seconds)
            return score
        case "jax":
            return sum(name.split(".")[0] in ("jax", "r1jax") for name in sys.modules)
        case "environment":
            return len(os.environ.keys() - {"PYTHONPATH", "LC_CTYPE"})
        case "hang":
            while True:
                pass
        case "hang in C":
            return 9 ** 9 ** 9
        case "memory":
            return len(bytearray(1 << 34))
        case "crash":
            os.abort()
        case "leave":
            os._exit(0)
        case "raise":
            raise KeyError("no such thing")
        case "no number":
            return "seven"
        case "print":
            os.write(1, b"noise" * 100), os.write(0, b"noise")
            return 1
        case "child":
            return os.fork()
        case "shell":
            return os.system("true")
        case "file":
            with open("/tmp/r1jax_judge", "w") as file:
                file.write("x" * 10)
            return 1
        case "grow":
            sys.grown = bytearray(b"x" * (120 << 20))
            return 1
        case "pid":
            return os.getpid()
'''
FAST = Limits(deadline_s=1.0, memory_bytes=1 << 30)


@pytest.fixture
def judge(tmp_path):
    path = tmp_path / "obedient.py"
    path.write_text(JUDGE)
    return path


@pytest.fixture
def pool(judge):
    with WorkerPool(judge, workers=2, limits=FAST) as pool:
        yield pool


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within that time; a zombie counts as not gone."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


def test_order_is_kept_and_work_is_shared(pool):
    items = [["score", i, 0.01 * (i % 3)] for i in range(40)]
    assert [outcome.score for outcome in pool.map(items)] == list(range(40))
    assert pool.counts() == {"started": 2, "ok": 40}


def test_submit_returns_at_once(pool):
    pool.map(["pid", "pid"])  # they are up
    began = time.monotonic()
    futures = [pool.submit(["score", 1, 0.3]) for _ in range(2)]
    assert time.monotonic() - began < 0.25
    assert [future.result().score for future in futures] == [1, 1]


def test_a_worker_is_clean(pool):
    assert [outcome.score for outcome in pool.map(["jax", "environment"])] == [0, 0]


@pytest.mark.parametrize(
    ("item", "status", "detail"),
    [
        ("hang", "late", ""),
        ("hang in C", "late", ""),
        (["score", 1, 30], "late", ""),
        ("crash", "died", ""),
        ("leave", "died", ""),
        ("memory", "error", "MemoryError"),
        ("raise", "error", "KeyError: 'no such thing'"),
        ("no number", "error", "ValueError"),
        ("child", "error", "PermissionError"),
        ("shell", "error", "PermissionError"),
        ("file", "error", "OSError"),
    ],
    ids=str,
)
def test_failure_is_a_score_and_the_pool_lives(pool, item, status, detail):
    pool.map(["pid", "pid"])
    before = set(pool.pids())
    began = time.monotonic()
    first, second = pool.map([item, ["score", 0.5, 0]])
    assert (first.score, first.status) == (0.0, status)
    assert first.detail.startswith(detail)
    assert (second.score, second.status) == (0.5, "ok")
    assert time.monotonic() - began < 20
    assert [outcome.status for outcome in pool.map(["pid"] * 4)] == ["ok"] * 4
    for pid in before - set(pool.pids()):
        assert gone(pid, 1.0)


def test_what_a_judge_prints_reaches_no_one(pool, capfd):
    assert [outcome.score for outcome in pool.map(["print"] * 4)] == [1] * 4
    assert capfd.readouterr() == ("", "")


def test_failed_score_is_chosen(judge):
    with WorkerPool(judge, workers=1, limits=Limits(failed_score=math.nan)) as pool:
        assert math.isnan(pool.map(["raise"])[0].score)


def test_a_worker_killed_from_outside(judge):
    with WorkerPool(judge, workers=1, limits=Limits(deadline_s=20)) as pool:
        pid = int(pool.map(["pid"])[0].score)
        os.kill(pid, signal.SIGKILL)  # while idle: no item pays for it
        while pool.pids():
            time.sleep(0.01)
        other = pool.map(["pid"])[0]
        assert other.status == "ok"
        future = pool.submit(["score", 1, 15])
        while not future.running():
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(int(other.score), signal.SIGKILL)  # while at work
        assert future.result(10).status == "died"
        assert pool.map([["score", 1, 0]])[0].score == 1


@pytest.mark.parametrize("item", ["hang", "crash"])
def test_a_lost_worker_is_replaced_before_the_next_item(judge, item):
    with WorkerPool(judge, workers=1, limits=FAST) as pool:
        lost = int(pool.map(["pid"])[0].score)
        pool.map([item])
        until = time.monotonic() + 20
        while not pool.pids() and time.monotonic() < until:
            time.sleep(0.01)
        assert len(pool.pids()) == 1
        assert pool.pids() != [lost]


def test_workers_are_replaced_when_old_or_grown(judge):
    limits = Limits(items_per_worker=3, resident_bytes=100 << 20)
    with WorkerPool(judge, workers=1, limits=limits) as pool:
        pids = [outcome.score for outcome in pool.map(["pid"] * 7)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
        outcomes = pool.map(["grow", "pid"])
        assert outcomes[0].status == "ok"
        assert outcomes[1].score not in pids


def test_close_leaves_nothing(judge):
    with WorkerPool(judge, workers=2, limits=Limits(deadline_s=60)) as pool:
        pool.map(["pid", "pid"])
        pids = pool.pids()
        futures = [pool.submit(["score", 1, 50]) for _ in range(4)]
        time.sleep(0.3)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert len(pids) == 2
    assert all(gone(pid, 1.0) for pid in pids)
    assert all(future.cancelled() or future.exception() is not None for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("pid")
    pool.close()  # twice does no harm


PARENT = """
import sys
from r1jax.rl.rewards.pool import Limits, WorkerPool
pool = WorkerPool(sys.argv[1], workers=2, limits=Limits(deadline_s=60))
pids = {int(o.score) for o in pool.map([["score", 1, 0.2], ["score", 1, 0.2], "pid", "pid"])}
pids = pool.pids()
futures = [pool.submit(item) for item in ("hang", ["score", 1, 50])]
print(*pids, flush=True)
if sys.argv[2] == "wait":
    futures[0].result()
"""


@pytest.mark.parametrize("end", ["kill", pytest.param("leave", marks=pytest.mark.slow)])
def test_workers_die_with_their_parent(judge, end):
    """By SIGKILL and by leaving without close(), with both workers at work."""
    argument = "wait" if end == "kill" else "leave"
    root = Path(__file__).parents[2]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PARENT, str(judge), argument]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if end == "kill":
            parent.kill()
        parent.wait(30)
    assert all(gone(pid) for pid in pids)


def test_a_judge_that_does_not_load_says_so(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_package")
    with WorkerPool(path, workers=1) as pool, pytest.raises(RuntimeError, match="no_such_package"):
        pool.map([1])


def test_bad_settings_are_named(judge):
    with pytest.raises(ValueError, match=r"limits\.deadline_s must be positive"):
        Limits(deadline_s=0)
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        WorkerPool(judge, workers=0)
