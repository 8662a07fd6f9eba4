# SPDX-License-Identifier: Apache-2.0
"""The GRPO step: against an unrolled reference, and the properties that such steps break."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import UpdateConfig
from r1jax.ops.routing import balance_bias
from r1jax.rl import grpo_loss, k3
from r1jax.rl.rollout import Rollout, rollout, rows_of
from r1jax.train.grpo import grpo_step, interleave
from r1jax.train.state import Controls
from tests.nn import tiny as models
from tests.train import tiny

PROMPTS, GROUP, NEW, EOS, PAD = 2, 4, 6, 1, 0
ROWS = PROMPTS * GROUP
BETA, GAMMA = 0.04, 0.01
ONE = UpdateConfig(beta=BETA)
PIECES = UpdateConfig(beta=BETA, micro_batches=4)
MANY = UpdateConfig(beta=BETA, minibatches=2, micro_batches=2, epochs=2)
REWARD = np.array([0.0, 0.25, 1.0, 0.5, 1.0, 0.0, 0.0, 0.75], np.float32)

# Sums of the same float32 numbers in another order.
SUMS = 1e-6
# The sampler decodes with a cache in the latent space, the reference keeps whole logits: other
# float32 programs for log-probabilities of logits up to 10 divided by 0.7.
FLOAT32 = 1e-4
# bfloat16 keeps 8 bits at each of a dozen roundings.
BFLOAT16 = 0.15


@functools.cache
def sampler(cfg, top_p):
    def run(model, prompt_PS, valid_PS, key, temperature_B):
        return rollout(
            model, prompt_PS, valid_PS, key, temperature_B,
            max_new_tokens=NEW, eos_ids=(EOS,), pad_id=PAD, top_p=top_p,
        )  # fmt: skip

    return jax.jit(run)


def drawn(cfg=tiny.DEEPSEEK, *, temperature=1.0, top_p=None) -> Rollout:
    """Completions by the model itself; the second prompt is padded on the left."""
    prompt, valid = models.tokens(0, PROMPTS, 4), np.array([[1, 1, 1, 1], [0, 0, 1, 1]], bool)
    temperature_B = np.full(ROWS, temperature, np.float32)
    out = sampler(cfg, top_p)(models.model(cfg), prompt, valid, jax.random.key(3), temperature_B)
    assert 0 < out.ended_B.sum() < ROWS  # some rows end, some are cut
    return jax.tree.map(np.asarray, out)


@functools.cache
def step(update):
    """The step, jitted, never donating, and traced once a program."""

    def one(state, ref_params, rollout, reward_B, controls, *, temperature):
        return grpo_step(
            state, ref_params, rollout, reward_B, controls,
            temperature=temperature, cfg=update, optimizer=tiny.KEEP_GRADIENT,
        )  # fmt: skip

    return jax.jit(tiny.traced_once(one))


def after(r=None, reward=REWARD, *, update=ONE, lr=0.0, gamma=0.0, temperature=1.0, **changes):
    """(state, metrics) after a step from the filled model, which is its own reference."""
    state = changes.get("state", tiny.state())
    reference = changes.get("reference", state.params)
    controls = Controls(np.float32(lr), np.float32(gamma))
    r = drawn() if r is None else r
    temperature = np.float32(temperature)
    return step(update)(state, reference, r, reward, controls, temperature=temperature)


# ------------------------------------------------------------------------- against the reference


@jax.jit
def logits(model, rows):
    """[B, T, N] logits of the completions, and the loads of the pass."""
    out = model(*rows)
    return out.hidden_BTD[:, -NEW - 1 : -1] @ model.head_DN(), out.stats.load


def logp_of(logits_BTN, tokens_BT, temperature):
    logp_BTN = jax.nn.log_softmax(logits_BTN / temperature)
    entropy_BT = -(jnp.exp(logp_BTN) * logp_BTN).sum(-1)
    return jnp.take_along_axis(logp_BTN, tokens_BT[..., None], -1)[..., 0], entropy_BT


@jax.jit
def reference_update(state, rows, part, temperature):
    """Gradient and figures of one update on some rows, all at once, whole logits and all."""
    tokens, mask, old, ref, advantage = part

    def loss(params):
        whole, load = logits(state.model(params), rows)
        logp, entropy = logp_of(whole, tokens, temperature)
        value, _ = grpo_loss(logp, old, ref, advantage, mask, beta=BETA)
        return value, (logp, entropy, load)

    (value, (logp, entropy, load)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    ratio, up = jnp.exp(logp - old), jnp.sign(advantage)[:, None]
    clipped = jnp.where(up > 0, ratio > 1.2, (up < 0) & (ratio < 0.8))
    sums = dict(ratio=ratio, kl=k3(logp, ref, old), entropy=entropy, clip_fraction=clipped)
    return grads, value, load, {k: (v * mask).sum() for k, v in sums.items()}


def reference_step(r, reference, *, update, lr, temperature):
    """The step as plain loops: numpy advantages, no micro-batches, gradient descent by hand."""
    reward_PG = REWARD.reshape(PROMPTS, GROUP)
    advantage_PG = (reward_PG - reward_PG.mean(1, keepdims=True)) / reward_PG.std(1, keepdims=True)
    rows, state = rows_of(r), tiny.state()
    whole, _ = logits(state.model(reference), rows)
    ref = logp_of(whole, r.tokens_BT, temperature)[0]
    losses, norms, figures, loads = [], [], [], []
    for pick in picked_rows(update):
        mask = r.mask_BT * pick[:, None]  # the other rows are there but empty
        part = (r.tokens_BT, mask, r.logp_BT, ref, advantage_PG.reshape(-1))
        some = rows._replace(segments_BL=rows.segments_BL * pick[:, None])
        grads, loss, load, sums = reference_update(state, some, part, np.float32(temperature))
        params = jax.tree.map(lambda p, g: p - lr * g, state.params, grads)
        bias = state.router["moe_layers"]["feed_forward"]["router"]["bias"]
        bias[...] = balance_bias(bias[...], load, GAMMA)
        state = dataclasses.replace(state, params=params)
        losses.append(loss)
        norms.append(np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads))))
        figures.append(sums)
        loads.append(load)
    tokens = r.mask_BT.sum() * update.epochs
    means = {k: sum(f[k] for f in figures) / tokens for k in figures[0]}
    return (
        state,
        grads,
        means | dict(loss=np.mean(losses), grad_norm=np.mean(norms), load=sum(loads)),
    )


def picked_rows(update):
    """Which rows each update sees: dealt out like cards, so that each sees every prompt."""
    minibatch = np.arange(ROWS) % update.minibatches
    return [minibatch == m for m in range(update.minibatches)] * update.epochs


@pytest.mark.parametrize(
    "update", [ONE, pytest.param(MANY, marks=pytest.mark.slow)], ids=["one", "many"]
)
def test_the_step_is_the_unrolled_one(update):
    """Parameters, biases, last gradient, metrics; with a reference that is another model."""
    r, reference = drawn(temperature=0.7), tiny.state(seed=1).params
    found, metrics = after(
        r, update=update, lr=0.1, gamma=GAMMA, temperature=0.7, reference=reference
    )
    expected, grads, means = reference_step(r, reference, update=update, lr=0.1, temperature=0.7)
    chex.assert_trees_all_close(found.params, expected.params, rtol=FLOAT32, atol=FLOAT32)
    chex.assert_trees_all_close(found.opt.trace, grads, rtol=FLOAT32, atol=FLOAT32)
    chex.assert_trees_all_close(found.router, expected.router, atol=SUMS)
    for name, mean in means.items():
        np.testing.assert_allclose(metrics[name], mean, rtol=FLOAT32, atol=FLOAT32, err_msg=name)
    assert metrics["kl"] > 0.1
    assert (found.step, metrics["skipped"]) == (update.epochs * update.minibatches, 0.0)
    if update is MANY:
        assert metrics["clip_fraction"] > 0.01  # the later updates are off-policy


def test_a_minibatch_has_rows_of_every_prompt():
    """As R1's 16 of 8,192 rollouts: one sample of each of 512 groups, however it is cut."""
    prompt_B = np.repeat(np.arange(512), 16)
    dealt = np.asarray(interleave(prompt_B, 16, 8))
    assert dealt.shape == (16, 8, 64)
    np.testing.assert_array_equal(np.sort(dealt.reshape(16, -1)), [np.arange(512)] * 16)
    once = np.asarray(interleave(np.arange(8192), 16, 8)).reshape(-1)
    np.testing.assert_array_equal(np.sort(once), np.arange(8192))


