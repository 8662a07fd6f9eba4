# SPDX-License-Identifier: Apache-2.0
"""The decoder against a plain one in numpy; packing, padding and neighbours change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from r1jax.nn.dense import DenseTransformer
from r1jax.nn.param import RouterBias
from r1jax.nn.transformer import Transformer
from r1jax.ops.attention import causal_mask
from tests.nn import reference, tiny

# Three layers of float32 sums against float64, on hidden states of order 1.
FLOAT32 = 2e-4
# The same float32 program on the same row: another place in the batch may change the order of sums.
SAME = 2e-5

CONFIGS = {"all_mechanisms": tiny.model_config(), "none": tiny.plain_model_config()}


@jax.jit
def forward(model, tokens, positions, segments):
    return model(tokens, positions, segments)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_plain_decoder(name):
    model = tiny.model(CONFIGS[name])
    tokens = tiny.tokens(1, 2, 7)
    out = forward(model, *tiny.whole_rows(tokens))
    for row, found in zip(tokens, out.hidden_BTD, strict=True):
        np.testing.assert_allclose(found, reference.hidden(model, row), rtol=FLOAT32, atol=FLOAT32)


def test_unequal_mscales_scale_queries_and_keys():
    """mscale / mscale_all_dim multiplies cos and sin, mscale_all_dim² the softmax scale."""
    cfg = tiny.model_config()
    rope = dataclasses.replace(cfg.rope, factor=40.0, mscale=0.707, mscale_all_dim=1.0)
    model = jax.eval_shape(lambda: Transformer(dataclasses.replace(cfg, rope=rope)))
    cos, sin = model.rotation(jnp.array([[5]]))
    np.testing.assert_allclose(cos**2 + sin**2, (1.2608037774 / 1.3688879454) ** 2, rtol=1e-6)
    scale = model.stacks()[0].attention.scale
    assert scale == pytest.approx(8**-0.5 * 1.3688879454**2, rel=1e-6)


def test_scanned_is_unrolled():
    model = tiny.model(CONFIGS["all_mechanisms"])
    tokens, positions, segments = tiny.whole_rows(tiny.tokens(1, 2, 7))

    @jax.jit
    def unrolled(model):
        x, entries, stats = model.embed_tokens(tokens), [], []
        for layer in reference.layers_of(model):
            mask = causal_mask(jnp.asarray(segments))
            x, (entry, stat) = layer(x, model.rotation(positions), mask, segments > 0)
            entries.append(entry)
            stats.append(stat)
        return model.norm(x), entries, stats

    out = forward(model, tokens, positions, segments)
    hidden, entries, stats = unrolled(model)
    np.testing.assert_allclose(out.hidden_BTD, hidden, rtol=SAME, atol=SAME)
    scanned = [jnp.concatenate([e[i] for e in out.entries]) for i in range(2)]
    for i in range(2):
        np.testing.assert_allclose(
            scanned[i], jnp.stack([e[i] for e in entries]), rtol=SAME, atol=SAME
        )
    np.testing.assert_array_equal(out.stats.load, jnp.stack([s.load for s in stats[1:]]))
    np.testing.assert_allclose(
        out.stats.balance, jnp.stack([s.balance for s in stats[1:]]), rtol=SAME
    )


def test_what_is_cached():
    """kv_lora_rank + qk_rope_head_dim numbers a token a layer, whatever the heads."""
    cfg = CONFIGS["all_mechanisms"]
    out = forward(tiny.model(cfg), *tiny.whole_rows(tiny.tokens(1, 2, 7)))
    shapes = [[x.shape for x in entry] for entry in out.entries]
    c, r = cfg.mla.kv_lora_rank, cfg.mla.qk_rope_head_dim
    assert shapes == [[(1, 2, 7, c), (1, 2, 7, r)], [(2, 2, 7, c), (2, 2, 7, r)]]


@pytest.mark.parametrize("changes", [dict(remat=True), dict(scan_unroll=2), dict(scan_unroll=5)])
def test_how_a_stack_is_run_changes_nothing(changes):
    batch = tiny.whole_rows(tiny.tokens(1, 1, 5))
    results = []
    for how in ({}, changes):
        model = tiny.model(tiny.dense_config(qwen2=False, **how))
        results.append(jax.jit(jax.grad(lambda m: (tiny.logits(m, *batch) ** 2).sum()))(model))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=SAME, atol=SAME * np.abs(b).max())
        assert np.abs(b).max() > 0


# ------------------------------------------------------------------------- packing and neighbours

LENGTH = 9
DOCUMENTS = [tiny.tokens(seed, n) for seed, n in ((10, 4), (11, 3), (12, 2))]


def laid_out(*starts):
    """A row with DOCUMENTS[i] at starts[i] (None leaves it out) and the places each occupies."""
    row = {k: np.zeros(LENGTH, np.int32) for k in ("tokens", "positions", "segments")}
    for i, (document, start) in enumerate(zip(DOCUMENTS, starts, strict=True)):
        if start is not None:
            at = slice(start, start + len(document))
            row["tokens"][at], row["segments"][at] = document, i + 1
            row["positions"][at] = np.arange(len(document))
    return row


ROWS = [
    laid_out(0, 4, 7),  # packed
    laid_out(5, 0, 3),  # packed in another order
    laid_out(0, None, None),  # alone, padded on the right
    laid_out(None, 6, None),  # alone, padded on the left
    laid_out(None, None, 3),  # alone, padded on both sides
]
# (row, document, its start) of every appearance in ROWS
PLACES = [(0, 0, 0), (0, 1, 4), (0, 2, 7), (1, 0, 5), (1, 1, 0), (1, 2, 3), (2, 0, 0), (3, 1, 6),
          (4, 2, 3)]  # fmt: skip
MODELS = {
    "deepseek": CONFIGS["all_mechanisms"],
    "qwen2": tiny.dense_config(qwen2=True),
}


def batch_of(rows):
    return tuple(np.stack([r[k] for r in rows]) for k in ("tokens", "positions", "segments"))


@pytest.mark.parametrize("name", MODELS)
def test_packing_and_padding_do_not_change_a_document(name):
    model = tiny.model(MODELS[name])
    hidden = forward(model, *batch_of(ROWS)).hidden_BTD
    attention = reference.mla if name == "deepseek" else reference.gqa
    expected = [reference.hidden(model, d, attention=attention) for d in DOCUMENTS]
    for row, document, start in PLACES:
        found = hidden[row, start : start + len(DOCUMENTS[document])]
        np.testing.assert_allclose(found, expected[document], rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_its_neighbours_or_on_what_is_under_padding(name):
    model = tiny.model(MODELS[name])
    tokens, positions, segments = batch_of(ROWS)
    before = forward(model, tokens, positions, segments).hidden_BTD
    order = np.array([3, 3, 0, 1, 2])
    noise = np.where(segments == 0, tiny.tokens(13, *tokens.shape), tokens)
    after = forward(model, noise[order], positions[order], segments[order]).hidden_BTD
    real = segments[order] > 0
    np.testing.assert_allclose(after[real], before[order][real], rtol=SAME, atol=SAME)


@pytest.mark.parametrize("name", MODELS)
def test_the_future_is_not_seen(name):
    model = tiny.model(MODELS[name])
    batch = tiny.tokens(14, 5, LENGTH)
    batch[1:] = batch[0]
    batch[np.arange(1, 5), [2, 4, 6, 8]] += 1
    batch %= tiny.VOCAB
    hidden = forward(model, *tiny.whole_rows(batch)).hidden_BTD
    for row, changed in enumerate([2, 4, 6, 8], start=1):
        np.testing.assert_allclose(hidden[row, :changed], hidden[0, :changed], rtol=SAME, atol=SAME)
        assert np.abs(hidden[row, changed:] - hidden[0, changed:]).max(-1).min() > SAME


def test_router_report_counts_real_tokens():
    cfg = CONFIGS["all_mechanisms"]
    tokens, positions, segments = batch_of(ROWS)
    stats = forward(tiny.model(cfg), tokens, positions, segments).stats
    assert stats.load.shape == (2, cfg.moe.n_routed_experts)
    assert stats.balance.shape == (2, len(ROWS))
    np.testing.assert_array_equal(
        stats.load.sum(-1), (segments > 0).sum() * cfg.moe.num_experts_per_tok
    )
    noise = np.where(segments == 0, tiny.tokens(15, *tokens.shape), tokens)
    again = forward(tiny.model(cfg), noise, positions, segments).stats
    np.testing.assert_array_equal(again.load, stats.load)
    np.testing.assert_allclose(again.balance, stats.balance, rtol=SAME)


# --------------------------------------------------------------------------- dtypes and parameters


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_activations_over_float32_parameters(name):
    cfg = dataclasses.replace(MODELS[name], dtype="bfloat16")
    model = tiny.model(cfg)
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    out = forward(model, *batch_of(ROWS))
    assert out.hidden_BTD.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(out.entries)} == {jnp.dtype("bfloat16")}
    assert out.stats.balance.dtype == out.stats.load.dtype == jnp.float32
    exact = forward(tiny.model(MODELS[name]), *batch_of(ROWS)).hidden_BTD
    assert jnp.isfinite(out.hidden_BTD).all()
    real = np.stack([r["segments"] for r in ROWS]) > 0
    error = np.abs(out.hidden_BTD.astype(jnp.float32) - exact)[real]
    # A token whose router is near a tie may go to another expert; the others keep 8 bits.
    assert np.median(error) < 0.05


def test_the_router_multiplies_in_float32_on_every_backend():
    """By default a TPU multiplies float32 matrices in bfloat16, and a choice of experts flips."""
    router = next(reversed(list(reference.layers_of(tiny.model(tiny.model_config()))))).feed_forward
    program = jax.make_jaxpr(router.router)(jnp.zeros((2, 8), jnp.bfloat16))
    products = [e for e in program.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 1
    assert {v.aval.dtype for v in products[0].invars} == {jnp.dtype("float32")}
    assert set(products[0].params["precision"]) == {jax.lax.Precision.HIGHEST}


def sizes(model):
    """(parameters, router biases) by shape alone."""
    _, params, biases = nnx.split(model, nnx.Param, RouterBias)
    count = lambda state: sum(x.size for x in jax.tree.leaves(state))  # noqa: E731
    return count(params), count(biases)


def test_deepseek_v3_has_671_billion_parameters():
    """As counted in the released checkpoint: 671,026,419,200 with the biases, of which the MTP
    module is no part; one token meets 37 billion of them."""
    cfg = ModelConfig()
    model = jax.eval_shape(lambda: Transformer(cfg))
    params, biases = sizes(model)
    mtp, mtp_bias = sizes(model.mtp)
    assert biases - mtp_bias == 58 * 256
    assert params - mtp + 58 * 256 == 671_026_419_200
    # The module's own; the released 14B count the embedding and the head that it shares.
    assert mtp + mtp_bias + 2 * cfg.vocab_size * cfg.hidden_size == pytest.approx(13.5e9, rel=0.02)
    expert = 3 * cfg.hidden_size * cfg.moe.moe_intermediate_size
    idle = 58 * (256 - 8) * expert
    assert params - mtp - idle == pytest.approx(37e9, rel=0.02)


def test_deepseek_v2_lite_has_15_7_billion_parameters():
    """The same module with full queries, two shared experts and other sizes."""
    cfg = ModelConfig(
        vocab_size=102_400,
        num_layers=27,
        first_k_dense=1,
        hidden_size=2048,
        intermediate_size=10_944,
        mtp_depth=0,
        rope=RopeConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707),
        mla=MLAConfig(num_heads=16, q_lora_rank=None),
        moe=MoEConfig(
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=1408,
        ),
    )
    assert sizes(jax.eval_shape(lambda: Transformer(cfg)))[0] == 15_706_484_224


@pytest.mark.parametrize("name", MODELS)
def test_every_variable_names_its_axes(name):
    """One logical axis for each dimension, "layers" first in a stack."""
    kind = Transformer if name == "deepseek" else DenseTransformer
    model = jax.eval_shape(lambda: kind(MODELS[name]))
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    for path, v in jax.tree_util.tree_leaves_with_path(nnx.state(model), is_leaf=is_variable):
        where = jax.tree_util.keystr(path)
        assert len(v.out_sharding) == len(v.shape), where
        assert (v.out_sharding[0] == "layers") == ("layers" in where), where


def test_the_router_bias_is_no_parameter():
    model = tiny.model(CONFIGS["all_mechanisms"])
    _, params, biases = nnx.split(model, nnx.Param, RouterBias)
    assert "bias" not in str(jax.tree_util.tree_structure(params))
    assert [x.shape for x in jax.tree.leaves(biases)] == [(2, 6), (6,)]
