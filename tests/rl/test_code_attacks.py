# SPDX-License-Identifier: Apache-2.0
"""Attack programs against the sandbox and the code reward: none earns, none lives on (property 11).

The programs stand in `attacks/*.txt`. The problem of `tricks`, `forgeries` and `bombs` is f(x) =
2x + 1, a function; that of `scripts` is to print twice each number read. A trick solves it if and
only if what it tried came off: it sets WON. Each table runs with all layers of the fence, and again
with some left out, so that none stands in for another unseen. Bombs run into a limit and are slow.
"""

import os
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from r1jax.rl.rewards import bubblewrap
from r1jax.rl.rewards.code import FunctionTests, ScriptTests, code_reward, submit_code
from r1jax.rl.rewards.sandbox import Limits, Sandbox

if sys.platform != "linux":
    pytest.skip("the sandbox is built on Linux", allow_module_level=True)


def read_attacks(name):
    text = (Path(__file__).parent / "attacks" / f"{name}.txt").read_text()
    parts = [part.partition("\n") for part in f"\n{text}".split("\n## ")[1:]]
    return {title: source for title, _, source in parts}


TRICKS, BOMBS, SCRIPTS = (read_attacks(name) for name in ("tricks", "bombs", "scripts"))
FORGERIES = read_attacks("forgeries") | {
    "null bytes": "def f(x):\0 return 2 * x + 1",
    "nested source": "(" * 100_000,
}
TRICK = """
WON = False
SECRET, PARENT, OUTSIDE = {secret!r}, {parent}, {outside!r}
try:
{body}
except BaseException as error:
    print(type(error), error)
def f(x):
    return 2 * x + 1 if WON else None
"""
SHORT = Limits(wall_seconds=20, cpu_seconds=2, memory_bytes=1 << 29)
SCRIPT = Limits(wall_seconds=2, cpu_seconds=1, output_bytes=1 << 16)
BOMB = Limits(wall_seconds=4, cpu_seconds=1, memory_bytes=1 << 28, output_bytes=1 << 16)
RIGHT = "def f(x): return 2 * x + 1\n"
RIGHT_SCRIPT = "import sys\nfor l in sys.stdin: print(2 * int(l))"
TESTS = FunctionTests(
    tests="MARK = 'MARK_OF_THE_TESTS=482913'\n"
    + "".join(f"assert f({x}) == {2 * x + 1}\n" for x in (3, -8, 1000, 0)),
    remote=("f",),
)
SCRIPT_TESTS = ScriptTests((("3\n-8\n1000\n", "6\n-16\n2000\n"), ("1\n2\n3\n", "2\n4\n6\n")))

# What is left out: as in a container that allows no namespaces, where the filter is refused, …
FENCES = {
    "all": ("bubblewrap",),
    "no namespaces": ("bubblewrap", "user", "network", "ipc", "files", "pid"),
    "no filters": ("bubblewrap", "seccomp", "landlock"),
    "bubblewrap": (),
    "bubblewrap for namespaces": ("user", "network", "ipc", "files", "pid"),
}
# Tricks that one layer alone stops; without it they are answered by the docs of `sandbox`.
OPEN = {
    "no namespaces": {"root's home"} if os.getuid() else set(),
    "bubblewrap for namespaces": {"root's home"} if os.getuid() else set(),
    "no filters": {"keyring", "own user namespace"},
}


def words_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def is_warden(pid, parent):
    """What we started, or bubblewrap started for us; a program in it has a warden above it."""
    wraps = [words_of(p).partition(b"\0")[0].endswith(b"bwrap") for p in (pid, parent)]
    return parent == os.getpid() or any(wraps)


def leftovers(homes):
    """Processes of our wardens other than the wardens, and what attacks start."""
    found = []
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        words = words_of(pid)
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        ours = any(home.encode() in words for home in homes) and not is_warden(pid, int(parent))
        if state != "Z" and (ours or b"sleep\x001000" in words):
            found.append((pid, words))
    return found


@pytest.fixture(scope="module", params=FENCES)
def fence(request):
    if "bubblewrap" in request.param and (why := bubblewrap.refusal()):
        pytest.skip(f"bubblewrap: {why}")
    with Sandbox(SHORT, workers=2, without=FENCES[request.param]) as sandbox:
        sandbox.layers()
        yield request.param, sandbox


