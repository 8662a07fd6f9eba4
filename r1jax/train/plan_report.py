# SPDX-License-Identifier: Apache-2.0
"""A plan in figures, by name, and what helps a step that does not fit."""

from typing import Any

from r1jax.config import PlanConfig
from r1jax.parallel.costs import Costs
from r1jax.parallel.roofline import ASSUMED, by_axis
from r1jax.parallel.rounds import ROUNDS
from r1jax.train.plan import Plan, filled

GB = 1e9


def report(plan: Plan, cfg: PlanConfig) -> dict[str, Any]:
    """Everything that is known, for a program to read.

    Bytes are those of one device (JAX's: half a chip on tpu7x), in units of 10⁹; FLOP and tokens
    those of all. What needs a compiled program is None where memory was too short for one.
    """
    chip, n = plan.topology.chip, plan.topology.devices
    found = {
        "topology": plan.topology.name,
        "what": plan.what,
        "chips": plan.topology.chips,
        "devices": n,
        "mesh": plan.mesh.sizes(),
        "fits": plan.fits,
        "hbm_per_chip_gb": plan.used / GB,
        "hbm_available_gb": chip.hbm / GB,
        "arguments_gb": plan.argument_bytes / GB,
        "temporaries_gb": plan.temporary_bytes / GB,
        "arguments_by_part_gb": {k: v / GB for k, v in plan.arguments.items()},
        "host_gb": plan.host_bytes / GB,
        "activations_gb": None,
        "gradients_gb": None,
        "collective_gb": None,
        "collectives_gb": None,
        "collectives_seconds": None,
        "tokens": plan.tokens,
        "model_flops": plan.model_flops,
        "counted_flops": None,
        "hbm_traffic_gb": None,
        "seconds": None,
        "tokens_per_second": None,
        "mfu": None,
        "compile_seconds": plan.compile_seconds,
        "compile_processor_seconds": plan.processor_seconds,
        "assumptions": list(ASSUMED),
    }
    if plan.costs is None or plan.times is None or plan.stacked is None or plan.schedule is None:
        return found
    costs, times, order = plan.costs, plan.times, plan.schedule
    ends = {"overlapped": times.overlapped, "scheduled": order.seconds, "serial": times.serial}
    moved = by_axis(costs, plan.mesh.sizes())
    found |= {
        "activations_gb": plan.stacked.forward / GB,
        "gradients_gb": plan.stacked.backward / GB,
        "collective_gb": sum(c.sent for c in costs.collectives) / GB,
        "collectives_gb": {k: {a: b / GB for a, b in v.items()} for k, v in moved.items()},
        "collectives_seconds": {
            k: {"sent": s, "waited": order.waited.get(k, 0.0)} for k, s in order.moved.items()
        },
        "counted_flops": costs.total_flops * n,
        "hbm_traffic_gb": costs.traffic / GB,
        "seconds": times._asdict() | ends,
        "tokens_per_second": {k: plan.tokens / s for k, s in ends.items()},
        "mfu": {k: plan.mfu(s) for k, s in ends.items()},
    }
    found["assumptions"] += _guesses(costs, cfg, plan)
    return found


def _guesses(costs: Costs, cfg: PlanConfig, plan: Plan) -> list[str]:
    """What this program does not say and was taken for granted."""
    found = []
    rounds = [loop for loop in costs.loops if ROUNDS in loop.op_name]
    blocks = [loop for loop in costs.loops if ROUNDS not in loop.op_name]
    if blocks:
        most = max(loop.bound or 1 for loop in blocks)
        turns = max(loop.turns for loop in blocks)
        found.append(
            f"{len(blocks)} loops turn as often as the data say (blocks of attention): taken "
            f"as (n + 1) / 2, at most {turns:g} of {most}"
        )
    if plan.mesh.expert > 1:
        found.append("no dispatch buffer overflows, and all experts get the same number of tokens")
        if rounds:
            more = sum(loop.flops for loop in rounds) / costs.total_flops
            found.append(
                f"tokens go to their experts in one round; one more everywhere is {more:.0%} more "
                "arithmetic"
            )
        found.append(
            f"{filled(cfg, plan.mesh, plan.what):.0%} of the rows of a dispatch buffer have an "
            "expert; where bytes of memory are counted, all have"
        )
    silent = {k: n for k, n in costs.opaque.items() if not k.endswith("metadata")}
    if silent:
        names = ", ".join(f"{name} ({n:g} runs)" for name, n in silent.items())
        found.append(f"kernels that do not say what they cost count as nothing: {names}")
    return found


def verdict(plan: Plan, cfg: PlanConfig) -> str:
    """One line: whether it fits, by how much not, and what would help."""
    used, hbm = plan.used / GB, plan.topology.chip.hbm / GB
    where = f"{plan.what} on {plan.topology.name}"
    if plan.fits:
        return f"{where} fits: {used:.1f} of {hbm:.1f} GB a device"
    return (
        f"{where} does not fit: {used:.1f} GB a device of {hbm:.1f}, {used - hbm:.1f} too many; "
        f"{knob(plan, cfg)}"
    )


def knob(plan: Plan, cfg: PlanConfig) -> str:
    """What to change first in a step that does not fit."""
    arguments, temporary = plan.argument_bytes / GB, plan.temporary_bytes / GB
    hbm = plan.topology.chip.hbm / GB
    if arguments > 0.9 * hbm:
        largest = max(plan.arguments, key=plan.arguments.__getitem__)
        helps = "take more devices, or give axes that copy parameters (mesh.data) to mesh.fsdp"
        if plan.what == "decode" and cfg.sampling.layout == "decoding":
            helps = "raise mesh.tensor, or leave the weights cut: sampling.layout=training"
        return f"its arguments alone take {arguments:.1f} GB, most of it the {largest}: {helps}"
    start = f"temporaries take {temporary:.1f} GB"
    if plan.what == "train":
        pieces = cfg.micro_batches
        if cfg.rows_per_device > pieces:
            return f"{start}: micro_batches={2 * pieces} computes half as many rows at a time"
        return f"{start}: lower length or rows_per_device, or raise mesh.context or mesh.tensor"
    if plan.what == "grpo":
        pieces = cfg.grpo.update.micro_batches
        rows = cfg.grpo.prompts * cfg.grpo.group_size
        if rows // cfg.grpo.update.minibatches // pieces > plan.mesh.batch_shards:
            return f"{start}: grpo.update.micro_batches={2 * pieces} takes half the rows at a time"
        return f"{start}: raise mesh.context, or lower sampling.max_new_tokens"
    return f"{start}: lower grpo.prompts, or raise mesh.tensor"
