# SPDX-License-Identifier: Apache-2.0
"""Generation of text for a few prompts: prefill in chunks, then rounds, handed out as they come."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.infer import rerank
from r1jax.infer.cache import Cache, grown
from r1jax.infer.multitoken import (
    Drafter,
    Rules,
    Session,
    catch_up,
    probabilities,
    run,
    start_drafter,
)
from r1jax.infer.prompts import Kept, bucket, feed
from r1jax.infer.sample import draw
from r1jax.infer.speculative import Costs, best_horizon, hope
from r1jax.infer.unrolled import cache_for_decoding, for_decoding, stacked
from r1jax.nn.count import read_by_draft, read_by_pass
from r1jax.nn.param import has_blocks, resident

ROOM = 64  # tokens that one call of the compiled loop can make
SHORT = 8  # entries that a drafter catches up with by a smaller program
PATIENCE = 0.1  # seconds that a stream may be silent
# Tokens that a parameter is multiplied by in the time that it takes to be read: on accelerators; on
# CPUs from memory, and from their caches, where so many bytes of a model find room.
FREE, FREE_CPU, FREE_CACHED, CACHED = 256, 16, 1.5, 2**23

ALWAYS = Costs(round=0.0, draft=-0.01, module=-1.0)  # more drafts are better, whatever they bring


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to generate.

    Attributes:
        temperature: 0 is greedy.
        top_k, top_p: truncation, as in `infer.sample.truncate`; None: none.
        max_tokens: of a completion, the end of sequence included.
        eos_ids: tokens that end a completion.
        drafts: most tokens drafted a round by the MTP module; 0: plain decoding.
        always: draft as many also where it is not expected to pay, to see how many are accepted.
        rerank: draft so many continuations a round and keep the one that the main model finds
            likeliest, in place of verifying one; this changes the distribution (`infer.rerank`).
        seed: of the noise.
    """

    temperature: float = 0.6
    top_k: int | None = None
    top_p: float | None = 0.95
    max_tokens: int = 512
    eos_ids: tuple[int, ...] = ()
    drafts: int = 0
    always: bool = False
    rerank: int = 0
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number >= 0 (0 is greedy)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.drafts <= 8:
            raise ValueError(f"draft={self.drafts} must lie in 0..8 (0: plain decoding)")
        if not (self.rerank == 0 or 2 <= self.rerank <= 64):
            raise ValueError(f"rerank={self.rerank} must lie in 2..64 (0: drafts are verified)")
        if self.rerank and not self.drafts:
            raise ValueError(f"rerank={self.rerank} chooses among drafts: set draft to 1 or more")
        if self.always and not self.drafts:
            raise ValueError("always is about drafts: set draft to 1 or more")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must fit into 64 bits")

    @property
    def rules(self) -> Rules:
        """What of it is compiled in."""
        top_p = None if self.top_p == 1 or self.temperature == 0 else self.top_p
        top_k = None if self.temperature == 0 else self.top_k
        ends, greedy = tuple(sorted(self.eos_ids)), self.temperature == 0
        return Rules(ends, top_k, top_p, greedy, self.drafts, self.rerank)


