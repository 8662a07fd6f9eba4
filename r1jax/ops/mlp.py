# SPDX-License-Identifier: Apache-2.0
"""The gated feed-forward network."""

import jax
import jax.numpy as jnp


def swiglu(x: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array):
    """(SiLU(x·W_gate) ⊙ (x·W_up)) · W_down (Shazeer 2020, arXiv 2002.05202).

    Args:
        x: [..., D]; weights are cast to its dtype.
        w_gate_DF, w_up_DF, w_down_FD: [D, F], [D, F], [F, D].

    Returns:
        [..., D] in x's dtype.
    """
    dtype = x.dtype
    gate = jnp.einsum("...d,df->...f", x, w_gate_DF.astype(dtype))
    up = jnp.einsum("...d,df->...f", x, w_up_DF.astype(dtype))
    return jnp.einsum("...f,fd->...d", jax.nn.silu(gate) * up, w_down_FD.astype(dtype))
