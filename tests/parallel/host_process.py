# SPDX-License-Identifier: Apache-2.0
"""One process of a run of several, started by `test_hosts`: two updates of the smallest model.

Arguments: coordinator, processes, number of this one, file for the result.
"""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from r1jax.config import MeshConfig, OptimConfig
from r1jax.nn.transformer import Transformer
from r1jax.optim import adamw
from r1jax.parallel import hosts
from r1jax.parallel.mesh import make_mesh
from r1jax.train.state import Controls, create
from r1jax.train.supervised import supervised_step


def main(coordinator: str, processes: str, process: str, out: str) -> None:
    if int(processes) > 1:
        together = hosts.start(
            coordinator, processes=int(processes), process=int(process), timeout=60
        )
        if not together:
            raise SystemExit("alone")
    from tests.parallel.test_training import CFG, batches

    mesh, optimizer = make_mesh(MeshConfig(fsdp=2, expert=4)), adamw(OptimConfig())
    with jax.set_mesh(mesh):
        state = create(lambda: Transformer(CFG), optimizer, jax.random.key(0))
        part = hosts.rows_of_host(8)
        mine = {name: x[:, part] for name, x in batches().items()}
        batch = hosts.whole(mine, mesh, None, "batch", "length")
        step = jax.jit(
            lambda *a: supervised_step(*a, optimizer=optimizer, mtp_weight=0.3), donate_argnums=0
        )
        for _ in range(2):
            state, metrics = step(state, batch, Controls(np.float32(1e-3), np.float32(0.01)))
        whole = multihost_utils.process_allgather((state.params, metrics), tiled=True)
    if jax.process_index() == 0:
        np.savez(out, *jax.tree.leaves(whole))


if __name__ == "__main__":
    main(*sys.argv[1:])
