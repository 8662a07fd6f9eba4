# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face `config.json` as our schema, and back.

Each architecture is a table of three parts: fields that are read, fields that must have the value
which r1jax computes with, and fields that change nothing it computes. Any other field is refused by
its name: a mathematics that is silently another one is worse than none.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from r1jax.config import DenseConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from r1jax.ops.quant import BLOCK

HFConfig = Mapping[str, Any]

# What a config.json says about files, tokens, training or programs, not about the forward pass.
HARMLESS = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "aux_loss_alpha",
    "bos_token_id",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "ep_size",
    "initializer_range",
    "keys_to_ignore_at_inference",
    "max_window_layers",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "router_aux_loss_coef",
    "seq_aux",
    "sliding_window",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# Fields that must be absent, None or one of these values.
_ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
_DEEPSEEK_ONLY = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "tie_word_embeddings": (False,),
}
_ROPE_READ = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
_YARN_READ = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_LLAMA3_READ = {"low_freq_factor", "high_freq_factor"}


class Architecture(NamedTuple):
    """One `model_type`: how it is read, and what else its config.json may hold."""

    read: Callable[["Fields"], ModelConfig | DenseConfig]
    only: Mapping[str, tuple[Any, ...]]
    class_name: str


class Fields:
    """A config.json whose fields are ticked off as they are read."""

    def __init__(self, raw: HFConfig, where: str):
        self.raw, self.where, self.seen = raw, where, set(HARMLESS)

    def get(self, name: str, default: Any = ...) -> Any:
        """The value of a field; a field that is absent has its default, or is an error."""
        self.seen.add(name)
        value = self.raw.get(name)
        if value is None and default is ...:
            raise ValueError(f"{self.where}: the field {name} is missing")
        return default if value is None else value

    def integer(self, name: str, default: Any = ..., *, least: int = 0) -> int:
        """A whole number, at least `least`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{self.where}: {name} must be an integer of at least {least}, got {value!r}"
            )
        return value

    def number(self, name: str, default: Any = ...) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
            raise ValueError(f"{self.where}: {name} must be a number, got {value!r}")
        return float(value)

    def only(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses a value that is not computed with."""
        for name, values in allowed.items():
            value = self.get(name, values[0])
            if value not in values:
                raise ValueError(
                    f"{self.where}: {name}={value!r} is not supported, {values[0]!r} is"
                )

    def finish(self) -> None:
        """Refuses what nobody read."""
        for name, value in self.raw.items():
            if name not in self.seen and value is not None:
                near = difflib.get_close_matches(name, self.seen, n=1, cutoff=0.8)
                hint = f" (near: {near[0]})" if near else ""
                raise ValueError(
                    f"{self.where}: the field {name}={value!r} is not known to r1jax{hint}; if it "
                    "changes nothing in the forward pass, delete it or pass --ignore-field"
                )


def read_config(
    raw: HFConfig, *, where: str = "config.json", ignore: tuple[str, ...] = ()
) -> ModelConfig | DenseConfig:
    """Our schema of a config.json.

    Args:
        raw: the parsed file.
        where: its name, for messages.
        ignore: unknown fields that the caller knows to be harmless.

    Raises:
        ValueError: an unknown architecture, a field that is missing, of a wrong type, impossible,
            or that changes the mathematics in a way r1jax does not compute. The field is named.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: expected a JSON object, got {type(raw).__name__}")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"{where}: {kind=!r} is no known model_type; {sorted(ARCHITECTURES)} are")
    architecture = ARCHITECTURES[kind]
    fields = Fields(raw, where)
    fields.seen.update(ignore)
    fields.only(architecture.only)
    try:
        _check_quantisation(fields.get("quantization_config", None))
        cfg = dataclasses.replace(architecture.read(fields), dtype=_activations(raw))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from error
    fields.finish()
    return cfg


def _activations(raw: HFConfig) -> str:
    """What the forward pass runs in: float32 weights in float32, any others in bfloat16."""
    stored = raw.get("torch_dtype") or raw.get("dtype") or "float32"
    return "float32" if stored == "float32" else "bfloat16"


def _check_quantisation(given: Any) -> None:
    """DeepSeek's FP8 blocks are the one quantisation that is read."""
    if given is None:
        return
    expected = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    got = {name: given.get(name) for name in expected} if isinstance(given, Mapping) else given
    if got != expected or given.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"quantization_config={given!r} is not supported; {expected} in e4m3 is")


