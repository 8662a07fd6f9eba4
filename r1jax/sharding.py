# SPDX-License-Identifier: Apache-2.0
"""Logical axes → mesh axes. The one file that knows of no mesh, an Auto or an Explicit one.

Modules name what an axis *is* ("batch", "embed", "expert"); `RULES` says which mesh axes carry
it. Without a mesh every function here is the identity or a plain `jnp` call.

A training step opens one region with `local`, and so do the layers of a decoding step: inside,
every device runs the modules on its own rows, positions, heads and experts, and what has to cross
devices is said with `gather`, `total` and `share`. Those three are the identity outside such a
region, where XLA partitions by itself.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

RULES: Rules = (
    ("batch", ("slices", "data", "fsdp", "expert")),
    ("length", "context"),
    ("embed", ("fsdp", "expert", "context")),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("routed", None),
    ("layers", None),
    ("latent", ("fsdp", "expert", "context")),
)
# Every token asks for all weights: they are not cut where only memory would have it so. Rows have
# no positions to cut yet.
DECODING: Rules = (
    ("batch", ("slices", "data", "fsdp", "expert", "context")),
    ("length", None),
    ("embed", None),
    ("latent", None),
    *(rule for rule in RULES if rule[0] in ("heads", "mlp", "vocab", "expert", "routed", "layers")),
)
TILE = 128  # rows that a TPU keeps together

_in_force: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=RULES)


@contextlib.contextmanager
def ruled(rules: Rules) -> Iterator[None]:
    """Another table in force. To be entered inside the function that is jitted: `jit` does not tell
    calls under one table from calls under another."""
    token = _in_force.set(rules)
    try:
        yield
    finally:
        _in_force.reset(token)


def decoding() -> bool:
    """Whether `DECODING` is in force: nothing is cut but rows, experts, heads, hidden values and
    the vocabulary."""
    return _in_force.get() is DECODING


def spec(*axes: str | None) -> PartitionSpec:
    """Mesh axes of an array whose logical axes are `axes`, under the mesh in force.

    A mesh axis that the mesh lacks, that is one device long, or that an earlier dimension already
    took, is dropped.
    """
    mesh = jax.sharding.get_abstract_mesh()
    present = () if mesh.empty else [n for n in mesh.axis_names if mesh.shape[n] > 1]
    rules, taken, out = dict(_in_force.get()), set(), []
    for axis in axes:
        target = rules[axis] if axis is not None else None
        names = (target,) if isinstance(target, str) else (target or ())
        names = tuple(n for n in names if n in present and n not in taken)
        taken.update(names)
        out.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*out)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by its logical axes: a constraint on Auto meshes, a reshard on Explicit ones.

    A dimension is cut over as many of its mesh axes, from the first on, as divide it together.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    where = PartitionSpec(
        *(_dividing(n, _names((e,)), mesh) for n, e in zip(x.shape, spec(*axes), strict=True))
    )
    if mesh.are_all_axes_explicit:
        return jax.reshard(x, where)
    return jax.lax.with_sharding_constraint(x, where)


def einsum(equation: str, *args: jax.Array, out: tuple[str | None, ...]) -> jax.Array:
    """`jnp.einsum` whose result has the logical axes `out`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        return jnp.einsum(equation, *args, out_sharding=spec(*out))
    return constrain(jnp.einsum(equation, *args), *out)


def take(table_ND: jax.Array, index: jax.Array, *axes: str | None) -> jax.Array:
    """Rows of a possibly sharded table; the result has the logical axes `axes`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        return table_ND.at[index].get(out_sharding=spec(*axes))
    return constrain(table_ND[index], *axes)


def place(tree: Any, where: Any) -> Any:
    """Arrays where `where`, a pytree of `spec(...)`, says; as they are without a mesh.

    Each process must have the whole arrays; it places its own part of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    return jax.tree.map(
        lambda x, s: _own_part(x, NamedSharding(jax.sharding.get_mesh(), s)), tree, where
    )


def _own_part(x: Any, where: NamedSharding) -> jax.Array:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, where, lambda part: whole[part])
    if not x.sharding.is_equivalent_to(where, x.ndim):
        return jax.jit(lambda x: x, out_shardings=where)(x)
    # By the words of `where`: `jit` compiles anew for others that mean the same.
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, where, parts)


def fed(shape: tuple[int, ...], where: PartitionSpec, part: Callable[[Any], np.ndarray]) -> Any:
    """An array of which each process makes what its devices hold; whole without a mesh.

    Args:
        shape: of all of it.
        where: as for `place`.
        part: from an index, a tuple of slices, to what lies there.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return part(tuple(slice(None) for _ in shape))
    return jax.make_array_from_callback(shape, NamedSharding(mesh, where), part)


def kept(tree: Any, where: Any) -> Any:
    """What a program makes anew of arrays that lie as `where` says, so that it lies there again.

    Else XLA may choose another place, and the next call of the program is compiled for that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.are_all_axes_explicit:
        return tree
    return jax.lax.with_sharding_constraint(tree, where)


