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
    """Reward and accuracy of the samples by step: a thin line a seed, a thick one their mean."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, field in zip(figure.subplots(1, 2), ("reward", "accuracy"), strict=True):
        for name, runs in curves.items():
            y = np.array([[row[field] for row in rows] for rows in runs])
            steps = np.arange(1, y.shape[1] + 1)
            axis.plot(steps, y.T, color=COLOURS[name], alpha=0.25, linewidth=1)
            axis.plot(steps, y.mean(0), color=COLOURS[name], label=name)
        axis.set_title(f"{field.capitalize()} of the samples, by step", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=140)


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


if __name__ == "__main__":
    main()
