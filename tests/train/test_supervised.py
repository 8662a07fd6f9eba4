# SPDX-License-Identifier: Apache-2.0
"""The supervised step against loops over tokens, and what must not depend on micro-batches."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from r1jax.train.state import Controls
from r1jax.train.supervised import micro_batched, shifted, supervised_step
from tests.nn import tiny as models
from tests.train import tiny

LAMBDA, GAMMA = 0.3, 0.01
# Sums of the same float32 numbers in another order.
SUMS = 1e-6
# Another float32 program for the same forward pass: logits up to 10 over three layers.
FORWARD = 2e-5


@functools.cache
def step(optimizer=tiny.KEEP_GRADIENT):
    """The step, jitted, never donating, and traced once a program."""

    def one(state, batch, controls):
        return supervised_step(state, batch, controls, optimizer=optimizer, mtp_weight=LAMBDA)

    return jax.jit(tiny.traced_once(one))


def after(n=1, *, lr=0.0, gamma=GAMMA, state=None, batch=None):
    """(state, metrics) after one step of n micro-batches."""
    controls = Controls(np.float32(lr), np.float32(gamma))
    batch = micro_batched(tiny.packed() if batch is None else batch, n)
    return step()(tiny.state() if state is None else state, batch, controls)


def test_the_second_next_token_by_hand():
    batch = {
        "targets": np.array([[11, 12, 13, 0, 21, 0, 0]]),  # documents of 4 and 2 tokens, 1 padding
        "segments": np.array([[1, 1, 1, 1, 2, 2, 0]]),
        "mask": np.array([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]], np.float32),
    }
    targets, mask = shifted(batch)
    # Position 0 is taught t_2 = 12 although t_1 is not taught; 1 is taught 13; 2 and 3 have no
    # second next token in their document, nor has 4.
    assert mask.tolist() == [[1, 1, 0, 0, 0, 0, 0]]
    assert targets[0, :2].tolist() == [12, 13]


@functools.cache
def reference():
    """(gradient of the loss, first and second logits [B, T, N]), written out in full.

    λ weighs the second loss and α the balance loss, which is a mean over rows.
    """
    batch = tiny.packed()

    def loss(params):
        model = tiny.state().model(params)
        out = model(batch["tokens"], batch["positions"], batch["segments"])
        hidden, stats = model.predict_second(
            out.hidden_BTD, batch["targets"], batch["positions"], batch["segments"]
        )
        targets, mask = shifted(batch)
        first, second = out.hidden_BTD @ model.head_DN(), hidden @ model.head_DN()
        nll = _mean_nll(first, batch["targets"], batch["mask"])
        balance = out.stats.balance.sum(0) + stats.balance.sum(0)
        total = nll + LAMBDA * _mean_nll(second, targets, mask)
        return total + model.cfg.moe.balance_loss_alpha * balance.mean(), (first, second)

    return jax.jit(jax.grad(loss, has_aux=True))(tiny.state().params)


def _mean_nll(logits_BTN, targets_BT, mask_BT):
    logp_BTN = jax.nn.log_softmax(logits_BTN)
    picked_BT = jnp.take_along_axis(logp_BTN, targets_BT[..., None], -1)[..., 0]
    return -(picked_BT * mask_BT).sum() / mask_BT.sum()


def test_the_gradient_is_that_of_the_sum_of_the_losses():
    found = after()[0].opt.trace
    chex.assert_trees_all_close(found, reference()[0], rtol=FORWARD, atol=FORWARD)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found))


def test_losses_are_those_of_loops_over_documents():
    batch = tiny.packed()
    first_BTN, second_BTN = (np.asarray(jax.nn.log_softmax(x)) for x in reference()[1])
    first, second = [], []
    for b, ids in enumerate(batch["tokens"]):
        for document in range(1, batch["segments"][b].max() + 1):
            places = np.flatnonzero(batch["segments"][b] == document)
            for here, after_ in itertools.pairwise(places):
                if batch["mask"][b, here]:  # token i is taught the next one
                    first.append(-first_BTN[b, here, ids[after_]])
            for here, middle, last in zip(places, places[1:], places[2:], strict=False):
                if batch["mask"][b, middle]:  # and the one after it, where the next one is
                    second.append(-second_BTN[b, here, ids[last]])
    _, metrics = after()
    np.testing.assert_allclose(metrics["loss"], np.mean(first), rtol=FORWARD)
    np.testing.assert_allclose(metrics["mtp_loss"], np.mean(second), rtol=FORWARD)
    assert metrics["tokens"] == len(first)
    assert len(first) > len(second) > 0


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_micro_batches_are_one_batch(n):
    """Gradient, parameters, router biases and metrics, though rows differ in taught tokens."""
    taught = tiny.packed()["mask"].sum(-1)
    assert len(set(taught.tolist())) > 1
    whole, pieces = after(1, lr=0.1), after(n, lr=0.1)
    chex.assert_trees_all_close(pieces, whole, rtol=SUMS, atol=SUMS)
    chex.assert_trees_all_equal(pieces[1]["load"], whole[1]["load"])


@pytest.mark.slow
def test_eight_devices_are_one():
    """Rows spread over a data mesh: the same gradient, metrics, and loads of the whole batch."""
    batch = tiny.packed(rows=8)
    expected = after(lr=0.1, batch=batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        state = jax.device_put(tiny.state(), NamedSharding(mesh, PartitionSpec()))
        found = after(lr=0.1, state=state, batch=jax.device_put(batch, rows))
    chex.assert_trees_all_close(found, expected, rtol=SUMS, atol=SUMS)
    chex.assert_trees_all_equal(found[1]["load"], expected[1]["load"])


def test_learning_rate_zero_leaves_the_parameters():
    chex.assert_trees_all_equal(after(lr=0.0)[0].params, tiny.state().params)


def test_biases_move_against_the_load_by_gamma():
    """Each router by its own loads: those of the stack, then the MTP module's."""
    before = tiny.state()
    new, metrics = after()
    still, _ = after(gamma=0.0)
    chex.assert_trees_all_equal(still.router, before.router)
    batch, load_LE = tiny.packed(), np.asarray(metrics["load"])
    valid = (batch["segments"] > 0).sum()
    assert load_LE.shape == (2, 6)
    np.testing.assert_array_equal(load_LE.sum(-1), valid * 2)  # two experts a token, no padding
    moved = jax.tree.leaves(jax.tree.map(jnp.subtract, new.router, before.router))
    assert [m.shape for m in moved] == [(1, 6), (6,)]
    for bias, load in zip(moved, load_LE, strict=True):
        expected = GAMMA * np.sign(load.mean() - load)
        np.testing.assert_allclose(bias.reshape(-1), expected, atol=SUMS)
    assert np.abs(load_LE[0] - load_LE[1]).max() > 0


