# SPDX-License-Identifier: Apache-2.0
"""Properties every objective must have, checked over a table of all of them."""

import functools
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.rl import (
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    k3,
    output_grpo_loss,
    ppo_policy_loss,
    ratio_corrected,
    reinforce_loss,
    sft_loss,
    token_weights_constant_length,
    token_weights_sequence_mean,
    token_weights_sum,
    token_weights_token_mean,
)


def on_policy_loss(logp_BT, old_logp_BT, ref_logp_BT, advantage, mask_BT, **options):
    """`reinforce_loss` in the order of the others; the old policy has no part in it."""
    del old_logp_BT
    return reinforce_loss(logp_BT, advantage, mask_BT, ref_logp_BT=ref_logp_BT, **options)


# Every objective with the KL on, bounds that draws of spread 0.5 reach, and its own reduction.
CLIP = {"clip_low": 0.2, "clip_high": 0.28, "beta": 0.04}
OBJECTIVES = {
    "grpo": functools.partial(grpo_loss, **CLIP),
    "grpo_corrected": functools.partial(grpo_loss, kl=ratio_corrected(k3), **CLIP),
    "output_grpo": functools.partial(output_grpo_loss, **CLIP),
    "dr_grpo": functools.partial(dr_grpo_loss, **CLIP),
    "dapo": functools.partial(dapo_loss, **CLIP),
    "cispo": functools.partial(cispo_loss, ratio_floor=0.5, ratio_cap=1.5, beta=0.04),
    "gspo": functools.partial(gspo_loss, **CLIP),
    "gspo_token": functools.partial(gspo_token_loss, **CLIP),
    "ppo": functools.partial(ppo_policy_loss, **CLIP),
    "reinforce": functools.partial(on_policy_loss, beta=0.04, kl=k3),
}
WEIGHTS = {
    "dr_grpo": token_weights_constant_length,
    "dapo": token_weights_token_mean,
    "cispo": token_weights_token_mean,
    "ppo": token_weights_token_mean,
    "reinforce": functools.partial(token_weights_constant_length, length=1),
}
# k micro-batches must equal one batch to this, in float32 sums of up to 48 terms of order 1.
MICRO = 1e-6
# Two float32 evaluations of the same formula.
FLOAT32 = 2e-5
all_objectives = pytest.mark.parametrize("name", OBJECTIVES)
# One of each kind of ratio, for what is decided in the parts they share.
each_ratio = pytest.mark.parametrize("name", ["grpo", "gspo_token", "cispo"])


def draw(seed=0, rows=8, length=6, spread=0.5):
    """(logp, old_logp, ref_logp, advantage, mask), float32; lengths from 0 to `length`."""
    rng = np.random.default_rng(seed)
    logp_BT = -rng.exponential(1, (rows, length))
    old_BT, ref_BT = (logp_BT + spread * rng.normal(size=logp_BT.shape) for _ in range(2))
    mask_BT = np.arange(length) < rng.integers(0, length + 1, rows)[:, None]
    arrays = logp_BT, old_BT, ref_BT, rng.normal(size=rows)
    return *(jnp.asarray(x, jnp.float32) for x in arrays), jnp.asarray(mask_BT)


@functools.cache
def compiled(name, **options):
    """(arguments) -> ((loss, metrics), gradient with respect to logp), compiled once per shape."""
    objective = functools.partial(OBJECTIVES[name], **options)
    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def naive(name, arguments):
    """Each objective as loops over rows and tokens in Python floats, from the papers' formulas."""
    mask = arguments[-1]
    logp, old, ref, advantage = (np.asarray(x, np.float64) for x in arguments[:-1])
    terms, lengths = [], [int(row.sum()) for row in mask]
    for i, n in enumerate(lengths):
        steps = [t for t in range(mask.shape[1]) if mask[i, t]]
        d = [logp[i, t] - old[i, t] for t in steps]
        for t, d_t in zip(steps, d, strict=True):
            sequence = {"gspo": sum(d) / n, "gspo_token": sum(d) / n, "output_grpo": sum(d)}
            c = np.exp(sequence.get(name, d_t))
            if name == "cispo":
                policy = min(max(c, 0.5), 1.5) * advantage[i] * logp[i, t]
            elif name == "reinforce":
                policy = advantage[i] * logp[i, t]
            else:
                policy = min(c * advantage[i], min(max(c, 0.8), 1.28) * advantage[i])
            x = ref[i, t] - logp[i, t]
            kl = (np.exp(x) - x - 1) * (np.exp(d_t) if name == "grpo_corrected" else 1)
            terms.append((n, -policy + 0.04 * kl))
    rows = sum(n > 0 for n in lengths)
    if name in ("dapo", "cispo", "ppo"):
        return sum(x for _, x in terms) / sum(lengths)
    if name in ("dr_grpo", "reinforce"):
        length = mask.shape[1] if name == "dr_grpo" else 1
        return sum(x for _, x in terms) / (length * rows)
    return sum(x / n for n, x in terms) / rows


