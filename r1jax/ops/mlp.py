# SPDX-License-Identifier: Apache-2.0
"""The gated feed-forward network."""

import jax

from r1jax.ops.linear import FP8, linear


def swiglu(
    x: jax.Array,
    w_gate_DF: jax.Array,
    w_up_DF: jax.Array,
    w_down_FD: jax.Array,
    fp8: FP8 | None = None,
) -> jax.Array:
    """(SiLU(x·W_gate) ⊙ (x·W_up)) · W_down (Shazeer 2020, arXiv 2002.05202).

    Args:
        x: [..., D]
        w_gate_DF, w_up_DF, w_down_FD: [D, F], [D, F], [F, D].
        fp8: as in `linear`.

    Returns:
        [..., D] in x's dtype.
    """
    gate = linear("...d,df->...f", x, w_gate_DF, fp8)
    up = linear("...d,df->...f", x, w_up_DF, fp8)
    return linear("...f,fd->...d", gated(gate, up), w_down_FD, fp8)


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SiLU(gate) ⊙ up; its gradients are made once each and not again inside their users.

    Each is an operand of two products, for the activations and for the weights. XLA:CPU fuses the
    whole formula into the second's transposition, where it runs column by column: 1.5 ms in place
    of 0.1 for 1,280 × 128 values. Reverse mode only.
    """
    return jax.nn.silu(gate) * up


def _gated_forward(gate, up):
    return gated(gate, up), (gate, up)


def _gated_backward(residuals, given):
    # Else XLA:CPU makes the sigmoid once for both passes, as one array more.
    gate, up = jax.lax.optimization_barrier(residuals)
    share = jax.nn.sigmoid(gate)
    slope = share * (1.0 + gate * (1.0 - share))  # of SiLU
    return jax.lax.optimization_barrier((given * up * slope, given * gate * share))


gated.defvjp(_gated_forward, _gated_backward)
