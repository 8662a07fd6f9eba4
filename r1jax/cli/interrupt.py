# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that is heard wherever it falls."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

_AGAIN = 0.05  # seconds


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where Python would drop it.

    What is raised in a callback of the garbage collector (JAX has one), of a weak reference or in a
    finaliser is printed and forgotten: a run of hours would go on as if nothing had been pressed.
    From there the signal is sent again a little later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