@all_objectives
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.0, 2.0))
def test_equals_the_loops(name, seed, spread):
    arguments = draw(seed, spread=spread)
    (loss, _), _ = compiled(name)(*arguments)
    if not arguments[-1].any():
        assert loss == 0.0
        return
    np.testing.assert_allclose(loss, naive(name, arguments), rtol=FLOAT32, atol=FLOAT32)


@all_objectives
def test_micro_batches_add_up_to_the_batch(name):
    """One scan adds up loss, gradient and metrics of slices of two rows, one of them empty."""
    *arrays, mask_BT = draw(seed=3)
    mask_BT = mask_BT.at[2:4].set(False)
    arguments = (*arrays, mask_BT)
    weight_BT = WEIGHTS.get(name, token_weights_sequence_mean)(mask_BT)
    slices = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), (arguments, weight_BT))

    def micro_step(total, slice_):
        arguments, weight_BT = slice_
        loss = functools.partial(OBJECTIVES[name], weight_BT=weight_BT)
        aux, gradient_bT = jax.value_and_grad(loss, has_aux=True)(*arguments)
        return jax.tree.map(jnp.add, total, aux), gradient_bT

    whole, gradient_BT = compiled(name)(*arguments)
    zeros = jax.tree.map(jnp.zeros_like, whole)
    total, gradients = jax.jit(lambda s: jax.lax.scan(micro_step, zeros, s))(slices)
    chex.assert_trees_all_close(total, whole, rtol=MICRO, atol=MICRO)
    chex.assert_trees_all_close(gradients.reshape(gradient_BT.shape), gradient_BT, atol=MICRO)
    assert abs(whole[0]) > 1e-3
    assert np.abs(gradient_BT).max() > 1e-3
    if name not in ("cispo", "reinforce"):
        assert whole[1]["clip_high"] + whole[1]["clip_low"] > 0


@all_objectives
def test_garbage_under_the_mask_changes_nothing(name):
    clean = draw(seed=1)
    mask_BT = clean[-1].at[0].set(False)
    rng = np.random.default_rng(2)
    bad_values = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e30, -1e30])

    def soil(x_BT):
        return jnp.where(mask_BT, x_BT, bad_values[rng.integers(0, 5, x_BT.shape)])

    # A row without tokens may also have an advantage that is not a number.
    soiled = (*map(soil, clean[:3]), clean[3].at[0].set(jnp.nan), mask_BT)
    expected, gradient_BT = compiled(name)(*clean[:-1], mask_BT)
    found, soiled_gradient_BT = compiled(name)(*soiled)
    chex.assert_trees_all_equal(found, expected)
    np.testing.assert_array_equal(soiled_gradient_BT, gradient_BT)
    np.testing.assert_array_equal(soiled_gradient_BT[~mask_BT], 0.0)


@all_objectives
def test_a_batch_without_tokens_is_zero(name):
    result = compiled(name)(*draw()[:-1], jnp.zeros((8, 6), bool))
    chex.assert_trees_all_equal(result, jax.tree.map(jnp.zeros_like, result))


