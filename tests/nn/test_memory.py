# SPDX-License-Identifier: Apache-2.0
"""Bytes by format: the table is what a gradient really keeps, and FP8 saves what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from r1jax.config import FP8Config, ModelConfig, laptop_model, laptop_student
from r1jax.nn.build import blank
from r1jax.nn.memory import by_format, kept_bytes, linears
from r1jax.ops.linear import FP8, linear

FP8_ON = FP8Config(enabled=True, block=16)
MODELS = {"deepseek": laptop_model(), "qwen2": laptop_student(qkv_bias=True)}


def held(fn, *shapes, dtype):
    """Arrays that the backward pass of `fn` needs of the forward pass."""
    args = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtype, strict=True)]
    return jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(fn, *a)[1], *args))


def size(arrays):
    return sum(x.size * x.dtype.itemsize for x in arrays)


def test_a_linear_layer_keeps_a_quarter():
    """Weights 1024 × 2048 and 4,096 tokens: values of one byte, scales on top, measured."""
    shapes = (4096, 1024), (1024, 2048)
    for fp8, share in ((None, 1.0), (FP8(128, False), 0.255)):
        found = held(
            lambda x, w, fp8=fp8: linear("td,df->tf", x, w, fp8), *shapes, dtype=("float32",) * 2
        )
        exact = 4 * (4096 * 1024 + 1024 * 2048)
        assert size(found) == pytest.approx(share * exact, rel=0.005)
        assert size(found) < 0.26 * exact or fp8 is None


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_what_a_models_gradient_keeps(name):
    """Every E4M3 value between forward and backward pass. A scan that is not computed again keeps
    an input once for each layer that reads it; the table counts it once."""
    cfg = dataclasses.replace(MODELS[name], fp8=FP8_ON, scan_unroll=1)
    rows, block = jnp.ones((2, 64), jnp.int32), FP8_ON.block

    def run(model):
        out = model(rows, rows, rows)
        second = model.predict_second(out.hidden_BTD, rows, rows, rows) if model.has_mtp else None
        return out.hidden_BTD, second and second[0]

    kept = jax.tree.leaves(jax.eval_shape(lambda m: jax.vjp(run, m)[1], blank(cfg)))
    layers = linears(cfg)
    whole = lambda n: -(-n // block) * block  # noqa: E731
    weights = sum(whole(x.k) * whole(x.n) * x.matrices for x in layers)
    inputs = sum(rows.size * whole(x.k) * x.rows * x.layers for x in layers)
    assert size(x for x in kept if "float8" in x.dtype.name) == weights + inputs
    tiles = sum(rows.size * kept_bytes(x, block) for x in layers)
    assert tiles == pytest.approx(inputs * 1.25)  # a scale of four bytes for 16 values


def test_three_quarters_less_than_float32():
    """The 671B: the weights 74.9 %, what linear layers keep of a token 74.2 %; scales and the
    parameters that stay in bfloat16 are what is missing."""
    found = by_format(ModelConfig())
    assert found["bfloat16"].weights == 2 * (671_026_419_200 + 11_610_068_224)
    saved = [1 - a / b for a, b in zip(found["fp8"], found["float32"], strict=True)]
    assert saved == pytest.approx([0.7492, 0.7422], abs=1e-4)
    assert found["bfloat16"].kept * 2 == found["float32"].kept


def test_what_one_token_leaves_in_a_layer_by_hand():
    """Qwen2-shaped, 4 layers: norm outputs of 64 twice, 4 heads of 16, 192 between."""
    found = by_format(dataclasses.replace(MODELS["qwen2"], fp8=FP8_ON))
    assert found["float32"].kept == 4 * 4 * (64 + 64 + 64 + 192)
    assert found["fp8"].kept == 4 * (64 + 64 + 64 + 192) * 1.25
