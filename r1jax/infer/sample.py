# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens, with the log-probabilities a trainer needs."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Sample(NamedTuple):
    """One drawn token a row.

    Attributes:
        token_B: [B] int32.
        logp_B: [B] float32 log-probability under softmax(logits / temperature), untruncated: what
            the trainer computes again, so that the ratio is one before any update. A greedy row is
            scored at temperature 1, here as there.
        behaviour_logp_B: [B] float32 log-probability under the distribution drawn from, top-k and
            top-p included: what an importance weight divides by. 0 in a greedy row.
    """

    token_B: jax.Array
    logp_B: jax.Array
    behaviour_logp_B: jax.Array


def truncate(logits_BN: jax.Array, *, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits with −inf outside the `top_k` best and outside the smallest set of mass ≥ `top_p`.

    The set is the shortest prefix, in falling order of probability, that reaches `top_p` (Holtzman
    et al. 2019); ties at its edge are kept. `top_k` is applied first. None switches a rule off.
    """
    if top_k is not None and top_k < logits_BN.shape[-1]:
        edge_B1 = jax.lax.top_k(logits_BN, top_k)[0][..., -1:]
        logits_BN = jnp.where(logits_BN < edge_B1, -jnp.inf, logits_BN)
    if top_p is not None and top_p < 1.0:
        falling_BN = jnp.flip(jnp.sort(logits_BN, axis=-1), axis=-1)
        mass_BN = jax.nn.softmax(falling_BN, axis=-1)
        before_BN = jnp.cumsum(mass_BN, axis=-1) - mass_BN
        kept_BN = jnp.where(before_BN < top_p, falling_BN, jnp.inf)
        logits_BN = jnp.where(logits_BN < kept_BN.min(-1, keepdims=True), -jnp.inf, logits_BN)
    return logits_BN


def sample(
    logits_BN: jax.Array,
    key: jax.Array,
    temperature_B: jax.Array,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Sample:
    """Draws from softmax(logits / temperature) after truncation; temperature 0 is greedy.

    Args:
        logits_BN: [B, N] float32.
        key: PRNG key of this step.
        temperature_B: [B]; a row at 0 takes its best token.
        top_k, top_p: as in `truncate`.
    """
    chex.assert_rank([logits_BN, temperature_B], [2, 1])
    greedy_B1 = temperature_B[:, None] <= 0.0
    scaled_BN = logits_BN.astype(jnp.float32) / jnp.where(greedy_B1, 1.0, temperature_B[:, None])
    full_BN = jax.nn.log_softmax(scaled_BN, axis=-1)
    cut_BN = jax.nn.log_softmax(truncate(scaled_BN, top_k=top_k, top_p=top_p), axis=-1)
    noise_BN = jnp.where(greedy_B1, 0.0, jax.random.gumbel(key, logits_BN.shape))
    token_B = best(jnp.where(greedy_B1, scaled_BN, cut_BN) + noise_BN)
    pick = lambda table: jnp.take_along_axis(table, token_B[:, None], axis=-1)[:, 0]  # noqa: E731
    behaviour_B = jnp.where(greedy_B1[:, 0], 0.0, pick(cut_BN))
    return Sample(token_B, pick(full_BN), behaviour_B)


def distribution(
    logits_BTN: jax.Array,
    temperature_B: jax.Array,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """The probabilities that `sample` draws from: [B, T, N] float32; at temperature 0 one is 1."""
    b, t, n = logits_BTN.shape
    greedy_B1 = temperature_B[:, None] <= 0.0
    scaled = (
        logits_BTN.astype(jnp.float32) / jnp.where(greedy_B1, 1.0, temperature_B[:, None])[:, None]
    )
    flat = scaled.reshape(b * t, n)
    cut_BTN = jax.nn.softmax(truncate(flat, top_k=top_k, top_p=top_p)).reshape(b, t, n)
    best_BTN = jax.nn.one_hot(best(flat), n).reshape(b, t, n)
    return jnp.where(greedy_B1[:, None], best_BTN, cut_BTN)


def draw(probability_BN: jax.Array, key: jax.Array) -> jax.Array:
    """[B] int32: one token of each row's distribution; a token of probability 0 is never drawn."""
    noise_BN = jax.random.gumbel(key, probability_BN.shape)
    return best(jnp.log(probability_BN) + noise_BN)


def best(x_BN: jax.Array) -> jax.Array:
    """First place of each row's maximum, [B] int32, by two plain reductions.

    XLA:CPU runs the reduction of pairs behind `jnp.argmax` one element at a time.
    """
    place_N = jnp.arange(x_BN.shape[-1], dtype=jnp.int32)
    best_B1 = x_BN.max(-1, keepdims=True)
    return jnp.where(x_BN == best_B1, place_N, x_BN.shape[-1] - 1).min(-1)
