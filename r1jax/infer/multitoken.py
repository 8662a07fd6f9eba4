# SPDX-License-Identifier: Apache-2.0
"""Generation as one compiled loop of rounds; with an MTP module a round may bring several tokens.

A round feeds each row's last token and its drafts to the main model in one pass over the latent
cache and keeps what `speculative.verify` accepts, so the distribution of the tokens is the main
model's. Drafts come from the checkpoint's own MTP module (DeepSeek-V3 section 2.2), applied to its
own output for the second draft and on. A round without drafts is plain decoding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.infer.cache import Cache, extend, last, slots
from r1jax.infer.sample import distribution, draw
from r1jax.infer.speculative import HOPE, Costs, goes_on, pays, updated_rate, verify
from r1jax.nn.block import Entry

PENDING = 16  # positions whose MTP entries may be missing: made up for together


class Drafter(NamedTuple):
    """What the MTP module has seen, and what it has yet to see.

    Attributes:
        own: its cache, arrays [1, B, S, ...]; entry i is made of hidden i and token i + 1.
        length_B: [B] int32 entries.
        hidden_BWD: [B, W, D] hidden states of the main model that have no entry yet.
        next_BW: [B, W] int32, the token after each.
        pending_B: [B] int32, how many these are.
        rate_B: [B] running acceptance.
    """

    own: Entry
    length_B: jax.Array
    hidden_BWD: jax.Array
    next_BW: jax.Array
    pending_B: jax.Array
    rate_B: jax.Array


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
        drafts: most drafts a round.
    """

    eos_ids: tuple[int, ...] = ()
    top_k: int | None = None
    top_p: float | None = None
    drafts: int = 0


def start_drafter(model, own: Entry, length_B, hidden_BD: jax.Array, token_B: jax.Array) -> Drafter:
    """A drafter whose cache holds all of the prompt but its last token."""
    b, d = hidden_BD.shape
    hidden_BWD = jnp.zeros((b, PENDING, d), hidden_BD.dtype).at[:, 0].set(hidden_BD)
    next_BW = jnp.zeros((b, PENDING), jnp.int32).at[:, 0].set(token_B)
    ones = jnp.ones(b, jnp.int32)
    return Drafter(own, length_B, hidden_BWD, next_BW, ones, jnp.full(b, HOPE))


def extend_mtp(model, hidden_BTD: jax.Array, next_BT: jax.Array, own: Entry, length_B: jax.Array):
    """Feeds T positions a row to the MTP module: (its hidden_BTD, its cache)."""
    at_BT, step = slots(length_B, next_BT.shape[1], own[0].shape[2])
    turn = model.rotation(at_BT)
    return model.mtp.cached(hidden_BTD, model.embed_tokens(next_BT), turn, own, step)


def probabilities(model, hidden_BTD: jax.Array, temperature_B: jax.Array, rules: Rules):
    """[B, T, N] that the next tokens are drawn from; logits in float32."""
    head_DN = model.head_DN().astype(hidden_BTD.dtype)
    logits_BTN = jnp.einsum("btd,dn->btn", hidden_BTD, head_DN, preferred_element_type=jnp.float32)
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
    """Rounds until every row is done, or one has made `most` tokens of the M there is room for."""
    width = session.tokens_BM.shape[1]
    session = session._replace(
        made_B=jnp.zeros_like(session.made_B), counts=jnp.zeros_like(session.counts)
    )
    most = jnp.minimum(most, width - rules.drafts)

    def go_on(s: Session):
        return (s.left_B > 0).any() & (s.made_B < most).all()

    def body(s: Session):
        key, now = jax.random.split(s.key)
        s = s._replace(key=key)
        plain = functools.partial(_plain, model, rules=rules)
        if not rules.drafts:
            return plain(s, temperature_B, now)
        s = _caught_up(model, s)
        wanted = (pays(s.drafter.rate_B, costs, rules.drafts) & (s.left_B > 1)).any()
        return jax.lax.cond(
            wanted,
            lambda s: _drafted(model, s, temperature_B, now, costs, rules=rules),
            lambda s: plain(s, temperature_B, now),
            s,
        )

    return jax.lax.while_loop(go_on, body, session)


