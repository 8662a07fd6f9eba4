# SPDX-License-Identifier: Apache-2.0
"""The cache of generation equals the full forward pass, however the tokens come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.infer import generate as generating
from r1jax.infer import prompts as feeding
from r1jax.infer import unrolled
from r1jax.infer.cache import begin, empty, extend, grown, last
from r1jax.infer.speculative import Costs
from r1jax.nn import block
from tests.nn import tiny

# float32, absorbed against naive over three layers of values of order 1.
SAME = 1e-5
CONFIGS = [
    tiny.model_config(),
    tiny.plain_model_config(),
    tiny.dense_config(qwen2=True),
    tiny.dense_config(qwen2=False, qk_norm=True),
]
step, first = jax.jit(extend), jax.jit(begin, static_argnums=3)
whole = jax.jit(lambda model, *rows: model(*rows).hidden_BTD)


def full(model, tokens):
    return np.asarray(whole(model, *tiny.whole_rows(tokens)))


@pytest.mark.parametrize("cfg", CONFIGS)
def test_token_by_token(cfg):
    model, tokens = tiny.model(cfg), tiny.tokens(0, 2, 9)
    wanted, cache = full(model, tokens), empty(model, 2, 12)
    for t in range(9):
        hidden, cache = step(model, tokens[:, t : t + 1], cache)
        cache = cache._replace(length_B=cache.length_B + 1)
        np.testing.assert_allclose(hidden[:, 0], wanted[:, t], rtol=SAME, atol=SAME)


@pytest.mark.parametrize("cfg", CONFIGS[1:3])
def test_layers_that_lie_each_by_itself(cfg, monkeypatch):
    """Decoding from them is decoding from the stack; small layers stay in it."""
    model, tokens = tiny.model(cfg), tiny.tokens(5, 2, 6)
    assert unrolled.for_decoding(model) is model
    monkeypatch.setattr(unrolled, "SMALLEST", 1)
    apart = unrolled.for_decoding(model)
    assert [len(layers) for layers in apart.stacks()] == [cfg.num_layers]
    cache = empty(model, 2, 8)
    wanted = step(model, tokens, cache)
    hidden, got = step(apart, tokens, unrolled.cache_for_decoding(apart, cache))
    assert {len(x) for x in jax.tree.leaves(got.entries)} == {1}
    got = hidden, unrolled.stacked(got)
    for w, g in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(g, w, rtol=SAME, atol=SAME)
    np.testing.assert_array_equal(apart.head_DN(), model.head_DN())


@pytest.mark.parametrize("cfg", CONFIGS[1:])
def test_logits_of_few_rows_and_of_many(cfg):
    model, hidden = tiny.model(cfg), np.random.default_rng(6).normal(size=(3, 4, 8))
    hidden = jnp.asarray(hidden, jnp.float32)
    many = jnp.einsum("btd,dn->btn", hidden, model.head_DN())
    few = model.output_head().logits(hidden[:2])
    np.testing.assert_allclose(few, many[:2], rtol=SAME, atol=SAME)
    np.testing.assert_allclose(model.output_head().logits(hidden), many, rtol=SAME, atol=SAME)
    assert model.output_head().logits(hidden[:0]).shape == (0, *many.shape[1:])


@pytest.mark.slow
@settings(max_examples=5)
@given(cuts=st.lists(st.integers(1, 10), max_size=3, unique=True))
def test_any_chunks(cuts):
    model, tokens = tiny.model(CONFIGS[0]), tiny.tokens(1, 2, 11)
    edges = [0, *sorted(cuts), 11]
    cache, got = empty(model, 2, 16), []
    for a, b in zip(edges, edges[1:], strict=False):
        hidden, cache = step(model, tokens[:, a:b], cache)
        cache = cache._replace(length_B=cache.length_B + b - a)
        got.append(hidden)
    np.testing.assert_allclose(np.concatenate(got, 1), full(model, tokens), rtol=SAME, atol=SAME)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_rows_of_their_own_lengths_and_refused_drafts(cfg):
    """Prompts of 2, 7 and 4 tokens; wrong tokens are fed, forgotten, and the right ones fed."""
    model, tokens = tiny.model(cfg), tiny.tokens(2, 3, 11)
    wanted, n = full(model, tokens), np.array([2, 7, 4], np.int32)
    hidden, cache = first(model, tokens[:, :7], n, 16)
    for i in range(3):
        np.testing.assert_allclose(last(hidden, n)[i], wanted[i, n[i] - 1], rtol=SAME, atol=SAME)
    _, cache = step(model, (tokens[:, :3] + 5) % tiny.VOCAB, cache)  # never counted
    after = np.stack([tokens[i, n[i] : n[i] + 3] for i in range(3)])
    hidden, cache = step(model, after, grown(cache, 20))
    for i in range(3):
        np.testing.assert_allclose(hidden[i], wanted[i, n[i] : n[i] + 3], rtol=SAME, atol=SAME)


def test_rows_are_written_at_once_on_gpus(monkeypatch):
    """The same as row by row, also where a slice would be clipped."""
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((3, 4, 9, 2), np.float32)
    new = rng.standard_normal((4, 2, 2), np.float32)
    index = np.array([0, 5, 7, 8], np.int32)
    wanted = cache.copy()
    for b, start in enumerate([0, 5, 7, 7]):
        wanted[1, b, start : start + 2] = new[b]
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(block, "platform", lambda name=platform: name)
        got = block._written(jnp.asarray(cache), jnp.asarray(new), 1, jnp.asarray(index))
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafts", "costs"),
    [
        pytest.param(0, None, id="none"),
        pytest.param(2, generating.ALWAYS, id="always"),
        pytest.param(2, Costs(0.3, 0.4), id="given up"),
    ],
)
def test_writing_beyond_the_room_of_a_row_is_never_asked_for(drafts, costs, monkeypatch):
    """Generation to the last position of the model, in calls of a few tokens, caches as short as
    they may be."""
    monkeypatch.setattr(generating, "ROOM", 5)
    for module in (generating, feeding):
        monkeypatch.setattr(module, "bucket", lambda n: n)
    model = tiny.model(CONFIGS[0])
    # An end of sequence that never comes: no other test's programs, which have other sizes.
    sampling = generating.Sampling(0.0, max_tokens=57, eos_ids=(2**20,), drafts=drafts)
    prompts, out = [[1, 2, 3, 4, 5, 6, 7], [3]], [[], []]
    generation = generating.Generation(model, prompts, sampling, costs=costs)
    for new in generation:
        out = [row + tokens for row, tokens in zip(out, new, strict=True)]
    drafted, passes = generation.counts.drafted, generation.counts.passes
    assert (drafted > 0) == (drafts > 0)
    assert (drafted > passes) == (costs == generating.ALWAYS)
    for prompt, row in zip(prompts, out, strict=True):
        rows = np.array([prompt + row[:-1]], np.int32)
        best = np.asarray(tiny.logits(model, *tiny.whole_rows(rows)))[0].argmax(-1)
        assert best[len(prompt) - 1 :].tolist() == row


@pytest.mark.slow
def test_long_prompts_come_in_chunks(monkeypatch):
    model = tiny.model(CONFIGS[0])
    # Rounding moved one entry of seed 3 by 1.6e-5 on one CPU, ten times as far as these entries.
    prompts = [tiny.tokens(s, n).tolist() for s, n in ((13, 21), (14, 5), (15, 16))]
    at_once = feeding.feed(model, prompts, mtp=True)
    monkeypatch.setattr(feeding, "CHUNK", 8)
    chunks = feeding.feed(model, prompts, mtp=True)
    np.testing.assert_array_equal(at_once.cache.length_B, chunks.cache.length_B)
    np.testing.assert_allclose(at_once.hidden_BD, chunks.hidden_BD, rtol=SAME, atol=SAME)
    for a, b in zip(jax.tree.leaves(at_once.own), jax.tree.leaves(chunks.own), strict=True):
        for row, n in enumerate([20, 4, 15]):
            np.testing.assert_allclose(a[:, row, :n], b[:, row, :n], rtol=SAME, atol=SAME)


def test_the_cache_of_mla_holds_576_values():
    from r1jax.config import ModelConfig
    from r1jax.nn.count import cached_values

    cfg = tiny.model_config()
    cache = empty(tiny.model(cfg), 1, 4)
    per_token = sum(x.size for x in jax.tree.leaves(cache.entries)) / 4
    assert per_token == cfg.num_layers * cached_values(cfg) == 3 * 9
    assert cached_values(ModelConfig()) == 576
    assert jnp.asarray(cache.length_B).tolist() == [0]
