# SPDX-License-Identifier: Apache-2.0
"""The process of the tests: calls the program's functions by pipe and compares plain values.

The program never holds the tests, the expected values or this code, and this process never holds
an object of the program's: what arrives is built by `wire.decode` from exact built-in types.
"""

import builtins
import importlib
import sys
import types

from jail import wire


class Remote(wire.Ref):
    """A global of the program: called, it runs over there and returns a plain value."""

    def __init__(self, name, requests, replies):
        """Args: the global's name and the two descriptors of the calls."""
        super().__init__(name)
        self._requests, self._replies = requests, replies

    def __call__(self, *arguments, **keywords):
        """The value, or the program's exception as the built-in of that name."""
        call = (wire.Ref(self.name), arguments, keywords)
        wire.send(self._requests, wire.encode(call))
        reply = wire.receive(self._replies)
        value = wire.decode(reply[1:])
        if reply[:1] == b"V":
            return value
        if reply[:1] == b"H":
            return wire.Ref(str(value))
        kind = getattr(builtins, str(value[0]), None)
        # An exit of the program must not become one of the checker, nor end a loop of the tests.
        known = isinstance(kind, type) and issubclass(kind, Exception)
        if not known or issubclass(kind, StopIteration | StopAsyncIteration):
            kind = RuntimeError
        try:
            error = kind(str(value[1]))
        except TypeError:
            error = RuntimeError(str(value))
        raise error


def check(job: dict, requests: int, replies: int) -> None:
    """Runs the tests; returns if all hold and raises otherwise.

    Args:
      job: `given`, source run before (a prompt's own functions); `remote`, names that are the
        program's; `tests`, the source of the tests.
      requests: descriptor to write calls to.
      replies: descriptor to read answers from.
    """
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    names = module.__dict__
    exec(compile(job["given"], "given.py", "exec"), names)
    tests = compile(job["tests"], "tests.py", "exec")
    for name in job["remote"]:
        names[name] = Remote(name, requests, replies)
    for name in _names_of(tests):
        if name in names or hasattr(builtins, name):
            continue
        if name in sys.stdlib_module_names:
            names[name] = importlib.import_module(name)
        else:
            names[name] = Remote(name, requests, replies)
    exec(tests, names)


def _names_of(code) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*(_names_of(const) for const in inner))
