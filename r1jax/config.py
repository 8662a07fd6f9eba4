# SPDX-License-Identifier: Apache-2.0
"""The schema: one tree of frozen dataclasses, each checked where its fields are. Presets are functions.

Only programs (`r1jax.train`, `r1jax.eval`) see these; a module is given its own small sub-config and
an op is given scalars. `to_config_dict` and `from_config_dict` translate to and from the
`ml_collections.ConfigDict` that a config file returns and the command line edits.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

import ml_collections


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise ValueError(f"{type(owner).__name__}.{name} must be positive, got {value}")


def _fraction(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{type(owner).__name__}.{name} must lie in [0, 1], got {value}")


# --------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; YaRN (arXiv 2309.00071) is on when `factor` > 1."""

    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        _positive(self, "theta", "original_max_position")
        if self.factor < 1.0:
            raise ValueError(f"model.rope.factor must be >= 1 (1 = no YaRN), got {self.factor}")


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
        _positive(self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            _positive(self, "q_lora_rank")
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

    def __post_init__(self):
        _positive(self, "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
        _positive(self, "moe_intermediate_size")
        if self.n_shared_experts < 0:
            raise ValueError(f"model.moe.n_shared_experts must be >= 0: {self.n_shared_experts}")
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
    remat: bool = True
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(factor=40.0))
    mla: MLAConfig = field(default_factory=MLAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self):
        _positive(self, "vocab_size", "num_layers", "hidden_size", "intermediate_size")
        _positive(self, "max_position", "init_std")
        _check_dtype(self.dtype, "model.dtype")
        if not 0 <= self.first_k_dense < self.num_layers:
            raise ValueError(
                f"model.first_k_dense={self.first_k_dense} must be in [0, model.num_layers="
                f"{self.num_layers}): a DeepSeek model ends in mixture-of-experts layers"
            )
        if self.mtp_depth not in (0, 1):
            raise ValueError(f"model.mtp_depth must be 0 or 1 (as released), got {self.mtp_depth}")


@dataclass(frozen=True)
class DenseConfig:
    """A dense student: Qwen2-shaped (`qkv_bias=True`) or Llama-shaped (`qkv_bias=False`)."""

    vocab_size: int = 151_936
    num_layers: int = 28
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_heads: int = 12
    num_kv_heads: int = 2
    head_dim: int = 128
    qkv_bias: bool = True
    tie_embeddings: bool = True
    max_position: int = 131_072
    rms_norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "bfloat16"
    remat: bool = True
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(theta=1e6))

    def __post_init__(self):
        _positive(self, "vocab_size", "num_layers", "hidden_size", "intermediate_size")
        _positive(self, "num_heads", "num_kv_heads", "head_dim", "max_position", "init_std")
        _check_dtype(self.dtype, "dtype")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary halves), got {self.head_dim}")


def _check_dtype(name: str, path: str) -> None:
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"{path} must be 'float32' or 'bfloat16', got {name!r}")


# ------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with global-norm clipping; warm-up, then constant or cosine (DeepSeek-V3 section 4.2)."""

    learning_rate: float = 2.2e-4
    final_fraction: float = 1.0  # of learning_rate, at the end of the cosine; 1 = constant
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        _positive(self, "eps", "clip_norm")
        _fraction(self, "b1", "b2", "final_fraction")
        if self.learning_rate < 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError("optim.learning_rate, warmup_steps and weight_decay must be >= 0")


