# SPDX-License-Identifier: Apache-2.0
"""Generation as compiled loops of rounds; with an MTP module a round may bring several tokens.

A drafting round feeds each row's last token and its drafts to the main model in one pass over the
latent cache and keeps what `speculative.verify` accepts, so the distribution of the tokens is the
main model's. Drafts come from the checkpoint's own MTP module (DeepSeek-V3 section 2.2), applied to
its own output for the second draft and on. A round without drafts is plain decoding.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.infer.cache import Cache, extend, last, slots
from r1jax.infer.sample import best, distribution, draw
from r1jax.infer.speculative import (
    EARLY,
    Costs,
    best_horizon,
    goes_on,
    hope,
    updated_rate,
    verify,
    verify_greedy,
)
from r1jax.nn.block import Entry

PACE = 32  # rounds after which more drafts may be tried


class Drafter(NamedTuple):
    """What the MTP module has seen, and what it has yet to see.

    Attributes:
        own: its cache, arrays [1, B, S, ...]; entry i is made of hidden i and token i + 1.
        length_B: [B] int32 entries.
        hidden_BWD: [B, W, D] hidden states of the main model that have no entry yet. W is what a
            call can make: rounds without drafts leave them to be caught up with together.
        next_BW: [B, W] int32, the token after each.
        pending_B: [B] int32, how many these are; a drafting round finds at most drafts + 1.
        rate_BT: [B, T] running acceptance of a round's first, second, … draft.
        rounds: int32 scalar, made so far.
        depth: int32 scalar, most drafts of the next round, whose program depends on it.
    """

    own: Entry
    length_B: jax.Array
    hidden_BWD: jax.Array
    next_BW: jax.Array
    pending_B: jax.Array
    rate_BT: jax.Array
    rounds: jax.Array
    depth: jax.Array


class Session(NamedTuple):
    """Where each row's generation stands.

    Attributes:
        cache: of the main model.
        drafter: None without multi-token decoding.
        token_B: [B] int32 the last token, not yet fed.
        left_B: [B] int32 tokens a row may still make; 0: it is done.
        key: PRNG key of the next round.
        tokens_BM: [B, M] int32 what the call made.
        made_B: [B] int32 how many of them.
        counts: passes of the main model, drafts made and drafts accepted, over live rows.
    """

    cache: Cache
    drafter: Drafter | None
    token_B: jax.Array
    left_B: jax.Array
    key: jax.Array
    tokens_BM: jax.Array
    made_B: jax.Array
    counts: jax.Array


class Rules(NamedTuple):
    """How tokens are drawn and when to stop; hashable, compiled in.

    Attributes:
        eos_ids: tokens that end a row.
        top_k: as in `sample.truncate`.
        top_p: as in `sample.truncate`.
        greedy: every row's temperature is 0: nothing is drawn.
        drafts: most drafts a round.
        rerank: continuations of `drafts` tokens that `rerank.run` chooses from; 0: drafts are
            verified.
    """

    eos_ids: tuple[int, ...] = ()
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    drafts: int = 0
    rerank: int = 0


def start_drafter(
    own: Entry, length_B, hidden_BD: jax.Array, token_B: jax.Array, *, width: int, most: int, depth
) -> Drafter:
    """A drafter whose cache holds all of a prompt but its last token.

    Args:
        width: W.
        most: drafts of any round, T.
        depth: drafts of the first one, int32.
    """
    b, d = hidden_BD.shape
    hidden_BWD = jnp.zeros((b, width, d), hidden_BD.dtype).at[:, 0].set(hidden_BD)
    next_BW = jnp.zeros((b, width), jnp.int32).at[:, 0].set(token_B)
    ones = jnp.ones(b, jnp.int32)
    first = jnp.tile(hope(most), (b, 1)), jnp.int32(0), jnp.int32(depth)
    return Drafter(own, length_B, hidden_BWD, next_BW, ones, *first)


def extend_mtp(model, hidden_BTD: jax.Array, next_BT: jax.Array, own: Entry, length_B: jax.Array):
    """Feeds T positions a row to the MTP module: (its hidden_BTD, its cache)."""
    at_BT, step = slots(length_B, next_BT.shape[1], own[0].shape[2])
    turn = model.rotation(at_BT)
    return model.mtp.cached(hidden_BTD, model.embed_tokens(next_BT), turn, own, step)


def head_logits(model, hidden_BTD: jax.Array) -> jax.Array:
    """[B, T, N] float32 logits of the shared head."""
    return model.output_head().logits(hidden_BTD)


def probabilities(model, hidden_BTD: jax.Array, temperature_B: jax.Array, rules: Rules):
    """[B, T, N] that the next tokens are drawn from."""
    logits_BTN = head_logits(model, hidden_BTD)
    return distribution(logits_BTN, temperature_B, top_k=rules.top_k, top_p=rules.top_p)


def run(
    model,
    session: Session,
    temperature_B: jax.Array,
    most: jax.Array,
    costs: Costs,
    *,
    rules: Rules,
) -> Session:
    """Rounds until every row is done, one has made `most` of the M tokens there is room for, or
    it is time for another number of drafts: that depends on the rows alone, not on `most`.

    Args:
        model: a decoder made of stacks, with an MTP module if `rules.drafts`.
        session: where to go on.
        temperature_B: [B]; 0 is greedy.
        most: scalar int32.
        costs: of drafting.
        rules: with `drafts` = 0 no round drafts, also where the session has a drafter: `catch_up`
            must then come before one that drafts.
    """
    more = more_of(session, most, rules)

    def go_on(s: Session):
        return more(s) & (s.drafter is None or s.drafter.depth == rules.drafts)

    def body(s: Session):
        key, draft_key, now = s.key, None, None
        if not rules.greedy:
            key, draft_key, now = jax.random.split(s.key, 3)
        s = s._replace(key=key)
        if rules.drafts:
            drafts, drafter = _draft(model, s, temperature_B, draft_key, costs, rules=rules)
            s = s._replace(drafter=drafter)
        else:
            b, n = s.token_B.shape[0], model.head_DN().shape[-1]
            drafts = jnp.zeros((b, 0), jnp.int32), jnp.zeros((b, 0, n)), jnp.zeros(b, jnp.int32)
        s = _judged(model, s, drafts, temperature_B, now, rules=rules)
        return s if s.drafter is None else s._replace(drafter=_paced(s, costs))

    return jax.lax.while_loop(go_on, body, uncounted(session))


def uncounted(s: Session) -> Session:
    """The session with nothing made and nothing counted in this call."""
    return s._replace(made_B=jnp.zeros_like(s.made_B), counts=jnp.zeros_like(s.counts))


def more_of(session: Session, most: jax.Array, rules: Rules) -> Callable[[Session], jax.Array]:
    """Whether a session is to go on: a row is not done, and none has made `most` tokens."""
    most = jnp.minimum(most, session.tokens_BM.shape[1] - rules.drafts)
    return lambda s: (s.left_B > 0).any() & (s.made_B < most).all()


def _paced(s: Session, costs: Costs) -> Drafter:
    """The drafter with the depth of the next round: fewer drafts as soon as that is better, more
    when the first rounds' single drafts are judged and every `PACE` rounds. What deeper drafts are
    hoped to bring counts there alone, and first drafts come before deeper ones."""
    d, most = s.drafter, s.drafter.rate_BT.shape[1]
    deeper = (d.rounds % PACE == 0) | ((d.rounds == EARLY) & (d.depth > 0))
    reach = jnp.where(deeper, jnp.where(d.depth > 0, most, 1), d.depth)
    rate_BT = jnp.where(jnp.arange(most) < reach, d.rate_BT, 0.0)
    return d._replace(depth=best_horizon(rate_BT, s.left_B > 0, costs))


def catch_up(model, drafter: Drafter, *, width: int) -> Drafter:
    """Makes all pending entries but the last: the next draft starts from its output.

    Args:
        width: entries that a row has pending at most.
    """
    d = drafter
    hidden_BwD, next_Bw = d.hidden_BWD[:, :width], d.next_BW[:, :width]
    _, own = extend_mtp(model, hidden_BwD, next_Bw, d.own, d.length_B)
    done_B = jnp.maximum(d.pending_B - 1, 0)
    move = lambda x: jax.vmap(lambda row, n: jnp.roll(row, -n, axis=0))(x, done_B)  # noqa: E731
    return d._replace(
        own=own,
        length_B=d.length_B + done_B,
        hidden_BWD=move(d.hidden_BWD),
        next_BW=move(d.next_BW),
        pending_B=d.pending_B - done_B,
    )


def _draft(model, s: Session, temperature_B, key, costs: Costs, *, rules: Rules):
    """((draft_BT, drafter_BTN or None if greedy, horizon_B), drafter with entries for all that was
    pending).

    The module runs once on what is pending and once more for every draft after the first, while
    that is worth it for some row: then the others' drafts cost nothing.
    """
    d, depth = s.drafter, rules.drafts
    hidden_BWD, next_BW = d.hidden_BWD[:, : depth + 1], d.next_BW[:, : depth + 1]
    hidden, own = extend_mtp(model, hidden_BWD, next_BW, d.own, d.length_B)
    hidden_BD, length_B = last(hidden, d.pending_B), d.length_B + d.pending_B
    chain_B, horizon_B = jnp.ones_like(d.rate_BT[:, 0]), jnp.zeros_like(length_B)
    drafts, distributions, on = [], [], True
    for t in range(depth):
        if rules.greedy:
            drafts.append(best(head_logits(model, hidden_BD[:, None])[:, 0]))
            certain_B = 1.0
        else:
            q_BN = probabilities(model, hidden_BD[:, None], temperature_B, rules)[:, 0]
            distributions.append(q_BN)
            drafts.append(draw(q_BN, jax.random.fold_in(key, t)))
            certain_B = q_BN.max(-1)
        live_B = s.left_B > t + 1  # one token must be left for the main model to draw
        horizon_B += live_B & on
        if t + 1 < depth:
            more_B, chain_B = goes_on(chain_B, d.rate_BT, certain_B, t, costs)
            on &= (more_B & (s.left_B > t + 2)).any()
            fed = hidden_BD[:, None], drafts[-1][:, None], own, length_B + t
            hidden_BD, own = jax.lax.cond(on, _deeper, _no_deeper, model, *fed)
    drafter = d._replace(own=own, length_B=length_B, pending_B=jnp.zeros_like(d.pending_B))
    q_BTN = None if rules.greedy else jnp.stack(distributions, 1)
    return (jnp.stack(drafts, 1), q_BTN, horizon_B), drafter


def _deeper(model, hidden_B1D, next_B1, own: Entry, length_B):
    """(hidden_BD, own) of the module on its own output."""
    hidden_B1D, own = extend_mtp(model, hidden_B1D, next_B1, own, length_B)
    return hidden_B1D[:, 0], own


def _no_deeper(model, hidden_B1D, next_B1, own: Entry, length_B):
    """What it was given: its drafts do not count."""
    return hidden_B1D[:, 0], own


def _judged(model, s: Session, drafts, temperature_B, key, *, rules: Rules) -> Session:
    """Feeds last tokens and drafts, keeps what is accepted and one token more."""
    draft_BT, q_BTN, horizon_B = drafts
    fed_BT = jnp.concatenate([s.token_B[:, None], draft_BT], axis=1)
    hidden_BTD, cache = extend(model, fed_BT, s.cache)
    if rules.greedy:
        best_BT = best(head_logits(model, hidden_BTD))
        verdict = verify_greedy(best_BT, draft_BT, horizon_B)
    else:
        target_BTN = probabilities(model, hidden_BTD, temperature_B, rules)
        verdict = verify(target_BTN, q_BTN, draft_BT, horizon_B, key)
    on = advanced(s, cache, hidden_BTD, Drawn(draft_BT, horizon_B, *verdict), rules=rules)
    if s.drafter is None:
        return on
    # A row that was done keeps its rate for nobody.
    d, rounds = s.drafter, s.drafter.rounds + 1
    rate_BT = updated_rate(d.rate_BT, verdict.accepted_B, rules.drafts, d.rounds)
    return on._replace(drafter=on.drafter._replace(rate_BT=rate_BT, rounds=rounds))


class Drawn(NamedTuple):
    """What a round brought each row.

    Attributes:
        draft_BT: [B, T] int32 drafts that were fed after the last token.
        drafted_B: [B] how many were drafted, for the counts.
        accepted_B: [B] how many of `draft_BT` are kept.
        token_B: [B] int32 the token after these.
    """

    draft_BT: jax.Array
    drafted_B: jax.Array
    accepted_B: jax.Array
    token_B: jax.Array


def advanced(s: Session, cache: Cache, hidden_BTD, drawn: Drawn, *, rules: Rules) -> Session:
    """The session after a round.

    Args:
        s: before it.
        cache: with the entries of the last token and the drafts.
        hidden_BTD: [B, T + 1, D] of these.
        drawn: what became of them.
        rules: when a row ends.
    """
    new_BT = jnp.pad(drawn.draft_BT, ((0, 0), (0, 1)))
    place_T = jnp.arange(new_BT.shape[1])
    new_BT = jnp.where(place_T == drawn.accepted_B[:, None], drawn.token_B[:, None], new_BT)
    live_B = s.left_B > 0
    kept_B, ended_B = _kept(new_BT, drawn.accepted_B + 1, s.left_B, rules.eos_ids)
    row_B1 = jnp.arange(new_BT.shape[0])[:, None]
    # What a row does not keep is written beyond the width, that is nowhere.
    width = s.tokens_BM.shape[1]
    slot_BT = jnp.where(place_T < kept_B[:, None], s.made_B[:, None] + place_T, width)
    fed_B = jnp.where(live_B, drawn.accepted_B + 1, 0)
    drafter = s.drafter
    if drafter is not None:
        drafter = _seen(drafter, hidden_BTD, new_BT, fed_B)
    tally = jnp.stack([jnp.ones_like(live_B, jnp.int32), drawn.drafted_B, drawn.accepted_B])
    return s._replace(
        cache=cache._replace(length_B=cache.length_B + fed_B),
        drafter=drafter,
        token_B=jnp.where(live_B, drawn.token_B, s.token_B),
        left_B=jnp.where(ended_B, 0, s.left_B - kept_B),
        tokens_BM=s.tokens_BM.at[row_B1, slot_BT].set(new_BT, mode="drop"),
        made_B=s.made_B + kept_B,
        counts=s.counts + (tally * live_B).sum(1, dtype=jnp.int32),
    )


def _kept(new_BT, count_B, left_B, eos_ids: tuple[int, ...]):
    """(tokens of each row's `count_B` new ones that stand, whether it ended): an end of sequence
    and the limit cut what comes after."""
    eos_BT = jnp.isin(new_BT, jnp.asarray(eos_ids, jnp.int32)) if eos_ids else new_BT < 0
    eos_BT &= jnp.arange(new_BT.shape[1]) < count_B[:, None]
    ended_B = eos_BT.any(1)
    count_B = jnp.where(ended_B, jnp.argmax(eos_BT, 1).astype(jnp.int32) + 1, count_B)
    kept_B = jnp.minimum(count_B, left_B)
    return kept_B, ended_B & (count_B <= left_B)


def _seen(d: Drafter, hidden_BTD, next_BT, count_B) -> Drafter:
    """The drafter with `count_B` more positions pending."""
    row_B1 = jnp.arange(next_BT.shape[0])[:, None]
    place_T = jnp.arange(next_BT.shape[1])
    width = d.next_BW.shape[1]
    slot_BT = jnp.where(place_T < count_B[:, None], d.pending_B[:, None] + place_T, width)
    return d._replace(
        hidden_BWD=d.hidden_BWD.at[row_B1, slot_BT].set(hidden_BTD, mode="drop"),
        next_BW=d.next_BW.at[row_B1, slot_BT].set(next_BT, mode="drop"),
        pending_B=d.pending_B + count_B,
    )
