# SPDX-License-Identifier: Apache-2.0
"""The three programs that a pod is planned for, ready to be compiled: nothing is allocated."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax import optim
from r1jax.config import PlanConfig
from r1jax.infer import decode
from r1jax.infer.redundant import served
from r1jax.infer.sample import sample
from r1jax.nn.build import build
from r1jax.nn.count import decode_flops, forward_flops, train_flops
from r1jax.nn.param import RouterBias, resident
from r1jax.rl.rollout import Rollout
from r1jax.sharding import DECODING, RULES, Rules, ruled, spec
from r1jax.train.grpo import grpo_step
from r1jax.train.objective import objective_of
from r1jax.train.state import Controls, TrainState, laid
from r1jax.train.supervised import supervised_step

WHAT = ("train", "grpo", "decode")


class Job(NamedTuple):
    """A jitted program and its abstract arguments, each laid out on the mesh.

    Attributes:
        run: jitted.
        args, kwargs: of the call.
        parts: what the arguments hold: {"parameters": tree, …}.
        tokens: that a run reads or makes, over all devices.
        model_flops: arithmetic that the model asks for, nothing computed twice, over all devices.
    """

    run: Callable
    args: tuple
    kwargs: dict[str, Any]
    parts: dict[str, Any]
    tokens: int
    model_flops: float

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of each part on one device."""
        return {name: device_bytes(tree) for name, tree in self.parts.items()}


def make(what: str, cfg: PlanConfig, mesh: Mesh) -> Job:
    """One of `WHAT`, under the mesh that is set."""
    makers = {"train": _train, "grpo": _grpo, "decode": _decode}
    return makers[what](cfg, mesh)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of laid out arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def abstract_state(
    cfg: PlanConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, held: bool = False
) -> TrainState:
    """The training state as shapes that lie where the rules in force put them.

    Args:
        held: parameters are as decoding holds them, see `nn.param.resident`.
    """

    def make_state():
        model = resident(build(cfg.model)) if held else build(cfg.model)
        graphdef, params, router = nnx.split(model, nnx.Param, RouterBias)
        return TrainState(jnp.int32(0), params, router, optimizer.init(params), graphdef)

    state = jax.eval_shape(make_state)
    return _placed(state, laid(state), mesh)


def _placed(tree: Any, where: Any, mesh: Mesh) -> Any:
    """A tree of shapes with the shardings of a tree of specs."""
    put = lambda x, s: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=NamedSharding(mesh, s)
    )
    return jax.tree.map(put, tree, where)


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*axes)))


def _scalars(mesh: Mesh) -> Controls:
    one = _array(mesh, (), jnp.float32)
    return Controls(one, one)