def test_micro_batches_are_one_batch():
    whole, pieces = (after(update=u, lr=0.1, gamma=GAMMA) for u in (ONE, PIECES))
    chex.assert_trees_all_close(pieces, whole, rtol=SUMS, atol=SUMS)
    chex.assert_trees_all_equal(pieces[1]["load"], whole[1]["load"])


# ------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.7, None), (1.0, None), (1.3, None), (1.0, 0.7)]
)
def test_the_ratio_is_one_at_learning_rate_zero(temperature, top_p):
    """At every temperature, truncated or not, in every minibatch and epoch."""
    r = drawn(temperature=temperature, top_p=top_p)
    before = tiny.state()
    new, metrics = after(r, update=MANY, temperature=temperature)
    chex.assert_trees_all_equal(new.params, before.params)
    np.testing.assert_allclose(metrics["ratio"], 1.0, atol=FLOAT32)
    assert metrics["ratio_error"] < SUMS
    assert metrics["clip_fraction"] == 0.0
    assert abs(metrics["kl"]) < SUMS  # the reference is the policy
    assert metrics["sampler_error"] < FLOAT32
    # It can be seen: another temperature than the sampler's is no longer the same policy.
    _, other = after(r, update=MANY, temperature=temperature * 1.1)
    assert other["sampler_error"] > 100 * FLOAT32


