# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities by a head that is fetched a slice of the vocabulary at a time.

What `ops.loss.token_logp` computes, for a head that is nowhere whole: neither it nor its gradient.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.softmax_xent.ref import Given, absorb, finish, logits_of, products, slope, start

TOKENS = 4096  # of a tile of logits


class Slices(NamedTuple):
    """How a head is gone through.

    Attributes:
        fetch: (weight, i) → ([D, n] columns of slice i, [n] int32 their numbers, −1 for what is to
            be left out); linear in `weight`, what is kept of the head.
        count: slices; each column is in one of them.
    """

    fetch: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    count: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sliced_logp(
    slices: Slices,
    weight: jax.Array,
    hidden_TD: jax.Array,
    targets_T: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """log P(target) and entropy of softmax(hidden · head / temperature).

    The slices come under a running log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867);
    the gradient fetches each once more.

    Args:
        slices: how the head is gone through.
        weight: what is kept of it.
        hidden_TD: [T, D] final hidden states.
        targets_T: [T] int32 columns.
        temperature: scalar.

    Returns:
        (logp_T, entropy_T) float32, in nats.
    """
    return _forward(slices, weight, hidden_TD, targets_T, temperature)[0]


def _forward(slices, weight, hidden_TD, targets_T, temperature):
    hidden_ktD, target_kt1 = _chunks(hidden_TD), _chunks(targets_T[:, None])

    def one_slice(running, i):
        w_Dn, at_n = slices.fetch(weight, i)

        def one_chunk(xs):
            hidden_tD, target_t1, running = xs
            return absorb(running, *_logits(hidden_tD, w_Dn, at_n, target_t1, temperature))

        return jax.lax.map(one_chunk, (hidden_ktD, target_kt1, running)), None

    with jax.named_scope("sliced_logp"):
        running, _ = jax.lax.scan(one_slice, start(target_kt1.shape), jnp.arange(slices.count))
    logp, entropy, norm = (x.reshape(-1)[: len(targets_T)] for x in finish(running))
    return (logp, entropy), (weight, hidden_TD, targets_T, temperature, norm, entropy)


def _backward(slices, kept, given):
    weight, hidden_TD, targets_T, temperature, norm_T, entropy_T = kept
    columns = Given(*(_chunks(x[:, None]) for x in (norm_T, entropy_T, *given)))
    xs = (_chunks(hidden_TD), _chunks(targets_T[:, None]), columns)

    def one_slice(carry, i):
        d_weight, d_hidden = carry
        w_Dn, back, at_n = jax.vjp(lambda w: slices.fetch(w, i), weight, has_aux=True)

        def one_chunk(d_w, xs):
            (hidden_tD, target_t1, given), d_hidden_tD = xs
            logits, hit = _logits(hidden_tD, w_Dn, at_n, target_t1, temperature)
            d_logits = slope(logits, hit, given) / temperature
            more, d_w_more = products(d_logits.astype(hidden_tD.dtype), hidden_tD, w_Dn)
            return d_w + d_w_more, d_hidden_tD + more

        d_w, d_hidden = jax.lax.scan(one_chunk, jnp.zeros(w_Dn.shape, jnp.float32), (xs, d_hidden))
        return (d_weight + back(d_w.astype(w_Dn.dtype))[0], d_hidden), None

    zeros = (jnp.zeros_like(weight), jnp.zeros(xs[0].shape, jnp.float32))
    with jax.named_scope("sliced_logp_gradient"):
        (d_weight, d_hidden), _ = jax.lax.scan(one_slice, zeros, jnp.arange(slices.count))
    d_hidden = d_hidden.reshape(-1, hidden_TD.shape[1])[: len(hidden_TD)]
    # Logits are linear in the hidden states: Σ ∂s · s over the vocabulary is ∂hidden · hidden.
    d_temperature = -(d_hidden * hidden_TD.astype(jnp.float32)).sum() / temperature
    return d_weight, d_hidden.astype(hidden_TD.dtype), None, d_temperature


sliced_logp.defvjp(_forward, _backward)


def _logits(hidden_tD, w_Dn, at_n, target_t1, temperature):
    """(logits, −inf where a column is left out; whether a column is the target's)."""
    logits = logits_of(hidden_tD, w_Dn, temperature)
    return jnp.where(at_n >= 0, logits, -jnp.inf), (at_n == target_t1) & (at_n >= 0)


def _chunks(x_TD: jax.Array) -> jax.Array:
    """[T, D] → [k, t, D], zeros behind, in as few chunks of at most `TOKENS` as it takes."""
    count = -(-len(x_TD) // TOKENS)
    return jnp.pad(x_TD, ((0, -len(x_TD) % count), (0, 0))).reshape(count, -1, x_TD.shape[1])
