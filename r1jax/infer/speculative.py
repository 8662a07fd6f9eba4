# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: the rule that accepts drafts, and how far ahead it pays to draft.

Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318). Pure functions; what
drafts and what verifies is not their business.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from r1jax.infer.sample import draw

HOPE = 0.9  # acceptance that a row's first drafts are credited with before it has drafted
EARLY = 3  # rounds that weigh as much as this hope


class Verdict(NamedTuple):
    """What became of each row's drafts.

    Attributes:
        accepted_B: [B] int32 drafts kept, from the first on.
        token_B: [B] int32 the token after them.
    """

    accepted_B: jax.Array
    token_B: jax.Array


def verify(
    target_BTN: jax.Array,
    drafter_BTN: jax.Array,
    draft_BT: jax.Array,
    horizon_B: jax.Array,
    key: jax.Array,
) -> Verdict:
    """Accepts drafts so that the tokens are distributed as if the target had drawn every one.

    Draft t is accepted with probability min(1, p(d) / q(d)); the first that is refused is replaced
    by a draw from max(p − q, 0), normalised; if none is, one more token is drawn from p (arXiv
    2211.17192, algorithm 1). A row that drafted fewer than T stops at its horizon and draws from p
    there. Whether a draft is made may depend on what came before it, not on the draft itself.

    Args:
        target_BTN: [B, T + 1, N] probabilities p of the target after 0 … T drafts.
        drafter_BTN: [B, T, N] probabilities q that each draft was drawn from.
        draft_BT: [B, T] int32.
        horizon_B: [B] drafts that count, at most T.
        key: PRNG key.
    """
    chex.assert_rank([target_BTN, drafter_BTN, draft_BT, horizon_B], [3, 3, 2, 1])
    b, t = draft_BT.shape
    n = drafter_BTN.shape[-1]
    chex.assert_shape(target_BTN, (b, t + 1, n))
    if not t:
        return Verdict(jnp.zeros(b, jnp.int32), draw(target_BTN[:, 0], key))
    chance_key, draw_key = jax.random.split(key)
    at = lambda table: jnp.take_along_axis(table, draft_BT[..., None], -1)[..., 0]  # noqa: E731
    chance_BT = jax.random.uniform(chance_key, (b, t))
    kept_BT = chance_BT * at(drafter_BTN) < at(target_BTN[:, :t])
    accepted_B = _accepted(kept_BT, horizon_B)
    pick = lambda table: jnp.take_along_axis(table, accepted_B[:, None, None], 1)[:, 0]  # noqa: E731
    p_BN = pick(target_BTN)
    q_BN = pick(jnp.pad(drafter_BTN, ((0, 0), (0, 1), (0, 0))))
    rest_BN = jnp.maximum(p_BN - q_BN, 0.0)
    # p = q up to rounding leaves no rest: then a refusal was rounding too, and p is right.
    refused_B1 = ((accepted_B < horizon_B) & (rest_BN.sum(-1) > 0.0))[:, None]
    token_B = draw(jnp.where(refused_B1, rest_BN, p_BN), draw_key)
    return Verdict(accepted_B, token_B)


def verify_greedy(best_BT: jax.Array, draft_BT: jax.Array, horizon_B: jax.Array) -> Verdict:
    """`verify` where target and drafter are greedy: a draft stands if it is the target's best.

    Args:
        best_BT: [B, T + 1] int32, the target's best token after 0 … T drafts.
        draft_BT: [B, T] int32.
        horizon_B: [B] drafts that count, at most T.
    """
    chex.assert_rank([best_BT, draft_BT, horizon_B], [2, 2, 1])
    b, t = draft_BT.shape
    chex.assert_shape(best_BT, (b, t + 1))
    accepted_B = _accepted(draft_BT == best_BT[:, :t], horizon_B)
    return Verdict(accepted_B, jnp.take_along_axis(best_BT, accepted_B[:, None], 1)[:, 0])


