# SPDX-License-Identifier: Apache-2.0
"""Training steps and rollouts on 8 devices are those on one, on every kind of mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from r1jax.config import MeshConfig, OptimConfig, UpdateConfig
from r1jax.nn.param import specs
from r1jax.optim import adamw
from r1jax.parallel import dispatch
from r1jax.parallel.mesh import make_mesh
from r1jax.rl.rollout import rollout
from r1jax.sharding import spec
from r1jax.train.grpo import grpo_step
from r1jax.train.state import Controls, restart
from r1jax.train.supervised import micro_batched, supervised_step
from tests.nn import tiny as models
from tests.train import tiny

# Sums of the same float32 numbers in another order, relative to the largest value of an array.
FLOAT32 = 1e-5
CONTROLS = Controls(np.float32(0.1), np.float32(0.01))
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# A dense layer, one with experts, one that predicts the second next token.
CFG = models.model_config(
    num_layers=2,
    vocab_size=14,
    mla=dataclasses.replace(models.model_config().mla, q_lora_rank=16, kv_lora_rank=8),
    moe=dataclasses.replace(models.model_config().moe, n_routed_experts=8, n_group=4),
)
# Buffers of two experts a token hold no load as skewed as this.
REMADE = dataclasses.replace(
    CFG, remat=True, moe=dataclasses.replace(CFG.moe, dispatch_pieces=2, dispatch_slack=1.0)
)
QWEN2 = models.dense_config(qwen2=True, vocab_size=14)


def on(mesh: MeshConfig, kind: AxisType):
    return jax.set_mesh(make_mesh(mesh, axis_type=kind))


def assert_same(found, expected):
    def same(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-3)
        assert error < FLOAT32, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(same, found, expected)


def skewed(state):
    """Every token of the batch chooses the experts 0 and 1, which one group holds."""
    bias = lambda x: jnp.zeros_like(x).at[..., :2].set(100.0)  # noqa: E731
    return dataclasses.replace(state, router=jax.tree.map(bias, state.router))


def supervised(cfg, state, batch):
    run = functools.partial(supervised_step, optimizer=tiny.KEEP_GRADIENT, mtp_weight=0.3)
    return jax.jit(run)(state, batch, CONTROLS)


def batches():
    return micro_batched(tiny.packed(rows=16, length=16), 2)


@functools.cache
def on_one_device(cfg, worst):
    state = tiny.state(cfg)
    return supervised(cfg, skewed(state) if worst else state, batches())


def check_supervised(mesh, kind=AUTO, cfg=CFG, *, worst=False, but=()):
    """Loss, gradient, loads, parameters, biases; what is cut stays cut.

    Args:
        but: metrics that may differ.
    """
    expected = on_one_device(cfg, worst)
    with on(mesh, kind):
        state = tiny.state(cfg)
        state = jax.device_put(skewed(state) if worst else state, specs(state))
        found = supervised(cfg, state, jax.device_put(batches(), spec(None, "batch", "length")))
        lies = jax.tree.map(lambda x: x.sharding.spec, found[0])
        wanted = specs(state)
    jax.tree.map(lambda a, b: _assert_lies(a, b), lies, wanted)
    assert_same(
        *((x[0], {k: v for k, v in x[1].items() if k not in but}) for x in (found, expected))
    )
    return found


def _assert_lies(found, wanted):
    trimmed = lambda s: tuple(s) + (None,) * (9 - len(s))  # noqa: E731
    assert trimmed(found) == trimmed(wanted)


def test_a_mesh_of_experts_positions_and_heads():
    check_supervised(MeshConfig(expert=2, context=2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        MeshConfig(fsdp=8),
        MeshConfig(expert=8),
        MeshConfig(expert=4, fsdp=2),
        MeshConfig(tensor=2, fsdp=4),
        MeshConfig(context=4, fsdp=2),
        MeshConfig(context=2, fsdp=2, tensor=2),
        MeshConfig(slices=2, data=2, fsdp=2),
        MeshConfig(slices=2, fsdp=2, expert=2),
        MeshConfig(expert=2, context=2, tensor=2),
    ],
    ids=lambda m: "_".join(f"{k}{v}" for k, v in m.sizes().items() if v > 1),
)
def test_every_mesh(mesh, kind):
    check_supervised(mesh, kind)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [CFG, REMADE], ids=["plain", "remat_pieces"])
def test_all_tokens_to_one_group(cfg):
    """The worst load; 16 · 12 tokens of two experts each, all on one of four ranks."""
    _, metrics = check_supervised(MeshConfig(expert=4, fsdp=2), cfg=cfg, worst=True)
    load_LE = np.asarray(metrics["load"])
    assert (load_LE[:, 2:] == 0).all()
    assert (load_LE[:, :2] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("worst", [False, True], ids=["even", "worst"])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(expert=8),
        MeshConfig(expert=4, fsdp=2),
        MeshConfig(expert=2, context=2, tensor=2),
    ],
    ids=["expert8", "expert4_fsdp2", "expert2_context2_tensor2"],
)
def test_the_way_of_tpus_is_the_same_step(mesh, worst, monkeypatch):
    """Exchanges in rounds, two pieces, what is sent beside what is computed."""
    on_one_device(REMADE, worst)
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    monkeypatch.setattr(dispatch, "FEW", 8)
    _, metrics = check_supervised(mesh, cfg=REMADE, worst=worst, but=("overflow",))
    assert not worst or metrics["overflow"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kept",
    [
        dict(remat_saved=("attention_out", "entry")),
        dict(remat_saved=("entry",), remat_offloaded=("layer_input",)),
    ],
    ids=["saved", "offloaded"],
)
def test_what_a_layer_keeps_changes_no_number(kept):
    check_supervised(MeshConfig(expert=4, fsdp=2), cfg=dataclasses.replace(CFG, remat=True, **kept))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=2, context=4)], ids=["tensor", "context"]
)
def test_a_dense_student(mesh):
    check_supervised(mesh, cfg=QWEN2)


def test_a_stage_starts_with_moments_that_lie_like_the_parameters():
    with on(MeshConfig(fsdp=4, expert=2), AUTO):
        state = tiny.state(CFG)
        new = restart(jax.device_put(state, specs(state)), adamw(OptimConfig()))
        jax.tree.map(lambda x, w: _assert_lies(x.sharding.spec, w), new, specs(new))
        assert optax.tree.get(new.opt, "mu")["embed"][...].sharding.spec == spec(None, "embed")
    np.testing.assert_array_equal(new.params["embed"][...], state.params["embed"][...])


@pytest.mark.slow
def test_adam_and_its_moments_in_bfloat16():
    """A second update, through the moments of the first, which lie as the parameters do."""
    optimizer = adamw(OptimConfig(moment_dtype="bfloat16"))
    run = jax.jit(functools.partial(supervised_step, optimizer=optimizer, mtp_weight=0.3))

    def twice(state, batch):
        for _ in range(2):
            state, metrics = run(state, batch, CONTROLS._replace(learning_rate=np.float32(1e-3)))
        return state, metrics

    state, _ = twice(tiny.state(CFG, optimizer=optimizer), batches())
    with on(MeshConfig(expert=4, fsdp=2), AUTO):
        other = tiny.state(CFG, optimizer=optimizer)
        other = jax.device_put(other, specs(other))
        other, _ = twice(other, jax.device_put(batches(), spec(None, "batch", "length")))
        moments = optax.tree.get(other.opt, "nu")
        assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype("bfloat16")}
        assert moments["embed"][...].sharding.spec == spec("vocab", "embed")
    # A gradient near zero may change its sign, and Adam's first steps are all of one length.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).mean(), other.params, state.params)
    assert max(jax.tree.leaves(moved)) < 1e-5


def drawn(cfg, model):
    """Completions of eight prompts, two rows each."""

    def run(model, prompt_PS, valid_PS, key, temperature_B):
        rules = dict(max_new_tokens=6, eos_ids=(1,), pad_id=0)
        return rollout(model, prompt_PS, valid_PS, key, temperature_B, **rules)

    valid = np.ones((8, 4), bool)
    valid[3, :2] = False
    prompt, temperature_B = models.tokens(0, 8, 4), np.ones(16, np.float32)
    return jax.jit(run)(model, prompt, valid, jax.random.key(3), temperature_B)


def reinforced(cfg, state, r):
    reward_B = np.random.default_rng(0).random(16).astype(np.float32)
    update = UpdateConfig(beta=0.04, micro_batches=2)

    def run(state, reference, r):
        how = dict(temperature=1.0, cfg=update, optimizer=tiny.KEEP_GRADIENT)
        return grpo_step(state, reference, r, reward_B, CONTROLS, **how)

    reference = tiny.state(cfg, seed=1).params  # the policy as its own has a loss of about 0
    reference = jax.device_put(reference, jax.tree.map(lambda x: x.sharding, state.params))
    return jax.jit(run)(state, reference, r)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(expert=4, fsdp=2), MeshConfig(fsdp=2, tensor=2, context=2)],
    ids=["experts", "tensor_context"],
)
def test_rollout_and_grpo_on_the_trainers_mesh(mesh, kind):
    """The same completions are drawn, and the same step is taken from them."""
    state = tiny.state(CFG)
    expected = jax.tree.map(np.asarray, drawn(CFG, state.model()))
    stepped = reinforced(CFG, state, expected)
    with on(mesh, kind):
        state = jax.device_put(state, specs(state))
        found = drawn(CFG, state.model())
        np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
        assert_same(found, expected)
        again = reinforced(CFG, state, found)
    # How far the sampler's program rounds otherwise than the trainer's: rounding on every mesh, and
    # nothing that two meshes could have in common.
    for _, metrics in (again, stepped):
        assert metrics.pop("sampler_error") < FLOAT32
    assert_same(again, stepped)
