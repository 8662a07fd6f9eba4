# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities from hidden states without ever holding [B, T, vocabulary]."""

import chex
import jax
import jax.numpy as jnp

from pallas_kernels.softmax_xent import softmax_xent

# Up to so many logits a step of tiles and its second computing cost more than they save
# (experiments/log/010_…).
FEW = 2**24
COLUMNS = 8192  # of a tile with `chunk` tokens


def token_logp(
    hidden_BTD: jax.Array,
    head_DN: jax.Array,
    targets_BT: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log P(target) and entropy of softmax(hidden · head / temperature).

    Beyond `FEW` logits they live tile by tile, in value and gradient alike: the vocabulary in
    slices under a running log-sum-exp, and many tokens in chunks (`pallas_kernels.softmax_xent`).

    Args:
        hidden_BTD: [B, T, D] final hidden states.
        head_DN: [D, N] output head.
        targets_BT: [B, T] int32 token ids.
        temperature: softmax temperature of the sampler whose log-probabilities these must match.
        chunk: tokens of a tile, on all devices; None chooses, and takes few logits in whole.

    Returns:
        (logp_BT, entropy_BT): [B, T] float32, in nats. The entropy carries no gradient.
    """
    chex.assert_rank([hidden_BTD, head_DN, targets_BT], [3, 2, 2])
    if chunk is None and targets_BT.size * head_DN.shape[1] <= FEW:
        return _whole(hidden_BTD, head_DN, targets_BT, temperature)
    tile = None if chunk is None else (chunk, COLUMNS)

    def tiled(hidden_BTD, head_DN, targets_BT, temperature):
        logp_BT, entropy_BT = softmax_xent(
            hidden_BTD, head_DN, targets_BT, temperature=temperature, tile=tile
        )
        return logp_BT, jax.lax.stop_gradient(entropy_BT)

    arrays = hidden_BTD, head_DN, targets_BT, jnp.asarray(temperature, jnp.float32)
    if not jax.sharding.get_abstract_mesh().are_all_axes_explicit:
        return tiled(*arrays)
    # Which slice of the vocabulary lies where is the compiler's to decide.
    like_targets = jax.typeof(targets_BT).sharding
    return jax.sharding.auto_axes(tiled, out_sharding=(like_targets, like_targets))(*arrays)


def _whole(hidden_BTD, head_DN, targets_BT, temperature) -> tuple[jax.Array, jax.Array]:
    b, t, d = hidden_BTD.shape
    logits = jnp.einsum(
        "td,dn->tn",
        hidden_BTD.reshape(b * t, d),
        head_DN.astype(hidden_BTD.dtype),
        preferred_element_type=jnp.float32,
    )
    scale = 1.0 / jnp.asarray(temperature, jnp.float32)
    # Behind a barrier forward passes with a gradient and without share kernels on XLA:CPU.
    logits = jax.lax.optimization_barrier(logits * scale)
    norm_T = jax.nn.logsumexp(logits, axis=-1)
    # Chosen by a comparison: a gather's gradient is a scatter, which costs CPUs more than the rest.
    target_T, n = targets_BT.reshape(b * t), logits.shape[1]
    hit_TN = target_T[:, None] == jnp.arange(n)
    chosen_T = jnp.where(hit_TN, logits, 0.0).sum(-1)
    logp_T = jnp.where((target_T >= 0) & (target_T < n), chosen_T, jnp.nan) - norm_T
    still = jax.lax.stop_gradient(logits - norm_T[:, None])
    entropy_T = -(jnp.exp(still) * still).sum(-1)
    return logp_T.reshape(b, t), entropy_T.reshape(b, t)
