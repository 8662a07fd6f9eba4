# SPDX-License-Identifier: Apache-2.0
"""Models whose weights stay in FP8 blocks compute what they do with the weights themselves."""

import jax
import numpy as np
import pytest

from r1jax.config import MeshConfig
from r1jax.infer.generate import Generation, Sampling, prepared
from r1jax.nn.param import has_blocks, leaves, resident, specs
from r1jax.ops.blocks import Blocks
from r1jax.parallel.mesh import make_mesh
from r1jax.rl.rollout import rollout
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
    assert has_blocks(held)
    assert not has_blocks(model)
    # Blocks of four of which a device would have two rows.
    refused = pytest.raises(ValueError, match="cannot be cut over devices")
    with jax.set_mesh(make_mesh(MeshConfig(tensor=8))), refused:
        specs(held)


def test_what_is_prepared_is_not_copied():
    """Nor are norms and routers, the first time."""
    model = models.model(CFG)
    held = prepared(model)
    assert prepared(held) is held
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (resident(held), held)), strict=True))
    before, after = leaves(model), leaves(held)
    same = {k for k in before if before[k].get_value() is after[k].get_value()}
    assert same == {path for path in before if not linear_weight(path)}


@pytest.mark.slow
def test_generation(monkeypatch):
    """Prefill, cached steps and drafts; it is done by itself."""
    model, prompts = models.model(CFG), [[1, 2, 3], [4, 5, 6, 7, 8]]
    how = Sampling(0.0, None, None, 6, (), 1, always=True)

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


@pytest.mark.slow
def test_a_rollout(monkeypatch):
    """Its loop is given blocks, and draws what it draws from the weights."""
    model = models.model(CFG)
    prompt, valid = models.tokens(0, 2, 4) % CFG.vocab_size, np.ones((2, 4), bool)
    rules = dict(max_new_tokens=5, eos_ids=(1,), pad_id=0)

    def draw(model):
        return rollout(model, prompt, valid, jax.random.key(0), np.ones(4, np.float32), **rules)

    (loop,) = (e for e in jax.make_jaxpr(draw)(model).eqns if e.primitive.name == "while")
    given = [v.aval for v in loop.invars]
    matrices = sum(map(linear_weight, leaves(model)))
    assert sum(x.dtype == "float8_e4m3fn" for x in given) == matrices - in_mtp(model)
    found = jax.jit(draw)(model)
    monkeypatch.setattr("r1jax.rl.rollout.light", lambda model: model)
    wanted = jax.jit(lambda model: draw(model))(model)
    np.testing.assert_array_equal(found.tokens_BT, wanted.tokens_BT)
    np.testing.assert_allclose(found.logp_BT, wanted.logp_BT, atol=1e-4)


def in_mtp(model) -> int:
    """Matrices that decoding does not read."""
    return sum(path.startswith("mtp.") and linear_weight(path) for path in leaves(model))


def test_without_the_recipe_a_model_is_itself():
    model = models.model(models.dense_config(qwen2=True, vocab_size=14))
    assert prepared(model) is model
