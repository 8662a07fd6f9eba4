# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, by matplotlib: SVG that takes its colours from the page, or PNG."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Rows = Sequence[Mapping[str, Any]]


class Palette(NamedTuple):
    """Colours by role."""

    ink: str
    muted: str
    grid: str
    first: str
    second: str


LIGHT = Palette("#1c2330", "#5b6577", "#dfe3ea", "#2a5bd7", "#d9622b")
# Colours that nothing else uses; `svg` turns each into a variable of the page, which knows whether
# it is dark.
_ROLES = Palette("#010203", "#010204", "#010205", "#010206", "#010207")

# metric keys and title of each panel of RL curves
_PANELS = (
    (("reward",), "Reward"),
    (("accuracy", "format"), "Accuracy and format"),
    (("mean_tokens",), "Response length, tokens"),
    (("reflection",), "Reflection rate"),
    (("kl",), "KL to the reference"),
    (("entropy",), "Entropy"),
)
_FEW = 8  # points that are marked
_IN_PICTURE = ("Reward", "Response length, tokens", "Reflection rate")
_STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, small
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
}


def bars(stages: Rows) -> str:
    """Held-out pass@1 after each stage, students in another colour; "" if none was measured."""
    measured = [s for s in stages if _number(s.get("pass_at_1"))]
    if not measured:
        return ""

    def draw(colours: Palette) -> Figure:
        figure = Figure(figsize=(9.6, 0.55 + 0.34 * len(measured)))
        _draw_bars(figure.subplots(), measured, colours)
        return figure

    return _svg(draw, "pass@1 on held-out problems by stage")


def rl_curves(metrics: Rows) -> str:
    """Six panels over the steps of all RL stages, one after the other; "" if there was no RL."""
    rows = rl_rows(metrics)
    panels = [panel for panel in _PANELS if any(_has(rows, key) for key in panel[0])]
    if not panels:
        return ""

    def draw(colours: Palette) -> Figure:
        height = 2.3 * math.ceil(len(panels) / 3)
        figure = Figure(figsize=(9.6, height))
        axes = figure.subplots(math.ceil(len(panels) / 3), 3, squeeze=False).flat
        for axis, (keys, title) in zip(axes, panels, strict=False):
            draw_panel(axis, rows, keys, title, colours)
        for axis in list(axes)[len(panels) :]:
            axis.set_axis_off()
        return figure

    return _svg(draw, "curves over the steps of reinforcement learning")


def losses(metrics: Rows) -> str:
    """The loss of each supervised stage in a panel of its own; "" if there was none."""
    rl = {row["stage"] for row in rl_rows(metrics)}
    found = {
        s: [r for r in metrics if r.get("stage") == s] for s in _stages(metrics) if s not in rl
    }
    found = {stage: rows for stage, rows in found.items() if _has(rows, "loss")}
    if not found:
        return ""

    def draw(colours: Palette) -> Figure:
        across = min(5, max(3, len(found)))
        down = math.ceil(len(found) / across)
        figure = Figure(figsize=(9.6, 2.2 * down))
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        for axis, (stage, rows) in zip(axes, found.items(), strict=False):
            draw_panel(axis, rows, ("loss",), _label(stage), colours)
        for axis in axes[len(found) :]:
            axis.set_axis_off()
        return figure

    return _svg(draw, "training loss of the supervised stages")


def expert_load(metrics: Rows, moe_layers: int | None = None) -> str:
    """Load of each expert over time, relative to the even one, a panel per layer; "" if unknown.

    Of recorded layers beyond the `moe_layers` of the stack, the last is the MTP module.
    """
    loads = _expert_loads(metrics)
    if loads is None:
        return ""
    stages, relative_TLE = loads

    def draw(colours: Palette) -> Figure:
        layers, experts = relative_TLE.shape[1:]
        figure = Figure(figsize=(9.6, 1.0 + min(2.4, 0.11 * experts + 0.5)))
        axes = figure.subplots(1, layers, sharey=True, squeeze=False)[0]
        for layer, axis in enumerate(axes):
            image = _draw_load(axis, relative_TLE[:, layer].T, stages, colours)
            of_mtp = moe_layers is not None and layer >= moe_layers
            axis.set_title("MTP module" if of_mtp else f"MoE layer {layer + 1}")
        axes[0].set_ylabel("expert")
        bar = figure.colorbar(image, ax=list(axes), ticks=[0, 1, 2], pad=0.01, aspect=14)
        bar.ax.set_yticklabels(["idle", "even", "2 ×"])
        bar.outline.set_visible(False)
        return figure

    return _svg(draw, "load of each expert over time")


