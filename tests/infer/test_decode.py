# SPDX-License-Identifier: Apache-2.0
"""Cached decoding equals the full forward pass, position by position, for every kind of decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.infer.decode import empty_cache, positions_of, prefill, step
from tests.nn import tiny

# Two float32 programs of three layers on hidden states of order 1; MLA in its two forms.
FLOAT32 = 1e-4
PROMPTS, LENGTH, GROUP, NEW = 3, 5, 2, 4
MODELS = {
    "deepseek": tiny.model_config(),
    "deepseek_plain": tiny.plain_model_config(),
    "qwen2": tiny.dense_config(qwen2=True),
    "llama": tiny.dense_config(qwen2=False),
}
all_models = pytest.mark.parametrize("name", MODELS)


@jax.jit
def decoded(model, prompt_PS, valid_PS, tokens_BT):
    """Final hidden states [B, 1 + T, D] with the cache: of the prompt's end, then of each token."""
    prompt = prefill(model, prompt_PS, valid_PS)
    rows, new = tokens_BT.shape
    start = empty_cache(model, prompt, rows, new)

    def body(own, at):
        hidden, own = step(model, tokens_BT[:, at], prompt, own, at)
        return own, hidden

    _, hidden = jax.lax.scan(body, start, jnp.arange(new))
    first = jnp.repeat(prompt.hidden_PD, rows // prompt_PS.shape[0], axis=0)
    return jnp.concatenate([first[:, None], hidden.swapaxes(0, 1)], axis=1)


@jax.jit
def full(model, prompt_PS, valid_PS, tokens_BT):
    """The same from one forward pass over prompt and completion, every row with its own prompt."""
    group = tokens_BT.shape[0] // prompt_PS.shape[0]
    tokens = jnp.concatenate([jnp.repeat(prompt_PS, group, axis=0), tokens_BT], axis=1)
    valid = jnp.repeat(valid_PS, group, axis=0)
    valid = jnp.concatenate([valid, jnp.ones(tokens_BT.shape, bool)], axis=1)
    out = model(tokens, positions_of(valid), valid.astype(jnp.int32))
    return out.hidden_BTD[:, -tokens_BT.shape[1] - 1 :]


def prompts():
    """Three prompts of 5, 3 and 1 tokens, left-padded, and two completions of each."""
    valid = np.arange(LENGTH) >= np.array([0, 2, 4])[:, None]
    return tiny.tokens(20, PROMPTS, LENGTH), valid, tiny.tokens(21, PROMPTS * GROUP, NEW)


@all_models
def test_cached_is_full(name):
    model = tiny.model(MODELS[name])
    args = prompts()
    found, expected = decoded(model, *args), full(model, *args)
    assert found.shape == (PROMPTS * GROUP, 1 + NEW, 8)
    np.testing.assert_allclose(found, expected, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("name", ["deepseek", "qwen2"])
def test_padding_and_other_prompts_do_not_matter(name):
    """Other ids under the padding, other prompts beside it: a row is the same."""
    model = tiny.model(MODELS[name])
    prompt, valid, tokens = prompts()
    before = decoded(model, prompt, valid, tokens)
    noise = np.where(valid, prompt, tiny.tokens(22, *prompt.shape))
    noise[0] = tiny.tokens(23, LENGTH)
    order = np.array([0, 2, 1])
    rows = np.concatenate([[2 * p, 2 * p + 1] for p in order])
    after = decoded(model, noise[order], valid[order], tokens[rows])
    np.testing.assert_allclose(after[2:], before[rows][2:], rtol=FLOAT32, atol=FLOAT32)
    assert np.abs(after[:2] - before[:2]).max() > FLOAT32


def test_bfloat16_cache():
    """A bfloat16 decoder follows the exact one."""
    cfg = MODELS["deepseek_plain"]
    model, low = tiny.model(cfg), tiny.model(dataclasses.replace(cfg, dtype="bfloat16"))
    found = decoded(low, *prompts())
    assert found.dtype == jnp.bfloat16
    error = np.abs(found.astype(jnp.float32) - decoded(model, *prompts()))
    # A token whose router is near a tie may go to another expert; the others keep 8 bits.
    assert np.median(error) < 0.05


def test_positions_count_real_tokens():
    valid = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 0, 0]]
    assert positions_of(valid).tolist() == expected
