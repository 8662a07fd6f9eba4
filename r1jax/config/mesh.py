# SPDX-License-Identifier: Apache-2.0
"""How many devices carry which axis of a mesh, and whether a model and a batch can be cut so."""

import dataclasses
from dataclasses import dataclass

from r1jax.config.check import positive
from r1jax.config.model import DenseConfig, ModelConfig


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices. All 1: one device.

    Attributes:
        slices: groups of devices without a fast network between them; copies of the parameters.
            On several groups with `slices` 1 `fsdp` crosses that network: pieces instead of copies.
        data: copies of the parameters inside a slice.
        fsdp: devices that the parameters, their moments and gradients are cut over, and the batch.
        expert: devices that the routed experts are dealt out to; all other parameters and the batch
            are cut over them as over `fsdp`.
        tensor: devices that heads and hidden units are cut over.
        context: devices that the positions of a row are cut over, and parameters as over `fsdp`.
    """

    slices: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        positive(self, *(f.name for f in dataclasses.fields(self)))

    def sizes(self) -> dict[str, int]:
        """{axis: size} in the order of the mesh, slowest network first."""
        return dataclasses.asdict(self)

    @property
    def batch_shards(self) -> int:
        """Pieces that the rows of a batch are cut into."""
        return self.slices * self.data * self.fsdp * self.expert

    @property
    def devices(self) -> int:
        """Devices of the whole mesh."""
        return self.batch_shards * self.tensor * self.context

    def check(self, model: ModelConfig | DenseConfig, *, rows: int, length: int) -> None:
        """Refuses a mesh that cuts an axis unevenly.

        Args:
            model: the architecture.
            rows: of one micro-batch.
            length: positions of a row.

        Raises:
            ValueError: names both fields.
        """
        _held(model, "mesh", expert=self.expert, tensor=self.tensor)
        if isinstance(model, ModelConfig):
            copies = ("model.moe.redundant_experts", model.moe.redundant_experts)
            check_redundant(model, *copies, "mesh.expert", self.expert)
        shards = self.fsdp * self.expert * self.context
        for name, width in cut_widths(model).items():
            _cut(name, width, "mesh.fsdp × expert × context", shards)
        _cut("rows of a micro-batch", rows, "mesh.slices × data × fsdp × expert", self.batch_shards)
        _cut("length", length, "mesh.context", self.context)


@dataclass(frozen=True)
class SamplerConfig:
    """Devices, behind those of the mesh, that do nothing but sample: asynchronous training.

    They draw the next batch with the weights of one step before, while the trainer learns from this
    one. They hold weights as decoding wants them: cut over experts and heads alone.

    Attributes:
        data: copies of the model on them. 0: there are none, the mesh samples and trains in turns.
        expert: devices that the routed experts of a copy are dealt out to.
        tensor: devices that heads and hidden units of a copy are cut over.
    """

    data: int = 0
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        positive(self, "expert", "tensor")
        if self.data < 0:
            raise ValueError(f"SamplerConfig.data must be >= 0, got {self.data}")
        if not self.data and self.expert * self.tensor > 1:
            raise ValueError(
                f"SamplerConfig.expert={self.expert} and SamplerConfig.tensor={self.tensor} cut "
                "what no device holds; set SamplerConfig.data to the copies of the model, 1 or more"
            )

    @property
    def devices(self) -> int:
        """That only sample."""
        return self.data * self.expert * self.tensor

    def check(self, model: ModelConfig | DenseConfig, mesh: MeshConfig, *, rows: int) -> None:
        """Refuses devices that hold the model or the rows unevenly.

        Args:
            model: the architecture.
            mesh: the trainer's. Its devices give weights away in the pieces that these hold.
            rows: that are sampled at a time.

        Raises:
            ValueError: names both fields.
        """
        _held(model, "sampler", expert=self.expert, tensor=self.tensor)
        _cut("devices of mesh", mesh.devices, "sampler.expert × tensor", self.expert * self.tensor)
        _cut("rows of a piece", rows, "sampler.data × expert", self.data * self.expert)


def check_redundant(
    model: ModelConfig | DenseConfig, field: str, redundant: int, axis: str, n: int
) -> None:
    """Refuses copies of experts that the mesh cannot hold evenly.

    Args:
        field: that asks for so many.
        axis: name of the mesh axis that experts are dealt out to, of `n` devices.

    Raises:
        ValueError: names both fields.
    """
    if not redundant:
        return
    name = f"{field}={redundant}"
    if not isinstance(model, ModelConfig):
        raise ValueError(f"{name}: this model has no routed experts; set it to 0")
    if n == 1:
        raise ValueError(f"{name} are for devices that share experts; set {axis}, or it to 0")
    slots = model.moe.n_routed_experts + redundant
    if slots % n:
        raise ValueError(
            f"{name} and model.moe.n_routed_experts={model.moe.n_routed_experts} are {slots} "
            f"together, which {axis}={n} must divide; set it to {redundant + -slots % n}"
        )


def check_rebalance(model: ModelConfig | DenseConfig, every: int, mesh: MeshConfig) -> None:
    """Refuses to deal out (`rebalance_every`) experts that there are not, or groups that would be
    torn apart.

    Raises:
        ValueError: names the fields.
    """
    if not every:
        return
    if not isinstance(model, ModelConfig):
        raise ValueError(f"rebalance_every={every}: this model has no routed experts; set it to 0")
    groups, n = model.moe.n_group, mesh.expert
    if groups % n and n % groups:
        raise ValueError(
            f"rebalance_every={every} keeps groups of experts whole: of model.moe.n_group={groups} "
            f"and mesh.expert={n} one must divide the other; change mesh.expert, or set it to 0"
        )


def cut_widths(model: ModelConfig | DenseConfig) -> dict[str, int]:
    """{field: width} of what fsdp, expert and context cut together: all of them must divide it."""
    widths = {"model.hidden_size": model.hidden_size}
    if isinstance(model, ModelConfig):
        for name in ("q_lora_rank", "kv_lora_rank"):
            rank = vars(model.mla)[name]
            if rank and rank % 8 == 0:  # others are cut nowhere
                widths[f"model.mla.{name}"] = rank
    return widths


def _held(model: ModelConfig | DenseConfig, section: str, *, expert: int, tensor: int) -> None:
    """Refuses experts and heads that are dealt out unevenly."""
    cut = {"model.vocab_size": model.vocab_size}
    cut["model.intermediate_size"] = model.intermediate_size
    if isinstance(model, ModelConfig):
        moe = model.moe
        _cut("model.moe.n_routed_experts", moe.n_routed_experts, f"{section}.expert", expert)
        cut["model.moe.moe_intermediate_size"] = moe.moe_intermediate_size
        cut["model.mla.num_heads"] = model.mla.num_heads
    else:
        cut["model.num_kv_heads"] = model.num_kv_heads
    for name, size in cut.items():
        _cut(name, size, f"{section}.tensor", tensor)


def _cut(name: str, size: int, axis: str, pieces: int) -> None:
    if size % pieces:
        raise ValueError(f"{name}={size} must be divisible by {axis}={pieces}; change one of them")
