# SPDX-License-Identifier: Apache-2.0
"""The dense students against a plain decoder in numpy, and their public parameter counts."""

import jax
import numpy as np
import pytest
from flax import nnx

from r1jax.config import DenseConfig, RopeConfig
from r1jax.nn.dense import DenseTransformer
from tests.nn import reference, tiny

# Two layers of float32 sums against float64, on hidden states of order 1.
FLOAT32 = 2e-4


@pytest.mark.parametrize("qwen2", [True, False])
def test_it_is_the_plain_decoder(qwen2):
    model = tiny.model(tiny.dense_config(qwen2=qwen2))
    tokens = tiny.tokens(2, 2, 7)
    found = tiny.logits(model, *tiny.whole_rows(tokens))
    head = reference.array(model.embed).T if qwen2 else reference.array(model.head)
    for row, logits in zip(tokens, found, strict=True):
        expected = reference.hidden(model, row, attention=reference.gqa) @ head
        np.testing.assert_allclose(logits, expected, rtol=FLOAT32, atol=FLOAT32 * 5)


@pytest.mark.parametrize("qwen2", [True, False])
def test_biases_and_heads_are_there_or_not(qwen2):
    model = jax.eval_shape(lambda: DenseTransformer(tiny.dense_config(qwen2=qwen2)))
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(model)}
    assert any("b_q" in n for n in names) == qwen2
    assert any("head" in n for n in names) != qwen2
    assert jax.eval_shape(DenseTransformer.head_DN, model).shape == (8, tiny.VOCAB)


LLAMA = dict(qkv_bias=False, tie_embeddings=False, rope=RopeConfig(theta=5e5))
PUBLIC = {
    "Qwen2.5-1.5B": (DenseConfig(), 1_543_714_304),
    "Qwen2.5-7B": (
        DenseConfig(
            vocab_size=152_064,
            hidden_size=3584,
            intermediate_size=18_944,
            num_heads=28,
            num_kv_heads=4,
            tie_embeddings=False,
        ),
        7_615_616_512,
    ),
    "Llama-3.1-8B": (
        DenseConfig(
            vocab_size=128_256,
            num_layers=32,
            hidden_size=4096,
            intermediate_size=14_336,
            num_heads=32,
            num_kv_heads=8,
            **LLAMA,
        ),
        8_030_261_248,
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_parameter_counts_of_released_models(name):
    cfg, expected = PUBLIC[name]
    params = nnx.state(jax.eval_shape(lambda: DenseTransformer(cfg)), nnx.Param)
    assert sum(x.size for x in jax.tree.leaves(params)) == expected