def placed_shape(x: Any, where: PartitionSpec) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array that `place` would put there."""
    mesh = jax.sharding.get_mesh()
    lies = None if mesh.empty else NamedSharding(mesh, where)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in force, whose chips need not be there, or the default.

    A program may be compiled for a pod on a machine without one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


# ------------------------------------------------------------- regions where a device sees its own


def local(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`fn` run by every device on its own pieces; `fn` itself where there is nothing to cut.

    Args:
        fn: takes and returns pytrees of arrays; what it returns must be whole, by `total` or
            `gather`, along every mesh axis that `out_specs` does not name.
        in_specs: pytrees of `spec(...)`, one for each argument.
        out_specs: the same of what it returns.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.size == 1:
        return fn
    run = jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if not mesh.are_all_axes_explicit:
        return run
    # Explicit meshes want arguments that lie so already.
    return lambda *args: run(*jax.tree.map(jax.reshard, args, in_specs))


def automatic(fn: Callable, out_specs: Callable[..., Any]) -> Callable:
    """`fn` with XLA to choose the layouts inside, on Explicit meshes too.

    Args:
        fn: takes and returns pytrees of arrays.
        out_specs: the specs of what `fn` returns, from the same arguments.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        return fn
    return lambda *args: jax.sharding.auto_axes(fn, out_sharding=out_specs(*args))(*args)


def unpartitioned(*axes: str) -> int:
    """Pieces for a `local` region that an array cut along `axes` asks for; 0 if none is needed.

    That is the number of rows that "batch" must be cut into if the mesh in force cuts one of
    `axes`, which XLA is not to partition by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or not any(_names(spec(axis)) for axis in axes):
        return 0
    return math.prod(mesh.shape[n] for n in _names(spec("batch")))


def pieces(axis: str) -> int:
    """Pieces that the mesh in force cuts a logical axis into."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[n] for n in _names(spec(axis)))


def _dividing(size: int, names: tuple[str, ...], mesh) -> tuple[str, ...] | None:
    """The longest run of mesh axes, from the first on, whose product divides `size`."""
    while names and size % math.prod(mesh.shape[n] for n in names):
        names = names[:-1]
    return names or None


def _names(where: PartitionSpec) -> tuple[str, ...]:
    return tuple(n for e in where for n in ((e,) if isinstance(e, str) else e or ()))


def carriers(*axes: str) -> tuple[str, ...]:
    """Mesh axes that carry the logical `axes` inside a `local` region."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.manual_axes:
        return ()
    return _names(spec(*axes))


def count(*axes: str) -> int:
    """Pieces that the logical `axes` are cut into inside a `local` region; 1 outside."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[n] for n in carriers(*axes))


def index(*axes: str) -> jax.Array | int:
    """Which of `count(*axes)` pieces this device holds."""
    names = carriers(*axes)
    return jax.lax.axis_index(names) if names else 0


def gather(x: jax.Array, *axes: str | None, along: str) -> jax.Array:
    """`x`, whose logical axes are `axes`, whole along one of them."""
    where, names = axes.index(along), _along(axes, along)
    # One mesh axis at a time, as an axis of its own where pieces are odd or innermost: XLA:TPU
    # makes an all-reduce and a slice of other reduce-scatters, which gradients come back by.
    for name in reversed(names):
        if x.shape[where] % TILE == 0 and where < x.ndim - 1:
            x = jax.lax.all_gather(x, name, axis=where, tiled=True)
            continue
        pieces = jnp.moveaxis(jax.lax.all_gather(x, name), 0, where)
        x = pieces.reshape(*x.shape[:where], -1, *x.shape[where + 1 :])
    return x


def piece(*axes: str | None, along: str) -> tuple[jax.Array | int, int]:
    """(which piece this device holds of an array as `gather` takes it, of how many)."""
    names = _along(axes, along)
    of = math.prod(jax.sharding.get_abstract_mesh().shape[n] for n in names)
    return (jax.lax.axis_index(names) if names else 0), of


def _along(axes: tuple[str | None, ...], along: str) -> tuple[str, ...]:
    """Mesh axes that an array of these logical axes is cut over along one of them."""
    live = carriers(*(a for a in axes if a is not None))
    return tuple(n for n in _names((spec(*axes)[axes.index(along)],)) if n in live)


def total(x: jax.Array, *axes: str) -> jax.Array:
    """The sum of `x` over all pieces of the logical `axes`."""
    names = carriers(*axes)
    return jax.lax.psum(x, names) if names else x


def share(x: jax.Array, axis: str) -> jax.Array:
    """This device's part of the leading dimension of an array that all along `axis` hold.

    `gather(y, axis, ..., along=axis)` puts what was made of the parts together.
    """
    pieces = count(axis)
    if pieces == 1:
        return x
    size = x.shape[0] // pieces
    return jax.lax.dynamic_slice_in_dim(x, index(axis) * size, size)