def _plain(model, s: Session, temperature_B, key, *, rules: Rules) -> Session:
    """A round without drafts."""
    b = s.token_B.shape[0]
    n = model.head_DN().shape[-1]
    none = jnp.zeros((b, 0), jnp.int32), jnp.zeros((b, 0, n)), jnp.zeros(b, jnp.int32)
    return _judged(model, s, none, temperature_B, key, rules=rules)


def _drafted(model, s: Session, temperature_B, key, costs: Costs, *, rules: Rules) -> Session:
    """A round with drafts."""
    draft_key, key = jax.random.split(key)
    drafts, drafter = _draft(model, s, temperature_B, draft_key, costs, rules=rules)
    return _judged(model, s._replace(drafter=drafter), drafts, temperature_B, key, rules=rules)


def _draft(model, s: Session, temperature_B, key, costs: Costs, *, rules: Rules):
    """((draft_BT, drafter_BTN, horizon_B), drafter with entries for all that was pending)."""
    d, b = s.drafter, s.token_B.shape[0]
    hidden_BD, own = _read(model, d, rules.drafts + 1)
    length_B = d.length_B + d.pending_B
    t, n = rules.drafts, model.head_DN().shape[-1]

    def go_on(c):
        return (c["t"] < t) & c["live"].any()

    def apply_again(hidden_BD, own, token_B, at_B):
        hidden, own = extend_mtp(model, hidden_BD[:, None], token_B[:, None], own, at_B)
        return hidden[:, 0], own

    def body(c):
        q_BN = probabilities(model, c["hidden"][:, None], temperature_B, rules)[:, 0]
        more_B, chain_B = goes_on(c["chain"], d.rate_B, q_BN.max(-1), costs)
        # The first is drafted wherever drafting pays at all; one token must be left for the main
        # model to draw.
        live_B = c["live"] & (more_B | (c["t"] == 0)) & (s.left_B > c["t"] + 1)
        token_B = draw(q_BN, jax.random.fold_in(key, c["t"]))
        hidden_BD, own = jax.lax.cond(
            (c["t"] + 1 < t) & live_B.any(),
            apply_again,
            lambda hidden_BD, own, *_: (hidden_BD, own),
            *(c["hidden"], c["own"], token_B, length_B + c["t"]),
        )
        put = jax.lax.dynamic_update_index_in_dim
        return dict(
            t=c["t"] + 1,
            live=live_B,
            chain=chain_B,
            hidden=hidden_BD,
            own=own,
            drafts=put(c["drafts"], token_B, c["t"], 1),
            q=put(c["q"], q_BN, c["t"], 1),
            horizon=c["horizon"] + live_B,
        )

    first = dict(
        t=jnp.int32(0),
        live=pays(d.rate_B, costs, t) & (s.left_B > 1),
        chain=jnp.ones(b),
        hidden=hidden_BD,
        own=own,
        drafts=jnp.zeros((b, t), jnp.int32),
        q=jnp.zeros((b, t, n)),
        horizon=jnp.zeros(b, jnp.int32),
    )
    c = jax.lax.while_loop(go_on, body, first)
    drafter = d._replace(own=c["own"], length_B=length_B, pending_B=jnp.zeros_like(d.pending_B))
    return (c["drafts"], c["q"], c["horizon"]), drafter


def _read(model, d: Drafter, usual: int):
    """(the MTP module's output at the last pending position [B, D], its cache with all of them).

    Most often no more than `usual` are pending.
    """

    def first(width: int):
        hidden, own = extend_mtp(
            model, d.hidden_BWD[:, :width], d.next_BW[:, :width], d.own, d.length_B
        )
        return last(hidden, d.pending_B), own

    few = (d.pending_B <= usual).all()
    return jax.lax.cond(few, lambda: first(usual), lambda: first(PENDING))


