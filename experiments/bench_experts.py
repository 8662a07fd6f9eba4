# SPDX-License-Identifier: Apache-2.0
"""Times the three implementations of the routed experts, forward and backward, on this backend.

    python experiments/bench_experts.py

The implementations take turns; medians are printed in milliseconds of wall time and, because
other work on the machine stretches it, of CPU time. `ops.experts.choose` follows the outcome.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from r1jax.ops.experts import experts

IMPLEMENTATIONS = ("dense", "tiled", "looped", "ragged")
# tokens, experts, experts per token, model width, expert width
SHAPES = (
    (128, 8, 2, 64, 32),  # a decoding step of the laptop model
    (1024, 8, 2, 64, 32),  # its training step
    (4096, 8, 2, 64, 32),
    (2048, 16, 4, 256, 128),  # the 11.7M shape
    (2048, 32, 4, 256, 128),
    (2048, 64, 4, 256, 128),
    (2048, 64, 2, 256, 128),
)
REPEATS = 7


def main() -> None:
    """Prints one line a shape."""
    print(f"{jax.default_backend()}, jax {jax.__version__}; wall / CPU ms of value and gradient")
    print(f"{'T, E, K, D, F':24}" + "".join(f"{name:>18}" for name in IMPLEMENTATIONS))
    for t, e, k, d, f in SHAPES:
        keys = jax.random.split(jax.random.key(0), 6)
        x_TD = jax.random.normal(keys[0], (t, d))
        index_TK = jax.lax.top_k(jax.random.uniform(keys[1], (t, e)), k)[1]
        weight_TK = jax.random.uniform(keys[2], (t, k))
        shapes = ((e, d, f), (e, d, f), (e, f, d))
        weights = tuple(jax.random.normal(keys[3 + i], s) for i, s in enumerate(shapes))
        runs = {name: _compiled(name, index_TK) for name in IMPLEMENTATIONS}
        times = {name: [] for name in IMPLEMENTATIONS}
        for repeat in range(REPEATS + 1):
            for name, run in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                jax.block_until_ready(run(x_TD, weight_TK, weights))
                if repeat:  # the first call compiles
                    times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        cells = ""
        for name in IMPLEMENTATIONS:
            wall, cpu = (1e3 * statistics.median(x) for x in zip(*times[name], strict=True))
            cells += f"{f'{wall:.1f} / {cpu:.1f}':>18}"
        print(f"{f'{t}, {e}, {k}, {d}, {f}':24}{cells}", flush=True)


def _compiled(name: str, index_TK: jax.Array):
    def loss(x_TD, weight_TK, weights):
        return jnp.square(experts(x_TD, index_TK, weight_TK, weights, implementation=name)).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


if __name__ == "__main__":
    main()