QWEN2_BF16 = models.dense_config(qwen2=True, dtype="bfloat16")
DEEPSEEK_BF16 = dataclasses.replace(tiny.DEEPSEEK, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "update"),
    [
        pytest.param(QWEN2_BF16, ONE, id="qwen2-one"),
        pytest.param(DEEPSEEK_BF16, MANY, id="deepseek-many"),
        pytest.param(QWEN2_BF16, MANY, id="qwen2-many"),
        pytest.param(DEEPSEEK_BF16, ONE, id="deepseek-one"),
    ],
)
def test_the_ratio_is_one_in_bfloat16(cfg, update):
    """Though the sampler, another program, rounds otherwise."""
    _, metrics = after(drawn(cfg), state=tiny.state(cfg), update=update)
    np.testing.assert_allclose(metrics["ratio"], 1.0, atol=SUMS)
    assert metrics["ratio_error"] < SUMS
    assert 0.0 < metrics["sampler_error"] < BFLOAT16


@pytest.mark.slow
def test_the_samplers_own_probabilities_weigh_what_is_learnt():
    """Truncated importance sampling: all tokens 1.5 times likelier under the trainer, then 4."""
    r, cfg = drawn(), UpdateConfig(beta=BETA, importance_cap=2.0)
    found = {}
    for times in (1.0, 1.5, 4.0):
        by_sampler = r._replace(behaviour_logp_BT=r.logp_BT - np.float32(np.log(times)))
        found[times] = after(by_sampler, update=cfg)[0].opt.trace
    for times, weight in ((1.5, 1.5), (4.0, 2.0)):
        expected = jax.tree.map(lambda g, w=weight: w * g, found[1.0])
        chex.assert_trees_all_close(found[times], expected, rtol=FLOAT32, atol=FLOAT32)
    chex.assert_trees_all_close(found[1.0], after(r)[0].opt.trace, rtol=FLOAT32, atol=FLOAT32)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(found[1.0])) > 0.01


@pytest.mark.slow
def test_each_token_is_weighed_by_how_far_the_sampler_was_behind():
    """Gradient and figures against numpy's weights of the sampler's own log-probabilities."""
    r, cap = drawn(), 1.5
    mu_BT = r.logp_BT + np.random.default_rng(0).normal(size=r.logp_BT.shape).astype(np.float32)
    behind = r._replace(behaviour_logp_BT=mu_BT)
    cfg = UpdateConfig(beta=BETA, importance_cap=cap)
    found, metrics = after(behind, update=cfg)
    mask = np.asarray(r.mask_BT, np.float64)
    whole, _ = logits(tiny.state().model(), rows_of(r))
    logp = np.asarray(logp_of(whole, r.tokens_BT, 1.0)[0], np.float64)
    weight = np.minimum(np.exp(logp - mu_BT), cap)
    assert 0.2 < metrics["truncated"] < 0.8
    np.testing.assert_allclose(metrics["importance"], (weight * mask).sum() / mask.sum(), rtol=1e-4)
    share = ((weight == cap) * mask).sum() / mask.sum()
    np.testing.assert_allclose(metrics["truncated"], share, rtol=1e-5)
    reward_PG = REWARD.reshape(PROMPTS, GROUP)
    advantage = (reward_PG - reward_PG.mean(1, keepdims=True)) / reward_PG.std(1, keepdims=True)
    each = jnp.float32(weight * advantage.reshape(-1, 1))
    grads = weighed_gradient(tiny.state(), rows_of(r), (r.tokens_BT, r.mask_BT, each))
    chex.assert_trees_all_close(found.opt.trace, grads, rtol=FLOAT32, atol=FLOAT32)


