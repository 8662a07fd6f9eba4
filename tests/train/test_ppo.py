# SPDX-License-Identifier: Apache-2.0
"""The PPO steps: against plain loops, and the properties that such steps break."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1jax.config import PPOUpdateConfig
from r1jax.nn.param import RouterBias
from r1jax.nn.value import trunk_of, valued
from r1jax.rl.rollout import rows_of
from r1jax.train.ppo import ActorCritic, estimates, policy_of, ppo_step, shared_ppo_step
from r1jax.train.state import Controls, TrainState
from tests.nn import tiny as models
from tests.train import tiny
from tests.train.test_grpo import FLOAT32, NEW, REWARD, SUMS, drawn

ONE = PPOUpdateConfig(beta=0.1, lam=0.9, gamma=0.97)
PIECES = PPOUpdateConfig(beta=0.1, lam=0.9, gamma=0.97, micro_batches=4)
MANY = PPOUpdateConfig(beta=0.1, minibatches=2, micro_batches=2, epochs=2)


def state_of(module):
    graphdef, params, router = nnx.split(module, nnx.Param, RouterBias)
    params, router = nnx.clone(params), nnx.clone(router)
    return TrainState(jnp.int32(0), params, router, tiny.KEEP_GRADIENT.init(params), graphdef)


def critic(seed=5):
    """A critic of its own: another model's trunk with a drawn head."""
    return state_of(valued(trunk_of(models.model(tiny.DEEPSEEK, seed)), jax.random.key(1), std=0.3))


def shared():
    """The policy itself with a drawn head."""
    return state_of(valued(models.model(tiny.DEEPSEEK), jax.random.key(1), std=0.3))


@functools.cache
def own_step(cfg):
    def step(both, ref, rollout, reward_B, controls, *, temperature):
        return ppo_step(
            both, ref, rollout, reward_B, controls, temperature=temperature, cfg=cfg,
            optimizer=tiny.KEEP_GRADIENT, value_optimizer=tiny.KEEP_GRADIENT,
        )  # fmt: skip

    return jax.jit(tiny.traced_once(step))


@functools.cache
def shared_step(cfg, value_weight):
    def step(state, ref, rollout, reward_B, controls, *, temperature):
        return shared_ppo_step(
            state, ref, rollout, reward_B, controls, temperature=temperature, cfg=cfg,
            optimizer=tiny.KEEP_GRADIENT, value_weight=value_weight,
        )  # fmt: skip

    return jax.jit(tiny.traced_once(step))


def after(cfg=ONE, *, reward=REWARD, lr=0.0, value_lr=0.0, temperature=1.0, rollout=None, own=None):
    """((actor, critic), metrics) after a step; the reference is another model."""
    both = ActorCritic(tiny.state(), own or critic())
    controls = ActorCritic(*(Controls(np.float32(x), np.float32(0)) for x in (lr, value_lr)))
    rollout = drawn() if rollout is None else rollout
    reference = tiny.state(seed=1).params
    temperature = np.float32(temperature)
    return own_step(cfg)(both, reference, rollout, reward, controls, temperature=temperature)


@jax.jit
def passes(model, head, rows, tokens_BT):
    """Log-probabilities and values of the completions from whole logits."""
    hidden_BTD = model(*rows).hidden_BTD[:, -NEW - 1 : -1]
    logp_BTN = jax.nn.log_softmax(hidden_BTD @ head)
    return jnp.take_along_axis(logp_BTN, tokens_BT[..., None], -1)[..., 0], hidden_BTD


def by_hand(r, policy, reference, value_BT, cfg):
    """Whitened advantages and targets, token by token in numpy."""
    head = policy.head_DN()
    logp = np.asarray(passes(policy, head, rows_of(r), r.tokens_BT)[0], np.float64)
    ref = np.asarray(passes(reference, reference.head_DN(), rows_of(r), r.tokens_BT)[0])
    advantage, target = np.zeros(logp.shape), np.zeros(logp.shape)
    for i, length in enumerate(r.mask_BT.sum(1).astype(int)):
        after_value = after_advantage = 0.0
        for t in reversed(range(length)):
            reward = -cfg.beta * (logp[i, t] - ref[i, t]) + (REWARD[i] if t == length - 1 else 0)
            delta = reward + cfg.gamma * after_value - value_BT[i, t]
            after_advantage = delta + cfg.gamma * cfg.lam * after_advantage
            after_value = value_BT[i, t]
            advantage[i, t], target[i, t] = after_advantage, after_advantage + value_BT[i, t]
    real = advantage[r.mask_BT > 0]
    return (advantage - real.mean()) / real.std() * r.mask_BT, target, logp


