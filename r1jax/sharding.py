# SPDX-License-Identifier: Apache-2.0
"""Logical axes → mesh axes. The one file that knows of no mesh, an Auto or an Explicit one.

Modules name what an axis *is* ("batch", "embed", "expert"); `RULES` says which mesh axis carries
it. Without a mesh every function here is the identity or a plain `jnp` call.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("layers", None),
    ("latent", None),
)


def spec(*axes: str | None) -> PartitionSpec:
    """Mesh axes of an array whose logical axes are `axes`, under the mesh in force.

    A mesh axis that the mesh lacks, or that an earlier dimension already took, is dropped.
    """
    mesh = jax.sharding.get_abstract_mesh()
    present = () if mesh.empty else mesh.axis_names
    rules, taken, out = dict(RULES), set(), []
    for axis in axes:
        target = rules[axis] if axis is not None else None
        names = (target,) if isinstance(target, str) else (target or ())
        names = tuple(n for n in names if n in present and n not in taken)
        taken.update(names)
        out.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*out)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by its logical axes: a constraint on Auto meshes, a reshard on Explicit ones."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if mesh.are_all_axes_explicit:
        return jax.reshard(x, spec(*axes))
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def einsum(equation: str, *args: jax.Array, out: tuple[str | None, ...]) -> jax.Array:
    """`jnp.einsum` whose result has the logical axes `out`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jnp.einsum(equation, *args)
    if mesh.are_all_axes_explicit:
        return jnp.einsum(equation, *args, out_sharding=spec(*out))
    return jax.lax.with_sharding_constraint(jnp.einsum(equation, *args), spec(*out))


def take(table_ND: jax.Array, index: jax.Array, *axes: str | None) -> jax.Array:
    """Rows of a possibly sharded table; the result has the logical axes `axes`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        return table_ND.at[index].get(out_sharding=spec(*axes))
    return constrain(table_ND[index], *axes)
