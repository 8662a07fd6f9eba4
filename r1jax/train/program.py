# SPDX-License-Identifier: Apache-2.0
"""Compiling the programs of a run."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import jax

_LEVEL = "xla_backend_optimization_level"
_THREAD = "r1jax compiles"


def program(fn: Callable, **how) -> Callable:
    """`jax.jit(fn, **how)` with the compiler set for whole steps.

    On CPUs LLVM's first optimisation level compiles these programs a fifth faster than the default,
    its third, and they run as fast (measured in `experiments/log/003_…`). A level in XLA_FLAGS
    stands.
    """
    on_cpu = jax.default_backend() == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", "")
    return jax.jit(fn, compiler_options={_LEVEL: 1} if on_cpu else None, **how)


class Ahead:
    """A `program` traced for such arguments before its first call, and compiled while other work
    goes on.

    Tracing is done at once: it is Python, which two threads would only do in turns. What cannot be
    traced raises here, what cannot be compiled raises in the call.

    Attributes:
        shapes: what a call returns, as `jax.ShapeDtypeStruct`s.
    """

    def __init__(self, fn: Callable, *args: Any, **kwargs: Any):
        """Args: a `program`; arrays, or anything with their shape and dtype."""
        self._lowered = fn.lower(*jax.tree.map(_abstract, args), **jax.tree.map(_abstract, kwargs))
        self.shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._lowered.out_info
        )
        # A process waits for it to end: a thread that Python stops inside XLA brings all down.
        self._thread = threading.Thread(target=self._compile, name=_THREAD)

    def _compile(self):
        with contextlib.suppress(Exception):
            self._lowered.compile()

    def start(self) -> "Ahead":
        """Starts compiling in a thread; until `join`, a call would compile it again."""
        self._thread.start()
        return self

    def join(self) -> None:
        """Waits until it is compiled."""
        self._thread.join()


def compiling() -> bool:
    """Whether anything compiles ahead right now."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, and on a mesh where it lies."""
    where = x.sharding if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else None
    on_mesh = where is not None and where.num_devices > 1
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where if on_mesh else None)
