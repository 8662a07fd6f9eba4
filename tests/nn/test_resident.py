# SPDX-License-Identifier: Apache-2.0
"""Models whose weights stay in FP8 blocks compute what they do with the weights themselves."""

import jax
import numpy as np
import pytest

from r1jax.infer.generate import Generation, Sampling, prepared
from r1jax.nn.param import leaves, resident
from r1jax.ops.blocks import Blocks
from tests.nn import tiny as models
from tests.nn.test_fp8 import CFG, QWEN2, linear_weight


@pytest.mark.parametrize("cfg", [CFG, QWEN2], ids=["deepseek", "qwen2"])
def test_a_full_pass(cfg):
    model = models.model(cfg)
    held = resident(model)
    for path, variable in leaves(held).items():
        assert isinstance(variable.get_value(), Blocks) == linear_weight(path), path
    rows = models.whole_rows(models.tokens(1, 2, 7) % cfg.vocab_size)
    run = jax.jit(lambda model: model(*rows).hidden_BTD)
    np.testing.assert_allclose(run(held), run(model), rtol=1e-5, atol=1e-6)
    again = resident(held)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (again, held)), strict=True))


@pytest.mark.parametrize("drafts", [0, 1])
def test_generation(drafts, monkeypatch):
    """Prefill, cached steps and drafts; it is done by itself."""
    model, prompts = models.model(CFG), [[1, 2, 3], [4, 5, 6, 7, 8]]
    how = Sampling(0.0, None, None, 6, (), drafts, always=drafts > 0)

    def text():
        generation = Generation(model, prompts, how)
        made = [sum(row, []) for row in zip(*generation, strict=True)]
        return made, generation.model

    found, held = text()
    assert isinstance(leaves(held)["moe_layers.attention.w_o"].get_value(), Blocks)
    monkeypatch.setattr("r1jax.infer.generate.prepared", lambda model: model)
    wanted, plain = text()
    assert plain is model
    assert found == wanted


def test_without_the_recipe_a_model_is_itself():
    model = models.model(models.dense_config(qwen2=True, vocab_size=14))
    assert prepared(model) is model
