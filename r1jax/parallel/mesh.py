# SPDX-License-Identifier: Apache-2.0
"""Meshes of devices, and how wide each axis should be for a model on so many of them."""

import contextlib
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from r1jax.config import DenseConfig, MeshConfig, ModelConfig, SamplerConfig
from r1jax.config.mesh import cut_widths

WIDEST = 64  # ranks that experts are dealt out to; DeepSeek-V3 was trained on 64 (section 3.2)


def make_mesh(
    cfg: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """The mesh of a config; axes that talk most lie closest.

    Args:
        cfg: sizes of the axes.
        devices: those of a topology that is compiled for, or all that there are.
        axis_type: Auto or Explicit; a training step runs on both.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if cfg.devices != len(devices):
        sizes = " × ".join(f"{name}={size}" for name, size in cfg.sizes().items() if size > 1)
        raise ValueError(
            f"mesh {sizes or 'of one device'} takes {cfg.devices} devices, {len(devices)} are "
            f"there; change mesh.fsdp, for example to {_fitting(cfg, len(devices))}"
        )
    names, shape = tuple(cfg.sizes()), tuple(cfg.sizes().values())
    return Mesh(_placed(cfg, shape, devices), names, axis_types=(axis_type,) * len(names))


def entered(cfg: MeshConfig, *, spare: int = 0) -> contextlib.AbstractContextManager:
    """The mesh of a config in force; of one device, and one process, there is none.

    Args:
        spare: devices behind those of the mesh that are left to others; what is left of them is
            idle. With 0 all devices belong to the mesh.

    Raises:
        ValueError: as `make_mesh`.
    """
    if cfg.devices == 1 and jax.process_count() == 1:
        return contextlib.nullcontext()
    devices = jax.devices()[: cfg.devices] if spare else None
    return jax.set_mesh(make_mesh(cfg, devices))


def meshes_apart(cfg: MeshConfig, sampler: SamplerConfig) -> tuple[Mesh, Mesh]:
    """(devices that only sample, those of the mesh `cfg`), both with the axes of the sampler's.

    An array that lies on both by one spec lies in the same pieces: it goes from one to the other
    piece by piece, and no host waits for it.

    Raises:
        ValueError: there are not so many devices, or other processes have some of them.
    """
    count = jax.device_count()
    if cfg.devices + sampler.devices > count:
        raise ValueError(
            f"mesh takes {cfg.devices} devices and sampler {sampler.devices}, {count} are there; "
            "change mesh.fsdp or sampler.data"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"sampler.data={sampler.data}: devices that only sample are there in runs of one "
            f"process, not of {jax.process_count()}; set it to 0"
        )
    cut = sampler.expert * sampler.tensor
    copies = (sampler.data, cfg.devices // cut)
    sizes = (MeshConfig(data=n, expert=sampler.expert, tensor=sampler.tensor) for n in copies)
    # The trainer's in the order of its own mesh: a program cannot have two orders.
    ours = jax.devices()[: cfg.devices]
    if cfg.devices > 1:
        ours = jax.sharding.get_mesh().devices.flat
    theirs = jax.devices()[cfg.devices : cfg.devices + sampler.devices]
    return tuple(_as_it_is(size, list(d)) for size, d in zip(sizes, (theirs, ours), strict=True))


def _as_it_is(cfg: MeshConfig, devices: list[jax.Device]) -> Mesh:
    names, shape = tuple(cfg.sizes()), tuple(cfg.sizes().values())
    kinds = (AxisType.Auto,) * len(names)
    return Mesh(np.array(devices).reshape(shape), names, axis_types=kinds)


def _placed(cfg: MeshConfig, shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    split = dict(allow_split_physical_axes=True)
    across = _across(cfg, len({getattr(d, "slice_index", 0) for d in devices}))
    if not across:
        return mesh_utils.create_device_mesh(shape, devices, **split)
    inside = tuple(n // across.get(name, 1) for name, n in cfg.sizes().items())
    outside = tuple(across.get(name, 1) for name in cfg.sizes())
    return mesh_utils.create_hybrid_device_mesh(inside, outside, devices, **split)


def _across(cfg: MeshConfig, slices: int) -> dict[str, int]:
    """The axis that crosses the slow network, and into how many: {} in one slice.

    Copies of the parameters do, or, where `cfg.slices` is 1, the pieces that `fsdp` cuts them into.
    """
    if slices == 1:
        return {}
    if cfg.slices == slices:
        return {"slices": slices}
    if cfg.slices == 1 and cfg.fsdp % slices == 0:
        return {"fsdp": slices}
    raise ValueError(
        f"mesh.slices={cfg.slices} and mesh.fsdp={cfg.fsdp} do not go with {slices} slices: set "
        f"mesh.slices={slices}, or mesh.slices=1 and mesh.fsdp to a multiple of {slices}"
    )


def _fitting(cfg: MeshConfig, devices: int) -> str:
    others = cfg.devices // cfg.fsdp
    return str(devices // others) if devices % others == 0 else f"a multiple of {others} devices"


def for_training(model: ModelConfig | DenseConfig, devices: int, *, slices: int = 1) -> MeshConfig:
    """Experts over up to `WIDEST` devices, everything else cut over all of a slice.

    A dense model is cut over all of them. More devices than the weights' widths can be cut over
    hold copies.

    Raises:
        ValueError: the devices are no multiple of the slices.
    """
    if devices % slices:
        raise ValueError(f"{devices=} must be divisible by {slices=}; change one of them")
    inside = devices // slices
    experts = model.moe.n_routed_experts if isinstance(model, ModelConfig) else 1
    cut = math.gcd(inside, *cut_widths(model).values())
    expert = math.gcd(experts, cut, WIDEST)
    return MeshConfig(slices=slices, data=inside // cut, fsdp=cut // expert, expert=expert)


def for_long_rows(
    model: ModelConfig | DenseConfig, devices: int, *, rows: int, length: int
) -> MeshConfig:
    """`for_training` where there are more devices than rows: the rest cut the rows' positions.

    Args:
        model: the architecture.
        devices: of one slice.
        rows: of a micro-batch.
        length: positions of a row.

    Raises:
        ValueError: rows and positions cannot be cut over so many devices.
    """
    across = math.gcd(rows, devices)
    context = devices // across
    if length % context:
        raise ValueError(
            f"{length=} must be divisible by the {context} devices that {rows=} leave over"
        )
    inner = for_training(model, across)
    return MeshConfig(data=inner.data, fsdp=inner.fsdp, expert=inner.expert, context=context)


def for_decoding(model: ModelConfig | DenseConfig, devices: int) -> MeshConfig:
    """Weights stay where they are used: experts dealt out as far as they go, copies beyond.

    What is no expert is cut over the same devices, and gathered.
    """
    experts = model.moe.n_routed_experts if isinstance(model, ModelConfig) else 1
    heads = model.mla.num_heads if isinstance(model, ModelConfig) else model.num_kv_heads
    if experts > 1:
        expert = math.gcd(experts, devices)
        return MeshConfig(data=devices // expert, expert=expert)
    tensor = math.gcd(heads, devices)
    return MeshConfig(data=devices // tensor, tensor=tensor)
