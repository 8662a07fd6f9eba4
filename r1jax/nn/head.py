# SPDX-License-Identifier: Apache-2.0
"""The output head, and log-probabilities of tokens by it, the work shared out over a mesh."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.softmax_xent.ref import columns, tile_of
from r1jax.nn import param
from r1jax.ops.loss import token_logp
from r1jax.ops.sliced_loss import Slices, sliced_logp
from r1jax.sharding import carriers, count, gather, platform, share

FEW = 8  # rows that a tied head is multiplied by from the left, on a CPU
COLUMNS = 8192  # of the vocabulary that are whole at a time where devices hold parts of the head


class Head(NamedTuple):
    """Where the output head is kept.

    Attributes:
        weight: [D, N], or [N, D] where it is the embedding.
        tied: whether it is.
        dtype: of the activations.
    """

    weight: nnx.Param
    tied: bool
    dtype: str

    def whole_DN(self) -> jax.Array:
        """[D, N] float32."""
        whole = param.whole(self.weight, self.dtype)
        return whole.T if self.tied else whole

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, N] float32 logits of all columns."""
        (b, t, d), dtype = hidden_BTD.shape, hidden_BTD.dtype
        if self.tied and b * t <= FEW and platform() == "cpu":
            # The embedding times the rows: XLA:CPU transposes it for rows times the embedding.
            whole_ND = param.whole(self.weight, self.dtype).astype(dtype)
            rows_XD = hidden_BTD.reshape(b * t, d)
            how = dict(preferred_element_type=jnp.float32)
            logits_NX = jnp.einsum("nd,xd->nx", whole_ND, rows_XD, **how)
            return jax.lax.optimization_barrier(logits_NX).T.reshape(b, t, len(whole_ND))
        head_DN = self.whole_DN().astype(dtype)
        return jnp.einsum("btd,dn->btn", hidden_BTD, head_DN, preferred_element_type=jnp.float32)


def score(
    hidden_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """`ops.loss.token_logp` by a head that devices may hold parts of. Args and Returns: as there.

    A slice of the vocabulary is whole at a time, and so is its gradient. Devices along the axis of
    "vocab" hold the same tokens: each scores a share of them.
    """
    if not carriers("embed", "vocab"):
        return token_logp(hidden_BTD, head.whole_DN(), targets_BT, temperature=temperature)
    shape, shares = targets_BT.shape, count("vocab")
    short = -targets_BT.size % shares
    hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    hidden_TD = share(jnp.pad(hidden_TD, ((0, short), (0, 0))), "vocab")
    targets_T = share(jnp.pad(targets_BT.reshape(-1), (0, short)), "vocab")
    weight = head.weight[...]
    here = weight.shape[0 if head.tied else 1]
    slices, size = tile_of(here, max(COLUMNS // shares, 1))
    how = dict(here=here, size=size, tied=head.tied, dtype=hidden_BTD.dtype)
    temperature = jnp.asarray(temperature, jnp.float32)
    logp_T, entropy_T = sliced_logp(
        Slices(functools.partial(_slice, **how), slices), weight, hidden_TD, targets_T, temperature
    )
    known_T = (targets_T >= 0) & (targets_T < here * shares)
    found = jnp.where(known_T, logp_T, math.nan), jax.lax.stop_gradient(entropy_T)
    whole = (gather(x, "vocab", along="vocab") for x in found)
    return tuple(x[: targets_BT.size].reshape(shape) for x in whole)


def _slice(weight: jax.Array, i: jax.Array, *, here: int, size: int, tied: bool, dtype):
    """([D, shares · size] columns from all devices, their numbers; −1: an earlier slice's)."""
    begin, stale = columns(i, here, size)
    part = jax.lax.dynamic_slice_in_dim(weight, begin, size, 0 if tied else 1).astype(dtype)
    part_dn = part.T if tied else part
    for axis in ("embed", "vocab"):
        part_dn = gather(part_dn, "embed", "vocab", along=axis)
    at_n = jnp.where(jnp.arange(size) >= stale, begin + jnp.arange(size), -1)
    at_sn = jnp.where(at_n >= 0, jnp.arange(count("vocab"))[:, None] * here + at_n, -1)
    return part_dn, at_sn.reshape(-1)
