# SPDX-License-Identifier: Apache-2.0
"""Plans beside stop-watches: predicted and measured seconds of a training step on this CPU.

The "chip" is this machine: the peak of a float32 matmul and the bandwidth of a copy, measured
between the steps. All in processor seconds of all threads: other work on the machine stretches wall
time, by how much changes from one second to the next.

    python experiments/plan_on_cpu.py [--repeats 5]
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from r1jax.config import MLAConfig, ModelConfig, MoEConfig, PlanConfig, RopeConfig
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.topology import Chip, Topology
from r1jax.train import jobs
from r1jax.train.plan import mesh_for, plan

MOE = MoEConfig(16, 1, 4, 4, 2, moe_intermediate_size=128)
WIDE = ModelConfig(
    vocab_size=4096,
    num_layers=4,
    first_k_dense=1,
    hidden_size=256,
    intermediate_size=768,
    dtype="float32",
    remat=False,
    rope=RopeConfig(),
    mla=MLAConfig(4, 192, 64, 64, 32, 64),
    moe=MOE,
)
SHAPES = {
    "dense feed-forward, 8 × 256": (
        dataclasses.replace(WIDE, first_k_dense=3, intermediate_size=2048), 8, 256),
    "experts, 8 × 256": (WIDE, 8, 256),
    "experts with remat, long rows, 2 × 1,024": (dataclasses.replace(WIDE, remat=True), 2, 1024),
}  # fmt: skip


def seconds(fn, *args) -> float:
    """Processor time of one call that has been compiled."""
    began = time.process_time()
    jax.block_until_ready(fn(*args))
    return time.process_time() - began


def chip() -> Chip:
    """This machine, now: the best of three."""
    a, big = jnp.ones((1536, 1536)), jnp.ones(1 << 25)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda x: x + 1)
    product(a), copy(big)
    peak = 2 * 1536**3 / min(seconds(product, a) for _ in range(3))
    memory = 2 * big.nbytes / min(seconds(copy, big) for _ in range(3))
    return Chip(1e12, peak, peak, memory, 1e9, 1e9, 1)


def main() -> None:
    """Prints a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    for name, (model, rows, length) in SHAPES.items():
        cfg = PlanConfig(model=model, rows_per_device=rows, length=length)
        here = Topology("this CPU", "cpu", chip(), (1,))
        found = plan(cfg, here, "train", chips=jax.devices()[:1])
        mesh = make_mesh(mesh_for(cfg, here, "train"), jax.devices()[:1])
        with jax.set_mesh(mesh):
            job = jobs.make("train", cfg, mesh)
            fill = lambda x: jnp.ones(x.shape, x.dtype)  # noqa: E731
            state, *rest = jax.tree.map(fill, job.args)
            state, _ = job.run(state, *rest)
            took, chips = [], []
            for _ in range(repeats):
                chips.append(chip())
                began = time.process_time()
                state, _ = jax.block_until_ready(job.run(state, *rest))
                took.append(time.process_time() - began)
        peak = statistics.median(c.bf16 for c in chips)
        memory = statistics.median(c.memory for c in chips)
        compute, moved = found.costs.total_flops / peak, found.costs.traffic / memory
        low, high, real = max(compute, moved), compute + moved, statistics.median(took)
        print(
            f"{name}: arithmetic {compute:.3f} s at {peak / 1e9:.0f} GFLOP/s, memory {moved:.3f} s "
            f"at {memory / 1e9:.1f} GB/s: {low:.3f}–{high:.3f} s predicted, {real:.3f} measured "
            f"({real / low:.2f} and {real / high:.2f} times)",
            flush=True,
        )


if __name__ == "__main__":
    main()
