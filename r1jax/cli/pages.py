# SPDX-License-Identifier: Apache-2.0
"""Large pages for what a training step works with, on Linux.

XLA gets a step's working memory from `malloc` and gives it back after the step, and the kernel
hands it out again a page of 4 KB at a time: a quarter of the quickstart's CPU time. glibc asks for
pages of 2 MB instead if a variable says so, which it reads when a process starts, and only then.
"""

import contextlib
import os
import sys
from pathlib import Path

NAME, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
ASKED = "R1JAX_ASKED_FOR_LARGE_PAGES"  # the id of the process that did, which it keeps
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask() -> None:
    """Starts this process anew, same command and same id, with `GLIBC_TUNABLES` asking for large
    pages. Nothing happens where that is said already, one way or the other, or would change
    nothing: another system or C library, or a kernel that gives them to all or to none.

    For a process that has done nothing yet: what it was doing is lost.
    """
    said, process = os.environ.get(NAME, ""), str(os.getpid())
    if TUNABLE in said or not sys.executable or not _given_if_asked():
        return
    if os.environ.get(ASKED) == process:  # a process with privileges of its file is not heard
        return
    os.environ |= {NAME: ":".join(filter(None, (said, f"{TUNABLE}=1"))), ASKED: process}
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    with contextlib.suppress(OSError):  # then it goes on as it is
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _given_if_asked() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None and "[madvise]" in SETTING.read_text()
    except (AttributeError, ValueError, OSError):  # Windows; another C library; no such setting
        return False
