# SPDX-License-Identifier: Apache-2.0
"""Experts dealt out anew to the devices while a model trains, so that these get equal loads.

EPLB (DeepSeek-V3 section 3.4) without copies: whole groups go to devices, or the experts of a group
to those that share it, by the loads of the last step. Router columns, biases, moments and the
reference policy follow, so that the model is the same function as before. Which step does it and
how depends on that step alone: a resumed run does the same.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import DictKey

from r1jax.nn.param import specs
from r1jax.parallel.eplb import dealt
from r1jax.parallel.relocation import relocated
from r1jax.sharding import automatic, kept, local, pieces, spec
from r1jax.train.program import program

MOVED = ("state", "reference")  # of a stage's carry: the policy and what shares its router biases


def fullest(load_LE: np.ndarray, devices: int) -> float:
    """Load of the fullest device over the mean, summed over layers: what a step waits for.

    Args:
        load_LE: [L, E] tokens of each expert, or shares, which are dealt out to the devices in
            order.
    """
    load_Ln = np.asarray(load_LE, np.float64).reshape(len(load_LE), devices, -1).sum(-1)
    return float(load_Ln.max(1).sum() * devices / max(load_Ln.sum(), 1e-20))


@dataclasses.dataclass(frozen=True)
class Rebalance:
    """When experts are dealt out anew, and what is to be known of the model.

    Attributes:
        every: so many steps.
        groups: of experts, `n_group`.
    """

    every: int
    groups: int

    def due(self, step: int) -> bool:
        """Whether it is time behind a step, the first being 1."""
        return step % self.every == 0

    def __call__(self, carry: Mapping[str, Any], load_LE: np.ndarray) -> dict[str, Any]:
        """The carry of a stage with the experts of its `MOVED` dealt out by these loads."""
        trees = {k: carry[k] for k in MOVED if carry.get(k) is not None}
        return {**carry, **compile_rebalance(self.groups)(trees, np.asarray(load_LE, np.float32))}


@functools.cache
def compile_rebalance(groups: int):
    """The program that moves them, in place: (trees of a carry, load_LE) to the trees."""

    def run(trees, load_LE):
        whole = automatic(functools.partial(_moved, groups=groups), lambda t, *_: specs(t))
        return whole(trees, load_LE)

    return program(run, donate_argnums=0)


def _moved(trees, load_LE, *, groups: int):
    order = functools.partial(dealt, devices=pieces("expert"), groups=groups)
    order_LE = jax.vmap(order)(load_LE)
    orders = _by_mixture(trees["state"].router, order_LE)

    def follow(path, variable):
        if not isinstance(variable, nnx.Variable):
            return variable
        names = tuple(key.key for key in path if isinstance(key, DictKey))
        mine = [o for at, o in orders.items() if _within(at, names)]
        axes = variable.out_sharding
        if not mine or not {"expert", "routed"} & set(axes):
            return variable
        stacked = axes[0] == "layers"
        x, mine_LE = variable[...], mine[0]
        if not stacked:
            x, mine_LE = x[None], mine_LE[None]
        if "expert" in axes:
            found = _weights(x, mine_LE, spec(*(() if stacked else (None,)), *axes))
        else:
            at = axes.index("routed") - len(axes)
            found = jax.vmap(lambda x, o: jnp.take(x, o, axis=at))(x, mine_LE)
        return variable.replace(found if stacked else found[0])

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    found = jax.tree_util.tree_map_with_path(follow, trees, is_leaf=is_variable)
    if (load := trees["state"].load) is not None:
        rows = jnp.take_along_axis(load[: len(order_LE)], order_LE, 1)
        found["state"] = dataclasses.replace(found["state"], load=load.at[: len(rows)].set(rows))
    return kept(found, specs(found))


def _by_mixture(router: nnx.State, order_LE: jax.Array) -> dict[tuple[str, ...], jax.Array]:
    """{path of a mixture, or of a stack of them: its rows of the orders}, as the biases lie."""
    found, start = {}, 0
    for path, bias in jax.tree_util.tree_flatten_with_path(router)[0]:
        names = tuple(key.key for key in path if isinstance(key, DictKey))
        at, count = names[: names.index("router")], bias.shape[0] if bias.ndim == 2 else 1
        if start + count > len(order_LE):  # a router that did not run, the MTP module's
            continue
        rows = order_LE[start : start + count]
        found[at] = rows if bias.ndim == 2 else rows[0]
        start += count
    return found


def _within(at: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether a path, whatever tree it is of, leads into this mixture."""
    n = len(at)
    return any(names[i : i + n] == at for i in range(len(names) - n + 1))


def _weights(x: jax.Array, order_LE: jax.Array, where) -> jax.Array:
    """[L, E, ...] in the new orders, a layer at a time where the old one lay."""

    def move(x, order_LE):
        def one(layer, x):
            row = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
            row = relocated(row, order_LE[layer])
            return jax.lax.dynamic_update_index_in_dim(x, row, layer, 0)

        return jax.lax.fori_loop(0, len(x), one, x)

    return local(move, (where, spec()), where)(x, order_LE)
