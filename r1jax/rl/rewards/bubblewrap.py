# SPDX-License-Identifier: Apache-2.0
"""bubblewrap around a warden, where it is installed: one more fence, built by a program of its own.

It stands outside the warden's own layers and depends on none of them. Where the kernel lets only a
set-user-id program make namespaces, these are the only namespaces there are.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NOT_INSTALLED = "not installed"
_STDLIB = os.path.dirname(os.path.realpath(os.__file__))
_LIBRARIES = (
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/etc/ld.so.cache",
)
_PROBE_SECONDS = 20.0


def interpreter() -> str:
    """The interpreter itself, not the link of a virtual environment: it finds its library by it."""
    return os.path.realpath(sys.executable)


def wrapped(command: Sequence[str], home: str, code: Path) -> list[str]:
    """The command in namespaces of its own: no network, no processes but its own, few files.

    Args:
      command: begins with `interpreter()`.
      home: the only folder of the machine that can be written.
      code: a folder that the command reads.

    Returns:
      the command line of bubblewrap; it ends with the process that started it.
    """
    # Root keeps its power within, for the warden to give each run a user of its own. Anybody else
    # gets a user namespace, in which the warden can open another.
    power = ["--cap-add", "ALL"] if os.getuid() == 0 else ["--unshare-user-try"]
    words = [str(shutil.which("bwrap")), *power, "--die-with-parent", "--new-session"]
    words += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for path in (*_LIBRARIES, "/usr/share/zoneinfo", interpreter(), _STDLIB, *_loaded()):
        words += ["--ro-bind-try", path, path]
    # What is installed there may hold a dataset's answers.
    words += ["--tmpfs", f"{_STDLIB}/site-packages"] * os.path.isdir(f"{_STDLIB}/site-packages")
    words += ["--ro-bind", str(code), str(code), "--bind", home, home, "--chdir", "/"]
    return [*words, "--", *command]


@functools.cache
def refusal() -> str:
    """Why bubblewrap cannot be used, "" if it can; tried once, on the interpreter."""
    if shutil.which("bwrap") is None:
        return NOT_INSTALLED
    here = Path(__file__).parent / "jail"
    command = wrapped([interpreter(), "-S", "-s", "-c", "import random"], str(here), here)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, env={}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return "" if done.returncode == 0 else (said[-1:] or [f"it ended with {done.returncode}"])[0]


def _loaded() -> list[str]:
    """Libraries of the interpreter's installation that it is linked with; none of a package's."""
    prefix = os.path.realpath(sys.base_prefix)
    try:
        with open("/proc/self/maps") as maps:
            names = {line.split(maxsplit=5)[-1].strip() for line in maps}
    except OSError:
        return []
    ours = (n for n in names if n.startswith(prefix) and ".so" in n and "site-packages" not in n)
    return sorted(name for name in ours if not name.startswith((_STDLIB, *_LIBRARIES)))
