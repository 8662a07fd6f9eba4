# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a model's tokens, the work shared out over a mesh."""

import jax
import jax.numpy as jnp

from r1jax.ops.loss import token_logp
from r1jax.sharding import count, gather, share


def score(
    hidden_BTD: jax.Array,
    head_DN: jax.Array,
    targets_BT: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """`ops.loss.token_logp` with a whole head. Args and Returns: as there.

    Devices along the axis of "vocab" hold the same tokens: each scores a share of them.
    """
    shares = count("vocab")
    if shares == 1:
        return token_logp(hidden_BTD, head_DN, targets_BT, temperature=temperature)
    b, t, d = hidden_BTD.shape
    short = -(b * t) % shares
    hidden_1TD = share(jnp.pad(hidden_BTD.reshape(-1, d), ((0, short), (0, 0))), "vocab")[None]
    targets_1T = share(jnp.pad(targets_BT.reshape(-1), (0, short)), "vocab")[None]
    found = token_logp(hidden_1TD, head_DN, targets_1T, temperature=temperature)
    whole = (gather(x[0], "vocab", along="vocab")[: b * t].reshape(b, t) for x in found)
    return tuple(whole)
