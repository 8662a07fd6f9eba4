# SPDX-License-Identifier: Apache-2.0
"""GRPO in turns on 8 devices beside asynchronous GRPO on 4 + 4: the curves, and the time of a step.

Every finished quickstart run given is one seed: its cold start is the start. Both have the same
settings, importance correction included; the devices are virtual, of one CPU.

    python experiments/asynchronous.py runs/q0 runs/q1 runs/q2 --out runs/asynchronous
"""

import argparse
import dataclasses
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import numpy as np
from matplotlib.figure import Figure

from r1jax.config import MeshConfig, SamplerConfig, UpdateConfig, laptop
from r1jax.io import metrics
from r1jax.train.runs import run_trainer

COLOURS = {"in turns": "#2a5bd7", "asynchronous": "#d9622b"}
DEVICES = {
    "in turns": dict(mesh=MeshConfig(data=2, fsdp=4)),
    "asynchronous": dict(mesh=MeshConfig(data=2, fsdp=2), sampler=SamplerConfig(data=4)),
}


def run_of(name: str, start: pathlib.Path, seed: int, steps: int):
    """The laptop's GRPO on the devices of `name`."""
    run = laptop.grpo(steps=steps, update=UpdateConfig(beta=0.01, importance_cap=2.0))
    where = laptop.StartConfig(path=str(start / "cold_start"), remat=False)
    return dataclasses.replace(run, start=where, seed=seed, **DEVICES[name])


def seconds_of(rows) -> float:
    """Of a step, median; the first quarter, with the compilation in it, is left out."""
    times = np.diff([r["seconds"] for r in rows])
    return float(np.median(times[len(times) // 4 :]))


def picture(path: pathlib.Path, curves) -> None:
    """Reward of the samples by step, and by updates that the policy which drew them had had.

    A thin line a seed, a thick one their mean.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, runs in curves.items():
        y = np.array([[row["reward"] for row in rows] for rows in runs])
        step = np.array([row["step"] for row in runs[0]])
        had = step - 1 - np.array([int(row.get("staleness", 0)) for row in runs[0]])
        last = np.append(had[1:] > had[:-1], True)  # of two batches of one policy
        for axis, x, y_at in ((left, step, y), (right, had[last], y[:, last])):
            axis.plot(x, y_at.T, color=COLOURS[name], alpha=0.25, linewidth=1)
            axis.plot(x, y_at.mean(0), color=COLOURS[name], label=name)
    left.set_title("Reward of the samples: a thin line a seed", loc="left", fontsize=10)
    left.set_xlabel("step of training")
    right.set_xlabel("updates of the policy that drew them")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=140)


def apart(curves) -> str:
    """How far the curves are apart, as lines, beside how far seeds are."""
    y = {name: np.array([[r["reward"] for r in rows] for rows in c]) for name, c in curves.items()}
    turns, behind = y.values()
    spread = np.mean([c.std(0, ddof=1).mean() for c in (turns, behind)])
    same = behind[:, 1:] - turns[:, :-1]  # the same number of updates
    return (
        f"asynchronous less in turns, mean of steps: {(behind - turns).mean():+.3f}; at the same "
        f"number of updates {same.mean():+.3f}, and by seed "
        f"{', '.join(f'{d:+.3f}' for d in same.mean(1))}; deviation of seeds at a step {spread:.3f}"
    )


def main() -> None:
    """Runs what is not done, prints a line a run, and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=pathlib.Path, nargs="+", help="finished quickstart runs")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    curves = {name: [] for name in DEVICES}
    for seed, start in enumerate(args.runs):
        for name in DEVICES:
            folder = args.out / f"{name.replace(' ', '_')}_{seed}"
            summary = run_trainer(run_of(name, start, seed, args.steps), folder)
            rows = metrics.read(folder / "metrics.jsonl")
            curves[name].append(rows)
            late = np.mean([r["reward"] for r in rows[-10:]])
            weights = np.mean([r["importance"] for r in rows])
            error = np.mean([r["sampler_error"] for r in rows])
            print(
                f"seed {seed}, {name}: pass@1 {100 * summary['stages'][1]['pass_at_1']:.1f} %, "
                f"reward of the last ten steps {late:.3f}, weight {weights:.3f}, "
                f"error of log-probabilities {error:.4f}, {seconds_of(rows):.2f} s a step",
                flush=True,
            )
    picture(args.out / "asynchronous.png", curves)
    if len(args.runs) > 1:
        print(apart(curves))


if __name__ == "__main__":
    main()