def test_the_step_with_its_own_critic_is_the_one_by_hand():
    """Gradients of both and the figures, from GAE in numpy and losses written out."""
    r = drawn()
    (actor, value), metrics = after(ONE, lr=0.1, value_lr=0.1)
    policy, own = tiny.state(), critic()

    def value_of(params):
        model = own.model(params)
        hidden = passes(model.decoder, jnp.zeros((8, 2)), rows_of(r), r.tokens_BT * 0)[1]
        return hidden @ model.value_head[...] + model.value_bias[...]

    old = np.asarray(jax.jit(value_of)(own.params), np.float64)
    reference = policy.model(tiny.state(seed=1).params)  # the router bias is the policy's
    advantage, target, _ = by_hand(r, policy.model(), reference, old, ONE)
    tokens = r.mask_BT.sum()

    def policy_loss(params):
        model = policy.model(params)
        logp = passes(model, model.head_DN(), rows_of(r), r.tokens_BT)[0]
        return -(logp * advantage * r.mask_BT).sum() / tokens  # on policy the ratio is 1

    def critic_loss(params):
        return 0.5 * (jnp.square(value_of(params) - target) * r.mask_BT).sum() / tokens

    chex.assert_trees_all_close(
        actor.opt.trace, jax.jit(jax.grad(policy_loss))(policy.params), rtol=FLOAT32, atol=FLOAT32
    )
    loss, grads = jax.jit(jax.value_and_grad(critic_loss))(own.params)
    chex.assert_trees_all_close(value.opt.trace, grads, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(metrics["value_loss"], loss, rtol=FLOAT32)
    rest, spread = ((target - old)[r.mask_BT > 0], target[r.mask_BT > 0])
    np.testing.assert_allclose(
        metrics["explained_variance"], 1 - rest.var() / spread.var(), rtol=1e-3
    )
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, own.params, grads)
    chex.assert_trees_all_close(value.params, moved, rtol=FLOAT32, atol=FLOAT32)


def test_what_a_rollout_leaves_for_its_updates():
    """The old values are those before the first update: later ones are clipped around them."""
    rng = np.random.default_rng(0)
    old, ref, value = (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(3))
    mask = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
    batch = {"mask": mask, "old_logp": old, "ref_logp": ref}
    found = estimates(batch, value, np.array([1.0, 0.0], np.float32), PPOUpdateConfig(beta=0.5))
    np.testing.assert_array_equal(found["old_value"], value * mask)
    np.testing.assert_allclose(found["kl"], (old - ref) * mask, rtol=FLOAT32)


@pytest.mark.slow
def test_micro_batches_are_one_batch():
    whole, pieces = (after(cfg, lr=0.1, value_lr=0.1) for cfg in (ONE, PIECES))
    chex.assert_trees_all_close(pieces, whole, rtol=SUMS, atol=SUMS)


@pytest.mark.slow
def test_at_learning_rate_0_every_ratio_is_1():
    """Over minibatches and epochs, with a critic that does move."""
    (actor, _), metrics = after(MANY, value_lr=0.1, temperature=0.7, rollout=drawn(temperature=0.7))
    assert metrics["ratio_error"] < FLOAT32
    assert metrics["clip_fraction"] == 0
    assert metrics["sampler_error"] < FLOAT32  # the temperature is the sampler's
    chex.assert_trees_all_equal(actor.params, tiny.state().params)
    assert actor.step == 4


def test_a_critic_that_is_not_a_number_moves_nothing_and_is_counted():
    """Its values make the advantages: neither update is done, and both are counted."""
    own = critic()
    own.params["value_bias"] = own.params["value_bias"].replace(jnp.float32(np.nan))
    (actor, value), metrics = after(ONE, lr=0.1, value_lr=0.1, own=own)
    assert metrics["skipped"] == 2
    chex.assert_trees_all_equal(actor.params, tiny.state().params)
    chex.assert_trees_all_equal(value.params, own.params)
    for state in (actor, value):
        chex.assert_tree_all_finite((state.opt, state.router))


@pytest.mark.slow
def test_a_shared_trunk_with_no_value_weight_has_the_policy_gradient_of_ppo():
    """The same values from a critic of its own, and the policy's gradient is the same."""
    r, both = drawn(), shared()
    own = state_of(valued(trunk_of(models.model(tiny.DEEPSEEK)), jax.random.key(1), std=0.3))
    controls = Controls(np.float32(0), np.float32(0))
    reference = tiny.state(seed=1).params
    ref_shared = both.params.__class__(dict(both.params) | {"decoder": reference})
    temperature = np.float32(1.0)
    joint, metrics = shared_step(ONE, 0.0)(
        both, ref_shared, r, REWARD, controls, temperature=temperature
    )
    pair, own_metrics = own_step(ONE)(
        ActorCritic(tiny.state(), own), reference, r, REWARD, ActorCritic(controls, controls),
        temperature=temperature,
    )  # fmt: skip
    chex.assert_trees_all_close(joint.opt.trace["decoder"], pair.actor.opt.trace, atol=SUMS)
    for name in ("loss", "kl", "value_loss", "explained_variance", "entropy", "sampler_error"):
        np.testing.assert_allclose(metrics[name], own_metrics[name], rtol=FLOAT32, err_msg=name)
    assert float(jnp.abs(joint.opt.trace["value_head"][...]).max()) == 0.0
    chex.assert_trees_all_equal(policy_of(joint).params, tiny.state().params)


def test_a_shared_head_learns():
    controls = Controls(np.float32(0), np.float32(0))
    state, _ = shared_step(ONE, 0.5)(
        shared(), shared().params, drawn(), REWARD, controls, temperature=np.float32(1)
    )
    assert float(jnp.abs(state.opt.trace["value_head"][...]).max()) > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_without_a_reward_teaches_nothing(bad):
    """Its tokens have no advantage and its value is its own target; the others are as before."""
    reward = REWARD.copy()
    reward[2] = bad
    (actor, value), metrics = after(ONE, reward=reward)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((actor.opt.trace, value.opt.trace)))
    np.testing.assert_allclose(metrics["reward"], np.delete(REWARD, 2).mean(), rtol=1e-6)
    assert metrics["skipped"] == 0
