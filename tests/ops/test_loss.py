# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities: the plain log-softmax's numbers, without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops.loss import token_logp

# A log-softmax over 11 float32 logits of order 3.
FLOAT32 = 1e-5
# bfloat16 keeps 8 bits of the logits' inputs; products of 5 of them are of order 3.
BFLOAT16 = 5e-2
B, T, D, N = 2, 7, 5, 11


def arguments():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, N)).astype(np.float32)
    return hidden, head, rng.integers(0, N, (B, T)).astype(np.int32)


def plain(hidden, head, targets, temperature=1.0):
    logp = jax.nn.log_softmax(jnp.einsum("btd,dn->btn", hidden, head) / temperature)
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], entropy


@pytest.mark.parametrize("chunk", [1, 4, 14, 1024])  # 14 tokens: divided, not divided, whole, more
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_it_is_the_log_softmax(chunk, temperature):
    args = arguments()
    found = token_logp(*args, temperature=temperature, chunk=chunk)
    for a, b in zip(found, plain(*args, temperature), strict=True):
        assert a.shape == (B, T)
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)


def test_temperature_may_be_traced():
    args = arguments()
    f = jax.jit(lambda t: token_logp(*args, temperature=t)[0])
    np.testing.assert_allclose(f(0.7), plain(*args, 0.7)[0], rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("chunk", [4, 1024])
def test_gradients(chunk):
    hidden, head, targets = arguments()
    weight = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)

    def loss(f):
        return lambda hidden, head: jnp.sum(f(hidden, head, targets)[0] * weight)

    mine = functools.partial(token_logp, chunk=chunk, temperature=0.8)
    theirs = functools.partial(plain, temperature=0.8)
    found, expected = (
        jax.jit(jax.grad(loss(f), argnums=(0, 1)))(hidden, head) for f in (mine, theirs)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)


def test_the_entropy_carries_no_gradient():
    hidden, head, targets = arguments()
    gradient = jax.grad(lambda h: token_logp(h, head, targets)[1].sum())(hidden)
    assert not gradient.any()


def test_entropy_of_a_uniform_and_of_a_sure_model():
    head = np.zeros((D, N), np.float32)
    hidden = np.ones((1, 2, D), np.float32)
    targets = np.zeros((1, 2), np.int32)
    logp, entropy = token_logp(hidden, head, targets)
    np.testing.assert_allclose(entropy, np.log(N), rtol=FLOAT32)
    np.testing.assert_allclose(logp, -np.log(N), rtol=FLOAT32)
    head[:, 3] = 100.0
    logp, entropy = token_logp(hidden, head, targets + 3)
    assert entropy.tolist() == logp.tolist() == [[0.0, 0.0]]


def test_bfloat16_hidden_states_give_float32_log_probabilities():
    hidden, head, targets = arguments()
    low, entropy = token_logp(jnp.asarray(hidden, jnp.bfloat16), head, targets)
    assert low.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(low, plain(hidden, head, targets)[0], atol=BFLOAT16)


def temporaries(f, batch, length, dim, vocab):
    """Bytes of temporaries of the compiled gradient of the summed log-probabilities."""
    abstract = jax.ShapeDtypeStruct
    args = (
        abstract((batch, length, dim), jnp.float32),
        abstract((dim, vocab), jnp.float32),
        abstract((batch, length), jnp.int32),
    )
    loss = jax.grad(lambda h, w, t: f(h, w, t)[0].sum(), argnums=(0, 1))
    return jax.jit(loss).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_the_logits_are_never_whole_in_memory():
    """Of the [B, T, vocabulary] logits that the plain version keeps, a chunk's share is left."""
    shape = dict(batch=4, length=256, dim=8, vocab=20_000)
    whole = 4 * 256 * 20_000 * 4
    assert temporaries(plain, **shape) >= whole
    assert temporaries(functools.partial(token_logp, chunk=64), **shape) < whole / 4


def test_ids_outside_the_vocabulary_have_no_probability_and_no_gradient():
    hidden, head = jnp.ones((1, 3, 2)), jnp.arange(8.0).reshape(2, 4)
    targets = jnp.array([[-1, 1, 4]])

    def known(hidden):
        logp_BT, _ = token_logp(hidden, head, targets)
        return jnp.where(targets == 1, logp_BT, 0.0).sum(), logp_BT

    slope, logp_BT = jax.grad(known, has_aux=True)(hidden)
    np.testing.assert_array_equal(np.isnan(logp_BT), [[True, False, True]])
    np.testing.assert_array_equal(np.any(slope != 0, -1), [[False, True, False]])
    assert np.isfinite(slope).all()
