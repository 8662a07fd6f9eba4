# SPDX-License-Identifier: Apache-2.0
"""Models in and out: bit-identical round trips, FP8 blocks, meshes, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from r1jax.data.text import TextTokenizer
from r1jax.data.tokenizer import task_tokenizer
from r1jax.io.hf_config import read_config, write_config
from r1jax.io.hf_load import SCALE, load
from r1jax.io.hf_save import tensors
from r1jax.io.model import Model, export_model, in_fp8, open_model, save_model
from r1jax.io.shards import Shards, write_shards
from r1jax.nn.param import leaves, resident, specs
from r1jax.ops.quant import BlockScaled, dequantise, quantise
from tests.nn import tiny

CONFIGS = {
    "deepseek": tiny.model_config(),
    "plain": tiny.plain_model_config(),
    "qwen2": tiny.dense_config(qwen2=True),
    "llama": tiny.dense_config(qwen2=False),
    "qwen3": tiny.dense_config(qwen2=False, qk_norm=True),
}


def write(folder, cfg, dtype="float32", change=None):
    """A checkpoint of a tiny model; `change(tensors)` edits them."""
    found = dict(tensors(tiny.model(cfg), cfg, dtype=dtype))
    if change is not None:
        change(found)
    config = write_config(cfg, dtype="float32")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, found.items(), shard_bytes=2000)
    return folder


def same_files(a, b):
    one, other = Shards(a), Shards(b)
    assert one.shapes().keys() == other.shapes().keys()
    for name in one.shapes():
        x, y = one.read(name), other.read(name)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.tobytes() == y.tobytes(), name


def meshes():
    shape, names = (2, 4), ("fsdp", "expert")
    return [
        None,
        jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * 2),
        jax.make_mesh((4, 2), ("tensor", "data"), axis_types=(AxisType.Auto,) * 2),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bf16", "fp8"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("deepseek", "qwen3") else pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_there_and_back_is_bit_identical(tmp_path, name, dtype):
    """HF → ours → disk → ours → HF, MTP layer, biases and FP8 scales included."""
    source = write(tmp_path / "hf", CONFIGS[name], dtype)
    model = open_model(source)
    save_model(tmp_path / "ours", model)
    again = open_model(tmp_path / "ours")
    assert again.cfg == model.cfg
    assert again.hf_config == model.hf_config
    export_model(tmp_path / "back", again)
    same_files(source, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert ("quantization_config" in config) == (dtype == "fp8")


@pytest.mark.parametrize(
    ("mesh", "dtype"),
    [
        pytest.param(mesh, dtype, id=f"{dtype}-{kind}", marks=marks)
        for mesh, kind in zip(meshes(), ("one", "explicit", "auto"), strict=True)
        for dtype in ("bf16", "fp8")
        for marks in [() if kind == "one" else pytest.mark.slow]
    ],
)
def test_onto_a_mesh(tmp_path, mesh, dtype):
    cfg = CONFIGS["deepseek"]
    source = Shards(write(tmp_path / "hf", cfg, dtype))
    module = load(source, cfg, mesh=mesh)
    if mesh is not None and "expert" in mesh.axis_names:
        w = leaves(module)["moe_layers.feed_forward.w_gate"].get_value()
        values = w.values if dtype == "fp8" else w
        assert values.sharding.mesh.axis_names == mesh.axis_names
    for name, array in tensors(module, cfg):
        assert array.tobytes() == source.read(name).tobytes(), name


def test_dequantised_is_the_block_formula(tmp_path):
    """By two loops over blocks, in float32; parts of one matrix share blocks that straddle them."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(300, 200)).astype(np.float32)
    w[128:256, :128] = 0
    values, scale = quantise(w)
    wanted = np.empty_like(w)
    for r in range(3):
        for c in range(2):
            block = np.s_[r * 128 : (r + 1) * 128, c * 128 : (c + 1) * 128]
            amax = np.abs(w[block]).max()
            assert scale[r, c] == (amax / np.float32(448) if amax else 1)
            wanted[block] = values[block].astype(np.float32) * scale[r, c]
    np.testing.assert_array_equal(dequantise(values, scale), wanted)
    assert np.abs(wanted - w).max() <= np.abs(w).max() / 448 * 16  # half a step of E4M3 at 448


