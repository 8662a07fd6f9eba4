# SPDX-License-Identifier: Apache-2.0
"""A head that comes in slices gives the whole head's log-probabilities, entropies, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import sliced_loss
from r1jax.ops.sliced_loss import Slices, sliced_logp

# A log-softmax over 11 float32 logits of order 3.
FLOAT32 = 1e-5
T, D, N = 7, 5, 11


def fetch(size, weight, i):
    """Columns i · size and on; the last slice begins earlier and leaves out what has been."""
    begin = jnp.minimum(i * size, N - size)
    at_n = begin + jnp.arange(size)
    part = jax.lax.dynamic_slice_in_dim(weight, begin, size, 1)
    return part, jnp.where(at_n >= i * size, at_n, -1)


def plain(head, hidden, targets, temperature):
    logp = jax.nn.log_softmax(hidden @ head / temperature)
    return logp[jnp.arange(T), targets], -(jnp.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("size", [4, 11])  # three slices, of which the last overlaps; all at once
def test_slices_are_the_whole(size, monkeypatch):
    monkeypatch.setattr(sliced_loss, "TOKENS", 3)  # chunks of 3, 3 and a padded one
    rng = np.random.default_rng(0)
    head, hidden, given = (rng.normal(size=s).astype(np.float32) for s in ((D, N), (T, D), (2, T)))
    targets = np.array([0, 3, 4, 7, 8, 10, 9], np.int32)
    slices = Slices(functools.partial(fetch, size), -(-N // size))

    def run(f):
        def weighed(head, hidden, temperature):
            found = f(head, hidden, targets, temperature)
            return sum((x * g).sum() for x, g in zip(found, given, strict=True)), found

        return jax.grad(weighed, argnums=(0, 1, 2), has_aux=True)(head, hidden, 0.7)

    found, expected = run(functools.partial(sliced_logp, slices)), run(plain)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)
