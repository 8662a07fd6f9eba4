# SPDX-License-Identifier: Apache-2.0
"""A step compiled for a pod that need not be there: does it fit, what does it move, how long."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.config import MeshConfig, PlanConfig, check_redundant
from r1jax.nn.count import size
from r1jax.parallel import costs, roofline
from r1jax.parallel.dispatch import no_smaller, reach, room
from r1jax.parallel.hlo import parse
from r1jax.parallel.mesh import for_decoding, for_long_rows, for_training, make_mesh
from r1jax.parallel.rounds import ROUNDS
from r1jax.parallel.schedule import Scheduled, scheduled
from r1jax.parallel.stacks import Stacked, stacked
from r1jax.parallel.topology import Topology, devices
from r1jax.train import jobs
from r1jax.train.failure import StageFailed

_GIB = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
# Two wordings of the compiler's. Whatever the first says, its number holds the arguments too: of 48
# GiB of temporaries beside 60 of arguments it says that the temporaries need 108.
_SHORT = (
    re.compile(r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"),
)


class Plan(NamedTuple):
    """What is known of a step on a pod. Bytes, seconds and FLOP are of one device unless named.

    Attributes:
        topology: of the pod.
        what: one of `jobs.WHAT`.
        mesh: sizes of its axes.
        arguments: bytes of each part of the arguments, by name.
        argument_bytes: of all of them, as the compiler lays them out.
        temporary_bytes: of everything else that lives while the step runs.
        host_bytes: in the memory of the host, for this device.
        stacked: what of it is kept from layer to layer.
        tokens: of all devices.
        model_flops: of all devices.
        compile_seconds: of the compiler alone.
        processor_seconds: that all cores spent on it.
        costs: counts of the compiled program; None if it did not compile for lack of memory.
        times: the roofline's; None with them.
        schedule: what its order takes; None with them.
    """

    topology: Topology
    what: str
    mesh: MeshConfig
    arguments: dict[str, int]
    argument_bytes: float
    temporary_bytes: float
    host_bytes: float
    stacked: Stacked | None
    tokens: int
    model_flops: float
    compile_seconds: float
    processor_seconds: float
    costs: costs.Costs | None
    times: roofline.Times | None
    schedule: Scheduled | None

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
    """The mesh of the config, or of one device (all axes 1) what suits the program on this pod.

    Raises:
        ValueError: it does not multiply to the pod's devices, or cuts the model or the batch
            unevenly.
    """
    rows = cfg.grpo.prompts * cfg.grpo.group_size
    length = cfg.sampled_length
    if what == "train":
        rows, length = cfg.rows_per_device * topology.devices // cfg.micro_batches, cfg.length
    elif what == "grpo":
        rows //= cfg.grpo.update.minibatches * cfg.grpo.update.micro_batches
    mesh = cfg.mesh
    if mesh.devices == 1 < topology.devices:
        mesh = _proposed(cfg, topology, what, rows)
    if mesh.devices != topology.devices:
        sizes = " × ".join(f"{name} {n}" for name, n in mesh.sizes().items() if n > 1)
        raise ValueError(
            f"mesh {sizes or 'of one device'} = {mesh.devices} devices, but {topology.name} has "
            f"{topology.devices}; {_repair(mesh, topology)} or choose another topology"
        )
    mesh.check(cfg.model, rows=rows, length=mesh.context if what == "decode" else length)
    if what == "decode":
        copies = ("sampling.redundant_experts", cfg.sampling.redundant_experts)
        check_redundant(cfg.model, *copies, "mesh.expert", mesh.expert)
    return mesh


def _proposed(cfg: PlanConfig, topology: Topology, what: str, rows: int) -> MeshConfig:
    inside, slices = topology.devices // topology.slices, topology.slices
    if what == "decode":
        return dataclasses.replace(for_decoding(cfg.model, inside), slices=slices)
    if what == "grpo" and rows % topology.devices:
        one = for_long_rows(cfg.model, inside, rows=rows // slices, length=cfg.sampled_length)
        return dataclasses.replace(one, slices=slices)
    copies = for_training(cfg.model, topology.devices, slices=slices)
    if slices > 1 and _kept_bytes(cfg, what) / inside > topology.chip.hbm / 2:
        return for_training(cfg.model, topology.devices)  # pieces, not copies, on the slices
    return copies


def _kept_bytes(cfg: PlanConfig, what: str) -> int:
    """Of parameters, gradients, both moments and a reference, over all devices."""
    optimizer = cfg.grpo.optim if what == "grpo" else cfg.optim
    held, found = what == "grpo" and cfg.grpo.update.beta > 0, size(cfg.model)
    a_value = 4 * (3 if held else 2) + 2 * jnp.dtype(optimizer.moment_dtype).itemsize
    return (found.parameters + found.mtp) * a_value


def _repair(mesh: MeshConfig, topology: Topology) -> str:
    others = mesh.devices // mesh.fsdp
    if topology.devices % others == 0:
        return f"set mesh.fsdp={topology.devices // others}"
    return f"its other axes take {others}, which does not divide {topology.devices}: change them"


def plan(cfg: PlanConfig, topology: Topology, what: str, *, chips: list[Any] | None = None) -> Plan:
    """Compiles one of the three programs for a pod and reads what it costs.

    Args:
        chips: devices to compile for instead of the pod's, as many.

    Raises:
        ValueError: mesh, model or batch do not go together, or libtpu is missing.
        StageFailed: the compiler fails for another reason than memory.
    """
    sizes = mesh_for(cfg, topology, what)
    mesh = make_mesh(sizes, devices(topology) if chips is None else chips)
    with jax.set_mesh(mesh):
        job = jobs.make(what, cfg, mesh)
        lowered = job.run.lower(*job.args, **job.kwargs)
        began = time.monotonic(), time.process_time()
        program, needs = compiled(lowered)
    took = time.monotonic() - began[0], time.process_time() - began[1]
    given = job.bytes_by_part()
    fixed, work = (topology, what, sizes, given), (job.tokens, job.model_flops, *took)
    if program is None:
        total = sum(given.values())
        return Plan(*fixed, total, max(needs - total, 0.0), 0, None, *work, None, None, None)
    memory, text = program.memory_analysis(), parse(program.as_text())
    where = roofline.spots(mesh.devices.flat)
    share, apart = filled(cfg, sizes, what), roofline.counterparts(where)
    n = _pieces(cfg, sizes, what)
    rules = costs.Rules(sizes.devices, turns(n), share, apart, used(n))
    found = costs.measure(text, rules)
    return Plan(
        *fixed,
        memory.argument_size_in_bytes,
        _beside_arguments(memory),
        memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        stacked(text),
        *work,
        found,
        roofline.times(found, topology.chip, where),
        scheduled(text, rules, topology.chip, where),
    )


def _beside_arguments(memory: Any) -> float:
    """Bytes that a program has allocated beside its arguments.

    The compiler's `temp_size_in_bytes` holds some of what loops carry twice: 52.1 GB for the 671B's
    step, where the buffers that it lays out take 34.4. JAX before 0.12 tells no other figure.
    """
    whole = getattr(memory, "total_allocation_bytes", 0)
    if whole:
        return whole - memory.argument_size_in_bytes
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + max(kept, 0)


def compiled(lowered: Any) -> tuple[Any, float]:
    """(the program, 0), or (None, bytes of all that it needs) if memory is short."""
    try:
        return lowered.compile(), 0.0
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        for pattern in _SHORT:
            if found := pattern.search(said):
                n, unit = found.groups()
                return None, float(n) * _GIB[unit]
        line = " ".join(said.split())
        raise StageFailed(f"the compiler cannot do this step: {line[:400]}") from error


def filled(cfg: PlanConfig, mesh: MeshConfig, what: str) -> float:
    """Share of the rows of a dispatch buffer that belong to an expert, at a balanced load.

    The few rows of a step of decoding leave most of the smallest buffers empty.
    """
    moe = cfg.model.moe
    if mesh.expert == 1:
        return 1.0
    if what != "decode":
        return 1.0 / moe.dispatch_slack
    tokens, k = _tokens(cfg, mesh, what), moe.num_experts_per_tok
    slots, reached = moe.n_routed_experts, reach(mesh.expert, k, moe.n_group, moe.topk_group)
    if cfg.sampling.redundant_experts:
        slots, reached = slots + cfg.sampling.redundant_experts, min(mesh.expert, k)
    buffer = room(
        math.ceil(tokens),
        k,
        mesh.expert,
        slots // mesh.expert,
        reach=reached,
        slack=moe.dispatch_slack,
    )
    return tokens * k / buffer.computed


def _tokens(cfg: PlanConfig, mesh: MeshConfig, what: str) -> float:
    """Those of a device that go to experts at once."""
    rows = cfg.grpo.prompts * cfg.grpo.group_size
    if what == "decode":
        shards = mesh.batch_shards * (mesh.context if cfg.sampling.layout == "decoding" else 1)
        return rows / shards
    if what == "train":
        tokens = cfg.rows_per_device * mesh.devices * cfg.length / cfg.micro_batches
    else:
        tokens = rows * cfg.sampled_length
        tokens /= cfg.grpo.update.minibatches * cfg.grpo.update.micro_batches
    return tokens / (mesh.batch_shards * mesh.context)


def _pieces(cfg: PlanConfig, mesh: MeshConfig, what: str) -> int:
    """That they go in."""
    moe = cfg.model.moe
    pairs = math.ceil(_tokens(cfg, mesh, what)) * moe.num_experts_per_tok
    return no_smaller(moe.dispatch_pieces, pairs)


def turns(pieces: int) -> Callable[[str, int | None], float]:
    """Tokens go to their experts in one round a piece: no buffer overflows. Blocks of attention
    turn half as often as they may."""
    return lambda op_name, most: pieces if ROUNDS in op_name else costs.half(op_name, most)


def used(pieces: int) -> Callable[[str], float]:
    """In the loop over pieces one of each kind of exchange is beside an end and moves nothing."""
    return lambda op_name: 1.0 - 1.0 / pieces if f"{ROUNDS}/while" in op_name else 1.0
