# SPDX-License-Identifier: Apache-2.0
"""Making parameters and stacks of layers, and filling them.

A module is built without a key and without a mesh: its constructor says shapes, logical axes and
how each parameter is to be drawn; `initialise` then draws all of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from r1jax.ops.blocks import Blocks, in_blocks
from r1jax.ops.linear import FP8
from r1jax.parallel.weights import WHOLE, blocks_spec, crossed, cut_of, stored
from r1jax.sharding import carriers, gather, spec

POOLED = 1 << 20  # parameters up to this size share one draw


class RouterBias(nnx.Variable):
    """The balance bias b of a router: moved by the balance rule, never by the gradient."""


class Slots(nnx.Variable):
    """What the slots of a served mixture hold, and the shares they take: no layer casts them."""


def normal(
    shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, *, exact: bool = False
) -> nnx.Param:
    """A float32 parameter that `initialise` draws from N(0, std²), with the logical axes `axes`.

    Args:
        exact: whether layers compute with it in float32, whatever the activations are.
    """
    return _drawn(shape, axes, init_std=std, exact=exact, inputs=0)


def linear(
    shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, *, inputs: int = 1
) -> nnx.Param:
    """`normal`, the weight of an `ops.linear`: what the recipe computes in FP8.

    Args:
        inputs: axes that are contracted, the first ones but for experts.
    """
    return _drawn(shape, axes, init_std=std, exact=False, inputs=inputs)


def _drawn(shape, axes, **how) -> nnx.Param:
    zeros = jnp.zeros(shape, jnp.float32)
    return nnx.Param(zeros, out_sharding=axes, eager_sharding=False, **how)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...], cls=nnx.Param):
    """A float32 variable filled with `value`."""
    full = jnp.full(shape, value, jnp.float32)
    how = dict(out_sharding=axes, eager_sharding=False, init_std=0.0, exact=True, inputs=0)
    return cls(full, **how)


def slots(x: jax.Array) -> Slots:
    """Something of the slots that is whole on all devices."""
    how = dict(out_sharding=(None,) * x.ndim, eager_sharding=False, exact=True, inputs=0)
    return Slots(x, **how)


def stack(make: Callable[[], nnx.Module], n: int) -> nnx.Module:
    """`n` modules made by `make()` as one, every variable with a leading "layers" axis."""
    one = nnx.transform_metadata(lambda _: make(), in_axes=0, out_axes=0, partition="layers")
    return jax.vmap(one)(jnp.arange(n))


def initialise(module: nnx.Module, key: jax.Array) -> nnx.Module:
    """The module with every parameter drawn; constants keep their value.

    Parameters up to `POOLED` elements are cut from one stream of normals: sixty draws of their own
    took XLA 15 to 37 s to compile on two busy cores, this one 2 to 3 s. Larger ones are drawn each
    by itself, so that they are made where they are sharded.
    """
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    variables, treedef = jax.tree.flatten(params, is_leaf=_is_variable)
    small = [p for p in variables if p.init_std and p[...].size <= POOLED]
    pool, start = _normals(jax.random.fold_in(key, 0), sum(p[...].size for p in small)), 0
    for i, p in enumerate(variables):
        shape, size = p[...].shape, p[...].size
        if not p.init_std:
            continue
        if size <= POOLED:
            drawn, start = pool[start : start + size].reshape(shape), start + size
        else:
            drawn = jax.random.normal(jax.random.fold_in(key, i + 1), shape, jnp.float32)
        variables[i] = p.replace(p.init_std * drawn)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, variables), rest)


def use(variable: nnx.Variable, dtype: Any, *along: str) -> jax.Array:
    """A parameter as a layer computes with it: cast, and whole along its axes `along`.

    It is cast before it crosses devices, so bfloat16 halves what a layer's weights, and the
    gradients that come back, cost the network.

    Args:
        variable: of a module, or of one layer inside a stack's scan.
        dtype: of the activations.
        along: logical axes to be made whole; `parallel.weights.WHOLE` if none is named.
    """
    x, axes = variable[...].astype(dtype), _axes(variable)
    for axis in along or WHOLE:
        if axis in axes:
            x = gather(x, *axes, along=axis)
    return x


def operand(variable: nnx.Variable, dtype: Any, fp8: FP8 | None) -> jax.Array | Blocks:
    """`use` for `ops.linear`: FP8 is made of the float32 weight itself, which gets its gradient so.

    It is made before the weight crosses devices, if it does. What lies in blocks already is handed
    on.
    """
    held, axes = variable[...], _axes(variable)
    if fp8 is None:
        return use(variable, dtype)
    if isinstance(held, Blocks):
        return held.here
    if cut := cut_of(axes, variable.inputs, fp8.block):
        return crossed(held.astype(jnp.float32), cut)
    return use(variable, jnp.float32)


def whole(variable: nnx.Variable, dtype: Any) -> jax.Array:
    """A parameter whole along every axis, float32: for the embedding and the head.

    Where it crosses devices it is rounded to `dtype`, which is what it is used in; what many tokens
    do to its gradient is summed in float32 before that is rounded and crosses devices in turn.
    """
    named = [axis for axis in variable.out_sharding if axis is not None]
    if not carriers(*named):
        return variable[...]
    return use(variable, dtype, *named).astype(jnp.float32)


def specs(tree: Any) -> Any:
    """The tree with a `PartitionSpec` for each array: by the logical axes of its variable, under
    the mesh in force; an array that is in no variable is whole everywhere.

    None at the end is left out, as in the results of programs: `jit` compares specs word by word.

    Raises:
        ValueError: a checkpoint's FP8 blocks, or ours where a device's part would end inside one.
    """
    found = []
    for x in jax.tree.leaves(tree, is_leaf=_is_variable):
        if not _is_variable(x):
            found.append(PartitionSpec())
        elif len(jax.tree.leaves(x)) == 1:
            found.append(_trimmed(spec(*_axes(x))))
        else:
            found += [_trimmed(_blocks_spec(x))] * 2  # values and scales
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _blocks_spec(x: nnx.Variable) -> PartitionSpec:
    held = x[...]
    if isinstance(held, Blocks):
        where = blocks_spec(_axes(x), held.own, held.inputs, held.block)
        if where is not None:
            return where
    raise ValueError(
        "weights in these FP8 blocks cannot be cut over devices: use the model they were made of, "
        "or open the checkpoint with dtype 'bfloat16' or 'float32'"
    )


def _trimmed(where: PartitionSpec) -> PartitionSpec:
    last = max((i + 1 for i, names in enumerate(where) if names), default=0)
    return PartitionSpec(*where[:last])


def as_used(module: nnx.Module) -> nnx.Module:
    """The module with its parameters in what layers compute with: to be held where none is trained.

    Nothing that is computed with it differs, as every layer would cast them so. Loops that read all
    weights at every turn are spared the cast, and half of the traffic. FP8 is made of float32.
    """
    cfg = module.cfg
    if cfg.fp8.enabled:
        return module
    cast = lambda x: x if x.exact else x.replace(x[...].astype(cfg.dtype))  # noqa: E731
    return jax.tree.map(cast, module, is_leaf=_is_variable)


def resident(module: nnx.Module) -> nnx.Module:
    """`as_used`, and by the recipe with the weights of its products in blocks.

    Nothing that is computed with it differs, as every pass would make the same blocks; but of a
    checkpoint's blocks, whose scales are then those that were stored, not those of the values.

    On a mesh it is for the inside of a program, with the rules in force by which the weights lie;
    those of which a device's part would end inside a block stay as they are.
    """
    cfg = module.cfg
    if not cfg.fp8.enabled:
        return as_used(module)
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1

    def one(x: nnx.Variable) -> nnx.Variable:
        if isinstance(x[...], Blocks):
            return x
        if not x.inputs:
            return x if x.exact else x.replace(x[...].astype(cfg.dtype))
        axes = x.out_sharding
        if alone:
            own = len([axis for axis in axes if axis not in ("layers", "expert")])
            return x.replace(_in_blocks(x[...], own, x.inputs, cfg.fp8.block))
        made = stored(x[...], axes, x.inputs, cfg.fp8.block)
        return x if made is None else x.replace(made)

    return jax.tree.map(one, module, is_leaf=_is_variable)


# Each weight by itself: no two are held twice, and what stays as it is is not copied.
_in_blocks = jax.jit(in_blocks, static_argnums=(1, 2, 3))


def has_blocks(module: nnx.Module) -> bool:
    """Whether it is `resident` by the recipe: it decodes, and cannot be saved."""
    return any(isinstance(variable.get_value(), Blocks) for variable in leaves(module).values())


def all_in_blocks(tree: Any) -> bool:
    """Whether all weights of the recipe's products are in blocks already."""
    variables = filter(_is_variable, jax.tree.leaves(tree, is_leaf=_is_variable))
    return all(isinstance(x.get_value(), Blocks) for x in variables if x.inputs)


def leaves(module: nnx.Module) -> dict[str, nnx.Variable]:
    """{dotted path, as `moe_layers.attention.w_uk`: variable} of a module."""
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.state(module), is_leaf=_is_variable)
    return {_dotted(path): variable for path, variable in flat}


def filled(module: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """The module with the value of every variable replaced, by dotted path."""
    graphdef, state = nnx.split(module)
    put = lambda path, variable: variable.replace(values[_dotted(path)])  # noqa: E731
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(put, state, is_leaf=_is_variable))


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Logical axes; of one layer inside a stack's scan without "layers"."""
    axes = variable.out_sharding
    return axes[len(axes) - len(variable.shape) :]


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in path)


def _normals(key: jax.Array, n: int, chunk: int = 4096) -> jax.Array:
    """[≥ n] standard normals, drawn a chunk at a time so that one small loop is compiled."""
    keys = jax.random.split(key, max(math.ceil(n / chunk), 1))
    return jax.lax.map(lambda k: jax.random.normal(k, (chunk,), jnp.float32), keys).reshape(-1)
