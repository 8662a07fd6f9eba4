# SPDX-License-Identifier: Apache-2.0
"""Multi-token decoding changes nothing: the rule by enumeration, the whole loop by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.infer import generate as generating
from r1jax.infer import multitoken
from r1jax.infer.generate import Generation, Sampling, draft_costs, generate
from r1jax.infer.multitoken import extend_mtp
from r1jax.infer.prompts import feed
from r1jax.infer.sample import distribution
from r1jax.infer.speculative import (
    HOPE,
    Costs,
    best_horizon,
    goes_on,
    hope,
    updated_rate,
)
from r1jax.nn.count import read_by_draft, read_by_pass
from tests.infer.counting import chi_square_bound
from tests.nn import tiny

ALWAYS, NEVER = Costs(-0.9, 0.0), Costs(100.0, 1.0)
SHORT = Costs(-0.9, 0.0, 10.0)  # drafting pays, a second pass of the module never does
hidden = jax.jit(lambda model, *rows: model(*rows).hidden_BTD)


def exact_joint(model, prompt, temperature, top_p):
    """{three tokens: probability} by enumeration with full forward passes."""
    joint = {(): 1.0}
    for _ in range(3):
        longer = {}
        rows = np.array([[*prompt, *key] for key in joint], np.int32)
        logits = tiny.logits(model, *tiny.whole_rows(rows))[:, -1:]
        temperatures = jnp.full(len(rows), temperature)
        p = np.asarray(distribution(logits, temperatures, top_p=top_p))[:, 0]
        for row, (key, chance) in zip(p, joint.items(), strict=True):
            longer |= {(*key, t): chance * row[t] for t in np.flatnonzero(row)}
        joint = longer
    return joint


@pytest.mark.parametrize(
    ("temperature", "top_p", "drafts", "costs"),
    [
        (0.7, 0.9, 2, ALWAYS),
        pytest.param(1.0, 1.0, 1, ALWAYS, marks=pytest.mark.slow),
        pytest.param(1.3, 0.8, 3, ALWAYS, marks=pytest.mark.slow),
        pytest.param(1.0, 0.9, 3, SHORT, marks=pytest.mark.slow),
    ],
)
def test_three_tokens_are_distributed_as_by_enumeration(temperature, top_p, drafts, costs):
    model, rows, prompt = tiny.model(tiny.model_config()), 6000, [1, 2, 3]
    joint = exact_joint(model, prompt, temperature, top_p)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=6, drafts=drafts, seed=5)
    generation = Generation(model, [prompt] * rows, sampling, costs=costs)
    made = [[] for _ in range(rows)]
    for new in generation:
        for row, tokens in zip(made, new, strict=True):
            row += tokens
    assert all(len(row) == 6 for row in made)
    assert generation.counts.accepted > 0.02 * generation.counts.drafted > 0
    found = dict.fromkeys(joint, 0)
    for row in made:
        found[tuple(row[:3])] += 1  # a KeyError would be a sequence that cannot be
    often = [k for k, p in joint.items() if p * rows >= 5]
    rare = rows - sum(found[k] for k in often), rows * (1 - sum(joint[k] for k in often))
    chi = sum((found[k] - rows * joint[k]) ** 2 / (rows * joint[k]) for k in often)
    chi += (rare[0] - rare[1]) ** 2 / max(rare[1], 1.0)
    assert len(often) > 20
    assert chi < chi_square_bound(len(often) + 1)


@pytest.mark.parametrize(
    ("drafts", "costs"),
    [
        (2, ALWAYS),
        pytest.param(3, Costs(0.0, 0.1), marks=pytest.mark.slow),
        pytest.param(1, ALWAYS, marks=pytest.mark.slow),
        pytest.param(4, ALWAYS, marks=pytest.mark.slow),
        pytest.param(2, NEVER, marks=pytest.mark.slow),
    ],
)
def test_greedy_is_token_identical(drafts, costs):
    """Rows of several lengths, ends of sequence and limits, whatever is drafted."""
    model = tiny.model(tiny.model_config())
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1], [2], [11, 3]]
    plain = Sampling(temperature=0.0, max_tokens=24, eos_ids=(7,))
    wanted = generate(model, prompts, plain)
    drafted = Sampling(temperature=0.0, max_tokens=24, eos_ids=(7,), drafts=drafts)
    found = [[] for _ in prompts]
    for new in Generation(model, prompts, drafted, costs=costs):
        for row, tokens in zip(found, new, strict=True):
            row += tokens
    assert found == wanted
    assert {len(row) for row in wanted} != {24}, "some row should have ended early"


@pytest.mark.slow
@pytest.mark.parametrize(
    "patience",
    [
        pytest.param(0.0, id="calls of one token"),
        pytest.param(1e9, id="whole calls"),
    ],
)
def test_rounds_without_drafts_leave_nothing_out(patience, monkeypatch):
    """The module's cache and what is pending are those of the whole text, after some rounds with
    drafts, many without, and several times of catching up, in calls of any length."""
    monkeypatch.setattr(generating, "PATIENCE", patience)
    monkeypatch.setattr(generating, "ROOM", 7)
    monkeypatch.setattr(generating, "SHORT", 3)
    model, prompts = tiny.model(tiny.model_config()), [[1, 2, 3, 4, 5], [6]]
    # An end of sequence that never comes: no other test's programs, which have other sizes.
    sampling = Sampling(1.0, top_p=None, max_tokens=50, eos_ids=(2**20,), drafts=2, seed=0)
    generation = Generation(model, prompts, sampling, costs=Costs(0.3, 0.4))
    rows = [list(prompt) for prompt in prompts]
    for new in generation:
        rows = [row + tokens for row, tokens in zip(rows, new, strict=True)]
    counts, session = generation.counts, generation._session
    assert 0 < counts.drafted < counts.passes / 2, "rounds of both kinds"
    d, length_B = session.drafter, np.asarray(session.cache.length_B)
    assert d.next_BW.shape[1] == 7 + 3 < 50 / 2, "it has to catch up"
    done_B, pending_B = np.asarray(d.length_B), np.asarray(d.pending_B)
    np.testing.assert_array_equal(done_B + pending_B, length_B)
    whole = feed(model, rows, mtp=True)
    for b, row in enumerate(rows):
        n, more = done_B[b], pending_B[b]
        for found, wanted in zip(d.own, whole.own, strict=True):
            np.testing.assert_allclose(found[0, b, :n], wanted[0, b, :n], rtol=1e-4, atol=1e-5)
        full = hidden(model, *tiny.whole_rows(np.array([row], np.int32)))[0, n : n + more]
        np.testing.assert_allclose(d.hidden_BWD[b, :more], full, rtol=1e-4, atol=1e-5)
        assert d.next_BW[b, :more].tolist() == row[n + 1 : n + more + 1]


@pytest.mark.slow
def test_a_pass_that_is_not_worth_it_is_not_made():
    """One draft a round where the second asks for a pass: no other is kept or counted."""
    model = tiny.model(tiny.model_config())
    sampling = Sampling(temperature=1.0, top_p=None, max_tokens=60, drafts=3, seed=1)
    for costs, least, most in ((SHORT, 0.9, 1.0), (ALWAYS, 2.5, 3.0)):
        generation = Generation(model, [[1, 2]], sampling, costs=costs)
        made = sum(len(new) for (new,) in generation)
        counts = generation.counts
        assert made == counts.tokens == counts.passes + counts.accepted == 60
        assert least < counts.drafted / counts.passes <= most


def test_drafts_are_always_made_whatever_becomes_of_them():
    rate, live = hope(2)[None], np.ones(1, bool)
    for n in range(2000):
        rate = updated_rate(rate, jnp.zeros(1, jnp.int32), 2, n)
    assert best_horizon(rate, live, generating.ALWAYS) == 2
    more, _ = goes_on(jnp.zeros(1), rate, jnp.zeros(1), 0, generating.ALWAYS)
    assert more.all()


def test_the_drafter_sees_what_training_showed_it():
    """A model whose MTP module is right is always accepted: greedy drafts are the main model's.

    Here the module's draft is checked directly: its output over the cache equals the full pass.
    """
    model = tiny.model(tiny.model_config())
    tokens = tiny.tokens(0, 2, 9)
    own = feed(model, tokens.tolist(), mtp=True).own
    _, positions, segments = tiny.whole_rows(tokens[:, 1:])

    @jax.jit
    def both(model, own):
        full = hidden(model, *tiny.whole_rows(tokens))
        second, _ = model.predict_second(full[:, :-1], tokens[:, 1:], positions, segments)
        length_B = jnp.array([7, 7], jnp.int32)
        return second, extend_mtp(model, full[:, 7:8], tokens[:, 8:9], own, length_B)[0]

    second, again = both(model, own)
    np.testing.assert_allclose(again[:, 0], second[:, 7], rtol=2e-5, atol=2e-5)


def test_horizon_rules():
    """Tokens 1, 1 + .9, 1 + .9 + .81 … for 1, 1.1, 1.2 … passes; a bad third draft is not made."""
    free, dear = Costs(0.0, 0.1), Costs(0.5, 0.9)
    rates = jnp.array([[0.9, 0.9, 0.9], [0.9, 0.9, 0.01], [0.01, 0.9, 0.9]])
    best = lambda rates, costs, *live: int(best_horizon(rates, jnp.array(live), costs))  # noqa: E731
    assert [best(rates[i : i + 1], free, True) for i in range(3)] == [3, 2, 0]
    assert [best(rates[i : i + 1], dear, True) for i in range(3)] == [0, 0, 0]
    assert best(jnp.array([[0.6, 0.1]]), Costs(0.2, 0.3), True) == 1  # 1.6 tokens for 1.5 passes
    assert best(jnp.zeros((2, 0)), free, True, True) == 0
    # Together: 1.46 for 1.5, 1.86 for 2: none pays, though one row alone would have two of them.
    both = rates[1:3]
    assert best(both, Costs(0.0, 0.5), True, True) == 0
    assert best(both, Costs(0.0, 0.5), True, False) == 2
    assert best(both, Costs(0.0, 0.5), False, False) == 0
    rate_BT, sure_B, dear = jnp.array([[0.9, 0.5]] * 2), jnp.array([0.9, 0.01]), Costs(0, 1, 0.2)
    more, chain = goes_on(jnp.ones(2), rate_BT, sure_B, 0, dear)
    assert more.tolist() == [True, False]  # 0.9 · 0.5 and 0.095 · 0.5 tokens for 0.2 passes
    np.testing.assert_allclose(chain, [0.9, np.sqrt(0.009)], rtol=1e-6)


def test_running_acceptance_by_place():
    """Judged are the accepted drafts and the first one after them; others drift towards hope."""
    up, down = 0.4 + 0.6 / 16, 0.4 - 0.4 / 16
    first, second = 0.4 + (0.9 - 0.4) / 256, 0.4 + (0.81 - 0.4) / 256
    expected = {2: [[up, up], [up, down], [down, second]], 1: [[up, second]], 0: [[first, second]]}
    for depth, rows in expected.items():
        accepted_B = np.arange(depth, depth - len(rows), -1)
        rate = updated_rate(jnp.full((len(rows), 2), 0.4), accepted_B, depth, 12)
        np.testing.assert_allclose(rate, rows, rtol=1e-6)
    for n in range(3000):
        rate = updated_rate(rate, jnp.zeros(1, jnp.int32), 0, n)
    np.testing.assert_allclose(rate, [hope(2)], rtol=1e-3)


def test_the_first_rounds_weigh_more():
    """What is hoped for counts as three rounds, of as many as there were with them."""
    rate = hope(1)[None]
    for n in range(12):
        rate = updated_rate(rate, jnp.zeros(1, jnp.int32), 1, n)
        np.testing.assert_allclose(rate, [[HOPE * 3 / (4 + n)]], rtol=1e-6)


def test_costs_count_the_experts_that_further_tokens_read():
    """k of E experts a token: k of one token, k + k (1 - k / E) of two, all of very many."""
    cfg = tiny.model_config(mtp_depth=1)
    moe, layers = cfg.moe, cfg.num_layers - cfg.first_k_dense
    expert = 3 * cfg.hidden_size * moe.moe_intermediate_size
    e, k = moe.n_routed_experts, moe.num_experts_per_tok
    more = read_by_pass(cfg, 2) - read_by_pass(cfg, 1)
    assert more == pytest.approx(layers * expert * k * (1 - k / e))
    everything = read_by_pass(cfg, 10_000) - read_by_pass(cfg, 1)
    assert everything == pytest.approx(layers * expert * (e - k))
    assert read_by_draft(cfg, 2) - read_by_draft(cfg, 1) == pytest.approx(more / layers)


@pytest.mark.slow
def test_drafts_that_should_not_pay_are_made_only_where_always():
    """A CPU has so small a model in its caches: a token more costs nearly a pass."""
    model, how = tiny.model(tiny.model_config()), dict(max_tokens=12, drafts=2)
    for always in (False, True):
        generation = Generation(model, [[1, 2]], Sampling(1.0, always=always, **how))
        assert sum(len(new) for (new,) in generation) == 12
        counts = generation.counts
        assert (counts.drafted > 0) == always
        if always:  # but in the last rounds, which must leave a token for the main model to draw
            assert counts.drafted >= 2 * (counts.passes - 1) - 3


def test_drafts_are_cheap_where_weights_come_from_memory(monkeypatch):
    model = tiny.model(tiny.model_config())
    cached = draft_costs(model, 1)
    assert cached.round + 2 * cached.draft > 2 * HOPE
    monkeypatch.setattr("r1jax.infer.generate.CACHED", 0)
    read = draft_costs(model, 1)
    # The module's share of the weights, and 1/16 of a pass for the arithmetic of a token more.
    assert read.draft - (read.round - 0.1) == pytest.approx(1 / 17)
    assert read.draft < cached.draft


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_k=0), "top_k"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(drafts=9), "draft"),
        (dict(always=True), "set draft"),
        (dict(seed=2**63), "seed"),
    ],
)
def test_impossible_sampling(changes, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**changes)


@pytest.mark.parametrize(
    ("prompts", "word"),
    [([], "no prompt"), ([[]], "no token"), ([[99]], "outside"), ([[1] * 60], "64")],
)
def test_impossible_prompts(prompts, word):
    with pytest.raises(ValueError, match=word):
        Generation(tiny.model(tiny.model_config()), prompts, Sampling(max_tokens=10))


def test_drafts_need_the_module():
    with pytest.raises(ValueError, match="multi-token"):
        Generation(tiny.model(tiny.plain_model_config()), [[1]], Sampling(max_tokens=4, drafts=1))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", [0, 2])
def test_it_decodes_whatever_the_default_dtypes_are(drafts, temperature):
    """Numbers stay int32 and float32 where JAX would make 64 bits of them."""
    model, prompts = tiny.model(tiny.model_config()), [[1, 2, 3, 4, 5], [6]]
    sampling = Sampling(temperature, max_tokens=12, drafts=drafts)
    wanted = generate(model, prompts, sampling)
    with jax.enable_x64(True):
        found = generate(model, prompts, sampling)
    assert found == wanted or temperature  # noise of 64 bits is other noise
    assert [len(row) for row in found] == [12, 12]


def test_the_seed_makes_the_text():
    model = tiny.model(tiny.model_config())
    runs = [
        generate(model, [[1, 2]], Sampling(1.0, max_tokens=30, drafts=2, always=True, seed=s))
        for s in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.slow
def test_the_text_does_not_depend_on_how_fast_it_is_made(monkeypatch):
    """Calls of one token or of many: the number of drafts changes at the same tokens."""
    model, texts = tiny.model(tiny.model_config()), []
    for patience in (1e-9, 1e9):
        monkeypatch.setattr("r1jax.infer.generate.PATIENCE", patience)
        sampling = Sampling(temperature=1.0, top_p=None, max_tokens=40, drafts=3, seed=4)
        generation = Generation(model, [[1, 2], [3]], sampling, costs=Costs(0.0, 0.35))
        texts.append([[], []])
        for new in generation:
            for row, tokens in zip(texts[-1], new, strict=True):
                row += tokens
        assert 0 < generation.counts.drafted < 3 * generation.counts.passes
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_the_order_of_a_batch_changes_nothing():
    model = tiny.model(tiny.model_config())
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [2]]
    sampling = Sampling(temperature=0.0, max_tokens=10, drafts=2, always=True)
    alone = [generate(model, [p], sampling)[0] for p in prompts]
    for order in ((2, 0, 1), (1, 2, 0)):
        assert generate(model, [prompts[i] for i in order], sampling) == [alone[i] for i in order]


@pytest.mark.parametrize(
    ("depth", "rounds", "first", "expected"),
    [
        (1, 1, 0.9, 1),
        (1, 2, 0.9, 1),  # deeper drafts are not tried before
        (1, 3, 0.9, 3),
        (1, 2, 0.5, 0),  # what deeper ones are hoped to bring does not keep it going
        (0, 3, 0.6, 0),  # given up for good reason
        (0, 32, 0.6, 0),
        (0, 32, 0.9, 1),  # tried again with one
        (3, 7, 0.9, 3),
        (3, 7, 0.3, 0),
    ],
)
def test_how_deep_the_next_round_drafts(depth, rounds, first, expected):
    rate_BT = jnp.array([[first, 0.9, 0.9]])
    drafter = multitoken.Drafter(*[None] * 5, rate_BT, jnp.int32(rounds), jnp.int32(depth))
    session = multitoken.Session(None, drafter, None, jnp.ones(1), *[None] * 4)
    found = multitoken._paced(session, Costs(round=0.34, draft=0.3))
    assert int(found.depth) == expected