@each_ratio
def test_rows_without_tokens_do_not_count(name):
    arguments = draw(seed=4)
    padded = tuple(jnp.concatenate([x, jnp.zeros_like(x)]) for x in arguments)
    expected, _ = compiled(name)(*arguments)
    found, _ = compiled(name)(*padded)
    chex.assert_trees_all_close(found, expected, rtol=MICRO, atol=MICRO)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_the_mask_may_have_any_dtype(name, dtype):
    *arrays, mask_BT = draw()
    # Operation by operation: two compiled programs may be fused differently, these may not differ.
    with jax.disable_jit():
        expected = compiled(name)(*arrays, mask_BT)
        found = compiled(name)(*arrays, mask_BT.astype(dtype))
    chex.assert_trees_all_equal(found, expected)


@all_objectives
def test_equal_rewards_give_no_policy_gradient(name):
    """Exactly zero, off policy too, and for fractions whose mean is rounded."""
    logp_BT, old_BT, _, _, mask_BT = draw(seed=5)
    reward_B = jnp.array([0.1] * 4 + [1.0, 0.0, 0.25, 0.5])
    advantage_B = group_advantages(reward_B, group_size=4)
    mask_BT = mask_BT.at[:, 0].set(True)
    # At the reference the gradient of the KL is exactly zero, so only the policy's is left.
    _, gradient_BT = compiled(name)(logp_BT, old_BT, logp_BT, advantage_B, mask_BT)
    np.testing.assert_array_equal(gradient_BT[:4], 0.0)
    assert np.abs(gradient_BT[4:]).max() > 1e-3


@all_objectives
def test_on_policy_ratio_is_one_and_nothing_is_clipped(name):
    logp_BT, _, _, advantage_B, mask_BT = draw(seed=6)
    (_, metrics), _ = compiled(name)(logp_BT, logp_BT, logp_BT, advantage_B, mask_BT)
    assert metrics["ratio"] == metrics["tokens"] == mask_BT.sum()
    for zero in ("ratio_square_error", "clip_low", "clip_high", "kl"):
        assert metrics[zero] == 0.0, zero


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.float32) for name in OBJECTIVES), ("grpo", jnp.bfloat16)]
)
def test_extreme_log_probabilities_stay_finite(name, dtype):
    """Every pairing of policy, sampler and reference log-probs between 0 and −1e4."""
    values = np.array([0.0, -1e-6, -50.0, -1e4])
    logp_BT, old_BT, ref_BT = (
        jnp.asarray(x.reshape(1, -1), dtype) for x in np.meshgrid(values, values, values)
    )
    mask_BT = jnp.ones(logp_BT.shape, bool)
    for advantage in (1.0, -1.0):
        result = compiled(name)(logp_BT, old_BT, ref_BT, jnp.array([advantage]), mask_BT)
        chex.assert_tree_all_finite(result)
        assert result[0][0].dtype == jnp.float32


@each_ratio
def test_vmap_equals_a_loop(name):
    draws = [draw(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *draws)
    found = jax.vmap(compiled(name))(*stacked)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(compiled(name)(*x) for x in draws))
    chex.assert_trees_all_close(found, expected, rtol=FLOAT32, atol=MICRO)


@each_ratio
def test_an_advantage_per_token_equals_one_per_row(name):
    logp_BT, old_BT, ref_BT, advantage_B, mask_BT = draw(seed=7)
    advantage_BT = jnp.broadcast_to(advantage_B[:, None], logp_BT.shape)
    expected = compiled(name)(logp_BT, old_BT, ref_BT, advantage_B, mask_BT)
    found = compiled(name)(logp_BT, old_BT, ref_BT, advantage_BT, mask_BT)
    chex.assert_trees_all_equal(found, expected)