def _deepseek(f: Fields) -> ModelConfig:
    heads, q_rank = f.integer("num_attention_heads", least=1), f.get("q_lora_rank", None)
    nope, rope = f.integer("qk_nope_head_dim"), f.integer("qk_rope_head_dim")
    f.only({"qk_head_dim": (nope + rope,), "head_dim": (rope, nope + rope)})
    f.only({"num_key_value_heads": (heads,)})
    return ModelConfig(
        vocab_size=f.integer("vocab_size"),
        num_layers=f.integer("num_hidden_layers"),
        first_k_dense=f.integer("first_k_dense_replace", 0),
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        max_position=f.integer("max_position_embeddings"),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        mtp_depth=f.integer("num_nextn_predict_layers", 0),
        rope=_rope(f),
        mla=MLAConfig(
            num_heads=heads,
            q_lora_rank=None if q_rank is None else f.integer("q_lora_rank"),
            kv_lora_rank=f.integer("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=f.integer("v_head_dim"),
        ),
        moe=MoEConfig(
            n_routed_experts=f.integer("n_routed_experts"),
            n_shared_experts=f.integer("n_shared_experts", 0),
            num_experts_per_tok=f.integer("num_experts_per_tok"),
            n_group=f.integer("n_group", 1),
            topk_group=f.integer("topk_group", 1),
            routed_scaling_factor=f.number("routed_scaling_factor", 1.0),
            moe_intermediate_size=f.integer("moe_intermediate_size"),
        ),
    )


def _dense(f: Fields, *, qkv_bias: bool, qk_norm: bool, tied: bool) -> DenseConfig:
    heads, width = f.integer("num_attention_heads", least=1), f.integer("hidden_size")
    layers = f.integer("num_hidden_layers")
    kinds = f.get("layer_types", [])
    full = isinstance(kinds, list) and len(kinds) == kinds.count("full_attention")
    if not full or len(kinds) not in (0, layers):
        raise ValueError(
            f"{f.where}: layer_types={kinds!r} is not supported, 'full_attention' for each of "
            f"{layers} layers is"
        )
    f.only({"use_sliding_window": (False,)})
    if f.get("head_dim", None) is None and width % heads:
        raise ValueError(f"hidden_size={width} is no multiple of num_attention_heads={heads}")
    return DenseConfig(
        vocab_size=f.integer("vocab_size"),
        num_layers=layers,
        hidden_size=width,
        intermediate_size=f.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=f.integer("num_key_value_heads", heads),
        head_dim=f.integer("head_dim", width // heads),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tie_embeddings=bool(f.get("tie_word_embeddings", tied)),
        max_position=f.integer("max_position_embeddings"),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope=_rope(f),
    )


def _rope(f: Fields) -> RopeConfig:
    """`rope_theta` and `rope_scaling`, or `rope_parameters` that holds both (transformers 5)."""
    scaling, both = f.get("rope_scaling", None) or {}, f.get("rope_parameters", None) or {}
    # Newer files may hold the same under both names.
    if scaling and both and {**scaling, **both} != {**both, **scaling}:
        raise ValueError("rope_scaling and rope_parameters disagree; keep one of them")
    rope = Fields({**scaling, **both}, "rope_scaling")
    rope.seen = set()
    theta = rope.number("rope_theta", f.number("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.get("type", None)
    given = dict(theta=theta)
    if kind != "default":
        given |= dict(
            factor=rope.number("factor"),
            original_max_position=rope.integer(
                "original_max_position_embeddings", f.integer("max_position_embeddings")
            ),
        )
    if kind == "yarn":
        given |= _yarn(rope)
    elif kind == "llama3":
        given |= dict(scaling="llama3")
        given |= {name: rope.number(name) for name in sorted(_LLAMA3_READ)}
    elif kind != "default":
        raise ValueError(
            f"rope_scaling: rope_type={kind!r} is not supported; default, yarn, llama3 are"
        )
    rope.only({"truncate": (True,), "partial_rotary_factor": (1.0,)})
    rope.finish()
    return RopeConfig(**given)


def _yarn(rope: Fields) -> dict[str, float]:
    """YaRN's own fields. Without the two mscales it scales cos and sin by 0.1 ln(factor) + 1."""
    one, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if bool(one) != bool(all_dim):
        raise ValueError(
            "rope_scaling: mscale and mscale_all_dim go together; give both or neither"
        )
    rope.only({"attention_factor": (None,)})
    return dict(
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=one or 1.0,
        mscale_all_dim=all_dim,
    )


def _qwen2(f: Fields) -> DenseConfig:
    return _dense(f, qkv_bias=True, qk_norm=False, tied=False)


def _qwen3(f: Fields) -> DenseConfig:
    return _dense(f, qkv_bias=False, qk_norm=True, tied=False)


def _llama(f: Fields) -> DenseConfig:
    return _dense(f, qkv_bias=False, qk_norm=False, tied=False)


ARCHITECTURES: dict[str, Architecture] = {
    "deepseek_v3": Architecture(_deepseek, _ONLY | _DEEPSEEK_ONLY, "DeepseekV3ForCausalLM"),
    "qwen2": Architecture(_qwen2, _ONLY, "Qwen2ForCausalLM"),
    "qwen3": Architecture(_qwen3, _ONLY, "Qwen3ForCausalLM"),
    "llama": Architecture(_llama, _ONLY, "LlamaForCausalLM"),
}


def write_config(cfg: ModelConfig | DenseConfig, *, dtype: str) -> dict[str, Any]:
    """A config.json that `read_config` and transformers read as `cfg`.

    Args:
        cfg: the architecture.
        dtype: of the weights, "float32" or "bfloat16".
    """
    kind = "deepseek_v3"
    if isinstance(cfg, DenseConfig):
        kind = "qwen2" if cfg.qkv_bias else "qwen3" if cfg.qk_norm else "llama"
    shared = {
        "architectures": [ARCHITECTURES[kind].class_name],
        "model_type": kind,
        "torch_dtype": dtype,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "max_position_embeddings": cfg.max_position,
        "rms_norm_eps": cfg.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": cfg.rope.theta,
        "rope_scaling": _written_rope(cfg.rope),
    }
    if isinstance(cfg, DenseConfig):
        return shared | {
            "num_attention_heads": cfg.num_heads,
            "num_key_value_heads": cfg.num_kv_heads,
            "head_dim": cfg.head_dim,
            "tie_word_embeddings": cfg.tie_embeddings,
        }
    return shared | _written_deepseek(cfg)


def _written_deepseek(cfg: ModelConfig) -> dict[str, Any]:
    mla, moe = cfg.mla, cfg.moe
    return {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "first_k_dense_replace": cfg.first_k_dense,
        "n_routed_experts": moe.n_routed_experts,
        "n_shared_experts": moe.n_shared_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "num_nextn_predict_layers": cfg.mtp_depth,
        "tie_word_embeddings": False,
        **{name: values[0] for name, values in _DEEPSEEK_ONLY.items()},
    }


def _written_rope(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.factor == 1.0:
        return None
    out = {
        "rope_type": rope.scaling,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position,
    }
    if rope.scaling == "llama3":
        names = sorted(_LLAMA3_READ)
    else:
        names = sorted(_YARN_READ if rope.mscale_all_dim else _YARN_READ - {"mscale_all_dim"})
        names = names if rope.mscale_all_dim else [n for n in names if n != "mscale"]
    return out | {name: getattr(rope, name) for name in names}
