# SPDX-License-Identifier: Apache-2.0
"""From one number per token to one loss: reductions written as per-token weights.

Every reduction of the GRPO family is linear in the per-token terms, so each one is a table of
weights `w_BT` and `loss = Σ w·x`. A training step computes the weights once from the mask of the
whole batch and slices them: the losses, gradients and metrics of its micro-batches then add up to
those of the batch, however unequal the lengths are.

Rows whose mask is empty (padding rows, completions filtered out) hold no output: they get weight 0
and are not counted in any denominator, so appending them never changes a loss. A batch of only
such rows has weights, loss and gradient 0.
"""

import chex
import jax
import jax.numpy as jnp


def mask_tokens(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sets masked positions to 0, in value and in gradient, whatever they hold, NaN included.

    Applied to log-probabilities before any arithmetic: a `where` after `exp` would hide a NaN in
    the value but not in the gradient.

    Args:
      x_BT: per-token values [B, T], any float dtype (below float32 is raised to float32).
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      [B, T], at least float32.
    """
    chex.assert_equal_shape([x_BT, mask_BT])
    x_BT = jnp.asarray(x_BT)
    x_BT = x_BT.astype(jnp.promote_types(x_BT.dtype, jnp.float32))
    return jnp.where(mask_BT != 0, x_BT, 0)


def weighted_sum(x_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """Σ w·x over the positions of non-zero weight; the value of x elsewhere is never looked at.

    Args:
      x_BT: per-token values [B, T], float.
      weight_BT: per-token weights [B, T], from one of the `token_weights_*`.

    Returns:
      A scalar.
    """
    return jnp.sum(mask_tokens(x_BT, weight_BT) * weight_BT)


def _row_lengths(mask_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mask in float [B, T], its row sums [B, 1] and the number of rows that have a token."""
    chex.assert_rank(mask_BT, 2)
    mask_BT = (mask_BT != 0).astype(jnp.result_type(float))
    length_B1 = jnp.sum(mask_BT, axis=1, keepdims=True)
    return mask_BT, length_B1, jnp.sum(length_B1 > 0)


def token_weights_sequence_mean(mask_BT: jax.Array) -> jax.Array:
    """Mean over each sequence, then mean over sequences: w = m / (|o_i| · B). Sums to 1.

    GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3): every output weighs the same, so a token of a
    long output weighs less. B counts the rows that have at least one token.

    Args:
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      Weights [B, T], of the default float type (float32 unless 64 bits are enabled).
    """
    mask_BT, length_B1, rows = _row_lengths(mask_BT)
    return mask_BT / (jnp.maximum(length_B1, 1) * jnp.maximum(rows, 1))


def token_weights_token_mean(mask_BT: jax.Array) -> jax.Array:
    """Mean over all tokens of the batch: w = m / Σ_i |o_i|. Sums to 1.

    DAPO (arXiv 2503.14476, eq. 8): every token weighs the same. The paper normalises inside the
    outputs of one prompt; as in the public implementations, the mean here runs over the whole
    batch.

    Args:
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      Weights [B, T], of the default float type (float32 unless 64 bits are enabled).
    """
    mask_BT, length_B1, _ = _row_lengths(mask_BT)
    return mask_BT / jnp.maximum(jnp.sum(length_B1), 1)


def token_weights_constant_length(mask_BT: jax.Array, *, length: int | None = None) -> jax.Array:
    """Sum over each sequence over a constant, mean over sequences: w = m / (L · B).

    Dr. GRPO (arXiv 2503.20783, section 3.2): no term depends on the length of the output, which
    removes the pull towards long wrong answers. B counts the rows that have at least one token.

    Args:
      mask_BT: [B, T], true or non-zero where the token counts.
      length: L in tokens, the generation budget; None is T, the padded length.

    Returns:
      Weights [B, T], of the default float type (float32 unless 64 bits are enabled). They
      sum to the mean length over L.
    """
    mask_BT, _, rows = _row_lengths(mask_BT)
    return mask_BT / ((mask_BT.shape[1] if length is None else length) * jnp.maximum(rows, 1))


def token_weights_sum(mask_BT: jax.Array) -> jax.Array:
    """Plain sum over all tokens: w = m.

    Args:
      mask_BT: [B, T], true or non-zero where the token counts.

    Returns:
      Weights [B, T], of the default float type (float32 unless 64 bits are enabled).
    """
    return _row_lengths(mask_BT)[0]


def sequence_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """`x_BT` reduced with `token_weights_sequence_mean`, to a scalar."""
    return weighted_sum(x_BT, token_weights_sequence_mean(mask_BT))


def token_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """`x_BT` reduced with `token_weights_token_mean`, to a scalar."""
    return weighted_sum(x_BT, token_weights_token_mean(mask_BT))


def constant_length_mean(
    x_BT: jax.Array, mask_BT: jax.Array, *, length: int | None = None
) -> jax.Array:
    """`x_BT` reduced with `token_weights_constant_length`, to a scalar."""
    return weighted_sum(x_BT, token_weights_constant_length(mask_BT, length=length))


def token_sum(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """`x_BT` reduced with `token_weights_sum`, to a scalar."""
    return weighted_sum(x_BT, token_weights_sum(mask_BT))
