# SPDX-License-Identifier: Apache-2.0
"""The schema: round trips, and one clear sentence for each thing that cannot be."""

import dataclasses

import ml_collections
import pytest

from r1jax import config
from r1jax.config import from_config_dict, to_config_dict

PRESETS = {
    "quickstart": config.quickstart(),
    "recipe": config.RecipeConfig(),
    "model": config.ModelConfig(),
    "laptop_model": config.laptop_model(),
    "student": config.laptop_student(qkv_bias=True),
    "sampling": config.SamplingConfig(top_k=5, top_p=0.9),
}


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    cfg = PRESETS[name]
    spelled = to_config_dict(cfg)
    assert isinstance(spelled, ml_collections.ConfigDict)
    assert from_config_dict(type(cfg), spelled) == cfg
    assert from_config_dict(type(cfg), spelled.to_dict()) == cfg


def test_what_is_left_out_keeps_its_default():
    cfg = from_config_dict(config.RecipeConfig, {"seed": 7, "model": {"moe": {"n_group": 4}}})
    assert cfg.seed == 7
    assert cfg.model.moe == dataclasses.replace(config.MoEConfig(), n_group=4)
    assert cfg.rl_1 == config.GRPOConfig()


def test_conversions():
    """int → float and list → tuple, and None where it is allowed: nothing else."""
    cfg = from_config_dict(config.TaskConfig, {"weights": [1, 2, 3]})
    assert cfg.weights == (1.0, 2.0, 3.0)
    assert [type(w) for w in cfg.weights] == [float] * 3
    assert from_config_dict(config.MLAConfig, {"q_lora_rank": None}).q_lora_rank is None
    assert from_config_dict(config.SamplingConfig, {"top_p": 1}).top_p == 1.0


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (config.SFTConfig, {"steps": 1.5}, "steps must be int, got 1.5"),
        (config.SFTConfig, {"steps": True}, "steps must be int, got True"),
        (config.SFTConfig, {"steps": None}, "steps must be int, got None"),
        (config.SFTConfig, {"mtp_weight": "0.3"}, "mtp_weight must be float, got '0.3'"),
        (config.SFTConfig, {"mtp_weight": True}, "mtp_weight must be float, got True"),
        (config.SFTConfig, {"mtp_weight": float("nan")}, "mtp_weight must be finite"),
        (config.SFTConfig, {"optim": {"b1": float("inf")}}, "optim.b1 must be finite"),
        (config.ModelConfig, {"remat": 1}, "remat must be bool, got 1"),
        (config.ModelConfig, {"dtype": 32}, "dtype must be str, got 32"),
        (config.ModelConfig, {"moe": 8}, "moe must be a section of fields, got 8"),
        (config.ModelConfig, {"moe": None}, "moe must be a section of fields, got None"),
        (config.TaskConfig, {"names": "countdown"}, "names must be a tuple, got 'countdown'"),
        (config.TaskConfig, {"weights": ["a", 1, 1]}, "weights must be float, got 'a'"),
        (config.SamplingConfig, {"top_k": 2.5}, "top_k must be int, got 2.5"),
    ],
)
def test_wrong_types(cls, values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        from_config_dict(cls, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"unknown config key sed; did you mean seed"),
        ({"model": {"moe": {"n_grup": 4}}}, r"model\.moe\.n_grup; did you mean n_group"),
        ({"rl_1": {"group": 4}}, r"rl_1\.group; did you mean group_size"),
        ({"model": {"mla": {"zzz": 4}}}, r"model\.mla\.zzz; known: \['kv_lora_rank', "),
    ],
)
def test_unknown_keys(values, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(config.RecipeConfig, values)


def moe(**fields):
    return {"model": {"moe": fields}}


ODD = {"rl_1": {"prompts": 3, "group_size": 3, "update": {"minibatches": 2}}}
STUDENTS = {"qwen2": {"max_position": 16}}
REFUSED = [
    ({"model": {"rope": {"theta": 0.0}}}, "theta must be positive, got 0.0"),
    ({"model": {"rope": {"original_max_position": 0}}}, "original_max_position must be positive"),
    ({"model": {"rope": {"factor": 0.5}}}, r"model\.rope\.factor must be >= 1 .*got 0.5"),
    ({"model": {"mla": {"num_heads": 0}}}, "num_heads must be positive, got 0"),
    ({"model": {"mla": {"kv_lora_rank": -1}}}, "kv_lora_rank must be positive, got -1"),
    ({"model": {"mla": {"q_lora_rank": 0}}}, "q_lora_rank must be positive, got 0"),
    ({"model": {"mla": {"qk_nope_head_dim": 0}}}, "qk_nope_head_dim must be positive"),
    ({"model": {"mla": {"v_head_dim": 0}}}, "v_head_dim must be positive"),
    ({"model": {"mla": {"qk_rope_head_dim": 7}}}, r"qk_rope_head_dim must be positive and even.*7"),
    ({"model": {"mla": {"qk_rope_head_dim": 0}}}, "qk_rope_head_dim must be positive and even"),
    (moe(num_experts_per_tok=0), "num_experts_per_tok must be positive"),
    (moe(moe_intermediate_size=0), "moe_intermediate_size must be positive"),
    (moe(n_shared_experts=-1), r"model\.moe\.n_shared_experts must be >= 0"),
    (moe(n_group=7), r"n_routed_experts=256 must be divisible by model\.moe\.n_group=7"),
    (moe(n_group=256, topk_group=8), r"n_routed_experts=256 over model\.moe\.n_group=256 leaves"),
    (moe(topk_group=9), r"model\.moe\.topk_group=9 exceeds model\.moe\.n_group=8"),
    (moe(topk_group=1, num_experts_per_tok=33), r"num_experts_per_tok=33 exceeds the 32 experts"),
    ({"model": {"vocab_size": 0}}, "vocab_size must be positive"),
    ({"model": {"max_position": 0}}, "max_position must be positive"),
    ({"model": {"init_std": 0.0}}, "init_std must be positive"),
    ({"model": {"dtype": "float16"}}, r"model\.dtype must be 'float32' or .*, got 'float16'"),
    ({"model": {"first_k_dense": 61}}, r"model\.first_k_dense=61 must be in \[0, model\.num_l"),
    ({"model": {"first_k_dense": -1}}, r"model\.first_k_dense=-1 must be in"),
    ({"model": {"mtp_depth": 2}}, r"model\.mtp_depth must be 0 or 1 .*got 2"),
    ({"students": {"qwen2": {"num_kv_heads": 5}}}, "num_heads=12 must be divisible by num_kv_h"),
    ({"students": {"llama": {"head_dim": 3}}}, "head_dim must be even .*got 3"),
    ({"students": {"llama": {"head_dim": 0}}}, "head_dim must be positive"),
    ({"students": {"llama": {"dtype": "int8"}}}, "dtype must be 'float32' or .*, got 'int8'"),
    ({"pretrain": {"optim": {"learning_rate": -1.0}}}, r"optim\.learning_rate.* must be >= 0"),
    ({"pretrain": {"optim": {"warmup_steps": -1}}}, r"warmup_steps.* must be >= 0"),
    ({"pretrain": {"optim": {"b2": 1.5}}}, r"b2 must lie in \[0, 1\], got 1.5"),
    ({"pretrain": {"optim": {"final_fraction": -0.5}}}, "final_fraction must lie in"),
    ({"pretrain": {"optim": {"clip_norm": 0.0}}}, "clip_norm must be positive"),
    ({"pretrain": {"steps": -1}}, "steps must be >= 0, got -1"),
    ({"pretrain": {"examples": 0}}, "examples must be positive"),
    ({"pretrain": {"length": 0}}, "length must be positive"),
    ({"pretrain": {"bias_freeze": 2.0}}, "bias_freeze must lie in"),
    ({"pretrain": {"batch_size": 9, "micro_batches": 2}}, "batch_size=9 must be divisible by mic"),
    ({"rl_1": {"temperature": -0.1}}, r"temperature=-0.1 must be positive"),
    ({"sampling": {"top_k": 0}}, "top_k must be positive"),
    ({"sampling": {"top_p": 0.0}}, r"sampling\.top_p must lie in \(0, 1\], got 0.0"),
    ({"sampling": {"top_p": 1.1}}, r"sampling\.top_p must lie in \(0, 1\], got 1.1"),
    ({"sampling": {"max_new_tokens": 0}}, "max_new_tokens must be positive"),
    ({"rl_1": {"group_size": 0}}, "group_size must be positive"),
    ({"rl_1": {"group_size": 1}}, "group_size=1 leaves update.objective=.grpo. no answer to"),
    ({"rl_1": {"update": {"beta": -1.0}}}, r"update\.beta must be >= 0"),
    ({"rl_1": {"update": {"clip_low": -0.1}}}, r"update\.clip_low.* must be >= 0"),
    ({"rl_1": {"update": {"epochs": 0}}}, "epochs must be positive"),
    ({"rl_1": {"steps": -1}}, r"steps must be >= 0, got -1 \(in rl_1\)"),
    (ODD, r"=9 must be divisible by update\.minib"),
    ({"tasks": {"mix": {"retry": 1.5}}}, r"retry is a probability in 0\.\.1, got 1.5"),
    ({"tasks": {"mix": {"max_tries": 0}}}, "max_tries must be at least 1, got 0"),
    ({"tasks": {"difficulty": {"countdown_largest": 13}}}, r"countdown_largest must be in 3\.\.12"),
    ({"tasks": {"difficulty": {"countdown_target": 145}}}, r"countdown_target must be in 10\.\.14"),
    ({"tasks": {"difficulty": {"countdown_numbers": []}}}, "countdown_numbers must hold numbers"),
    ({"tasks": {"difficulty": {"arithmetic_operations": [5]}}}, "arithmetic_operations must hold"),
    ({"tasks": {"names": ["countdown"]}}, r"tasks\.weights must have one number for each of"),
    ({"tasks": {"template": "chat"}}, r"tasks\.template must be 'r1' or 'primer', got 'chat'"),
    ({"evaluation": {"samples": 0}}, "samples must be positive"),
    ({"rejection": {"keep": 9, "samples": 8}}, r"rejection\.keep=9 exceeds rejection\.samples=8"),
    ({"checkpoint_every": 0.0}, "checkpoint_every must be positive"),
    ({"model": {"max_position": 100}}, r"model\.max_position=100 is shorter than sampling\.prompt"),
    ({"students": STUDENTS}, r"qwen2\.max_position=16 is shorter.* = 120; raise students"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused(values, message):
    """One line that names the field, what was expected and what was got."""
    with pytest.raises(ValueError, match=message) as error:
        from_config_dict(config.RecipeConfig, values)
    assert "\n" not in str(error.value)


def test_a_refusal_names_the_section():
    """Two stages have the same fields: the message says which one is meant."""
    with pytest.raises(ValueError, match=r"^steps must be >= 0, got -1 \(in cold_start\)$"):
        from_config_dict(config.RecipeConfig, {"cold_start": {"steps": -1}})
    with pytest.raises(ValueError, match=r"^rl_2\.optim\.clip_norm must be positive, got 0\.0$"):
        from_config_dict(config.RecipeConfig, {"rl_2": {"optim": {"clip_norm": 0.0}}})
    with pytest.raises(ValueError, match=r"^model\.mtp_depth must be [^(]*\(as released\), got 2$"):
        from_config_dict(config.RecipeConfig, {"model": {"mtp_depth": 2}})


def test_edges_that_are_allowed():
    assert config.MoEConfig(n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=2)
    assert config.MoEConfig(topk_group=1, num_experts_per_tok=32).num_experts_per_tok == 32
    assert config.ModelConfig(first_k_dense=0).first_k_dense == 0
    assert config.SamplingConfig(top_p=1.0).top_p == 1.0
    assert config.UpdateConfig(beta=0.0, clip_high=10.0).beta == 0.0


def test_configs_are_frozen_and_hashable():
    """Modules keep them as static attributes, so they must hash."""
    cfg = config.quickstart()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.seed = 1
    assert hash(cfg) == hash(config.quickstart())
