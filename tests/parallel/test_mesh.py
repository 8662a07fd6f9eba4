# SPDX-License-Identifier: Apache-2.0
"""Meshes: sizes, presets, and what is refused."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from r1jax.config import MeshConfig, ModelConfig
from r1jax.parallel.mesh import for_decoding, for_long_rows, for_training, make_mesh
from tests.nn import tiny


def test_a_mesh_has_the_devices_and_the_axes_of_its_config():
    mesh = make_mesh(MeshConfig(expert=4, context=2))
    assert dict(mesh.shape) == dict(slices=1, data=1, fsdp=1, expert=4, tensor=1, context=2)
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_that_does_not_multiply_says_what_would():
    with pytest.raises(ValueError, match=r"expert=2 × tensor=2 takes 4 .* 8 are there.* to 2"):
        make_mesh(MeshConfig(expert=2, tensor=2))
    with pytest.raises(ValueError, match="to a multiple of 3 devices"):
        make_mesh(MeshConfig(tensor=3))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(expert=3), "model.moe.n_routed_experts=256 .* mesh.expert=3"),
        (MeshConfig(tensor=3), "model.vocab_size=129280 .* mesh.tensor=3"),
        (MeshConfig(tensor=256), "model.mla.num_heads=128 .* mesh.tensor=256"),
        (MeshConfig(fsdp=5), "model.hidden_size=7168 .*fsdp × expert × context=5"),
        (MeshConfig(fsdp=128), "rows of a micro-batch=64 .*=128"),
        (MeshConfig(context=128), "length=64 .* mesh.context=128"),
    ],
)
def test_what_cannot_be_cut_evenly_is_refused(mesh, message):
    MeshConfig(expert=8, tensor=2, fsdp=4, context=2).check(ModelConfig(), rows=64, length=64)
    with pytest.raises(ValueError, match=message):
        mesh.check(ModelConfig(), rows=64, length=64)


def test_a_student_is_cut_by_its_key_heads():
    cfg = tiny.dense_config(qwen2=True, vocab_size=16)
    MeshConfig(tensor=2).check(cfg, rows=1, length=1)
    with pytest.raises(ValueError, match="model.num_kv_heads=2 .* mesh.tensor=4"):
        MeshConfig(tensor=4).check(cfg, rows=1, length=1)


def test_sizes_are_positive():
    with pytest.raises(ValueError, match="MeshConfig.expert must be positive, got 0"):
        MeshConfig(expert=0)


def test_presets():
    cfg = ModelConfig()
    assert for_training(cfg, 512) == MeshConfig(fsdp=8, expert=64)
    assert for_training(cfg, 512, slices=2) == MeshConfig(slices=2, fsdp=4, expert=64)
    assert for_training(cfg, 4096) == MeshConfig(data=8, fsdp=8, expert=64)
    assert for_training(cfg, 1) == MeshConfig()
    assert for_training(tiny.dense_config(qwen2=True), 8) == MeshConfig(fsdp=8)
    long = for_long_rows(cfg, 512, rows=64, length=32_768)
    assert long == MeshConfig(expert=64, context=8)
    assert for_decoding(cfg, 512) == MeshConfig(data=2, expert=256)
    for mesh in (for_training(cfg, 512), for_training(cfg, 4096), long):
        mesh.check(cfg, rows=mesh.batch_shards, length=32_768)
    with pytest.raises(ValueError, match="slices=3"):
        for_training(cfg, 512, slices=3)
    with pytest.raises(ValueError, match="length=4095"):
        for_long_rows(cfg, 512, rows=64, length=4095)


@dataclass(frozen=True)
class Chip:
    """What is asked of a TPU's device."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self):
        """In a row."""
        return (self.id % 4, 0, 0)


@pytest.mark.parametrize(
    ("cfg", "crosses"),
    [
        (MeshConfig(slices=2, fsdp=2, expert=2), "slices"),
        (MeshConfig(fsdp=4, expert=2), "fsdp"),
        (MeshConfig(data=2, fsdp=2, expert=2), "fsdp"),
    ],
)
def test_the_slow_network_lies_between_copies_or_pieces(cfg, crosses):
    """Only along that axis do devices of two slices meet, and along it in two runs."""
    chips = [Chip(n, n // 4) for n in range(8)]
    mesh = make_mesh(cfg, chips)
    slice_of = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    for axis, name in enumerate(mesh.axis_names):
        changes = np.abs(np.diff(slice_of, axis=axis)).sum(axis)
        assert (changes == (name == crosses)).all(), name


def test_a_mesh_that_slices_do_not_divide():
    with pytest.raises(ValueError, match="mesh.slices=1 and mesh.fsdp=1 do not go with 2 slices"):
        make_mesh(MeshConfig(expert=8), [Chip(n, n // 4) for n in range(8)])