def test_kept_fp8_is_the_dequantised_model(tmp_path):
    cfg = CONFIGS["deepseek"]
    source = Shards(write(tmp_path / "hf", cfg, "fp8"))
    kept, plain = load(source, cfg), load(source, cfg, dtype="float32")
    scaled = [k for k, v in leaves(kept).items() if isinstance(v.get_value(), BlockScaled)]
    assert len(scaled) == 37
    assert "moe_layers.attention.w_uv" in scaled
    for name, variable in leaves(kept).items():
        x = np.asarray(variable.get_value().astype(jnp.float32))
        np.testing.assert_array_equal(x, leaves(plain)[name][...], err_msg=name)
    rows = tiny.whole_rows(tiny.tokens(0, 2, 9))
    a, b = tiny.logits(kept, *rows), tiny.logits(plain, *rows)
    assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()
    bf16 = leaves(load(source, cfg, dtype="bfloat16"))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    whole = dequantise(source.read(name), source.read(name + SCALE)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(bf16["moe_layers.feed_forward.w_up"][...][0, 2], whole.T)


@pytest.mark.slow
def test_kept_fp8_multiplies_in_fp8(tmp_path):
    """By the recipe kept blocks and dequantised weights give the same numbers, and others than
    without it."""
    cfg = CONFIGS["deepseek"]
    write(tmp_path / "hf", cfg, "fp8")
    kept, plain = (open_model(tmp_path / "hf", dtype=d) for d in ("stored", "float32"))
    rows = tiny.whole_rows(tiny.tokens(0, 2, 9))
    a, b, ready = (
        tiny.logits(m, *rows)
        for m in (in_fp8(kept).module, in_fp8(plain).module, resident(in_fp8(kept).module))
    )
    exact = tiny.logits(plain.module, *rows)
    for found in (a, ready):
        np.testing.assert_allclose(found, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    # Random routers choose other experts now and then.
    assert 0.01 < np.linalg.norm(b - exact) / np.linalg.norm(exact) < 0.5
    assert not kept.cfg.fp8.enabled
    with pytest.raises(ValueError, match="dtype 'bfloat16'"):
        specs(kept.module)
    ready = dataclasses.replace(kept, module=resident(in_fp8(kept).module))
    for write_it in (save_model, export_model):
        with pytest.raises(ValueError, match="out: the model's weights are in FP8 blocks"):
            write_it(tmp_path / "out", ready)
    assert not (tmp_path / "out").exists()


def edit(key, new):
    def change(found):
        if new is None:
            del found[key]
        else:
            found[key] = new(found[key])

    return change


def broken(x):
    x = np.array(x, order="C")
    x.reshape(-1)[-1] = np.nan
    return x


EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


def unscaled(found):
    """One expert in bfloat16 among FP8 ones: they cannot be one stacked array."""
    found[EXPERT] = found[EXPERT].astype(jnp.bfloat16)
    del found[EXPERT + SCALE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(EXPERT, None), f"{EXPERT} is missing"),
        (edit(EXPERT, lambda x: x.T.copy()), f"{EXPERT} has shape .*, the config asks"),
        (edit(EXPERT, broken), f"safetensors: {EXPERT} holds NaN"),
        (edit(EXPERT, lambda x: x.astype(np.float64)), "float64"),
        (edit("model.layers.1.mlp.gate.e_score_correction_bias", None), "bias is missing"),
        (
            lambda f: f.update({"model.layers.9.x": np.ones(1, np.float32)}),
            "layers.9.x has no place",
        ),
        (edit("model.layers.3.embed_tokens.weight", lambda x: x + 1), "differs from model.embed"),
        (edit("model.layers.3.eh_proj.weight", None), "eh_proj.weight is missing"),
    ],
)
def test_a_checkpoint_that_is_wrong_is_named(tmp_path, change, message):
    source = write(tmp_path / "hf", CONFIGS["deepseek"], change=change)
    with pytest.raises(ValueError, match=message):
        open_model(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(EXPERT + SCALE, None), "scale_inv of an FP8 weight is missing"),
        (edit(EXPERT + SCALE, lambda x: x[:, :0]), "scale_inv is"),
        (edit(EXPERT + SCALE, broken), "scale_inv holds NaN"),
        (edit(EXPERT, lambda x: np.full_like(x, np.nan)), f"{EXPERT} holds NaN"),
        (edit(EXPERT, lambda x: x.astype(np.float32)), "scale_inv has no place"),
        (unscaled, "pass --dtype"),
    ],
)
def test_fp8_that_is_wrong_is_named(tmp_path, change, message):
    source = write(tmp_path / "hf", CONFIGS["deepseek"], "fp8", change)
    with pytest.raises(ValueError, match=message):
        open_model(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"logit_softcapping": 30.0}, "logit_softcapping"),
        ({"hidden_size": "8"}, "hidden_size must be an integer"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"n_group": 4}, "n_routed_experts"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "warp": 1}}, "warp"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 1}}, "mscale_all_dim"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ],
)
def test_a_config_that_is_not_computed_is_refused_by_name(change, message):
    config = write_config(CONFIGS["deepseek"], dtype="float32") | change
    with pytest.raises(ValueError, match=message):
        read_config(config)


