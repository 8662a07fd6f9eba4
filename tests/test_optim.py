# SPDX-License-Identifier: Apache-2.0
"""The optimizer chain against optax's own, and the learning-rate schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from r1jax import optim
from r1jax.config import OptimConfig
from r1jax.nn.build import build
from r1jax.nn.value import valued
from tests.nn import tiny


@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0], ids=["unclipped", "near", "clipped"])
def test_adamw_is_optax_adamw_after_its_clip(size):
    cfg = OptimConfig(learning_rate=1e-2, b1=0.8, b2=0.9, weight_decay=0.1, clip_norm=1.5)
    rng = np.random.default_rng(0)
    draw = lambda: {"w": rng.normal(size=(3, 4)), "norm": rng.normal(size=4)}  # noqa: E731
    params = jax.tree.map(jnp.float32, draw())
    theirs = optax.chain(
        optax.clip_by_global_norm(1.5),
        optax.adamw(1e-2, 0.8, 0.9, eps=cfg.eps, weight_decay=0.1, mask={"w": True, "norm": False}),
    )
    mine = optim.adamw(cfg)
    a, b = params, params
    mine_state, their_state = mine.init(a), theirs.init(b)
    for _ in range(4):
        grads = jax.tree.map(lambda g: jnp.float32(size * g), draw())
        norm = optax.tree.norm(grads)
        updates, mine_state = mine.update(grads, mine_state, a, grad_norm=norm)
        a = optim.apply(a, updates, jnp.float32(1e-2))
        updates, their_state = theirs.update(grads, their_state, b)
        b = optax.apply_updates(b, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), a, b)


def test_only_gains_and_biases_do_not_decay():
    cfg = tiny.model_config(num_layers=1, first_k_dense=0)
    models = [tiny.dense_config(qwen2=True, num_layers=1), cfg]
    for module in (valued(build(cfg), jax.random.key(0), std=0.1) for cfg in models):
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        still = {
            jax.tree_util.keystr(path[-1:])
            for path, moves in jax.tree_util.tree_leaves_with_path(optim.decayed(params))
            if not moves
        }
        vectors = {"['weight']", "['value_bias']", "['b_q']", "['b_k']", "['b_v']"}
        assert "['value_bias']" in still
        assert still <= vectors


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    cfg = OptimConfig(learning_rate=2.0, final_fraction=0.1, warmup_steps=4)
    rates = [optim.learning_rate(cfg, step, 24) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == pytest.approx(2.0)
    assert rates[14] == pytest.approx(2.0 * 0.55)  # half way down
    assert rates[24] == pytest.approx(0.2)
