# SPDX-License-Identifier: Apache-2.0
"""A plan as a picture: what fills a device's memory, and what a step waits for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

_COLOURS = ("#4e79a7", "#59a14f", "#f28e2b", "#b07aa1", "#edc948", "#76b7b2", "#bab0ac")


def draw(facts: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a report (`r1jax.train.plan_report`); the name's ending says how."""
    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none"}):
        timed = facts["seconds"] is not None
        figure = Figure(figsize=(8, 3.2 if timed else 1.8), layout="constrained")
        axes = figure.subplots(2 if timed else 1, 1, squeeze=False)[:, 0]
        _memory(axes[0], facts)
        if timed:
            _times(axes[1], facts)
        figure.suptitle(f"{facts['what']} on {facts['topology']}", fontsize=10)
        figure.savefig(path, dpi=160)


def _memory(axes: Any, facts: Mapping[str, Any]) -> None:
    parts = dict(facts["arguments_by_part_gb"])
    rest = facts["temporaries_gb"]
    for name, key in (("kept activations", "activations_gb"), ("gradients", "gradients_gb")):
        if facts[key]:
            parts[name] = min(facts[key], rest)
            rest -= parts[name]
    _stack(axes, parts | {"other temporaries": rest})
    limit = facts["hbm_available_gb"]
    axes.axvline(limit, color="black", linewidth=1.5)
    axes.annotate(f"{limit:.0f} GB", (limit, 0.42), ha="right", va="bottom", fontsize=8)
    axes.set_xlim(0, 1.05 * max(limit, facts["hbm_per_chip_gb"]))
    axes.set_xlabel("memory of a device, GB")


def _times(axes: Any, facts: Mapping[str, Any]) -> None:
    seconds = facts["seconds"]
    names = {"compute": "arithmetic", "memory": "memory", "interconnect": "interconnect"}
    names |= {"network": "between slices"}
    _stack(axes, {name: seconds[key] for key, name in names.items() if seconds[key]})
    axes.axvline(seconds["overlapped"], color="black", linestyle=":", linewidth=1.5)
    axes.annotate("all overlapping", (seconds["overlapped"], 0.42), va="bottom", fontsize=8)
    axes.axvline(seconds["scheduled"], color="black", linestyle="--", linewidth=1.5)
    axes.annotate("as scheduled", (seconds["scheduled"], 0.6), va="bottom", fontsize=8)
    axes.set_xlabel("seconds of a step, one after the other")


def _stack(axes: Any, parts: Mapping[str, float]) -> None:
    """One bar of pieces, with a legend below."""
    left, least = 0.0, 0.002 * sum(parts.values())
    parts = {name: value for name, value in parts.items() if value > least}
    for colour, (name, value) in zip(_COLOURS, parts.items(), strict=False):
        axes.barh(0, value, left=left, height=0.8, color=colour, label=f"{name} {value:.3g}")
        left += value
    axes.set_yticks([])
    axes.set_ylim(-0.5, 0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(ncols=4, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.35))