class Counts(NamedTuple):
    """What was done, over all rows.

    Attributes:
        tokens: made.
        passes: of the main model.
        drafted, accepted: by multi-token decoding.
        reused: tokens of the prompts that were in the cache already.
    """

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    reused: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted; 0 if there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass of the main model brought."""
        return self.tokens / self.passes if self.passes else 0.0


class Generation:
    """One generation: iterate to get the new tokens of every row, as they come.

        for new in Generation(model, prompts, Sampling(max_tokens=100)):
            ...                     # a list of int for each prompt, perhaps empty

    Attributes:
        counts: what has been done so far.
    """

    def __init__(
        self,
        model,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        costs: Costs | None = None,
        kept: Kept | None = None,
    ):
        """Nothing is computed before the first iteration.

        Args:
            model: a decoder made of stacks.
            prompts: token ids of each row, at least one.
            sampling: how to generate.
            costs: of drafting; None: `draft_costs(model, rows)`, or `ALWAYS`.
            kept: what an earlier generation of the same rows and model left, `Generation.kept`;
                what its tokens share with the prompts is not fed again. It is used up.

        Raises:
            ValueError: no prompt, an empty one, an id outside the vocabulary, a prompt and its
                completion longer than the model's positions, drafts without an MTP module.
        """
        _check(model, prompts, sampling)
        self.model, self.sampling, self.counts = model, sampling, Counts()
        self._weights, self._treedef = None, None
        self._prompts = [list(map(int, p)) for p in prompts]
        self._before, self._rows = kept, [list(row) for row in self._prompts]
        self._session: Session | None = None
        if costs is None:
            costs = ALWAYS if sampling.always else draft_costs(model, len(prompts))
        self._costs = costs
        self._temperature_B = jnp.full(len(prompts), sampling.temperature, jnp.float32)

    def __iter__(self) -> Iterator[list[list[int]]]:
        began = time.perf_counter()
        self.model = prepared(self.model)
        session = self._session = self._prefill()
        first = np.asarray(session.token_B)[:, None].tolist()
        rows = len(first)
        self.counts = self.counts._replace(tokens=rows, passes=rows)
        yield self._noted(first)
        # Flattened once: a module of a few hundred arrays takes longer to flatten than to run.
        model = for_decoding(self.model)
        self._weights, self._treedef = jax.tree.flatten(model)
        cache = cache_for_decoding(model, session.cache)
        session = self._session = session._replace(cache=cache)
        # As many tokens a call as the stream's reader has patience for; one takes no longer than
        # the prompts did.
        most = int(np.clip(PATIENCE / (time.perf_counter() - began), 4, ROOM))
        while (np.asarray(session.left_B) > 0).any():
            began = time.perf_counter()
            session = self._session = self._call(self._with_room(session), most)
            made = np.asarray(session.made_B)
            took = (time.perf_counter() - began) / max(int(made.max()), 1)
            most = int(np.clip(PATIENCE / took, 1, ROOM))
            tokens = np.asarray(session.tokens_BM)
            self._count(made, np.asarray(session.counts))
            yield self._noted([row[:n].tolist() for row, n in zip(tokens, made, strict=True)])

    def _noted(self, new: list[list[int]]) -> list[list[int]]:
        for row, tokens in zip(self._rows, new, strict=True):
            row += tokens
        return new

    @property
    def kept(self) -> Kept | None:
        """What the next generation of these rows need not feed again; None before any token.

        It is gone once this one makes another token.
        """
        if self._session is None:
            return None
        cache, drafter = stacked(self._session.cache), self._session.drafter
        fed = [row[:n] for row, n in zip(self._rows, np.asarray(cache.length_B), strict=True)]
        if drafter is None:
            return Kept(fed, cache, None, np.zeros(len(fed), np.int32))
        return Kept(fed, cache, drafter.own, np.asarray(drafter.length_B))

    def _call(self, session: Session, most: int) -> Session:
        """Some rounds: with as many drafts as pay for some row now, perhaps none."""
        rules, how = self.sampling.rules, (most, self._costs)
        d = session.drafter
        if d is None:
            rules = rules._replace(drafts=0)
        elif not rules.rerank:
            rules = rules._replace(drafts=int(d.depth))
            waiting, width = int(np.asarray(d.pending_B).max()), d.next_BW.shape[1]
            if waiting > (rules.drafts + 1 if rules.drafts else width - most):
                fixed = dict(treedef=self._treedef, width=width if waiting > SHORT else SHORT)
                session = session._replace(drafter=_catch_up(self._weights, d, **fixed))
        fixed = dict(treedef=self._treedef, rules=rules)
        return _run(self._weights, session, self._temperature_B, how, **fixed)

    def _count(self, made: np.ndarray, new: np.ndarray) -> None:
        passes, drafted, accepted = (int(n) for n in new)
        c = self.counts
        self.counts = c._replace(
            tokens=c.tokens + int(made.sum()),
            passes=c.passes + passes,
            drafted=c.drafted + drafted,
            accepted=c.accepted + accepted,
        )

    def _prefill(self) -> Session:
        rules = self.sampling.rules
        costs = Costs(*map(float, self._costs))
        depth = _hoped(costs, rules.drafts)
        if not (rules.rerank or depth):
            rules = rules._replace(drafts=0)
        if costs.draft > 0:  # where none is right, deeper ones would only cost more
            depth = min(depth, 1)
        longest = max(len(p) for p in self._prompts)
        room = _room(longest, self.sampling.max_tokens, rules.drafts)[1]
        how = dict(mtp=rules.drafts > 0, kept=self._before, room=room)
        fed = feed(self.model, self._prompts, **how)
        self._before, self.counts = None, Counts(reused=fed.reused)
        lengths = np.array([len(p) for p in self._prompts], np.int32)
        key = jax.random.key(self.sampling.seed)
        how = (self._temperature_B, lengths, self.sampling.max_tokens, key, depth)
        return _started(self.model, fed.cache, fed.own, fed.hidden_BD, *how, rules=rules)

    def _with_room(self, session: Session) -> Session:
        """The session with slots for everything that one call can write."""
        longest = int(np.asarray(session.cache.length_B).max())
        left = int(np.asarray(session.left_B).max())
        drafts = 0 if session.drafter is None else self.sampling.drafts
        least, room = _room(longest, left, drafts)
        if longest + least <= session.cache.capacity:
            return session
        capacity = bucket(longest + room)
        session = session._replace(cache=grown(session.cache, capacity))
        if session.drafter is not None:
            d = session.drafter
            own = grown(Cache((d.own,), d.length_B), capacity).entries[0]
            session = session._replace(drafter=d._replace(own=own))
        return session


def generate(model, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """The completions of all prompts, the end of sequence included: `Generation` to its end."""
    out: list[list[int]] = [[] for _ in prompts]
    for new in Generation(model, prompts, sampling):
        for row, tokens in zip(out, new, strict=True):
            row += tokens
    return out


def prepared(model):
    """The model with what the FP8 recipe makes of its weights made once, where every token would
    make it; done already, without the recipe, or on a mesh, the model itself."""
    alone = jax.sharding.get_abstract_mesh().empty
    made = not alone or not model.cfg.fp8.enabled or has_blocks(model)
    return model if made else resident(model)


def draft_costs(model, rows: int) -> Costs:
    """What drafting costs, from the parameters that a pass reads and multiplies by.

    A draft takes the MTP module's pass, and in the main model's the experts that it asks for beside
    the others, and its arithmetic; judging a round is counted as another pass of the module. On a
    CPU a few tokens go through every expert (`ops.experts`).
    Estimated, not timed, so that a seed gives the same tokens on a slow day.
    """
    if not model.has_mtp:
        return Costs(0.0, 0.0)
    cfg, free, asked = model.cfg, FREE, 1
    if jax.default_backend() == "cpu":
        held = sum(x.nbytes for x in jax.tree.leaves(model))
        free, asked = FREE_CACHED if held <= CACHED else FREE_CPU, math.inf

    def took(read, tokens: int) -> float:
        return read(cfg, tokens * asked) + tokens * read(cfg, asked) / free

    one, two = took(read_by_pass, rows), took(read_by_pass, 2 * rows)
    module = took(read_by_draft, rows) / one
    return Costs(round=0.1 + module, draft=module + two / one - 1.0, module=module)


def _check(model, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    cfg = model.cfg
    if not prompts:
        raise ValueError("there is no prompt")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no token; give it at least one (a bos token, say)")
        if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
            raise ValueError(f"prompt {i} has a token id outside 0..{cfg.vocab_size - 1}")
        if len(prompt) + sampling.max_tokens > cfg.max_position:
            raise ValueError(
                f"prompt {i} of {len(prompt)} tokens and max_tokens={sampling.max_tokens} exceed "
                f"the model's {cfg.max_position} positions; lower max_tokens"
            )
    if sampling.drafts and not model.has_mtp:
        raise ValueError("this model has no multi-token-prediction module: draft must be 0")


@functools.partial(jax.jit, static_argnames=("treedef", "rules"), donate_argnames="session")
def _run(weights, session: Session, temperature_B, how, *, treedef, rules: Rules) -> Session:
    model, (most, costs) = jax.tree.unflatten(treedef, weights), how
    if rules.drafts and rules.rerank:
        return rerank.run(model, session, temperature_B, most, rules=rules)
    return run(model, session, temperature_B, most, costs, rules=rules)


@functools.partial(jax.jit, static_argnames=("treedef", "width"), donate_argnames="drafter")
def _catch_up(weights, drafter: Drafter, *, treedef, width: int) -> Drafter:
    return catch_up(jax.tree.unflatten(treedef, weights), drafter, width=width)


def _room(longest: int, left: int, drafts: int) -> tuple[int, int]:
    """Slots behind the `longest` row, `left` tokens wanted: (those that one call can write, those
    for what is left or for twice as long a row: a longer cache is another program)."""
    # `catch_up` writes as many slots as any call can make, whatever is left.
    call = (ROOM if drafts else min(ROOM, left)) + drafts + 1
    return call, call + min(left if drafts else max(left - ROOM, 0), longest)


@functools.cache
def _hoped(costs: Costs, drafts: int) -> int:
    """Drafts that pay before any was made."""
    return int(best_horizon(hope(drafts)[None], np.ones(1, bool), costs))


@functools.partial(jax.jit, static_argnames="rules", donate_argnames=("cache", "own"))
def _started(model, cache, own, hidden_BD, *how, rules: Rules) -> Session:
    """A session behind its first token, from prompts in the caches and the hidden states there."""
    temperature_B, length_B, max_tokens, key, depth = how
    key, now = jax.random.split(key)
    token_B = draw(probabilities(model, hidden_BD[:, None], temperature_B, rules)[:, 0], now)
    drafter = None
    if rules.drafts:
        width = ROOM + rules.drafts + 1
        how = dict(width=width, most=rules.drafts, depth=depth)
        drafter = start_drafter(own, length_B - 1, hidden_BD, token_B, **how)
    rows, ended_B = len(length_B), jnp.isin(token_B, jnp.array(rules.eos_ids, jnp.int32))
    return Session(
        cache=cache,
        drafter=drafter,
        token_B=token_B,
        left_B=jnp.where(ended_B, 0, max_tokens - 1).astype(jnp.int32),
        key=key,
        tokens_BM=jnp.zeros((rows, ROOM + rules.drafts), jnp.int32),
        made_B=jnp.zeros(rows, jnp.int32),
        counts=jnp.zeros(3, jnp.int32),
    )