def picture(path: str | Path, summary: Mapping[str, Any], metrics: Rows) -> None:
    """Writes one wide PNG: pass@1 by stage, and reward, length and reflection over RL."""
    measured = [s for s in summary.get("stages", []) if _number(s.get("pass_at_1"))]
    rows = rl_rows(metrics)
    panels = [(keys, title) for keys, title in _PANELS if title in _IN_PICTURE]
    with matplotlib.rc_context(style(LIGHT)):
        figure = Figure(figsize=(13.0, 3.1))
        axes = figure.subplots(1, 1 + len(panels), width_ratios=[1.35] + [1.0] * len(panels))
        _draw_bars(axes[0], measured, LIGHT)
        axes[0].set_title("Held-out pass@1, %")
        for axis, (keys, title) in zip(axes[1:], panels, strict=True):
            draw_panel(axis, rows, keys, title, LIGHT)
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def rl_rows(metrics: Rows) -> list[dict[str, Any]]:
    """The rows of the RL stages, with `at`: the step counted on from stage to stage."""
    found: list[dict[str, Any]] = []
    offset = 0
    for stage in _stages(metrics):
        rows = [r for r in metrics if r.get("stage") == stage and "reward" in r]
        found += [{**row, "at": offset + row.get("step", 0)} for row in rows]
        offset = found[-1]["at"] if found else 0
    return found


def _stages(metrics: Rows) -> list[str]:
    return list(dict.fromkeys(str(row.get("stage", "")) for row in metrics))


def _label(name: Any) -> str:
    """A name as a font can draw it and a figure has room for."""
    return "".join(c if c.isprintable() else "?" for c in str(name)[:24])


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _has(rows: Rows, key: str) -> bool:
    return any(_number(row.get(key)) for row in rows)


def _draw_bars(axis: Axes, stages: Rows, colours: Palette) -> None:
    if not stages:
        axis.set_axis_off()
        return
    teacher = stages[0].get("parameters")
    is_student = [s.get("parameters") != teacher for s in stages]
    values = [100 * s["pass_at_1"] for s in stages]
    axis.barh(
        range(len(stages)),
        values,
        height=0.66,
        color=[colours.second if student else colours.first for student in is_student],
    )
    for row, value in enumerate(values):
        axis.text(value + 1.2, row, f"{value:.1f}", va="center", color=colours.ink)
    axis.set_yticks(range(len(stages)), [_label(s.get("name", "?")) for s in stages])
    axis.tick_params(axis="y", labelcolor=colours.ink)
    axis.set_ylim(len(stages) - 0.5, -0.5)
    axis.set_xlim(0, 108)
    axis.set_xticks(range(0, 101, 25))
    axis.grid(axis="y", visible=False)
    axis.spines["bottom"].set_visible(False)


def draw_panel(axis: Axes, rows: Rows, keys: Iterable[str], title: str, colours: Palette) -> None:
    """Each key as recorded, faint, and smoothed within each stage; a line where a stage begins."""
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.margins(x=0.01)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    stages = _stages(rows)
    present = [key for key in keys if _has(rows, key)]
    for key, colour in zip(present, (colours.first, colours.second), strict=False):
        for stage in stages:
            x, y = _points([row for row in rows if row.get("stage") == stage], key)
            axis.plot(x, y, color=colour, alpha=0.25, linewidth=1.0)
            label = key if stage == stages[0] else None
            # A line through one point is nothing to see.
            marker = "o" if len(x) <= _FEW else None
            axis.plot(x, _smooth(y), color=colour, label=label, marker=marker, markersize=3.5)
    if len(present) > 1 and len(stages) == 1:
        axis.legend(labelcolor=colours.muted, loc="best")
    elif len(present) > 1:  # above the names of the stages
        axis.legend(labelcolor=colours.muted, loc="lower right", bbox_to_anchor=(1.0, 0.08))
    _from_zero(axis)
    if len(stages) == 1:
        return
    for number, stage in enumerate(stages):
        begins = next(row.get("at", 0) for row in rows if row.get("stage") == stage)
        if number:
            axis.axvline(begins, color=colours.muted, linewidth=0.8, linestyle=(0, (3, 3)))
        axis.annotate(
            _label(stage),
            (begins, 0.02),
            xycoords=axis.get_xaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=colours.muted,
        )


