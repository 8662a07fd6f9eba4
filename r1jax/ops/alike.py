# SPDX-License-Identifier: Apache-2.0
"""Work on equal pieces of arrays, written so that XLA:CPU compiles it once for all of them.

It makes a kernel of its own of every operation at another constant place. A place that it does not
know is an argument: pieces of one shape then share a kernel, and so does all that is done to them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def hidden(i: int) -> jax.Array:
    """The number as a scalar int32 that XLA takes for a variable."""
    return jax.lax.optimization_barrier(jnp.int32(i))


def pieces(tree: Any) -> list[Any]:
    """The tree at each place of its arrays' leading axis, one after another."""
    leaves, treedef = jax.tree.flatten(tree)
    return [jax.tree.unflatten(treedef, each) for each in _cut(leaves)]


@jax.custom_vjp
def _cut(arrays: list[jax.Array]) -> list[list[jax.Array]]:
    """The arrays at each place; the gradients of the places are put together once."""
    how = dict(keepdims=False, allow_negative_indices=False)
    at = functools.partial(jax.lax.dynamic_index_in_dim, **how)
    places = [hidden(i) for i in range(arrays[0].shape[0])]
    return jax.lax.optimization_barrier([[at(x, i) for x in arrays] for i in places])


def _cut_backward(_, given: list[list[jax.Array]]):
    given = jax.lax.optimization_barrier(given)
    return ([jnp.stack(each) for each in zip(*given, strict=True)],)


_cut.defvjp(lambda arrays: (_cut(arrays), None), _cut_backward)
