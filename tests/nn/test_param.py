# SPDX-License-Identifier: Apache-2.0
"""Drawing parameters: the right spread for each, no two alike, the same for the same key."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1jax.config import laptop_model, laptop_student
from r1jax.nn import param
from r1jax.nn.dense import DenseTransformer
from r1jax.nn.transformer import Transformer


class Pair(nnx.Module):
    """Parameters of different spread, size and kind."""

    def __init__(self):
        self.wide = param.normal((40, 50), ("embed", "mlp"), 3.0)
        self.narrow = param.normal((50, 40), ("mlp", "embed"), 0.01)
        self.twin = param.normal((50, 40), ("mlp", "embed"), 0.01)
        self.gain = param.constant(1.0, (7,), (None,))
        self.bias = param.constant(0.5, (3,), (None,), cls=param.RouterBias)


@pytest.fixture(params=["pooled", "each", "some"])
def pair(request, monkeypatch):
    """Drawn from one pool, each by itself, and some of both."""
    monkeypatch.setattr(
        param, "POOLED", {"pooled": 1 << 20, "each": 0, "some": 1999}[request.param]
    )
    make = lambda key: param.initialise(Pair(), key)  # noqa: E731
    return make, make(jax.random.key(0))


def test_each_parameter_has_its_spread(pair):
    _, module = pair
    for variable, std in ((module.wide, 3.0), (module.narrow, 0.01)):
        x = np.asarray(variable[...]) / std
        # 2,000 draws: mean within 4.5 and spread within 4.5 standard errors.
        assert abs(x.mean()) < 0.1
        assert abs(x.std() - 1.0) < 0.07
        assert np.abs(x).max() > 2.5
        assert x.dtype == np.float32
    np.testing.assert_array_equal(module.gain[...], 1.0)
    np.testing.assert_array_equal(module.bias[...], 0.5)


def test_no_two_parameters_share_their_draws(pair):
    _, module = pair
    drawn = [module.wide[...] / 3.0, module.narrow[...] / 0.01, module.twin[...] / 0.01]
    for a, b in itertools.combinations(drawn, 2):
        r = np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]
        assert abs(r) < 0.1  # 4.5 standard errors of 2,000 pairs
    values = np.concatenate([np.ravel(x) for x in drawn])
    assert len(np.unique(np.round(values, 6))) > 0.99 * values.size


def test_the_key_decides(pair):
    make, module = pair
    again, other = make(jax.random.key(0)), make(jax.random.key(1))
    for a, b in zip(jax.tree.leaves(module), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(module.wide[...], other.wide[...])
    jitted = jax.jit(make)(jax.random.key(0))
    np.testing.assert_allclose(module.wide[...], jitted.wide[...], rtol=1e-6)


def test_layers_of_a_stack_differ():
    module = param.initialise(param.stack(Pair, 3), jax.random.key(0))
    assert module.wide[...].shape == (3, 40, 50)
    assert module.wide.out_sharding == ("layers", "embed", "mlp")
    assert module.bias[...].shape == (3, 3)
    for i, j in itertools.combinations(range(3), 2):
        r = np.corrcoef(np.ravel(module.wide[i]), np.ravel(module.wide[j]))[0, 1]
        assert abs(r) < 0.1


@pytest.mark.parametrize("kind", ["deepseek", "dense"])
def test_a_whole_model(kind):
    """Every matrix at init_std, every gain 1, every bias 0."""
    cfg = laptop_model() if kind == "deepseek" else laptop_student(qkv_bias=True)
    make = {"deepseek": Transformer, "dense": DenseTransformer}[kind]
    module = jax.jit(lambda key: param.initialise(make(cfg), key))(jax.random.key(3))
    for path, x in jax.tree_util.tree_leaves_with_path(module):
        where = jax.tree_util.keystr(path)
        if "norm" in where:
            np.testing.assert_array_equal(x, 1.0, err_msg=where)
        elif "bias" in where or ".b_" in where:
            np.testing.assert_array_equal(x, 0.0, err_msg=where)
        else:
            spread = float(jnp.std(x) / cfg.init_std)
            assert abs(spread - 1.0) < 4.5 / np.sqrt(2 * x.size), where