def _judged(model, s: Session, drafts, temperature_B, key, *, rules: Rules) -> Session:
    """Feeds last tokens and drafts, keeps what is accepted and one token more."""
    draft_BT, q_BTN, horizon_B = drafts
    fed_BT = jnp.concatenate([s.token_B[:, None], draft_BT], axis=1)
    hidden_BTD, cache = extend(model, fed_BT, s.cache)
    target = probabilities(model, hidden_BTD, temperature_B, rules)
    verdict = verify(target, q_BTN, draft_BT, horizon_B, key)
    new_BT = jnp.pad(draft_BT, ((0, 0), (0, 1)))
    place_T = jnp.arange(new_BT.shape[1])
    accepted_B1, token_B1 = verdict.accepted_B[:, None], verdict.token_B[:, None]
    new_BT = jnp.where(place_T == accepted_B1, token_B1, new_BT)
    live_B = s.left_B > 0
    kept_B, ended_B = _kept(new_BT, verdict.accepted_B + 1, s.left_B, rules.eos_ids)
    row_B1 = jnp.arange(new_BT.shape[0])[:, None]
    # What a row does not keep is written beyond the width, that is nowhere.
    width = s.tokens_BM.shape[1]
    slot_BT = jnp.where(place_T < kept_B[:, None], s.made_B[:, None] + place_T, width)
    drafter = s.drafter
    if drafter is not None:
        fed_B = jnp.where(live_B, verdict.accepted_B + 1, 0)
        drafter = _seen(drafter, hidden_BTD, new_BT, fed_B)
        accepted_B = jnp.where(live_B, verdict.accepted_B, 0)
        rate_B = updated_rate(drafter.rate_B, horizon_B, accepted_B)
        drafter = drafter._replace(rate_B=jnp.where(live_B, rate_B, drafter.rate_B))
    tally = jnp.stack([jnp.ones_like(live_B, jnp.int32), horizon_B, verdict.accepted_B])
    return s._replace(
        cache=cache._replace(
            length_B=cache.length_B + jnp.where(live_B, verdict.accepted_B + 1, 0)
        ),
        drafter=drafter,
        token_B=jnp.where(live_B, verdict.token_B, s.token_B),
        left_B=jnp.where(ended_B, 0, s.left_B - kept_B),
        tokens_BM=s.tokens_BM.at[row_B1, slot_BT].set(new_BT, mode="drop"),
        made_B=s.made_B + kept_B,
        counts=s.counts + (tally * live_B).sum(1),
    )


def _kept(new_BT, count_B, left_B, eos_ids: tuple[int, ...]):
    """(tokens of each row's `count_B` new ones that stand, whether it ended): an end of sequence
    and the limit cut what comes after."""
    eos_BT = jnp.isin(new_BT, jnp.asarray(eos_ids, jnp.int32)) if eos_ids else new_BT < 0
    eos_BT &= jnp.arange(new_BT.shape[1]) < count_B[:, None]
    ended_B = eos_BT.any(1)
    count_B = jnp.where(ended_B, eos_BT.argmax(1) + 1, count_B)
    kept_B = jnp.minimum(count_B, left_B)
    return kept_B, ended_B & (count_B <= left_B)


def _seen(d: Drafter, hidden_BTD, next_BT, count_B) -> Drafter:
    """The drafter with `count_B` more positions pending."""
    row_B1 = jnp.arange(next_BT.shape[0])[:, None]
    place_T = jnp.arange(next_BT.shape[1])
    slot_BT = jnp.where(place_T < count_B[:, None], d.pending_B[:, None] + place_T, PENDING)
    return d._replace(
        hidden_BWD=d.hidden_BWD.at[row_B1, slot_BT].set(hidden_BTD, mode="drop"),
        next_BW=d.next_BW.at[row_B1, slot_BT].set(next_BT, mode="drop"),
        pending_B=d.pending_B + count_B,
    )


def _caught_up(model, s: Session) -> Session:
    """Makes the pending entries if one more plain round could find no room for its own."""

    def make(d: Drafter) -> Drafter:
        # The last one stays pending: the next draft starts from its output.
        _, own = extend_mtp(model, d.hidden_BWD, d.next_BW, d.own, d.length_B)
        done_B = jnp.maximum(d.pending_B - 1, 0)
        move = lambda x: jax.vmap(lambda row, n: jnp.roll(row, -n, axis=0))(x, done_B)  # noqa: E731
        return d._replace(
            own=own,
            length_B=d.length_B + done_B,
            hidden_BWD=move(d.hidden_BWD),
            next_BW=move(d.next_BW),
            pending_B=d.pending_B - done_B,
        )

    full = (s.drafter.pending_B >= PENDING).any()
    return s._replace(drafter=jax.lax.cond(full, make, lambda d: d, s.drafter))
