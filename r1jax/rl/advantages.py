# SPDX-License-Identifier: Apache-2.0
"""From rewards to advantages: the group is the baseline, no critic.

Rows of one prompt are contiguous: B = P·G completions, of which rows p·G … p·G + G − 1 answer
prompt p.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np


def _group(reward_B: jax.Array, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Rewards [P, G] in float (0 where not finite) and where they are finite [P, G]."""
    reward_B = jnp.asarray(reward_B)
    chex.assert_rank(reward_B, 1)
    if group_size < 1 or reward_B.shape[0] % group_size:
        raise ValueError(
            f"{reward_B.shape[0]} rewards do not fall into groups of {group_size=}; "
            "set group_size to the number of samples per prompt"
        )
    # A boolean or integer reward must not make the mean or the result an integer.
    reward_B = reward_B.astype(jnp.promote_types(reward_B.dtype, jnp.float32))
    reward_PG = reward_B.reshape(-1, group_size)
    valid_PG = jnp.isfinite(reward_PG)
    return jnp.where(valid_PG, reward_PG, 0), valid_PG


def _differs(reward_PG: jax.Array, valid_PG: jax.Array) -> jax.Array:
    """[P, 1] bool: the valid rewards of the group are not all equal."""
    # By comparison: the variance of equal fractions (G times 0.1) is rounding error, not 0.
    highest_P1 = jnp.max(jnp.where(valid_PG, reward_PG, -jnp.inf), axis=1, keepdims=True)
    lowest_P1 = jnp.min(jnp.where(valid_PG, reward_PG, jnp.inf), axis=1, keepdims=True)
    return highest_P1 > lowest_P1


def _mean(x: jax.Array, valid: jax.Array, axis: int | None) -> tuple[jax.Array, jax.Array]:
    """Mean along `axis` of the valid entries of x, which is 0 elsewhere, and their number."""
    count = jnp.sum(valid, axis=axis, keepdims=True)
    return jnp.sum(x, axis=axis, keepdims=True) / jnp.maximum(count, 1), count


def _deviation(x: jax.Array, valid: jax.Array, axis: int | None, ddof: int) -> jax.Array:
    """Standard deviation along `axis` of the valid entries of x, which is 0 elsewhere; 0 for a
    single one."""
    mean, count = _mean(x, valid, axis)
    squares = jnp.sum(jnp.where(valid, jnp.square(x - mean), 0), axis=axis, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(count - ddof, 1))


def group_advantages(
    reward_B: jax.Array,
    *,
    group_size: int,
    scale: Literal["group", "batch", "none"] = "group",
    ddof: int = 0,
    eps: float = 1e-6,
) -> jax.Array:
    """A_i = (r_i − mean_G) / (std + eps) (DeepSeekMath, arXiv 2402.03300, 4.1.2; R1, eq. 3).

    The mean is always the group's. What has no contrast has no advantage, exactly 0 and never NaN:
      * a group whose rewards are all equal, or a group of one;
      * a completion whose reward is NaN or infinite (a verifier that failed); it is also left out
        of the mean and deviation of its group and of the batch.

    Args:
      reward_B: rewards [B = P·G], float, integer or boolean, of any scale; fractions count as
        fractions.
      group_size: G, completions per prompt.
      scale: divide by the deviation of the group (GRPO), of all rewards of the batch, or not at all
        (Dr. GRPO: `"none"`; eps is then not used either).
      ddof: 0 divides the squares by G (the papers), 1 by G − 1 (TRL, verl).
      eps: added to the deviation.

    Returns:
      Advantages [B], at least float32. Means of groups without invalid rewards are 0.

    Raises:
      ValueError: B is not a multiple of `group_size`, or `scale` is none of the three.
    """
    reward_PG, valid_PG = _group(reward_B, group_size)
    centred_PG = reward_PG - _mean(reward_PG, valid_PG, 1)[0]
    if scale == "group":
        advantage_PG = centred_PG / (_deviation(reward_PG, valid_PG, 1, ddof) + eps)
    elif scale == "batch":
        advantage_PG = centred_PG / (_deviation(reward_PG, valid_PG, None, ddof) + eps)
    elif scale == "none":
        advantage_PG = centred_PG
    else:
        raise ValueError(f"{scale=} must be 'group', 'batch' or 'none'")
    return jnp.where(_differs(reward_PG, valid_PG) & valid_PG, advantage_PG, 0).reshape(-1)


def leave_one_out_advantages(reward_B: jax.Array, *, group_size: int) -> jax.Array:
    """A_i = r_i − mean of the rewards of the other samples (RLOO, arXiv 2402.14740).

    Equal to G / (G − 1) · (r_i − mean_G), so the baseline of a sample does not depend on it and
    the policy gradient is unbiased. The KL goes into the reward (`kl_penalised_reward`), and the
    loss is `reinforce_loss` on policy, `output_grpo_loss` with a clip for several updates a batch.
    What has no contrast, or no finite reward, has advantage 0 as in `group_advantages`.

    Args:
      reward_B: rewards [B = P·G], float, integer or boolean.
      group_size: G, completions per prompt.

    Returns:
      Advantages [B], at least float32, of mean 0 in every group.

    Raises:
      ValueError: B is not a multiple of `group_size`.
    """
    reward_PG, valid_PG = _group(reward_B, group_size)
    mean_P1, count_P1 = _mean(reward_PG, valid_PG, 1)
    advantage_PG = (reward_PG - mean_P1) * count_P1 / jnp.maximum(count_P1 - 1, 1)
    return jnp.where(_differs(reward_PG, valid_PG) & valid_PG, advantage_PG, 0).reshape(-1)


def informative_groups(reward_B: jax.Array, *, group_size: int) -> jax.Array:
    """Which prompts have contrast: two finite rewards of the group differ.

    The others have zero advantage and no policy gradient. They are worth counting, and are what
    DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) replaces.

    Args:
      reward_B: rewards [B = P·G].
      group_size: G, completions per prompt.

    Returns:
      [P] bool.
    """
    return _differs(*_group(reward_B, group_size)).reshape(-1)


def overlong_penalty(
    length_B: jax.Array | np.ndarray, *, max_length: int, buffer: int
) -> jax.Array:
    """DAPO's soft punishment of long outputs, to be added to the reward (arXiv 2503.14476, eq. 13).

    0 up to max_length − buffer tokens, then linear to −1 at max_length, and −1 beyond.

    Args:
      length_B: length of each completion in tokens [B], integer or float.
      max_length: L_max, in tokens.
      buffer: L_cache, in tokens, the width of the ramp; at least 1.

    Returns:
      [B], float32, in [−1, 0]. A numpy array is answered with one: the host need not wait for a
      device that is at work.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"{buffer=} must be between 1 and {max_length=}")
    lib = jnp if isinstance(length_B, jax.Array) else np
    over_B = (lib.asarray(length_B) - (max_length - buffer)).astype(lib.float32)
    return -lib.clip(over_B / buffer, 0.0, 1.0)
