# SPDX-License-Identifier: Apache-2.0
"""Work on equal pieces of arrays, written so that XLA:CPU compiles it once for all of them.

It makes a kernel of its own of every operation at another constant place. A place that it does not
know is an argument: pieces of one shape then share a kernel, and so does all that is done to them.
"""

from typing import Any

import jax
import jax.numpy as jnp


def hidden(i: int) -> jax.Array:
    """The number as a scalar int32 that XLA takes for a variable."""
    return jax.lax.optimization_barrier(jnp.int32(i))


def pieces(tree: Any) -> list[Any]:
    """The tree at each place of its arrays' leading axis, one after another."""
    leaves, treedef = jax.tree.flatten(tree)
    by_leaf = [_cut(x) if jnp.issubdtype(x.dtype, jnp.inexact) else tuple(x) for x in leaves]
    return [jax.tree.unflatten(treedef, each) for each in zip(*by_leaf, strict=True)]


@jax.custom_vjp
def _cut(x_L: jax.Array) -> tuple[jax.Array, ...]:
    """The pieces, whose gradients are put together once."""
    index = jax.lax.dynamic_index_in_dim
    cut = tuple(index(x_L, hidden(i), keepdims=False) for i in range(x_L.shape[0]))
    return jax.lax.optimization_barrier(cut)


def _cut_backward(_, given: tuple[jax.Array, ...]):
    return (jnp.stack(jax.lax.optimization_barrier(given)),)


_cut.defvjp(lambda x_L: (_cut(x_L), None), _cut_backward)
