# SPDX-License-Identifier: Apache-2.0
"""Work on equal pieces of arrays, written so that XLA:CPU compiles it once for all of them.

It makes a kernel of its own of every operation at another constant place or on another shape, and
compiling kernels is what a CPU's first step waits for. A place that it does not know is an
argument, and a vector has one shape whatever it came from: pieces of one size then share a kernel,
and so does all that is done to them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import present


def hidden(i: int) -> jax.Array:
    """The number as a scalar int32 that XLA takes for a variable."""
    return jax.lax.optimization_barrier(jnp.int32(i))


def flat(tree: Any, *, kept: int = 0) -> Any:
    """The arrays with all axes behind the first `kept` as one, on a CPU and where no mesh cuts
    them. A TPU would copy them."""
    if not _alone_on_cpu(tree):
        return tree

    def one(x):
        return x.reshape(*x.shape[:kept], math.prod(x.shape[kept:]))

    # XLA would move the shapes back into the kernels.
    return jax.lax.optimization_barrier(jax.tree.map(one, tree))


def shaped(tree: Any, like: Any) -> Any:
    """What `flat` made of arrays shaped as those of `like`, in their shapes again."""
    if not _alone_on_cpu(tree):
        return tree
    tree = jax.lax.optimization_barrier(tree)
    return jax.tree.map(lambda x, old: x.reshape(old.shape), tree, like)


def _alone_on_cpu(tree: Any) -> bool:
    if not jax.sharding.get_abstract_mesh().empty or present()[0] != "cpu":
        return False
    return all(jax.typeof(x).sharding.mesh.empty for x in jax.tree.leaves(tree))


def pieces(tree: Any) -> list[Any]:
    """The tree at each place of its arrays' leading axis, one after another."""
    leaves, treedef = jax.tree.flatten(tree)
    return [jax.tree.unflatten(treedef, each) for each in _cut(leaves)]


@jax.custom_vjp
def _cut(arrays: list[jax.Array]) -> list[list[jax.Array]]:
    """The arrays at each place; the gradients of the places are put together once."""
    how = dict(keepdims=False, allow_negative_indices=False)
    at = functools.partial(jax.lax.dynamic_index_in_dim, **how)
    places, rows = [hidden(i) for i in range(len(arrays[0]))], flat(arrays, kept=1)
    cut = jax.lax.optimization_barrier([[at(x, i) for x in rows] for i in places])
    like = [_like(x, x.shape[1:]) for x in arrays]
    return [shaped(each, like) for each in cut]


def _cut_backward(_, given: list[list[jax.Array]]):
    like = [_like(x, (len(given), *x.shape)) for x in given[0]]
    rows = jax.lax.optimization_barrier([flat(each) for each in given])
    return (shaped([jnp.stack(each) for each in zip(*rows, strict=True)], like),)


def _like(x: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype)


_cut.defvjp(lambda arrays: (_cut(arrays), None), _cut_backward)