def _accepted(kept_BT: jax.Array, horizon_B: jax.Array) -> jax.Array:
    """[B] int32: drafts within the horizon before the first that is not kept."""
    kept_BT &= _before(horizon_B, kept_BT.shape[1])
    return jnp.cumprod(kept_BT.astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)


def _before(count_B: jax.Array, t: int) -> jax.Array:
    """[B, T] bool: places before each row's count."""
    return jnp.arange(t) < count_B[:, None]


class Costs(NamedTuple):
    """Time of speculation, in passes of the main model over one token a row.

    Attributes:
        round: what a drafting round costs beyond a plain pass, before its first draft.
        draft: one more draft, its token in the main model's pass included.
        module: what of that a round is spared that drafts less than was compiled in.
    """

    round: jax.Array | float
    draft: jax.Array | float
    module: jax.Array | float = 0.0


def hope(t: int) -> jax.Array:
    """[T] acceptance of a round's drafts before any was made: drafts of drafts are worse ones."""
    return HOPE ** jnp.arange(1, t + 1)


def best_horizon(rate_BT: jax.Array, live_B: jax.Array, costs: Costs) -> jax.Array:
    """Scalar int32: how many drafts, of up to T, make the rows' tokens fastest; 0: none.

    k drafts bring a row 1 + r_1 + r_1 r_2 + … + r_1 … r_k tokens, and cost all rows together
    1 + round + k · draft passes.

    Args:
        rate_BT: [B, T] acceptance of the first draft, of the second where the first is accepted, …
        live_B: [B] bool: rows that count.
        costs: of drafting.
    """
    drafts_T = jnp.arange(1, rate_BT.shape[1] + 1)
    tokens_BT = 1.0 + jnp.cumsum(jnp.cumprod(rate_BT, axis=1), axis=1)
    tokens_T = (tokens_BT * live_B[:, None]).sum(0) / jnp.maximum(live_B.sum(), 1)
    speed_T = tokens_T / (1.0 + costs.round + costs.draft * drafts_T)
    return jnp.argmax(jnp.pad(speed_T, (1, 0), constant_values=1.0)).astype(jnp.int32)


def goes_on(chain_B: jax.Array, rate_BT: jax.Array, best_B: jax.Array, t: int, costs: Costs):
    """Whether draft t + 1 of each row is worth its pass of the module, once draft t is known.

    The chance of draft t is estimated as the geometric mean of the running acceptance at its place
    and of the drafter's greatest probability; `chain` is the product of these, and of the next
    draft only the running acceptance is known.

    Args:
        chain_B: [B] chance that all drafts before t are accepted.
        rate_BT: [B, T] running acceptance of a row's drafts, t + 1 < T.
        best_B: [B] the drafter's greatest probability for draft t.
        t: counted from 0.
        costs: of drafting.

    Returns:
        ([B] bool, the new chain_B).
    """
    chain_B = chain_B * jnp.sqrt(rate_BT[:, t] * best_B)
    return chain_B * rate_BT[:, t + 1] > costs.module, chain_B


def updated_rate(
    rate_BT: jax.Array, accepted_B: jax.Array, depth: int, rounds: jax.Array | int
) -> jax.Array:
    """Running acceptance by place, after a round of at most `depth` drafts.

    The accepted ones move their places' by a sixteenth, in the first dozen rounds, while little but
    `hope` is known, by more; and so does the first that was refused or, for want of confidence, not
    made. Others move by 1/256 towards `hope`, so that a row that gave up tries again some day.

    Args:
        rate_BT: [B, T] before the round.
        accepted_B: [B] of its drafts.
        depth: most drafts that a row could make in it.
        rounds: made before it.
    """
    t = rate_BT.shape[1]
    kept_BT = _before(accepted_B, t)
    judged_BT = _before(jnp.minimum(accepted_B + 1, depth), t)
    step = 1.0 / jnp.minimum(16, EARLY + 1 + rounds)
    return rate_BT + jnp.where(judged_BT, (kept_BT - rate_BT) * step, (hope(t) - rate_BT) / 256)