@dataclass(frozen=True)
class SFTConfig:
    """Next-token training on packed rows: pre-training (every token) and SFT (completions only)."""

    steps: int = 1000
    examples: int = 10_000  # documents generated for it
    batch_size: int = 32  # packed rows a step
    micro_batches: int = 1
    length: int = 128  # tokens of a packed row
    mtp_weight: float = 0.3  # λ, eq. 25
    bias_freeze: float = 0.034  # last share of the steps in which the router bias stands still
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        _positive(self, "examples", "batch_size", "micro_batches", "length")
        _fraction(self, "bias_freeze")
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        _divides(self.batch_size, "batch_size", self.micro_batches, "micro_batches")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn. `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    prompt_length: int = 24
    max_new_tokens: int = 96

    def __post_init__(self):
        _positive(self, "prompt_length", "max_new_tokens")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature must be >= 0, got {self.temperature}")
        if self.top_k is not None:
            _positive(self, "top_k")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.top_p must lie in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimisation (arXiv 2402.03300, eq. 3; R1's settings in SPEC of the paper).

    A step samples `prompts` × `group_size` completions, splits them into `minibatches` updates, goes
    over them `epochs` times, and computes each update in `micro_batches` pieces.
    """

    steps: int = 100
    prompts: int = 32
    group_size: int = 16
    minibatches: int = 1
    epochs: int = 1
    micro_batches: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.001  # weight of the KL to the reference
    reference_every: int = 400  # steps after which the reference becomes the policy; 0 = never
    accuracy_weight: float = 1.0
    format_weight: float = 1.0
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=3e-6, weight_decay=0.0)
    )

    def __post_init__(self):
        _positive(self, "prompts", "group_size", "minibatches", "epochs", "micro_batches")
        if self.steps < 0 or self.reference_every < 0 or self.beta < 0:
            raise ValueError("grpo.steps, grpo.reference_every and grpo.beta must be >= 0")
        rows = self.prompts * self.group_size
        _divides(rows, "prompts × group_size", self.minibatches * self.micro_batches,
                 "minibatches × micro_batches")  # fmt: skip


# --------------------------------------------------------------------------------------- tasks


LARGEST_INTEGER = 144
"""Integers that tasks write lie in ±144: the tokenizer has one token for each."""


@dataclass(frozen=True)
class TraceMix:
    """How cold-start traces are composed; every probability is in 0..1.

    Attributes:
      first_right: P(the first try is right).
      checked: P(a try is followed by its check and verdict); an unchecked try is answered at once.
      retry: P(a checked wrong try is followed by `wait` and another try); otherwise the writer
        gives up and answers with the wrong candidate. At 0 no trace contains `wait`.
      retry_right: P(a retry is right).
      max_tries: most tries in one trace.
    """

    first_right: float = 0.35
    checked: float = 0.5
    retry: float = 0.15
    retry_right: float = 0.5
    max_tries: int = 5

    def __post_init__(self):
        for field in ("first_right", "checked", "retry", "retry_right"):
            value = vars(self)[field]
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{field} is a probability in 0..1, got {value}")
        if self.max_tries < 1:
            raise ValueError(f"max_tries must be at least 1, got {self.max_tries}")


@dataclass(frozen=True)
class Difficulty:
    """How large the problems are.

    Attributes:
      countdown_numbers: how many numbers a countdown problem may give, one drawn per problem.
      countdown_largest: the largest given number, at most 12.
      countdown_target: the largest target; targets start at 1.
      quadratic_root: the largest absolute value of a root, at most 12.
      arithmetic_operations: how many operations a chain may have, the product included.
      arithmetic_largest: the largest operand of a chain, at most 12.
    """

    countdown_numbers: tuple[int, ...] = (3, 4)
    countdown_largest: int = 12
    countdown_target: int = 99
    quadratic_root: int = 12
    arithmetic_operations: tuple[int, ...] = (2, 3, 4)
    arithmetic_largest: int = 12

    def __post_init__(self):
        for field, low, high in (
            ("countdown_largest", 3, 12),
            ("countdown_target", 10, LARGEST_INTEGER),
            ("quadratic_root", 2, 12),
            ("arithmetic_largest", 2, 12),
        ):
            value = vars(self)[field]
            if not low <= value <= high:
                raise ValueError(f"{field} must be in {low}..{high}, got {value}")
        for field, low, high in (("countdown_numbers", 2, 4), ("arithmetic_operations", 1, 4)):
            value = vars(self)[field]
            if not value or any(not low <= n <= high for n in value):
                raise ValueError(f"{field} must hold numbers in {low}..{high}, got {value}")


def _divides(whole: int, whole_name: str, part: int, part_name: str) -> None:
    if whole % part:
        raise ValueError(f"{whole_name}={whole} must be divisible by {part_name}={part}")


@dataclass(frozen=True)
class TaskConfig:
    """What is to be reasoned about, and in which words."""

    names: tuple[str, ...] = ("arithmetic", "countdown", "quadratic")
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    template: str = "r1"  # "r1": <think>, <answer>; "primer": <reasoning_process>, <answer>
    difficulty: Difficulty = field(default_factory=Difficulty)
    mix: TraceMix = field(default_factory=TraceMix)

    def __post_init__(self):
        if len(self.names) != len(self.weights):
            raise ValueError(
                f"tasks.weights must have one number for each of tasks.names={self.names}, "
                f"got {self.weights}"
            )
        if self.template not in ("r1", "primer"):
            raise ValueError(f"tasks.template must be 'r1' or 'primer', got {self.template!r}")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation after each stage: `samples` at temperature 1 and one greedy a problem."""

    problems: int = 96
    samples: int = 16
    shown: int = 6  # problems whose answers before and after RL go into the report

    def __post_init__(self):
        _positive(self, "problems", "samples", "shown")


@dataclass(frozen=True)
class RejectionConfig:
    """Rejection sampling: sample, verify, keep up to `keep` distinct correct traces a problem."""

    problems: int = 256
    samples: int = 8
    keep: int = 2

    def __post_init__(self):
        _positive(self, "problems", "samples", "keep")
        if self.keep > self.samples:
            raise ValueError(f"rejection.keep={self.keep} exceeds rejection.samples={self.samples}")


@dataclass(frozen=True)
class StudentsConfig:
    """The two students that the teacher's correct traces are distilled into."""

    qwen2: DenseConfig = field(default_factory=DenseConfig)
    llama: DenseConfig = field(default_factory=lambda: DenseConfig(qkv_bias=False))


@dataclass(frozen=True)
class RecipeConfig:
    """The R1 recipe: one field a stage, in order."""

    seed: int = 0
    tasks: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    students: StudentsConfig = field(default_factory=StudentsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    pretrain: SFTConfig = field(default_factory=SFTConfig)
    cold_start: SFTConfig = field(default_factory=SFTConfig)
    rl_1: GRPOConfig = field(default_factory=GRPOConfig)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    sft_2: SFTConfig = field(default_factory=SFTConfig)
    rl_2: GRPOConfig = field(default_factory=GRPOConfig)
    distill_data: RejectionConfig = field(default_factory=RejectionConfig)
    distill: SFTConfig = field(default_factory=SFTConfig)
    checkpoint_every: float = 30.0  # seconds between checkpoints inside a stage

    def __post_init__(self):
        _positive(self, "checkpoint_every")
        total = self.sampling.prompt_length + self.sampling.max_new_tokens
        for name, model in self.models():
            if total > model.max_position:
                raise ValueError(
                    f"{name}.max_position={model.max_position} is shorter than "
                    f"sampling.prompt_length + max_new_tokens = {total}; raise {name}.max_position"
                )

    def models(self) -> tuple[tuple[str, ModelConfig | DenseConfig], ...]:
        """The three models with the paths of their fields."""
        students = self.students
        return (
            ("model", self.model),
            ("students.qwen2", students.qwen2),
            ("students.llama", students.llama),
        )


# ------------------------------------------------------------------------------- to and from dicts


def to_config_dict(cfg: Any) -> ml_collections.ConfigDict:
    """A frozen config as the `ConfigDict` that a config file returns; None fields stay settable."""
    out = ml_collections.ConfigDict()
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        nested = dataclasses.is_dataclass(value)
        out[f.name] = to_config_dict(value) if nested else value
    return out


def from_config_dict(cls: type, values: Any, path: str = "") -> Any:
    """The frozen config of type `cls` that a `ConfigDict` or nested dict spells out, validated.

    Raises:
        ValueError: an unknown key (near names are listed), a value of the wrong type, or a value
            that the class refuses.
    """
    kinds = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    found = {}
    for key, value in dict(values).items():
        where = f"{path}{key}"
        if key not in names:
            raise ValueError(f"unknown config key {where}{_near(key, names)}")
        kind = kinds[key]
        if dataclasses.is_dataclass(kind):
            found[key] = from_config_dict(kind, value, f"{where}.")
        else:
            found[key] = _typed(value, kind, where)
    return cls(**found)


def _near(key: str, names: set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {sorted(names)}"


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value` as a field of type `kind`: int → float and list → tuple are the only conversions."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a tuple, got {value!r}")
        return tuple(_typed(v, typing.get_args(kind)[0], where) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value!r}")
    return value


