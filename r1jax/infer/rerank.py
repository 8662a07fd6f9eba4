# SPDX-License-Identifier: Apache-2.0
"""Re-ranking: of k continuations that the MTP module drafts, the one the main model likes best.

Unlike `speculative.verify` this **changes the distribution**: every round keeps all tokens of one
drafted continuation. They are the drafter's proposals, sharpened towards what the main model finds
likely; only the token after them is drawn from the main model. It always brings drafts + 1 tokens a
pass, of k rows for every row.
"""

import jax
import jax.numpy as jnp

from r1jax.infer.cache import Cache, last
from r1jax.infer.multitoken import (
    Drafter,
    Drawn,
    Rules,
    Session,
    advanced,
    extend_mtp,
    head_logits,
    more_of,
    probabilities,
    uncounted,
)
from r1jax.infer.sample import distribution, draw
from r1jax.nn.block import Step, run_cached


def run(model, session: Session, temperature_B: jax.Array, most: jax.Array, *, rules: Rules):
    """Rounds until every row is done or one has made `most` tokens; as `multitoken.run`.

    Args:
        model: a decoder made of stacks, with an MTP module.
        session: where to go on, with a drafter.
        temperature_B: [B]; at 0 continuations are drafted at 1 (all would be the same), and the
            token after them is the best one.
        most: scalar int32.
        rules: with `drafts` and `rerank` of at least 1.
    """

    def body(s: Session) -> Session:
        key, draft_key, draw_key = jax.random.split(s.key, 3)
        s = s._replace(key=key)
        draft_XT, _, drafter = propose(model, s.drafter, temperature_B, draft_key, rules=rules)
        fed_XT = jnp.concatenate([_each(s.token_B, rules)[:, None], draft_XT], axis=1)
        hidden_XTD, entries = _beside(model, fed_XT, s.cache)
        logits_XTN = head_logits(model, hidden_XTD)
        score_X = mean_log_probability(logits_XTN[:, :-1], draft_XT, rules.eos_ids)
        best_B = score_X.reshape(-1, rules.rerank).argmax(1)
        chosen_B = best_B + rules.rerank * jnp.arange(len(best_B))
        cut = dict(top_k=rules.top_k, top_p=rules.top_p)
        last_BN = distribution(logits_XTN[chosen_B, -1:], temperature_B, **cut)[:, 0]
        all_B = jnp.full_like(s.left_B, rules.drafts)
        drawn = Drawn(draft_XT[chosen_B], all_B * rules.rerank, all_B, draw(last_BN, draw_key))
        cache = _joined(s.cache, entries, chosen_B)
        s = s._replace(drafter=drafter)
        return advanced(s, cache, hidden_XTD[chosen_B], drawn, rules=rules)

    return jax.lax.while_loop(more_of(session, most, rules), body, uncounted(session))


def mean_log_probability(logits_XTN, draft_XT, eos_ids: tuple[int, ...]) -> jax.Array:
    """[X]: log p of each continuation a token, at temperature 1, up to its end of sequence.

    Args:
        logits_XTN: [X, T, N] float32 of the main model before each drafted token.
        draft_XT: [X, T] int32.
        eos_ids: tokens that end a continuation.
    """
    logp_XTN = jax.nn.log_softmax(logits_XTN, axis=-1)
    logp_XT = jnp.take_along_axis(logp_XTN, draft_XT[..., None], axis=-1)[..., 0]
    eos_XT = jnp.isin(draft_XT, jnp.asarray(eos_ids, jnp.int32)) if eos_ids else draft_XT < 0
    before_XT = jnp.cumsum(eos_XT, axis=1) - eos_XT == 0
    return (logp_XT * before_XT).sum(1) / before_XT.sum(1)


