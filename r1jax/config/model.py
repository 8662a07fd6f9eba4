# SPDX-License-Identifier: Apache-2.0
"""Architectures: the DeepSeek-V3 decoder and the dense students."""

from dataclasses import dataclass, field

from r1jax.config.check import activations, positive

REMAT_NAMES = ("layer_input", "entry", "attention_out")
"""What a layer that is computed again may keep: its input (kept anyway, unless offloaded), what its
attention caches, and what its attention adds."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; with `factor` > 1 stretched to longer contexts by `scaling`.

    "yarn" (arXiv 2309.00071) reads the betas and mscales, "llama3" the two `_freq_factor`.
    """

    theta: float = 10_000.0
    scaling: str = "yarn"
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        positive(self, "theta", "original_max_position", "low_freq_factor")
        if self.factor < 1.0:
            raise ValueError(f"model.rope.factor must be >= 1 (1 = no scaling), got {self.factor}")
        if self.scaling not in ("yarn", "llama3"):
            raise ValueError(f"model.rope.scaling must be 'yarn' or 'llama3', got {self.scaling!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"model.rope.high_freq_factor={self.high_freq_factor} must exceed "
                f"model.rope.low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V3, section 2.1.1). `q_lora_rank=None`: full query."""

    num_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    def __post_init__(self):
        positive(self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            positive(self, "q_lora_rank")
        if self.qk_rope_head_dim <= 0 or self.qk_rope_head_dim % 2:
            raise ValueError(
                f"model.mla.qk_rope_head_dim must be positive and even (rotary pairs), "
                f"got {self.qk_rope_head_dim}"
            )


@dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE with auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2)."""

    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    moe_intermediate_size: int = 2048
    bias_update_speed: float = 0.001  # γ
    balance_loss_alpha: float = 0.0001  # α of the sequence-wise balance loss
    dispatch_slack: float = 1.25  # rows of an expert-parallel buffer over those of a balanced load
    dispatch_pieces: int = 8  # that a device's tokens are sent to other devices' experts in
    redundant_experts: int = 0  # copies of a batch's hottest on devices that share them: training

    def __post_init__(self):
        positive(self, "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
        positive(self, "moe_intermediate_size", "dispatch_slack", "dispatch_pieces")
        for name in ("n_shared_experts", "redundant_experts"):
            if vars(self)[name] < 0:
                raise ValueError(f"model.moe.{name} must be >= 0, got {vars(self)[name]}")
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"model.moe.n_routed_experts={self.n_routed_experts} must be divisible by "
                f"model.moe.n_group={self.n_group}; change one of them"
            )
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"a group needs two experts to be scored: model.moe.n_routed_experts="
                f"{self.n_routed_experts} over model.moe.n_group={self.n_group} leaves one; "
                "lower model.moe.n_group"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"model.moe.topk_group={self.topk_group} exceeds model.moe.n_group="
                f"{self.n_group}; lower model.moe.topk_group"
            )
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"model.moe.num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} "
                "experts of the kept groups; raise model.moe.topk_group or lower it"
            )


@dataclass(frozen=True)
class FP8Config:
    """DeepSeek-V3's FP8 recipe (section 3.3) for the linear layers: training, prefill and decoding.

    Attributes:
      enabled: in E4M3: projections of attention, feed-forward networks, experts and MTP, and what
        crosses devices on its way to the experts (section 3.3.3). Not so: embedding, head, router,
        norms, attention itself and the experts' sums. Parameters are float32 either way.
      block: length of the activations' tiles, side of the weights' blocks. TPU and GPU kernels have
        128 and 256.
      power_of_two: scales of activations and gradients are rounded up to powers of two.
    """

    enabled: bool = False
    block: int = 128
    power_of_two: bool = False

    def __post_init__(self):
        positive(self, "block")


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3-shaped decoder. The default is the 671B of the paper (section 4.2)."""

    vocab_size: int = 129_280
    num_layers: int = 61
    first_k_dense: int = 3
    hidden_size: int = 7168
    intermediate_size: int = 18_432
    max_position: int = 163_840
    rms_norm_eps: float = 1e-6
    init_std: float = 0.006
    mtp_depth: int = 1
    dtype: str = "bfloat16"  # of activations; parameters are float32
    remat: bool = True  # layers are computed again for their gradient
    remat_saved: tuple[str, ...] = ()  # of `REMAT_NAMES`: kept all the same
    remat_offloaded: tuple[str, ...] = ()  # of them: kept in the host's memory
    scan_unroll: int = 1  # layers in one turn of a stack's scan: more run and compile as one
    fp8: FP8Config = field(default_factory=FP8Config)
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(factor=40.0))
    mla: MLAConfig = field(default_factory=MLAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self):
        positive(self, "vocab_size", "num_layers", "hidden_size", "intermediate_size")
        positive(self, "max_position", "init_std", "scan_unroll")
        activations(self.dtype, "model.dtype")
        _named(self, "model.")
        if not 0 <= self.first_k_dense < self.num_layers:
            raise ValueError(
                f"model.first_k_dense={self.first_k_dense} must be in [0, model.num_layers="
                f"{self.num_layers}): a DeepSeek model ends in mixture-of-experts layers"
            )
        if self.mtp_depth not in (0, 1):
            raise ValueError(f"model.mtp_depth must be 0 or 1 (as released), got {self.mtp_depth}")


@dataclass(frozen=True)
class DenseConfig:
    """A dense decoder: Qwen2 (`qkv_bias`), Qwen3 (`qk_norm`) or Llama (neither)."""

    vocab_size: int = 151_936
    num_layers: int = 28
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_heads: int = 12
    num_kv_heads: int = 2
    head_dim: int = 128
    qkv_bias: bool = True
    qk_norm: bool = False
    tie_embeddings: bool = True
    max_position: int = 131_072
    rms_norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "bfloat16"
    remat: bool = True
    remat_saved: tuple[str, ...] = ()
    remat_offloaded: tuple[str, ...] = ()
    scan_unroll: int = 1
    fp8: FP8Config = field(default_factory=FP8Config)
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(theta=1e6))

    def __post_init__(self):
        positive(self, "vocab_size", "num_layers", "hidden_size", "intermediate_size")
        positive(self, "num_heads", "num_kv_heads", "head_dim", "max_position", "init_std")
        positive(self, "scan_unroll")
        activations(self.dtype, "dtype")
        _named(self, "")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary halves), got {self.head_dim}")


def _named(cfg: ModelConfig | DenseConfig, path: str) -> None:
    for field_name in ("remat_saved", "remat_offloaded"):
        for name in vars(cfg)[field_name]:
            if name not in REMAT_NAMES:
                raise ValueError(f"{path}{field_name} must be of {REMAT_NAMES}, got {name!r}")
    if both := set(cfg.remat_saved) & set(cfg.remat_offloaded):
        raise ValueError(f"{path}remat_saved and remat_offloaded both name {sorted(both)}")
