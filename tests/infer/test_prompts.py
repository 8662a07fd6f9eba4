# SPDX-License-Identifier: Apache-2.0
"""A turn of a conversation after the last: what was fed is not fed again, and nothing changes."""

import jax
import numpy as np
import pytest

from r1jax.infer import prompts as feeding
from r1jax.infer import unrolled
from r1jax.infer.generate import Generation, Sampling, generate
from r1jax.infer.prompts import feed
from r1jax.infer.speculative import Costs
from tests.nn import tiny

# Keys expanded in a first chunk, absorbed afterwards: float32 sums in other orders.
SAME = 1e-5
ALWAYS = Costs(-0.9, 0.0)


def answered(model, prompts, sampling, kept=None):
    """(answers, generation) of rows."""
    generation, out = Generation(model, prompts, sampling, costs=ALWAYS, kept=kept), []
    for new in generation:
        out = [a + b for a, b in zip(out or [[]] * len(new), new, strict=True)]
    return out, generation


@pytest.mark.parametrize(
    ("drafts", "rerank", "chunk", "apart"),
    [
        (0, 0, 512, False),
        (0, 0, 512, True),
        pytest.param(2, 0, 8, True, marks=pytest.mark.slow),
        pytest.param(2, 0, 8, False, marks=pytest.mark.slow),
        pytest.param(2, 2, 512, False, marks=pytest.mark.slow),
        pytest.param(2, 2, 512, True, marks=pytest.mark.slow),
        pytest.param(0, 0, 8, False, marks=pytest.mark.slow),
    ],
)
def test_a_conversation_is_answered_as_if_fed_anew(drafts, rerank, chunk, apart, monkeypatch):
    """Turns that go on, that change an earlier turn, that are shorter, and the same again; decoded
    from stacks of layers, and from layers that lie each by itself."""
    monkeypatch.setattr(feeding, "CHUNK", chunk)
    monkeypatch.setattr(unrolled, "SMALLEST", 1 if apart else unrolled.SMALLEST)
    model = tiny.model(tiny.model_config())
    sampling = Sampling(temperature=0.0, max_tokens=6, eos_ids=(7,), drafts=drafts, rerank=rerank)
    prompts, kept, reused = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5]], None, []
    for turn in range(5):
        wanted, _ = answered(model, prompts, sampling)
        found, generation = answered(model, prompts, sampling, kept)
        assert found == wanted, turn
        kept = generation.kept
        reused.append(generation.counts.reused)
        if turn == 0:  # the conversation goes on
            prompts = [[*p, *a, 9, turn] for p, a in zip(prompts, found, strict=True)]
        elif turn == 1:  # one row says another thing early on, the other goes on
            prompts = [[1, 2, 5, 5, 5], [*prompts[1], *found[1], 3]]
        elif turn == 2:
            prompts = [p[:-1] for p in prompts]
    assert reused[0] == 0
    assert all(n > 0 for n in reused[1:])
    assert reused[1] >= 3 + 11 - 2 * (drafts > 0)


def test_what_is_fed_after_a_shared_prefix_is_the_whole():
    model = tiny.model(tiny.model_config())
    before, after = tiny.tokens(0, 2, 20).tolist(), tiny.tokens(1, 2, 30).tolist()
    after[0][:17], after[1][:3] = before[0][:17], before[1][:3]
    fed = feed(model, before, mtp=True)
    kept = feeding.Kept(before, fed.cache, fed.own, np.array([19, 19]))
    whole, found = feed(model, after, mtp=True), feed(model, after, mtp=True, kept=kept)
    assert found.reused >= 16 + 2
    np.testing.assert_allclose(found.hidden_BD, whole.hidden_BD, rtol=SAME, atol=SAME)
    for stack, wanted in zip(found.cache.entries, whole.cache.entries, strict=True):
        for a, b in zip(stack, wanted, strict=True):
            np.testing.assert_allclose(a[:, :, :30], b[:, :, :30], rtol=SAME, atol=SAME)
    for a, b in zip(found.own, whole.own, strict=True):
        np.testing.assert_allclose(a[:, :, :29], b[:, :, :29], rtol=SAME, atol=SAME)


@pytest.mark.slow
def test_drafts_after_a_turn_without_are_fed_anew():
    model, plain = tiny.model(tiny.model_config()), Sampling(temperature=0.0, max_tokens=6)
    (answer,), generation = answered(model, [[1, 2, 3]], plain)
    prompt = [1, 2, 3, *answer, 4]
    drafting = Sampling(temperature=0.0, max_tokens=6, drafts=2)
    (found,), again = answered(model, [prompt], drafting, generation.kept)
    assert again.counts.reused == 0
    assert [found] == generate(model, [prompt], plain)


@pytest.mark.parametrize("flags", ["", "--xla_cpu_experimental_ynn_fusion_type="])
def test_many_rows_are_compiled_for_another_library(flags, monkeypatch):
    """On CPUs; what the environment says of libraries stands."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    for way in (feeding._begin, feeding._extend):
        apart = way(feeding.MANY) is not way(feeding.MANY - 1)
        assert apart == (not flags and jax.default_backend() == "cpu")


def test_many_rows_are_the_same(monkeypatch):
    """A first and a further chunk of 4 × 16 tokens, as few and as many rows."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(feeding, "CHUNK", 16)
    model = tiny.model(tiny.model_config())
    prompts = [[1 + (i + n) % 9 for n in range(20)] for i in range(4)]
    ways = [way(feeding.MANY) for way in (feeding._begin, feeding._extend)]
    few, before = feed(model, prompts, mtp=True), [way._cache_size() for way in ways]
    monkeypatch.setattr(feeding, "MANY", 4 * 16)
    many = feed(model, prompts, mtp=True)
    if jax.default_backend() == "cpu":
        assert [way._cache_size() for way in ways] == [n + 1 for n in before]
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=SAME, atol=SAME)  # noqa: E731
    jax.tree.map(near, many[:3], few[:3])