@pytest.mark.parametrize("name", ["deepseek", "llama"])
@pytest.mark.parametrize("heads", [0, -8])
def test_no_heads_are_refused_by_name(name, heads):
    config = write_config(CONFIGS[name], dtype="float32")
    change = {"num_attention_heads": heads, "num_key_value_heads": heads}
    config.pop("head_dim", None)
    with pytest.raises(ValueError, match="num_attention_heads must be an integer of at least 1"):
        read_config(config | change)


def test_more_experts_than_tensors_are_refused_at_once(tmp_path):
    source = write(tmp_path / "hf", CONFIGS["deepseek"])
    config = json.loads((source / "config.json").read_text()) | {"n_routed_experts": 3 * 10**8}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of 300000000 experts \(n_routed_experts\)"):
        open_model(source)


def test_an_unknown_field_can_be_declared_harmless():
    config = write_config(CONFIGS["llama"], dtype="float32") | {"my_note": "x"}
    with pytest.raises(ValueError, match="my_note"):
        read_config(config)
    assert read_config(config, ignore=("my_note",)).hidden_size == CONFIGS["llama"].hidden_size


def test_a_layer_that_slides_is_refused():
    config = write_config(CONFIGS["qwen2"], dtype="float32")
    layers, full = CONFIGS["qwen2"].num_layers, "full_attention"
    wrong = [["sliding_attention"] * layers, [full] * (layers + 1), [full] * layers + ["x"], full]
    for change in ({"use_sliding_window": True}, *({"layer_types": kinds} for kinds in wrong)):
        with pytest.raises(ValueError, match=next(iter(change))):
            read_config(config | change)


def test_another_models_tokenizer(tmp_path):
    source = write(tmp_path / "hf", CONFIGS["llama"])
    TextTokenizer(task_tokenizer().inner).save(source)
    with pytest.raises(ValueError, match="another model's tokenizer"):
        open_model(source)


def test_a_claim_of_many_layers_is_refused_at_once(tmp_path):
    source = write(tmp_path / "hf", CONFIGS["llama"])
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 10**15}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be 1000000000000000 layers"):
        open_model(source)


def test_what_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in (("none", "no such"), ("empty", "has neither"), ("file", "is a file")):
        with pytest.raises(ValueError, match=message):
            open_model(tmp_path / name)


def test_nothing_is_written_over(tmp_path):
    model = Model(CONFIGS["llama"], tiny.model(CONFIGS["llama"]), None)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("keep")
    for write_it in (save_model, export_model):
        with pytest.raises(ValueError, match="exists already"):
            write_it(tmp_path / "x", model)
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "mine"]


def test_a_damaged_folder_of_ours(tmp_path):
    model = Model(CONFIGS["llama"], tiny.model(CONFIGS["llama"]), None)
    save_model(tmp_path / "x", model)
    marker = tmp_path / "x" / "model.json"
    good = json.loads(marker.read_text())
    for change in ({"kind": "rnn"}, {"config": {}}, {"dtypes": {}}):
        marker.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=r"model\.json|checkpoint"):
            open_model(tmp_path / "x")
    marker.write_text("{")
    with pytest.raises(ValueError, match=r"model\.json"):
        open_model(tmp_path / "x")
