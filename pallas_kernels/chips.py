# SPDX-License-Identifier: Apache-2.0
"""What a chip can do: the numbers that choose tiles, limit memory and bound a kernel's time."""

from dataclasses import dataclass

import jax

MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """One JAX device. Vendors' dense peaks; a TPU7x chip is two devices.

    Attributes:
        name: as in `tuned/<name>.json`.
        on_chip: bytes of VMEM that one kernel may address (TPU), or shared memory of a block (GPU).
        hbm: bytes/s of main memory.
        bf16: FLOP/s of a bfloat16 matmul with float32 accumulation.
        fp8: FLOP/s of an E4M3 matmul, where the matrix unit takes E4M3; 0 where it does not and a
            kernel converts to bfloat16 beside it.
    """

    name: str
    on_chip: int
    hbm: float
    bf16: float
    fp8: float

    def peak(self, dtype_bits: int) -> float:
        """FLOP/s of a matmul whose narrower operand has this many bits."""
        return self.fp8 if dtype_bits <= 8 and self.fp8 else self.bf16


# Only TPU7x multiplies E4M3 faster than bfloat16; v5e and v5p have no unit for it at all.
V5E = Chip("v5e", 128 * MIB, 0.82e12, 197e12, 0)
V5P = Chip("v5p", 64 * MIB, 2.77e12, 459e12, 0)
V6E = Chip("v6e", 128 * MIB, 1.64e12, 918e12, 0)
TPU7X = Chip("tpu7x", 64 * MIB, 3.7e12, 1153e12, 2307e12)
H100 = Chip("h100", 227 * 1024, 3.35e12, 989e12, 1979e12)
H200 = Chip("h200", 227 * 1024, 4.8e12, 989e12, 1979e12)
# No vendor's peak: two laptop cores, so that the bench has a bound to print.
CPU = Chip("cpu", 32 * MIB, 2e10, 2e11, 0)

CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E, TPU7X, H100, H200, CPU)}
# Substrings of `device_kind`, the more special first.
_KINDS = (
    ("v5 lite", V5E),
    ("v5e", V5E),
    ("v6 lite", V6E),
    ("v6e", V6E),
    ("TPU7", TPU7X),
    ("v7x", TPU7X),
    ("TPU v5", V5P),
    ("H200", H200),
    ("H100", H100),
    ("H800", H100),
    ("cpu", CPU),
)


def named(device_kind: str) -> Chip | None:
    """The chip of JAX's `device.device_kind`, or of a name in CHIPS; None: not one we know."""
    if device_kind in CHIPS:
        return CHIPS[device_kind]
    return next((chip for part, chip in _KINDS if part in device_kind), None)


def present() -> tuple[str, str]:
    """(platform, device_kind) of the mesh in force, whose chips need not be there, or of the device
    that JAX computes on by default."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.platform, mesh.abstract_device.device_kind
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return device.platform, device.device_kind