def propose(model, drafter: Drafter, temperature_B: jax.Array, key, *, rules: Rules):
    """Drafts `rerank` continuations a row, X = B · rerank rows, the candidates of a row together.

    The candidates of a row attend to one copy of the module's cache.

    Returns:
        (draft_XT, distributions_XTN they were drawn from, drafter with entries for all that was
        pending).
    """
    d, depth = drafter, rules.drafts
    pending = d.hidden_BWD[:, : depth + 1], d.next_BW[:, : depth + 1]
    hidden, own = extend_mtp(model, *pending, d.own, d.length_B)
    length_B = d.length_B + d.pending_B
    hidden_XD = _each(last(hidden, d.pending_B), rules)
    temperature_X = _each(jnp.where(temperature_B > 0, temperature_B, 1.0), rules)
    length_X = _each(length_B, rules)
    shared = tuple(x[0] for x in own)
    mask_X1S = (jnp.arange(shared[0].shape[1]) < length_X[:, None])[:, None]
    short = tuple(
        jnp.zeros((1, len(length_X), max(depth - 1, 1), *x.shape[3:]), x.dtype) for x in own
    )
    drafts, distributions = [], []
    for t in range(depth):
        q_XN = probabilities(model, hidden_XD[:, None], temperature_X, rules)[:, 0]
        distributions.append(q_XN)
        drafts.append(draw(q_XN, jax.random.fold_in(key, t)))
        if t + 1 < depth:
            own_mask = jnp.broadcast_to(
                jnp.arange(short[0].shape[2]) <= t, (len(length_X), 1, short[0].shape[2])
            )
            turn = model.rotation(length_X[:, None] + t)
            next_X1D = model.embed_tokens(drafts[-1][:, None])
            step = Step(mask_X1S, own_mask, jnp.int32(t))
            hidden, short = model.mtp.cached(
                hidden_XD[:, None], next_X1D, turn, short, step, prompt=shared
            )
            hidden_XD = hidden[:, 0]
    drafter = d._replace(own=own, length_B=length_B, pending_B=jnp.zeros_like(d.pending_B))
    return jnp.stack(drafts, 1), jnp.stack(distributions, 1), drafter


def _each(x_B: jax.Array, rules: Rules) -> jax.Array:
    """[B, ...] → [X, ...]: every row once for each of its candidates."""
    return jnp.repeat(x_B, rules.rerank, axis=0)


def _beside(model, fed_XT: jax.Array, cache: Cache):
    """Feeds candidates after the shared cache of their row, which is neither copied nor changed.

    Returns:
        (hidden_XTD after the final norm, their own entries [L, X, T, ...] for each stack).
    """
    x, t = fed_XT.shape
    length_X = jnp.repeat(cache.length_B, x // len(cache.length_B))
    mask_XTS = jnp.broadcast_to(
        (jnp.arange(cache.capacity) < length_X[:, None])[:, None], (x, t, cache.capacity)
    )
    causal_XTT = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (x, t, t))
    step = Step(mask_XTS, causal_XTT, jnp.int32(0))
    turn = model.rotation(length_X[:, None] + jnp.arange(t, dtype=jnp.int32))
    x_XTD, made = model.embed_tokens(fed_XT), []
    for layers, entries in zip(model.stacks(), cache.entries, strict=True):
        own = jax.tree.map(lambda e: jnp.zeros((e.shape[0], x, t, *e.shape[3:]), e.dtype), entries)
        x_XTD, own = run_cached(layers, x_XTD, turn, prompt=entries, own=own, step=step)
        made.append(own)
    return model.norm(x_XTD), tuple(made)


def _joined(cache: Cache, entries, chosen_B: jax.Array) -> Cache:
    """The cache with the entries of each row's chosen candidate after what it has."""

    def put(old, new):  # [L, B, S, ...], [L, X, T, ...]
        row = lambda o, n, at: jax.lax.dynamic_update_slice_in_dim(o, n, at, axis=1)  # noqa: E731
        return jax.vmap(row, in_axes=(1, 1, 0), out_axes=1)(old, new[:, chosen_B], cache.length_B)

    return cache._replace(entries=jax.tree.map(put, cache.entries, entries))