# ---------------------------------------------------------------------------------------- presets


def laptop_model() -> ModelConfig:
    """A DeepSeek-V3-shaped model of 0.4M parameters with every mechanism switched on."""
    return ModelConfig(
        vocab_size=384,
        num_layers=4,
        first_k_dense=1,
        hidden_size=64,
        intermediate_size=192,
        max_position=512,
        init_std=0.1,
        mtp_depth=1,
        dtype="float32",
        remat=False,
        rope=RopeConfig(),
        mla=MLAConfig(
            num_heads=4,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
        ),
        moe=MoEConfig(
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
            moe_intermediate_size=32,
            bias_update_speed=0.01,
        ),
    )


def laptop_student(*, qkv_bias: bool) -> DenseConfig:
    """A dense student: Qwen2-shaped with biases and tied embeddings, else Llama-shaped."""
    return DenseConfig(
        vocab_size=384,
        num_layers=4,
        hidden_size=64,
        intermediate_size=192,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        qkv_bias=qkv_bias,
        tie_embeddings=qkv_bias,
        max_position=512,
        init_std=0.1,
        dtype="float32",
        remat=False,
        rope=RopeConfig(),
    )


def quickstart() -> RecipeConfig:
    """The whole recipe in minutes on two CPU cores: `r1jax quickstart`."""

    def sft(steps: int, lr: float, **changes) -> SFTConfig:
        optim = OptimConfig(
            learning_rate=lr, final_fraction=0.1, warmup_steps=20, weight_decay=0.01
        )
        return SFTConfig(steps=steps, batch_size=32, length=128, optim=optim, **changes)

    def rl(steps: int) -> GRPOConfig:
        return GRPOConfig(
            steps=steps,
            prompts=16,
            group_size=8,
            format_weight=0.2,
            reference_every=0,
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=3, weight_decay=0.0),
        )

    return RecipeConfig(
        tasks=TaskConfig(
            difficulty=Difficulty(
                countdown_numbers=(3,), arithmetic_operations=(2,), quadratic_root=12
            )
        ),
        model=laptop_model(),
        students=StudentsConfig(laptop_student(qkv_bias=True), laptop_student(qkv_bias=False)),
        sampling=SamplingConfig(prompt_length=16, max_new_tokens=96),
        evaluation=EvalConfig(problems=96, samples=16),
        pretrain=sft(400, 5e-3, examples=40_000),
        cold_start=sft(60, 2e-3, examples=4_000),
        rl_1=rl(60),
        rejection=RejectionConfig(problems=512, samples=8, keep=4),
        sft_2=sft(60, 2e-3),
        rl_2=rl(30),
        distill_data=RejectionConfig(problems=1024, samples=8, keep=4),
        distill=sft(300, 5e-3),
    )
