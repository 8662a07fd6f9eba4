# SPDX-License-Identifier: Apache-2.0
"""Compiling the programs of a run."""

import os
from collections.abc import Callable

import jax

_LEVEL = "xla_backend_optimization_level"


def program(fn: Callable, **how) -> Callable:
    """`jax.jit(fn, **how)` with the compiler set for whole steps.

    On CPUs LLVM's first optimisation level compiles these programs a fifth faster than the default,
    its third, and they run as fast (`experiments/log/004_grpo_iteration.md`). A level in XLA_FLAGS
    stands.
    """
    on_cpu = jax.default_backend() == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", "")
    return jax.jit(fn, compiler_options={_LEVEL: 1} if on_cpu else None, **how)
