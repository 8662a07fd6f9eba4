# SPDX-License-Identifier: Apache-2.0
"""The DeepSeek-V3 router: sigmoid affinities, group-limited top-k, bias-based load balancing.

DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; auxiliary-loss-free balancing (arXiv 2408.15664).
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """What the router decided.

    Attributes:
        index_TK: [T, K] int32, the chosen experts of each token, best first.
        weight_TK: [T, K] float32, their mixing weights; each row sums to `routed_scaling_factor`.
        affinity_TE: [T, E] float32, sigmoid affinities of all experts.
    """

    index_TK: jax.Array
    weight_TK: jax.Array
    affinity_TE: jax.Array


def route(
    logits_TE: jax.Array,
    bias_E: jax.Array,
    *,
    num_experts_per_tok: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
) -> Routing:
    """Chooses with s + b, weighs with s alone (DeepSeek-V3 eq. 13–16).

    s = sigmoid(logits). A group's score is the sum of its two best s + b; the best `topk_group`
    groups stay; the top K of s + b inside them are chosen; their s, normalised to sum to one, times
    `routed_scaling_factor` are the mixing weights. The bias has no path to the weights or to a
    gradient.

    Args:
        logits_TE: [T, E] router logits, computed in float32.
        bias_E: [E] float32 balance bias.
        num_experts_per_tok: K.
        n_group: groups that E is divided into, E % n_group == 0.
        topk_group: groups kept per token.
        routed_scaling_factor: the sum of a token's mixing weights.
    """
    chex.assert_rank([logits_TE, bias_E], [2, 1])
    chex.assert_axis_dimension(logits_TE, 1, bias_E.shape[0])
    affinity_TE = jax.nn.sigmoid(logits_TE.astype(jnp.float32))
    choice_TE = jax.lax.stop_gradient(affinity_TE + bias_E.astype(jnp.float32))
    if n_group > 1:
        grouped = choice_TE.reshape(choice_TE.shape[0], n_group, -1)
        score_TG = jax.lax.top_k(grouped, 2)[0].sum(-1)
        kept_TG = _top_mask(score_TG, topk_group)
        choice_TE = jnp.where(kept_TG[:, :, None], grouped, -jnp.inf).reshape(choice_TE.shape)
    index_TK = jax.lax.top_k(choice_TE, num_experts_per_tok)[1]
    chosen_TK = jnp.take_along_axis(affinity_TE, index_TK, axis=-1)
    total_T1 = chosen_TK.sum(-1, keepdims=True) + 1e-20
    return Routing(index_TK, chosen_TK / total_T1 * routed_scaling_factor, affinity_TE)


def _top_mask(score_TG: jax.Array, k: int) -> jax.Array:
    """True at the k best of each row; ties go to the lower index, as in `top_k`."""
    index_Tk = jax.lax.top_k(score_TG, k)[1]
    return (index_Tk[:, :, None] == jnp.arange(score_TG.shape[1])).any(1)


def expert_load(index_TK: jax.Array, valid_T: jax.Array, n_routed_experts: int) -> jax.Array:
    """Tokens sent to each expert, padding excluded: [E] float32 counts."""
    chosen_TE = jax.nn.one_hot(index_TK, n_routed_experts, dtype=jnp.float32).sum(1)
    return (chosen_TE * valid_T.astype(jnp.float32)[:, None]).sum(0)


def balance_bias(bias_E: jax.Array, load_E: jax.Array, speed: jax.Array | float) -> jax.Array:
    """b += γ · sign(mean load − load) (arXiv 2408.15664, algorithm 1).

    Args:
        bias_E: [..., E] float32.
        load_E: [..., E] token counts over the *whole* global batch, padding excluded.
        speed: γ; 0 freezes the bias.
    """
    mean = load_E.mean(-1, keepdims=True)
    return bias_E + speed * jnp.sign(mean - load_E)


def sequence_balance_loss(
    affinity_BTE: jax.Array,
    index_BTK: jax.Array,
    valid_BT: jax.Array,
    *,
    total: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Complementary sequence-wise balance loss, without its α (DeepSeek-V3 eq. 17–20).

    Σ_e f_e · P_e for each row, with f_e = E / (K·T) · #{t : e chosen} and P_e the mean over t of
    the affinities normalised over experts; T counts valid tokens. Only P carries a gradient.

    Args:
        affinity_BTE: [B, T, E] sigmoid affinities.
        index_BTK: [B, T, K] chosen experts.
        valid_BT: [B, T] 1 for a real token, 0 for padding.
        total: adds up what the pieces of a row have found, where T is only a piece of it.

    Returns:
        [B] float32, 1 under a perfect balance of loads or of affinities; 0 for an empty row.
    """
    n_experts, k = affinity_BTE.shape[-1], index_BTK.shape[-1]
    valid_BT = valid_BT.astype(jnp.float32)
    count_B1 = jnp.maximum(total(valid_BT.sum(-1, keepdims=True)), 1.0)
    chosen_BTE = jax.nn.one_hot(index_BTK, n_experts, dtype=jnp.float32).sum(2)
    times_BE = total(jnp.einsum("bte,bt->be", chosen_BTE, valid_BT))
    f_BE = times_BE * n_experts / (k * count_B1)
    share_BTE = affinity_BTE / (affinity_BTE.sum(-1, keepdims=True) + 1e-20)
    p_BE = total(jnp.einsum("bte,bt->be", share_BTE, valid_BT)) / count_B1
    return (jax.lax.stop_gradient(f_BE) * p_BE).sum(-1)
