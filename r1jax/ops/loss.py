# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities from hidden states without ever holding [B, T, vocabulary]."""

import chex
import jax
import jax.numpy as jnp


def token_logp(
    hidden_BTD: jax.Array,
    head_DN: jax.Array,
    targets_BT: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """log P(target) and entropy of softmax(hidden · head / temperature), in chunks of tokens.

    Each chunk's logits live only inside one step of a scan and are computed again in the backward
    pass, so the largest temporary is [chunk, N] in value and gradient alike.

    Args:
        hidden_BTD: [B, T, D] final hidden states.
        head_DN: [D, N] output head.
        targets_BT: [B, T] int32 token ids.
        temperature: softmax temperature of the sampler whose log-probabilities these must match.
        chunk: tokens per step.

    Returns:
        (logp_BT, entropy_BT): [B, T] float32, in nats. The entropy carries no gradient.
    """
    chex.assert_rank([hidden_BTD, head_DN, targets_BT], [3, 2, 2])
    b, t, d = hidden_BTD.shape
    n = b * t
    size = min(chunk, n)
    pad = -n % size
    hidden = jnp.pad(hidden_BTD.reshape(n, d), ((0, pad), (0, 0))).reshape(-1, size, d)
    targets = jnp.pad(targets_BT.reshape(n), (0, pad)).reshape(-1, size)

    def one(hidden_TD, target_T):
        logits = jnp.einsum(
            "td,dn->tn",
            hidden_TD,
            head_DN.astype(hidden_TD.dtype),
            preferred_element_type=jnp.float32,
        )
        logits = logits / temperature
        norm_T = jax.nn.logsumexp(logits, axis=-1)
        logp_T = jnp.take_along_axis(logits, target_T[:, None], axis=-1)[:, 0] - norm_T
        still = jax.lax.stop_gradient(logits - norm_T[:, None])
        entropy_T = -(jnp.exp(still) * still).sum(-1)
        return logp_T, entropy_T

    if hidden.shape[0] == 1:  # nothing to bound by computing again
        logp, entropy = one(hidden[0], targets[0])
    else:
        # Inside a scan nothing is merged, so the backward pass does compute again.
        body = jax.checkpoint(lambda _, xs: (None, one(*xs)), prevent_cse=False)
        _, (logp, entropy) = jax.lax.scan(body, None, (hidden, targets))
    return logp.reshape(-1)[:n].reshape(b, t), entropy.reshape(-1)[:n].reshape(b, t)
