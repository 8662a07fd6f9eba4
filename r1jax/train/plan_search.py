# SPDX-License-Identifier: Apache-2.0
"""Trying meshes, batches and recomputation for a step on a pod, and keeping what was found."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from r1jax.config import MeshConfig, PlanConfig, to_config_dict
from r1jax.parallel.roofline import ASSUMED
from r1jax.parallel.topology import Topology
from r1jax.train.failure import StageFailed
from r1jax.train.plan import mesh_for, plan
from r1jax.train.plan_report import report

_EXPERT, _TENSOR, _CONTEXT = (1, 8, 16, 32, 64), (1, 2, 4), (1, 2, 4, 8)


def search(
    cfg: PlanConfig,
    topology: Topology,
    what: str,
    *,
    out: Path,
    tries: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Reports of up to `tries` settings, the best that fit first, then those that do not.

    Best is the most tokens a second if nothing overlaps. Each report is a line of `out` as soon as
    it is known; a setting that is there already is not compiled again.

    Raises:
        ValueError: no setting goes with this model and pod.
    """
    settings = list(itertools.islice(candidates(cfg, topology, what), tries))
    if not settings:
        raise ValueError(
            f"no mesh of {topology.devices} devices cuts this model evenly; change mesh.slices or "
            "the topology"
        )
    found = []
    for number, one in enumerate(settings, 1):
        facts, known = once(one, topology, what, out=out)
        found.append(facts)
        state = "known" if known else "tried"
        say(f"[{number}/{len(settings)}] {state}: {_line(facts)}")
    return sorted(found, key=_rank)


def once(
    cfg: PlanConfig, topology: Topology, what: str, *, out: Path
) -> tuple[dict[str, Any], bool]:
    """(the report of a setting, whether it was in `out` already); if not, it is compiled and kept.

    A setting that the compiler cannot do is kept as well, with what it says as `failed`.
    """
    key = _key(cfg, topology, what)
    known = _read(out).get(key)
    if known is not None:
        return known, True
    rows = cfg.grpo.prompts * cfg.grpo.group_size
    pieces = {"train": cfg.micro_batches, "grpo": cfg.grpo.update.micro_batches}.get(what, 1)
    rows = cfg.rows_per_device * topology.devices if what == "train" else rows
    facts = dict(key=key, setting=dict(rows=rows, micro_batches=pieces, remat=cfg.model.remat))
    try:
        facts |= report(plan(cfg, topology, what), cfg)
    except StageFailed as error:
        mesh = mesh_for(cfg, topology, what).sizes()
        facts |= dict(topology=topology.name, what=what, mesh=mesh, fits=False, failed=str(error))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(facts, ensure_ascii=False) + "\n")
    return facts, False


def candidates(cfg: PlanConfig, topology: Topology, what: str) -> Iterator[PlanConfig]:
    """Settings that go with model and pod: the config's own first, then from plain to involved."""
    seen = set()
    for changed in itertools.chain([cfg], _settings(cfg, topology, what)):
        try:
            mesh = mesh_for(changed, topology, what)
        except ValueError:
            continue
        changed = dataclasses.replace(changed, mesh=mesh)
        if changed not in seen:
            seen.add(changed)
            yield changed


def _settings(cfg: PlanConfig, topology: Topology, what: str) -> Iterator[PlanConfig]:
    """Every product of the axes, the pieces and recomputation on and off; parameters copied on
    each slice or cut over all of them."""
    copies = sorted({topology.slices, 1}, reverse=True)
    for pieces, remat, sizes in itertools.product(
        (1, 2, 4), (True, False), itertools.product(_TENSOR, _CONTEXT, _EXPERT, copies)
    ):
        tensor, context, expert, slices = sizes
        left = topology.devices // slices
        if left % (tensor * context * expert):
            continue
        mesh = MeshConfig(
            slices=slices,
            fsdp=left // (tensor * context * expert),
            expert=expert,
            tensor=tensor,
            context=context,
        )
        try:
            yield _changed(cfg, what, mesh, pieces, remat)
        except ValueError:  # pieces that do not divide the rows
            continue


def _changed(cfg: PlanConfig, what: str, mesh: MeshConfig, pieces: int, remat: bool) -> PlanConfig:
    model = dataclasses.replace(cfg.model, remat=remat)
    cfg = dataclasses.replace(cfg, model=model, mesh=mesh)
    if what == "train":
        return dataclasses.replace(cfg, micro_batches=pieces)
    if what == "grpo":
        update = dataclasses.replace(cfg.grpo.update, micro_batches=pieces)
        return dataclasses.replace(cfg, grpo=dataclasses.replace(cfg.grpo, update=update))
    return cfg


def _rank(facts: dict[str, Any]) -> tuple[int, float]:
    if facts["fits"]:
        return 0, -facts["tokens_per_second"]["scheduled"]
    return (2, 0.0) if "failed" in facts else (1, facts["hbm_per_chip_gb"])


def _line(facts: dict[str, Any]) -> str:
    mesh = " × ".join(f"{name} {n}" for name, n in facts["mesh"].items() if n > 1)
    setting = facts["setting"]
    how = f"{setting['rows']} rows in {setting['micro_batches']} pieces, remat {setting['remat']}"
    if "failed" in facts:
        return f"{mesh}, {how}: {facts['failed']}"
    memory = f"{facts['hbm_per_chip_gb']:.1f} of {facts['hbm_available_gb']:.1f} GB"
    speed = facts["tokens_per_second"]
    tail = f", {speed['scheduled']:,.0f} tokens/s" if facts["fits"] else ", does not fit"
    return f"{mesh}, {how}: {memory}{tail} (compiled in {facts['compile_seconds']:.0f} s)"


def _key(cfg: PlanConfig, topology: Topology, what: str) -> str:
    asked = [to_config_dict(cfg).to_dict(), topology.name, what, ASSUMED]
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(out: Path) -> dict[str, dict[str, Any]]:
    """Reports of an earlier search by their key; a line cut off by a crash is dropped."""
    found = {}
    for line in out.read_text(encoding="utf-8").splitlines() if out.is_file() else ():
        try:
            facts = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "key" in facts:
            found[facts["key"]] = facts
    return found