@jax.jit
def weighed_gradient(state, rows, part):
    """Σ over tokens of −A_t · ∇ log π, a sequence's mean, the sequences' mean; no clip, no KL."""
    tokens, mask, advantage_BT = part

    def loss(params):
        logp = logp_of(logits(state.model(params), rows)[0], tokens, 1.0)[0]
        return -((advantage_BT * logp * mask).sum(1) / mask.sum(1)).mean()

    return jax.grad(loss)(state.params)


def test_fractions_of_a_reward_survive():
    _, metrics = after()
    np.testing.assert_allclose(metrics["reward"], REWARD.mean())
    assert metrics["dead_groups"] == 0.0
    tenths, _ = after(reward=REWARD / 10)
    chex.assert_trees_all_close(tenths.opt.trace, after()[0].opt.trace, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_equal_rewards_give_no_gradient_and_are_counted(reward):
    new, metrics = after(reward=np.full(ROWS, reward, np.float32))
    assert metrics["dead_groups"] == 1.0
    assert metrics["grad_norm"] < SUMS  # what is left is the KL to itself
    _, half = after(reward=np.where(np.arange(ROWS) < GROUP, reward, REWARD))
    assert half["dead_groups"] == 0.5
    assert half["grad_norm"] > 1e-3


@pytest.mark.parametrize("unknown", [np.nan, np.inf])
def test_a_reward_that_is_not_known_counts_for_nothing(unknown):
    """No advantage, and the others' are those of the smaller group."""
    reward = REWARD.copy()
    reward[1] = unknown
    new, metrics = after(reward=reward)
    np.testing.assert_allclose(metrics["reward"], np.delete(reward, 1).mean(), rtol=1e-6)
    assert metrics["skipped"] == 0.0
    chex.assert_tree_all_finite(new.opt.trace)


def test_what_lies_outside_the_rows_is_never_looked_at():
    """Other pad tokens, the end token among them, before prompts and after ends: the same step."""
    r = drawn()
    other = r._replace(
        prompt_PS=np.where(r.prompt_valid_PS, r.prompt_PS, 7),
        tokens_BT=np.where(r.mask_BT > 0, r.tokens_BT, EOS),
        logp_BT=np.where(r.mask_BT > 0, r.logp_BT, np.nan),
    )
    assert (other.tokens_BT != r.tokens_BT).any()
    assert (other.prompt_PS != r.prompt_PS).any()
    chex.assert_trees_all_equal(after(other, gamma=GAMMA), after(r, gamma=GAMMA))


def test_a_reward_raises_what_it_rewards():
    """The end token itself, which is inside the mask, and whole completions."""
    r = drawn()
    tokens, mask = r.tokens_BT.copy(), r.mask_BT.copy()
    tokens[0], mask[0] = [EOS] + [PAD] * (NEW - 1), [1.0] + [0.0] * (NEW - 1)
    r = r._replace(tokens_BT=tokens, mask_BT=mask)

    def logp(state):
        return np.asarray(logp_of(logits(state.model(), rows_of(r))[0], tokens, 1.0)[0]) * mask

    before = logp(tiny.state())
    r = r._replace(logp_BT=before)
    for row in (0, 5):
        reward = (np.arange(ROWS) == row).astype(np.float32)
        raised = logp(after(r, reward, lr=0.02)[0]) - before
        lowered = logp(after(r, -reward, lr=0.02)[0]) - before
        assert raised[row].sum() > 1e-3
        assert lowered[row].sum() < -1e-3


def test_no_array_of_tokens_times_vocabulary():
    """The compiled step keeps far less than one float for each token and word: a few tiles."""
    rows, length, vocab = 128, 64, 8192
    cfg = models.dense_config(qwen2=True, vocab_size=vocab, num_layers=1)
    state, shape = tiny.state(cfg), jax.ShapeDtypeStruct
    f, i = (functools.partial(lambda dtype, *s: shape(s, dtype), d) for d in ("float32", "int32"))
    r = Rollout(
        i(32, 4), shape((32, 4), bool), i(rows, length), f(rows, length), f(rows, length),
        f(rows, length), shape((rows,), bool),
    )  # fmt: skip
    lowered = step(ONE).lower(state, state.params, r, f(rows), Controls(f(), f()), temperature=f())
    used = lowered.compile().memory_analysis().temp_size_in_bytes
    assert 0 < used < rows * length * vocab * 4 / 2.5
