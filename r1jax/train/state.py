# SPDX-License-Identifier: Apache-2.0
"""`TrainState`: one tree that trains, rolls out and is saved; and the update trainers share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from r1jax import optim
from r1jax.nn.param import RouterBias, initialise, specs
from r1jax.ops.alike import flat, shaped
from r1jax.ops.routing import balance_bias
from r1jax.sharding import kept

FADING = 0.9  # weight of loads after one update more
POOLED = 1 << 22  # values of gradients that are put together for their norm


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters, router biases and optimizer moments; `graphdef` makes the module of them."""

    step: jax.Array  # int32, optimizer updates done
    params: nnx.State
    router: nnx.State
    opt: optax.OptState
    graphdef: nnx.GraphDef = field(metadata=dict(static=True))
    load: jax.Array | None = None  # [L, E] tokens of each expert lately; None: not counted

    def model(self, params: nnx.State | None = None) -> nnx.Module:
        """The module, with other parameters of the same shape if given."""
        return nnx.merge(self.graphdef, self.params if params is None else params, self.router)

    def slim(self) -> "TrainState":
        """Without the optimizer: what samples, is evaluated, and starts the next stage."""
        return TrainState(self.step, self.params, self.router, (), self.graphdef, self.load)


class Controls(NamedTuple):
    """What changes from step to step without a new compilation, scalars float32."""

    learning_rate: jax.Array | float
    bias_speed: jax.Array | float  # γ of the balance rule


def create(
    make: Callable[[], nnx.Module],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
) -> TrainState:
    """A fresh state of the module that `make()` builds, its parameters drawn where they lie."""

    @jax.jit
    def init(key):
        graphdef, params, router = nnx.split(initialise(make(), key), nnx.Param, RouterBias)
        return TrainState(jnp.int32(0), params, router, optimizer.init(params), graphdef)

    return _where_it_lies(init, key)


def _where_it_lies(make: Callable, given: Any) -> TrainState:
    """`make(given)`, jitted; on a mesh each array is made on the devices that will hold it."""
    if jax.sharding.get_abstract_mesh().empty:
        return make(given)
    return jax.jit(make, out_shardings=specs(jax.eval_shape(make, given)))(given)


def laid(state: TrainState) -> TrainState:
    """A `PartitionSpec` for each array of a state: parameters, their moments and router biases by
    their logical axes, under the mesh in force."""
    return specs(state)


def restart(
    state: TrainState, optimizer: optax.GradientTransformation, *, counted: bool = False
) -> TrainState:
    """A copy of the weights with a fresh optimizer: how a stage begins, its state being donated.

    Args:
        counted: whether the loads of experts are kept, as copies of them want it.
    """

    @jax.jit
    def fresh(weights):
        params, router = jax.tree.map(jnp.copy, weights)
        load = no_load(router) if counted else None
        opt = optimizer.init(params)
        return TrainState(jnp.int32(0), params, router, opt, state.graphdef, load)

    return _where_it_lies(fresh, (state.params, state.router))


def no_load(router: nnx.State) -> jax.Array:
    """[L, E] zeros: a row for each router bias."""
    biases = jax.tree.leaves(router)
    rows = sum(bias.shape[0] if bias.ndim == 2 else 1 for bias in biases)
    return jnp.zeros((rows, biases[0].shape[-1]), jnp.float32)


def accumulate(loss_fn: Callable, params: nnx.State, micro_batches: Any) -> tuple[Any, Any]:
    """Sums gradients and metrics of `loss_fn(params, micro_batch) -> (loss, metrics)` over a scan.

    The loss must already carry whole-batch weights, so that the sum over micro-batches *is* the
    loss of the whole batch.

    Args:
        micro_batches: a pytree with a leading axis of micro-batches.

    Returns:
        (gradients, metrics), each summed.
    """

    def one(params, batch):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        return grads, metrics

    first = jax.tree.map(lambda x: x[0], micro_batches)
    if jax.tree.leaves(micro_batches)[0].shape[0] == 1:
        return one(params, first)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, params, first))

    def body(total, batch):
        return jax.tree.map(jnp.add, total, one(params, batch)), None

    return jax.lax.scan(body, zero, micro_batches)[0]


def update(
    state: TrainState,
    grads: nnx.State,
    load_LE: jax.Array,
    controls: Controls,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update and one move of the router biases.

    A gradient with NaN or Inf in it changes nothing but the step count and is reported as
    `skipped` = 1.

    Args:
        load_LE: [L, E] expert loads over the whole batch, in the order of the router biases:
            the layers of the stack, then the MTP module if it ran.
        optimizer: treats each value by itself, but for the norm that it is told.
    """
    grads, params, opt = flat((grads, state.params, state.opt))
    norm = _norm(jax.tree.leaves(grads))
    good = jnp.isfinite(norm)
    optimizer = optax.with_extra_args_support(optimizer)
    updates, moved = optimizer.update(grads, opt, params, grad_norm=norm)
    moved = optim.apply(params, updates, jnp.asarray(controls.learning_rate)), moved
    router = balance(state.router, load_LE, controls.bias_speed)
    keep = lambda new, old: jax.tree.map(  # noqa: E731
        lambda n, o: jnp.where(good, n, o), new, old
    )
    params, opt = shaped(keep(moved, (params, opt)), (state.params, state.opt))
    state = TrainState(
        state.step + 1,
        params,
        keep(router, state.router),
        opt,
        state.graphdef,
        None if state.load is None else keep(_lately(state.load, load_LE), state.load),
    )
    state = kept(state, laid(state))
    return state, {"grad_norm": norm, "skipped": 1.0 - good.astype(jnp.float32)}


def _lately(load_LE: jax.Array, new_LE: jax.Array) -> jax.Array:
    """Loads of which each update counts `FADING` times what the next one does."""
    missing = len(load_LE) - len(new_LE)  # of the MTP module's router, where it did not run
    return FADING * load_LE + jnp.pad(new_LE, ((0, missing), (0, 0)))


def _norm(gradients: list[jax.Array]) -> jax.Array:
    """The global norm: of small vectors by one sum."""
    if all(g.ndim == 1 for g in gradients) and sum(g.size for g in gradients) <= POOLED:
        gradients = [jnp.concatenate(gradients)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradients))


def balance(router: nnx.State, load_LE: jax.Array, speed: jax.Array | float) -> nnx.State:
    """`ops.routing.balance_bias` on every router bias; rows of `load_LE` go in tree order."""
    leaves, treedef = jax.tree.flatten(router)
    moved, start = [], 0
    for bias in leaves:
        count = bias.shape[0] if bias.ndim == 2 else 1
        if start + count > load_LE.shape[0]:  # a router that did not run, the MTP module's
            moved.append(bias)
            continue
        load = load_LE[start : start + count].reshape(bias.shape)
        moved.append(balance_bias(bias, load, speed))
        start += count
    return jax.tree.unflatten(treedef, moved)
