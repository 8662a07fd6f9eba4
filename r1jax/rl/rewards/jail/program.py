# SPDX-License-Identifier: Apache-2.0
"""The process of the untrusted program: runs its text, or answers calls of its functions.

Nothing here is secret and nothing here judges. A program may rewrite all of it: what leaves are
bytes, and bytes that say the right values are what a right program would say.
"""

import atexit
import builtins
import os
import sys
import threading
import types

from jail import wire

REQUESTS, REPLIES = 3, 4  # descriptors of the calls


def as_script(source: bytes) -> None:
    """Runs the program as `__main__` and ends the process with its exit status."""
    status = 1
    try:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(source, "program.py", "exec"), module.__dict__)
        status = 0
    except SystemExit as error:
        code = error.code
        status = code if isinstance(code, int) else int(code is not None)
    except BaseException as error:
        _report(error)
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = status or 1
    os._exit(status & 0xFF)


def as_functions(source: bytes) -> None:
    """Runs the program as a module, then answers calls until the pipe ends."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = module.__dict__
    try:
        exec(compile(source, "solution.py", "exec"), names)
    except BaseException as error:
        _report(error)
        os._exit(1)
    objects = {}

    def look_up(name):
        if name in objects:
            return objects[name]
        return names[name] if name in names else getattr(builtins, name)

    while True:
        try:
            call = wire.receive(REQUESTS)
        except EOFError:
            os._exit(0)
        try:
            function, arguments, keywords = wire.decode(call, look_up)
            value = function(*arguments, **keywords)
            try:
                reply = b"V" + wire.encode(value)
            except (TypeError, ValueError):  # stays here; the checker may pass it back to us
                handle = f"#{len(objects)}"
                objects[handle] = value
                reply = b"H" + wire.encode(handle)
        except BaseException as error:
            reply = b"E" + wire.encode((type(error).__name__, str(error)[:500]))
        wire.send(REPLIES, reply)


def _report(error: BaseException) -> None:
    try:
        import traceback

        traceback.print_exception(error)
        sys.stderr.flush()
    except BaseException:
        os.write(2, b"the program raised\n")