def _train(cfg: PlanConfig, mesh: Mesh) -> Job:
    optimizer = optim.adamw(cfg.optim)
    state = abstract_state(cfg, optimizer, mesh)
    rows = cfg.rows_per_device * mesh.size
    shape = (cfg.micro_batches, rows // cfg.micro_batches, cfg.length)
    of = lambda dtype: _array(mesh, shape, dtype, None, "batch", "length")  # noqa: E731
    names = ("tokens", "targets", "positions", "segments")
    batch = {name: of(jnp.int32) for name in names} | {"mask": of(jnp.float32)}
    step = functools.partial(supervised_step, optimizer=optimizer, mtp_weight=cfg.mtp_weight)
    tokens = rows * cfg.length
    return Job(
        jax.jit(step, donate_argnums=0),
        (state, batch, _scalars(mesh)),
        {},
        _state_parts(state) | {"batch": batch},
        tokens,
        tokens * train_flops(cfg.model, cfg.length),
    )


def _state_parts(state: TrainState) -> dict[str, Any]:
    return {"parameters": (state.params, state.router), "optimizer": state.opt}


def _grpo(cfg: PlanConfig, mesh: Mesh) -> Job:
    optimizer = optim.adamw(cfg.grpo.optim)
    state = abstract_state(cfg, optimizer, mesh)
    prompts, rows = cfg.grpo.prompts, cfg.grpo.prompts * cfg.grpo.group_size
    prompt, new = cfg.sampling.prompt_length, cfg.sampling.max_new_tokens
    of = lambda *shape_dtype: _array(mesh, *shape_dtype, "batch", None)  # noqa: E731
    rollout = Rollout(
        # Prompts are few: they lie on all devices.
        prompt_PS=_array(mesh, (prompts, prompt), jnp.int32),
        prompt_valid_PS=_array(mesh, (prompts, prompt), bool),
        tokens_BT=of((rows, new), jnp.int32),
        mask_BT=of((rows, new), jnp.float32),
        logp_BT=of((rows, new), jnp.float32),
        behaviour_logp_BT=of((rows, new), jnp.float32),
        ended_B=_array(mesh, (rows,), bool, "batch"),
    )
    step = functools.partial(grpo_step, cfg=cfg.grpo.update, optimizer=optimizer)
    reward_B = _array(mesh, (rows,), jnp.float32)
    reference = state.params if cfg.grpo.update.beta else None
    return Job(
        jax.jit(step, donate_argnums=0),
        (state, reference, rollout, reward_B, _scalars(mesh)),
        {"temperature": _array(mesh, (), jnp.float32)},
        _state_parts(state) | {"reference": reference, "batch": rollout},
        rows * (prompt + new),
        rows * _grpo_flops(cfg),
    )


def _grpo_flops(cfg: PlanConfig) -> float:
    """Of one row: reference and old policy once, where they are needed, forward and backward of the
    policy an epoch; the head on completion tokens alone."""
    length, update = cfg.sampled_length, cfg.grpo.update
    head, held = 2 * cfg.model.vocab_size * cfg.model.hidden_size, update.beta > 0
    forward = length * (forward_flops(cfg.model, length) - head)
    forward += cfg.sampling.max_new_tokens * head
    old = update.minibatches * update.epochs > 1 or (objective_of(update).kl_in_reward and held)
    still = held + old
    return forward * (still + 3 * update.epochs)


def _decode(cfg: PlanConfig, mesh: Mesh) -> Job:
    """One token for every row of a GRPO batch, at the end of its context, with the weights where
    `sampling.layout` holds them."""
    if cfg.sampling.layout == "training":
        return _token(cfg, mesh, RULES)
    with ruled(DECODING):
        return _token(cfg, mesh, DECODING)


def _token(cfg: PlanConfig, mesh: Mesh, rules: Rules) -> Job:
    """`_decode` under the rules in force."""
    state = abstract_state(cfg, optax.identity(), mesh, held=rules is DECODING).slim()
    if cfg.sampling.redundant_experts:
        state = _with_copies(state, cfg, mesh)
    prompts, rows = cfg.grpo.prompts, cfg.grpo.prompts * cfg.grpo.group_size
    length, new = cfg.sampling.prompt_length, cfg.sampling.max_new_tokens
    tokens_PS, valid_PS = (jax.ShapeDtypeStruct((prompts, length), d) for d in (jnp.int32, bool))
    model = state.model()

    def caches(model, *prompts: jax.Array):
        prompt = decode.by_rows(model, decode.prefill(model, *prompts), rows)
        return prompt, decode.empty_cache(model, prompt, rows, new)

    lie = lambda x, axes: _placed(x, _fitting(mesh, x.shape, axes), mesh)  # noqa: E731
    (hidden_PD, entries, valid_PS), own = jax.eval_shape(caches, model, tokens_PS, valid_PS)
    entries, own = (decode.map_entries(lie, model, cache) for cache in (entries, own))
    row = ("batch", None)
    prompt = decode.Prompt(lie(hidden_PD, row), entries, lie(valid_PS, row))
    vector = lambda dtype: _array(mesh, (rows,), dtype, "batch")  # noqa: E731
    chance = (vector(jnp.float32), _array(mesh, (2,), jnp.uint32))
    return Job(
        jax.jit(functools.partial(_next_token, rules=rules), donate_argnums=2),
        (state, prompt, (own, _array(mesh, (), jnp.int32)), vector(jnp.int32), chance),
        {},
        {"parameters": (state.params, state.router), "cache": (prompt, own)},
        rows,
        rows * decode_flops(cfg.model, cfg.sampled_length),
    )


def _with_copies(state: TrainState, cfg: PlanConfig, mesh: Mesh) -> TrainState:
    """The state with redundant experts in it, as decoding holds them."""

    def copied(state, load_LE):
        model = served(state.model(), load_LE, redundant=cfg.sampling.redundant_experts)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        return TrainState(state.step, params, rest, (), graphdef)

    layers = cfg.model.num_layers - cfg.model.first_k_dense
    load = jax.ShapeDtypeStruct((layers, cfg.model.moe.n_routed_experts), jnp.float32)
    held = jax.eval_shape(copied, state, load)
    return _placed(held, laid(held), mesh)


def _fitting(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    """The spec of the axes, without what does not divide: fewer prompts than devices lie on all."""
    found = spec(*axes)
    even = []
    for whole, names in zip(shape, found, strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        pieces = math.prod(mesh.shape[n] for n in names)
        even.append(names if whole % pieces == 0 else None)
    return PartitionSpec(*even)


def _next_token(state: TrainState, prompt, cache, token_B, chance, *, rules: Rules):
    """What decoding does for each token: one cached step, the head, a draw.

    `cache` is the rows' own and the slot that is written, `chance` temperatures and a raw key.
    """
    with ruled(rules):
        return _drawn(state.model(), prompt, cache, token_B, chance)


def _drawn(model, prompt, cache, token_B, chance):
    (own, index), (temperature_B, noise) = cache, chance
    hidden_BD, own = decode.step(model, token_B, prompt, own, index)
    logits_BN = jnp.einsum(
        "bd,dn->bn",
        hidden_BD,
        model.head_DN().astype(hidden_BD.dtype),
        preferred_element_type=jnp.float32,
    )
    return sample(logits_BN, jax.random.wrap_key_data(noise), temperature_B), (own, index + 1)
