# SPDX-License-Identifier: Apache-2.0
"""Compiling the programs of a run."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import jax

_LEVEL = "xla_backend_optimization_level"


def program(fn: Callable, **how) -> Callable:
    """`jax.jit(fn, **how)` with the compiler set for whole steps.

    On CPUs LLVM's first optimisation level compiles these programs a fifth faster than the default,
    its third, and they run as fast (measured in `experiments/log/003_…`). A level in XLA_FLAGS
    stands.
    """
    on_cpu = jax.default_backend() == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", "")
    return jax.jit(fn, compiler_options={_LEVEL: 1} if on_cpu else None, **how)


def ahead(fn: Callable, *args: Any, **kwargs: Any) -> threading.Thread:
    """Starts compiling a `program` for such arguments while other work goes on.

    A call after the thread has ended finds the program compiled; one before it compiles it again,
    so join it first. If it cannot be compiled, the call says why.

    Args:
        args, kwargs: arrays, or anything with their shape and dtype.
    """
    abstract = lambda x: x if _is_shape(x) else jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    args, kwargs = jax.tree.map(abstract, (args, kwargs))

    def compile_it():
        with contextlib.suppress(Exception):
            fn.lower(*args, **kwargs).compile()

    thread = threading.Thread(target=compile_it, daemon=True)
    thread.start()
    return thread


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)