def test_one_trace_serves_every_batch_and_coefficient():
    @jax.jit
    @chex.assert_max_traces(1)
    def step(arguments, clip_high, beta):
        return grpo_loss(*arguments, clip_high=clip_high, beta=beta)[0]

    chex.clear_trace_counter()
    losses = [step(draw(seed), 0.2 + seed, 0.01 * seed) for seed in range(3)]
    assert len(set(map(float, losses))) == 3


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 6), min_size=5, max_size=5))
def test_weights_sum_to_what_they_say(lengths):
    mask_BT = np.arange(6) < np.array(lengths)[:, None]
    rows, tokens = sum(n > 0 for n in lengths), sum(lengths)
    expected = {
        token_weights_sequence_mean: float(rows > 0),
        token_weights_token_mean: float(rows > 0),
        token_weights_constant_length: tokens / 6 / max(rows, 1),
        token_weights_sum: tokens,
    }
    for weights, total in expected.items():
        weight_BT = weights(mask_BT)
        np.testing.assert_allclose(weight_BT.sum(), total, rtol=FLOAT32)
        assert np.all(np.asarray(weight_BT)[~mask_BT] == 0)
    row_B = token_weights_sequence_mean(mask_BT).sum(axis=1)
    np.testing.assert_allclose(row_B, (np.array(lengths) > 0) / max(rows, 1), rtol=FLOAT32)


def test_sft_micro_batches_add_up():
    logp_BT, _, _, _, mask_BT = draw(seed=8)
    weight_BT = token_weights_token_mean(mask_BT)
    whole = sft_loss(logp_BT, mask_BT)
    parts = [
        sft_loss(logp_BT[i : i + 2], mask_BT[i : i + 2], weight_BT=weight_BT[i : i + 2])
        for i in range(0, 8, 2)
    ]
    chex.assert_trees_all_close(jax.tree.map(lambda *x: sum(x), *parts), whole, atol=MICRO)


def expected_gradient(objective, logits_VV, old_VV, score_VV, **options):
    """E over all two-token sequences of the old policy of the objective's gradient."""
    vocabulary = len(logits_VV[0])
    first, second = map(jnp.ravel, jnp.meshgrid(*[jnp.arange(vocabulary)] * 2, indexing="ij"))

    def logp(logits):
        """Log-probs [V², 2]: the first token from row 0, the second from the row of the first."""
        log_VV = jax.nn.log_softmax(logits)
        return jnp.stack([log_VV[0, first], log_VV[1 + first, second]], axis=1)

    old_BT = logp(old_VV)
    weight_BT = jnp.broadcast_to(jnp.exp(old_BT.sum(axis=1, keepdims=True)), old_BT.shape)
    mask_BT = jnp.ones(old_BT.shape, bool)

    def loss(logits):
        arguments = (logp(logits), old_BT, None, score_VV.ravel(), mask_BT)
        return objective(*arguments, weight_BT=weight_BT, beta=0.0, **options)[0]

    def exact(logits):
        return -jnp.sum(jnp.exp(logp(logits).sum(axis=1)) * score_VV.ravel())

    return jax.jit(lambda x: (jax.grad(loss)(x), jax.grad(exact)(x)))(logits_VV)


def test_policy_gradient_by_enumeration():
    """On policy all give the exact gradient, off policy only the ratio of whole outputs does."""
    rng = np.random.default_rng(9)
    logits_VV, old_VV = rng.normal(size=(2, 4, 3))
    score_VV = jnp.asarray(rng.normal(size=(3, 3)))
    free = {"clip_low": 1.0, "clip_high": 1e6}
    gap = {}
    with jax.enable_x64(True):
        for off_policy in (False, True):
            old = old_VV if off_policy else logits_VV
            for name, objective, options, scale in (
                ("token", grpo_loss, free, 1.0),
                # The row's value stands at each of its two tokens, and so does its gradient.
                ("output", output_grpo_loss, free, 2.0),
                ("sequence", gspo_loss, free, 1.0),
                ("sequence, token gradient", gspo_token_loss, free, 1.0),
                ("cispo", cispo_loss, {"ratio_cap": 1e6}, 1.0),
                ("no ratio", on_policy_loss, {}, 1.0),
            ):
                found, exact = expected_gradient(objective, logits_VV, old, score_VV, **options)
                gap[name, off_policy] = np.abs(found / scale - exact).max()
    for (name, off_policy), difference in gap.items():
        if name == "output" or not off_policy:
            assert difference < 1e-12, name
        else:
            assert difference > 1e-3, name


def test_import_touches_no_device():
    """With a platform that does not exist, using a device raises; the import does not."""
    script = """
import jax
import r1jax.rl
try:
    jax.devices()
except RuntimeError:
    raise SystemExit(0)
raise SystemExit("the platform exists, so this shows nothing")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