@pytest.fixture
def bait(tmp_path, monkeypatch):
    """A secret file, a folder that all may write, a server, a variable of the environment."""
    monkeypatch.setenv("R1JAX_SECRET", "answer")
    secret, outside = tmp_path / "secret", tmp_path / "outside"
    secret.write_text("answer 42")
    secret.chmod(0o600)
    outside.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"secret": str(secret), "parent": os.getpid(), "outside": str(outside)}
        yield names, str(server.getsockname()[1])
    assert secret.read_text() == "answer 42"
    assert list(outside.iterdir()) == []


def scores(sandbox, sources, tests, limits=None):
    texts = [f"Here:\n````python\n{text}\n````\n" for text in sources]
    answers = [tests] * len(texts)
    return code_reward([""] * len(texts), texts, answers, sandbox=sandbox, limits=limits)


def winners(names, reward_B):
    assert reward_B.dtype == np.float32
    return [name for name, reward in zip(names, reward_B, strict=True) if reward]


def all_is_well(sandbox):
    """The next right program passes, soon, and nothing of the earlier ones is alive."""
    began = time.monotonic()
    assert sandbox.run(RIGHT, checker={"given": "", "remote": ["f"], "tests": TESTS.tests}).passed
    assert time.monotonic() - began < 5
    wardens = [sandbox._warden() for _ in range(sandbox._idle.qsize())]
    for warden in wardens:
        sandbox._idle.put(warden)
    homes = [warden._home for warden in wardens]
    while leftovers(homes) and time.monotonic() - began < 8:
        time.sleep(0.05)  # a supervisor ends a moment after it has answered
    assert leftovers(homes) == []


def trick(name, bait):
    names, port = bait
    body = textwrap.indent(TRICKS[name].replace("{port}", port), " ")
    return TRICK.format(body=body, **names)


def test_there_are_enough():
    tables = (TRICKS, FORGERIES, BOMBS, SCRIPTS)
    assert sum(map(len, tables)) >= 100


def test_tricks(fence, bait):
    name, sandbox = fence
    tried = [key for key in TRICKS if key not in OPEN.get(name, ())]
    assert winners(tried, scores(sandbox, [trick(key, bait) for key in tried], TESTS)) == []
    all_is_well(sandbox)


def test_a_trick_can_succeed(fence, bait):
    names, _ = bait
    body = " open('own','w').write('x'); WON = open('own').read() == 'x'"
    source = TRICK.format(body=body, **names)
    assert scores(fence[1], [source], TESTS).tolist() == [1]


def test_forgeries(fence):
    _, sandbox = fence
    assert winners(FORGERIES, scores(sandbox, FORGERIES.values(), TESTS)) == []
    all_is_well(sandbox)


def test_scripts(fence):
    _, sandbox = fence
    reward_B = scores(sandbox, SCRIPTS.values(), SCRIPT_TESTS, SCRIPT)
    assert winners(SCRIPTS, reward_B) == []
    assert scores(sandbox, [RIGHT_SCRIPT], SCRIPT_TESTS).tolist() == [1]
    all_is_well(sandbox)


@pytest.mark.slow
def test_bombs(fence):
    _, sandbox = fence
    assert winners(BOMBS, scores(sandbox, BOMBS.values(), TESTS, BOMB)) == []
    all_is_well(sandbox)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_the_next_call_is_not_slowed(name):
    with Sandbox(SHORT, workers=1) as sandbox:
        assert scores(sandbox, [BOMBS[name]], TESTS, BOMB).tolist() == [0]
        all_is_well(sandbox)


def test_a_hung_program_stalls_no_other():
    with Sandbox(SHORT, workers=2) as sandbox:
        sandbox.layers()
        hung = submit_code(["while True: pass"], [TESTS], sandbox=sandbox)
        right = submit_code([RIGHT] * 8, [TESTS] * 8, sandbox=sandbox)
        assert right.result().tolist() == [1] * 8
        assert not hung.futures[0][0].done()
        assert hung.result().tolist() == [0]


def test_a_lost_warden_is_replaced():
    with Sandbox(SHORT, workers=1) as sandbox:
        sandbox.layers()
        warden = sandbox._warden()
        sandbox._idle.put(warden)
        os.kill(warden._process.pid, signal.SIGKILL)
        assert sandbox.run(RIGHT).status == "finished"
        all_is_well(sandbox)
