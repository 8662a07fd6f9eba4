# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that is heard wherever it falls."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_AGAIN = 0.05  # seconds


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where Python would drop it.

    JAX has a callback in the garbage collector, and what is raised in one is printed and forgotten:
    a run of hours would go on as if nothing had been pressed. There the signal is sent again a
    little later. A signal that is ignored, as in a shell's background, stays ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not _collecting(frame):
            raise KeyboardInterrupt
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    old = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def _collecting(frame: FrameType | None) -> bool:
    """Whether a frame is a callback of the garbage collector, or was called by one."""
    codes = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False
