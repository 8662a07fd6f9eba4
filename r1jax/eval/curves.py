# SPDX-License-Identifier: Apache-2.0
"""The curves of one trainer's run, as a PNG of small panels."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from r1jax.eval.figures import LIGHT, Rows, draw_panel, style

# Panels in the order of a reader's interest: what is not in the metrics is left out.
PANELS = (
    (("loss",), "Loss"),
    (("reward",), "Reward"),
    (("accuracy", "format"), "Accuracy and format"),
    (("margin",), "Margin of the rewards"),
    (("value_loss",), "Critic's loss"),
    (("explained_variance",), "Explained variance"),
    (("mean_tokens",), "Response length, tokens"),
    (("reflection",), "Reflection rate"),
    (("kl",), "KL to the reference, nats a token"),
    (("entropy",), "Entropy, nats a token"),
    (("clip_fraction",), "Clipped, share of tokens"),
    (("dead_groups",), "Groups without a signal, share"),
    (("mtp_loss",), "MTP loss"),
    (("grad_norm",), "Gradient norm"),
    (("lr",), "Learning rate"),
)
COLUMNS = 3


def draw_curves(path: str | Path, metrics: Rows, stage: str) -> Path:
    """Draws every known number of a stage over its steps.

    Args:
      path: of the PNG.
      metrics: rows of metrics.jsonl.
      stage: whose rows are drawn.

    Returns:
      the path.
    """
    rows = [row for row in metrics if row.get("stage") == stage]
    found = [
        (tuple(k for k in keys if any(k in row for row in rows)), title) for keys, title in PANELS
    ]
    found = [(keys, title) for keys, title in found if keys]
    lines = max(1, -(-len(found) // COLUMNS))
    with matplotlib.rc_context(style(LIGHT)):
        figure = Figure(figsize=(3.6 * COLUMNS, 2.3 * lines), layout="constrained")
        axes = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
        for axis, (keys, title) in zip(axes, found, strict=False):
            draw_panel(axis, rows, keys, title, LIGHT)
        for axis in axes[len(found) :]:
            axis.set_axis_off()
        figure.savefig(path, dpi=140, facecolor="white")
    return Path(path)