def test_a_gradient_with_nan_changes_nothing_and_is_counted():
    batch = tiny.packed()
    batch["mask"][0, 0] = np.nan
    before = tiny.state()
    new, metrics = after(lr=0.1, batch=batch)
    assert (metrics["skipped"], new.step) == (1.0, 1)
    assert not np.isfinite(metrics["grad_norm"])
    for name in ("params", "router", "opt"):
        chex.assert_trees_all_equal(getattr(new, name), getattr(before, name))
    good, metrics = after(lr=0.1, state=new)
    assert metrics["skipped"] == 0.0
    chex.assert_tree_all_finite(good.params)


def test_one_trace_serves_a_whole_schedule():
    """Whatever the learning rate and γ (`step` allows no other trace); and the loss falls."""
    state, losses = tiny.state(), []
    for i in range(10):
        gamma = GAMMA if i < 8 else 0.0
        state, metrics = after(lr=0.3 * (10 - i) / 10, gamma=gamma, state=state)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert state.step == 10


def test_a_dense_student_has_neither_loads_nor_a_second_loss():
    state = tiny.state(tiny.QWEN2)
    new, metrics = after(lr=0.1, state=state)
    assert metrics.keys() == {"loss", "tokens", "load", "grad_norm", "skipped"}
    assert metrics["load"].size == 0
    batch = tiny.packed()
    whole = models.logits(state.model(), batch["tokens"], batch["positions"], batch["segments"])
    expected = _mean_nll(whole, batch["targets"], batch["mask"])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=FORWARD)
    assert np.abs(new.params["embed"][...] - state.params["embed"][...]).max() > 0