def _from_zero(axis: Axes) -> None:
    """Shares that were 0 all the time are drawn on the ground, not in the middle of nothing."""
    values = np.concatenate([line.get_ydata() for line in axis.lines] or [np.ones(1)])
    if not np.any(values):
        axis.set_ylim(-0.03, 1.0)


def _points(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(row.get("at", row.get("step", 0)), row[key]) for row in rows if _number(row.get(key))]
    x, y = np.asarray(found, np.float64).reshape(-1, 2).T
    return x, y


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred mean over about a fifteenth of the curve, over what there is of it at the ends."""
    reach = len(y) // 30
    total = np.concatenate([[0.0], np.cumsum(y)])
    low = np.maximum(np.arange(len(y)) - reach, 0)
    high = np.minimum(np.arange(len(y)) + reach + 1, len(y))
    return (total[high] - total[low]) / (high - low)


def _expert_loads(metrics: Rows) -> tuple[list[str], np.ndarray] | None:
    """Stage of each record, and load over the mean of its layer, [T, L, E] with T at most 120."""
    found: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = {}
    for row in metrics:
        load_LE = np.asarray(row.get("expert_load", ()), np.float64)
        if load_LE.ndim == 2 and load_LE.size and np.isfinite(load_LE).all():
            found.setdefault(load_LE.shape, []).append((str(row.get("stage", "")), load_LE))
    if not found:
        return None
    records = max(found.values(), key=len)  # one shape to a picture: the one most often recorded
    chosen = np.unique(np.linspace(0, len(records) - 1, min(120, len(records))).round().astype(int))
    loads_TLE = np.stack([records[i][1] for i in chosen])
    mean_TL1 = loads_TLE.mean(axis=-1, keepdims=True)
    return [records[i][0] for i in chosen], loads_TLE / np.where(mean_TL1 > 0, mean_TL1, 1.0)


def _draw_load(axis: Axes, relative_ET: np.ndarray, stages: list[str], colours: Palette):
    # The middle is transparent: an even load shows the page, light or dark.
    blue, orange = (0.13, 0.42, 0.84), (0.88, 0.42, 0.10)
    colormap = LinearSegmentedColormap.from_list(
        "load", [(*blue, 1.0), (*blue, 0.06), (*orange, 0.06), (*orange, 1.0)]
    )
    image = axis.imshow(
        relative_ET, aspect="auto", interpolation="nearest", cmap=colormap, vmin=0.0, vmax=2.0
    )
    begins = [i for i in range(1, len(stages)) if stages[i] != stages[i - 1]]
    for i in begins:
        axis.axvline(i - 0.5, color=colours.ink, linewidth=0.8)
    labels = [_label(stages[i]) for i in (0, *begins)]
    axis.set_xticks([-0.5, *(i - 0.5 for i in begins)], labels, rotation=-30, ha="left")
    axis.set_yticks(range(0, len(relative_ET), max(1, len(relative_ET) // 4)))
    axis.grid(visible=False)
    return image


def style(colours: Palette) -> dict[str, Any]:
    """matplotlib's settings for a palette."""
    roles = {
        "text.color": colours.ink,
        "axes.titlecolor": colours.ink,
        "axes.labelcolor": colours.muted,
        "axes.edgecolor": colours.grid,
        "xtick.color": colours.muted,
        "ytick.color": colours.muted,
        "grid.color": colours.grid,
    }
    return _STYLE | roles


def _svg(draw: Any, name: str) -> str:
    """An <svg> element whose colours are variables of the page, `--ink` and the other roles."""
    out = io.StringIO()
    # The salt keeps the ids of several pictures on one page apart, and the file reproducible.
    with matplotlib.rc_context(style(_ROLES) | {"svg.hashsalt": name}):
        draw(_ROLES).savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for role, colour in _ROLES._asdict().items():
        text = text.replace(colour, f"var(--{role})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
