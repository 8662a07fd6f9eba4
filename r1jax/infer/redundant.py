# SPDX-License-Identifier: Apache-2.0
"""Experts dealt out anew for decoding, hot ones held several times (DeepSeek-V3 section 3.4.2).

A step of decoding is over when the device with most tokens is done. So each device holds some
experts beside its own share: copies of those that were asked for most lately, over which tokens are
spread. Where they go is worked out inside the program that decodes: no host waits for it, and the
same loads and seed draw the same again.
"""

import functools
from typing import NamedTuple

import jax
from flax import nnx

from r1jax.nn.moe import MoE, Placed
from r1jax.nn.param import specs
from r1jax.parallel.eplb import Placement, spread_out
from r1jax.parallel.relocation import relocated
from r1jax.sharding import local, pieces, spec

WEIGHTS = ("w_gate", "w_up", "w_down")


class Copies(NamedTuple):
    """Which experts are to be held several times.

    Attributes:
        load_LE: [L, E] tokens that each expert got lately: of the stack's layers, then of routers
            that decoding does not run.
        redundant: slots beyond one for each expert.
    """

    load_LE: jax.Array
    redundant: int


def served(model, load_LE: jax.Array, *, redundant: int):
    """The model with the experts of its stack in E + `redundant` slots: the same function.

    To be called inside the program that is jitted, with the rules of decoding in force.

    Args:
        model: a `Transformer`.
        load_LE, redundant: as in `Copies`. Slots divide evenly by the mesh's expert axis.
    """
    model = nnx.merge(*nnx.split(model))  # the caller's stays as it is
    layers = model.moe_layers
    depth = layers.feed_forward.w_gate.shape[0]
    how = dict(slots=load_LE.shape[1] + redundant, devices=pieces("expert"))
    place = jax.vmap(functools.partial(spread_out, **how))(load_LE[:depth])
    layers.feed_forward = Placed(_moved(layers.feed_forward, place), place)
    return model


def _moved(moe: MoE, place: Placement) -> MoE:
    """The mixture of a stack with the weights of each slot's expert, layer by layer."""

    def move(held, expert_LS):
        one = lambda layer: jax.tree.map(lambda x: relocated(x, layer[1]), layer[0])  # noqa: E731
        return jax.lax.map(one, (held, expert_LS))

    held = {name: vars(moe)[name] for name in WEIGHTS}
    where = specs(held)
    for name, weights in local(move, (where, spec()), where)(held, place.expert_S).items():
        setattr(moe, name, weights)
    return moe
