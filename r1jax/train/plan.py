# SPDX-License-Identifier: Apache-2.0
"""A step compiled for a pod that need not be there: does it fit, what does it move, how long."""

import dataclasses
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from r1jax.config import MeshConfig, PlanConfig
from r1jax.parallel import costs, roofline
from r1jax.parallel.hlo import parse
from r1jax.parallel.stacks import Stacked, stacked
from r1jax.parallel.topology import Topology, devices
from r1jax.train import jobs

_GIB = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
# Two wordings of the compiler's: what the temporaries need, or what all of it needs.
_TEMPORARIES = re.compile(r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds")
_ALL = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")


class Plan(NamedTuple):
    """What is known of a step on a pod. Bytes, seconds and FLOP are of one device unless named.

    Attributes:
        topology: of the pod.
        what: one of `jobs.WHAT`.
        mesh: sizes of its axes.
        arguments: bytes of each part of the arguments, by name.
        argument_bytes: of all of them, as the compiler lays them out.
        temporary_bytes: of everything else that lives while the step runs.
        stacked: what of it is kept from layer to layer.
        tokens: of all devices.
        model_flops: of all devices.
        compile_seconds: of the compiler alone.
        costs: counts of the compiled program; None if it did not compile for lack of memory.
        times: the roofline's; None with them.
    """

    topology: Topology
    what: str
    mesh: MeshConfig
    arguments: dict[str, int]
    argument_bytes: float
    temporary_bytes: float
    stacked: Stacked | None
    tokens: int
    model_flops: float
    compile_seconds: float
    costs: costs.Costs | None
    times: roofline.Times | None

    @property
    def used(self) -> float:
        """Bytes of arguments and temporaries."""
        return self.argument_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether it compiled within the memory that the chip has."""
        return self.costs is not None and self.used <= self.topology.chip.hbm

    def mfu(self, seconds: float) -> float:
        """Model FLOP utilisation of a step of so many seconds, of the peak in bfloat16."""
        return self.model_flops / (seconds * self.topology.devices * self.topology.chip.bf16)


def mesh_for(cfg: PlanConfig, topology: Topology, what: str) -> MeshConfig:
    """The mesh of the config on this pod: an `fsdp` of 1 takes the devices that are left.

    Raises:
        ValueError: it does not multiply to the pod's devices, or cuts the model or the batch
            unevenly.
    """
    mesh = cfg.mesh
    if (
        mesh.slices == 1
        and topology.slices > 1
        and mesh.devices * topology.slices <= (topology.devices)
    ):
        mesh = dataclasses.replace(mesh, slices=topology.slices)
    if mesh.fsdp == 1 and topology.devices % mesh.devices == 0:
        mesh = dataclasses.replace(mesh, fsdp=topology.devices // mesh.devices)
    if mesh.devices != topology.devices:
        sizes = " × ".join(f"{name} {n}" for name, n in mesh.sizes().items() if n > 1) or "1"
        raise ValueError(
            f"mesh {sizes} = {mesh.devices} devices, but {topology.name} has {topology.devices}; "
            f"{_repair(mesh, topology)} or choose another topology"
        )
    if what == "train":
        rows = cfg.rows_per_device * topology.devices // cfg.micro_batches
        mesh.check(cfg.model, rows=rows, length=cfg.length)
    elif what == "grpo":
        update = cfg.grpo.update
        rows = cfg.grpo.prompts * cfg.grpo.group_size
        rows //= update.minibatches * update.micro_batches
        mesh.check(cfg.model, rows=rows, length=cfg.sampled_length)
    else:
        rows = cfg.grpo.prompts * cfg.grpo.group_size
        mesh.check(cfg.model, rows=rows, length=mesh.context)
    return mesh


def _repair(mesh: MeshConfig, topology: Topology) -> str:
    others = mesh.devices // mesh.fsdp
    if topology.devices % others == 0:
        return f"set mesh.fsdp={topology.devices // others}"
    return f"its other axes take {others}, which does not divide {topology.devices}: change them"


def build_mesh(sizes: MeshConfig, topology: Topology, chips: list[Any] | None = None) -> Mesh:
    """The mesh of a pod's devices, axes laid along the torus where they can be."""
    found = devices(topology) if chips is None else chips
    shape = tuple(sizes.sizes().values())
    array = np.array(found).reshape(shape)
    return Mesh(array, tuple(sizes.sizes()), axis_types=(AxisType.Auto,) * len(shape))


def plan(cfg: PlanConfig, topology: Topology, what: str, *, chips: list[Any] | None = None) -> Plan:
    """Compiles one of the three programs for a pod and reads what it costs.

    Args:
        chips: devices to compile for instead of the pod's, as many.

    Raises:
        ValueError: mesh, model or batch do not go together, or libtpu is missing.
        RuntimeError: the compiler fails for another reason than memory.
    """
    sizes = mesh_for(cfg, topology, what)
    mesh = build_mesh(sizes, topology, chips)
    with jax.set_mesh(mesh):
        job = jobs.make(what, cfg, mesh)
        lowered = job.run.lower(*job.args, **job.kwargs)
        began = time.monotonic()
        compiled, short = _compiled(lowered)
    took = time.monotonic() - began
    given = job.bytes_by_part()
    fixed = (topology, what, sizes, given)
    if compiled is None:
        total = sum(given.values())
        temporary = short.bytes if short.temporaries else max(short.bytes - total, 0.0)
        return Plan(*fixed, total, temporary, None, job.tokens, job.model_flops, took, None, None)
    memory = compiled.memory_analysis()
    program = parse(compiled.as_text())
    found = costs.measure(program, _rules(cfg, sizes))
    times = roofline.times(found, topology.chip, roofline.spots(mesh.devices.flat))
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        *fixed,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + max(kept, 0),
        stacked(program),
        job.tokens,
        job.model_flops,
        took,
        found,
        times,
    )


class _Short(NamedTuple):
    """How much a program needs that does not fit; of the temporaries alone, or of everything."""

    bytes: float
    temporaries: bool


def _compiled(lowered: Any) -> tuple[Any, _Short | None]:
    """(the program, None), or (None, what it needs) if memory is short."""
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        for pattern, temporaries in ((_TEMPORARIES, True), (_ALL, False)):
            if found := pattern.search(said):
                n, unit = found.groups()
                return None, _Short(float(n) * _GIB[unit], temporaries)
        line = " ".join(said.split())
        raise RuntimeError(f"the compiler fails on this step: {line[:400]}") from error


def _rules(cfg: PlanConfig, mesh: MeshConfig) -> costs.Rules:
    filled = 1.0 / cfg.model.moe.dispatch_slack if mesh.expert > 1 else 1.0
    return costs.Rules(mesh.devices, costs.half, _bounded, filled)


def _bounded(op_name: str, branches: list[costs.Costs]) -> int:
    """Tokens travel to their experts by the bounded way: no buffer overflows. Anything else takes
    the branch with the most arithmetic."""
    sparse = [any(c.kind == "ragged-all-to-all" for c in branch.collectives) for branch in branches]
    if "routed_experts" in op_name and any(sparse):
        return sparse.index(True)
    return max(range(len(branches)), key=lambda i: branches[i].total_flops)
