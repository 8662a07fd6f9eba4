# SPDX-License-Identifier: Apache-2.0
"""Asynchronous training: devices of their own sample the next batch while the trainer learns.

    step            t - 1         t             t + 1
    trainer         learns t - 1  learns t      learns t + 1      weights W[t] before it learns t
    sampler         draws t       draws t + 1   draws t + 2       t + 1 with W[t]: one step behind

The weights travel as soon as they are made, and no host waits for them. Truncated importance
sampling weighs each token by how much likelier the trainer's policy finds it than the sampler's
did (`rl.ratio.truncated_importance_weight`). The batch in flight belongs to what is saved: it was
drawn with weights that are gone, and a resumed run learns from the very same.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from r1jax.config import MeshConfig, SamplerConfig
from r1jax.nn.param import RouterBias, as_used, resident, specs
from r1jax.parallel.mesh import meshes_apart
from r1jax.rl.rollout import Rollout
from r1jax.sharding import DECODING, kept, ruled
from r1jax.train.collect import Collected, Collector
from r1jax.train.program import program
from r1jax.train.state import TrainState


class Apart:
    """Devices that only sample, and how weights get there.

    Attributes:
        mesh: of these devices.
    """

    def __init__(self, mesh: MeshConfig, sampler: SamplerConfig):
        """To be made with the trainer's mesh in force.

        Raises:
            ValueError: as `parallel.mesh.meshes_apart`.
        """
        self.mesh, self._ours = meshes_apart(mesh, sampler)
        self._give = None
        self._held = program(_held)

    def weights(self, state: TrainState) -> TrainState:
        """The state's weights on these devices, as decoding uses them. It does not wait for them.

        One program of the trainer makes the pieces that the sampler's devices hold; each piece then
        crosses over. What jax.device_put would have to cut otherwise goes through the host.
        """
        if self._give is None:
            self._give, self._lies = self._compile(state)
        come = jax.device_put(self._give(state.slim()), self._lies)
        if not state.model().cfg.fp8.enabled:
            return come
        with jax.set_mesh(self.mesh):
            return self._held(come)

    def _compile(self, state: TrainState):
        with jax.set_mesh(self.mesh), ruled(DECODING):
            where = specs(jax.eval_shape(_as_sampled, state.slim()))
        ours, theirs = (
            jax.tree.map(lambda s, m=m: NamedSharding(m, s), where) for m in (self._ours, self.mesh)
        )
        return program(_as_sampled, out_shardings=ours), theirs


def _as_sampled(state: TrainState) -> TrainState:
    return _with(state, as_used(state.model()))


def _held(state: TrainState) -> TrainState:
    """In FP8 blocks, which each device makes of what it has."""
    with ruled(DECODING):
        model = resident(state.model())
        return _with(state, kept(model, specs(model)))


def _with(state: TrainState, model) -> TrainState:
    graphdef, params, router = nnx.split(model, nnx.Param, RouterBias)
    return TrainState(state.step, params, router, (), graphdef, state.load)


class Behind:
    """Batches drawn with the weights of one step before, on devices of their own."""

    def __init__(self, collector: Collector, apart: Apart):
        self.collector, self.apart, self.cfg = collector, apart, collector.cfg

    def carried(self) -> dict[str, Any]:
        """What a stage has to carry for it at first: the batch in flight, of which there is none.

        `since` is the step whose weights drew it.
        """
        cfg = self.cfg
        piece = self.collector.sampler.blank(cfg.prompts // cfg.pieces, cfg.group_size)
        return {"ahead": (piece,) * cfg.pieces, "since": np.int32(0)}

    def shapes(self, state: TrainState) -> Rollout:
        """Of a batch."""
        return self.collector.shapes(self.carried()["ahead"][0])

    def __call__(self, carry: Mapping[str, Any], step: int) -> tuple[Collected, dict[str, Any]]:
        """The batch of a step, when the next one has been set going: and what to carry of that."""
        number, last = int(carry["drawn"]), step + 1 == self.cfg.steps
        asked = self._asked(number, step)
        ahead, since = carry["ahead"], int(carry["since"])
        flying = {"ahead": ahead, "since": carry["since"]}
        weights = self.apart.weights(carry["state"]) if step == 0 or not last else None
        with jax.set_mesh(self.apart.mesh):
            if step == 0:  # there is no step before: with the weights as they are
                ahead = self.collector.draw(weights, asked, number)
            if not last:
                drawn = self.collector.draw(weights, self._asked(number + 1, step + 1), number + 1)
                flying = {"ahead": drawn, "since": np.int32(step)}
        # From the sampler's devices to whatever reward models and the trainer have: by the host,
        # which reads them anyway.
        pieces = (jax.tree.map(np.asarray, piece) for piece in ahead)
        got = self.collector.judged(asked, pieces, step, number)
        return got._replace(shown=got.shown | {"staleness": float(step - since)}), flying

    def _asked(self, number: int, step: int):
        return self.collector.questions(number, self.cfg.prompts, step)
