# SPDX-License-Identifier: Apache-2.0
"""Compiles for TPUs that are absent, with the real compiler, and says what it used."""

import re
from typing import NamedTuple

import jax
import pytest
from jax.experimental import topologies

VMEM = re.compile(r'"scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"\}')
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


class Report(NamedTuple):
    """Of one compiled program: bytes of temporaries, FLOPs, bytes moved; what its kernels ask for.

    Attributes:
        kernels: how many the program runs.
        vmem_limits: MiB of VMEM that the compiler let each kernel have.
    """

    temporaries: int
    flops: float
    bytes_accessed: float
    kernels: int
    vmem_limits: set[float]


def device(chip: str):
    """One device of an absent TPU; skips where the compiler is not installed."""
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[
            0
        ]
    except Exception as reason:  # another process holds it, or it is too old for this chip
        pytest.skip(f"no TPU compiler for {chip}: {reason}")


def compiled(call, arguments, chip: str) -> Report:
    """Compiles `call(*arguments)`, arguments being (shape, dtype) pairs in any pytree."""
    sharding = jax.sharding.SingleDeviceSharding(device(chip))
    is_leaf = lambda x: type(x) is tuple and len(x) == 2 and isinstance(x[0][0], int)  # noqa: E731
    abstract = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s[0], s[1], sharding=sharding), arguments, is_leaf=is_leaf
    )
    program = jax.jit(call).lower(*abstract).compile()
    calls = [line for line in program.as_text().splitlines() if "tpu_custom_call" in line]
    limits = [int(n) / 2**20 for line in calls for n in VMEM.findall(line)]
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return Report(
        memory.temp_size_in_bytes,
        float(cost.get("flops", 0)),
        float(cost.get("bytes accessed", 0)),
        len(calls),
        set(limits),
    )
