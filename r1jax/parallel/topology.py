# SPDX-License-Identifier: Apache-2.0
"""TPU pods by the names that people say: `v5p-1024`, `2xv6e-256`, `v5e:4x8`; and what a chip can.

The TPU compiler needs only a name to compile for a pod; no chip is touched.
"""

import difflib
import functools
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

_NAME = re.compile(r"^(?:(\d+) ?x ?)?([a-z]+\d+[a-z]*)(?:-(\d+)|:(\d+(?:x\d+){1,2}))$")
_GIB = 2**30
# What libtpu asks a cloud machine for; answers for one that is none.
_OFF_CLOUD = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no chip from anyone
}


class Chip(NamedTuple):
    """What one device of a pod can do, a device being what JAX shows as one.

    A device is a whole chip, but on tpu7x half of one.

    Attributes:
        hbm: bytes that a program may use: what the compiler itself says it has.
        bf16: FLOP/s of bfloat16 products.
        fp8: FLOP/s of FP8 products; that of bfloat16 where there are no faster units.
        memory: bytes/s of the main memory.
        link: bytes/s that leave over one link of the interconnect; a device has two a dimension.
        network: bytes/s that leave over the data centre's network.
        dimensions: of the torus.
        per_chip: devices of a chip.
        counts: what the number in a pod's name counts: chips, or TensorCores, two a chip.
        largest: chips of the largest pod.
        variant: how libtpu is to set the chip up.
    """

    hbm: float
    bf16: float
    fp8: float
    memory: float
    link: float
    network: float
    dimensions: int
    per_chip: int = 1
    counts: str = "chips"
    largest: int = 256
    variant: str = "default"

    @property
    def interconnect(self) -> float:
        """Bytes/s that leave over all links, both directions of all dimensions."""
        return 2 * self.dimensions * self.link


# Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x (peaks, HBM, ICI and DCN of a
# chip; "bidirectional ICI" counts both ways, so a link sends a 2 · 2 · dimensions-th of it);
# jax-ml.github.io/scaling-book, "TPU specs" (the same for each link, and the network of v4);
# usable HBM: what libtpu 0.0.52 says when a program does not fit.
CHIPS = {
    # 275 TFLOP/s, 32 GiB, 1,200 GB/s; six links of 45 GB/s
    "v4": Chip(31.75 * _GIB, 275e12, 275e12, 1.228e12, 45e9, 6.25e9, 3, 1, "cores", 4096,
               "megacore_dense"),
    # 197 TFLOP/s, 16 GiB, 819 GB/s; 400 GB/s ICI both ways over 4 links; 6.4 Tbit/s for 256 chips
    "v5e": Chip(15.75 * _GIB, 197e12, 197e12, 0.819e12, 50e9, 3.125e9, 2),
    # 459 TFLOP/s, 95 GiB, 2,765 GB/s; 1,200 GB/s ICI both ways over 6 links; 50 Gbit/s
    "v5p": Chip(95.73 * _GIB, 459e12, 459e12, 2.765e12, 100e9, 6.25e9, 3, 1, "cores", 8960),
    # 918 TFLOP/s (FP8 as bf16), 32 GiB, 1,638 GB/s; 800 GB/s ICI both ways, 4 links; 100 Gbit/s
    "v6e": Chip(31.24 * _GIB, 918e12, 918e12, 1.638e12, 100e9, 12.5e9, 2),
    # A chip: 2,307 TFLOP/s, 4,614 in FP8, 192 GiB, 7,380 GB/s, 1,200 GB/s ICI both ways over 6
    # links, 100 Gbit/s. A device is half of it.
    "tpu7x": Chip(94.74 * _GIB, 1153.5e12, 2307e12, 3.69e12, 50e9, 6.25e9, 3, 2, "cores", 9216),
}  # fmt: skip


class Topology(NamedTuple):
    """A pod, or several slices of one joined by the data centre's network.

    Attributes:
        name: as it was asked for.
        kind: key of `CHIPS`, or another name where `chip` was measured.
        chip: what a device of it can do.
        shape: chips along each dimension of the torus of a slice.
        slices: how many there are.
    """

    name: str
    kind: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        """What JAX shows of all slices."""
        return math.prod(self.shape) * self.chip.per_chip * self.slices

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices


def parse(name: str) -> Topology:
    """The pod of a name.

    `v5p-1024`, `v4-1024` and `tpu7x-256` count TensorCores, two a chip, `v5e-256` and `v6e-256`
    chips, as Google's accelerator types do; `v5p:8x8x8` gives the torus itself; `2xv6e-256` is two
    slices.

    Raises:
        ValueError: there is no such pod; near ones are named.
    """
    found = _NAME.match(name.strip().lower())
    kind = found.group(2) if found else name.partition("-")[0].partition(":")[0]
    if not found or kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near and near[0] != kind else ""
        raise ValueError(
            f"no topology {name!r}{hint}; known chips: {', '.join(CHIPS)}; write v5p-1024, "
            "v6e-256, 2xv6e-256 or v5p:8x8x8"
        )
    chip, slices = CHIPS[kind], int(found.group(1) or 1)
    if slices < 1:
        raise ValueError(f"no topology {name!r}: it has no slice")
    if found.group(4):
        shape = _checked(name, kind, tuple(map(int, found.group(4).split("x"))))
    else:
        shape = _shape(name, kind, int(found.group(3)))
    return Topology(name, kind, chip, shape, slices)


def sizes(kind: str) -> list[int]:
    """Numbers that a name of this chip may end in, in order: 8, 16, 32, … for v5p."""
    chip = CHIPS[kind]
    scale = 2 if chip.counts == "cores" else 1
    if chip.dimensions == 2:
        return [scale * n for n in (1, 4, 8, 16, 32, 64, 128, 256)]
    cubes = [64 * n for n in range(1, chip.largest // 64 + 1)]
    return [scale * n for n in (1, 4, 8, 16, 32, *cubes)]


def need_compiler() -> None:
    """ValueError if libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(
            "the TPU compiler is missing: pip install libtpu (it runs on any Linux machine and "
            "needs no TPU)"
        )


def devices(topology: Topology) -> list[Any]:
    """Compile-only devices of the pod, in the order in which a program numbers them.

    Raises:
        ValueError: libtpu is missing, or refuses the topology; what it says is passed on.
    """
    need_compiler()
    for key, value in _OFF_CLOUD.items():
        os.environ.setdefault(key, value)
    return list(_description(topology).devices)


@functools.cache
def _description(topology: Topology) -> Any:
    from jax.experimental import topologies  # touches libtpu

    per_host = (1,) * 3 if math.prod(topology.shape) == 1 else (2, 2, 1)
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.variant != "default":
        more["chip_config_name"] = topology.chip.variant
    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{topology.kind}:{'x'.join(map(str, topology.shape))}",
            chips_per_host_bounds=per_host,
            wrap=_wrapped(topology),
            **more,
        )
    except Exception as error:  # of whatever type the plugin raises
        said = " ".join(str(error).split())
        raise ValueError(f"the TPU compiler refuses {topology.name}: {said}") from error


def _wrapped(topology: Topology) -> tuple[bool, bool, bool]:
    """Dimensions whose ends are joined: those of whole cubes in 3D, of 16 chips in 2D."""
    shape = topology.shape
    if topology.chip.dimensions == 2:
        return (shape[0] == 16, shape[1] == 16, False)
    cubes = all(n % 4 == 0 for n in shape)
    return (cubes,) * 3


def _shape(name: str, kind: str, number: int) -> tuple[int, ...]:
    known = sizes(kind)
    if number not in known:
        near = sorted(known, key=lambda n: abs(n - number))[:3]
        chip = CHIPS[kind]
        raise ValueError(
            f"no topology {name!r}: {number} is no size of a {kind} pod (it counts "
            f"{'TensorCores, two a chip' if chip.counts == 'cores' else 'chips'}); near: "
            f"{', '.join(f'{kind}-{n}' for n in sorted(near))}"
        )
    chips = number // (2 if CHIPS[kind].counts == "cores" else 1)
    if CHIPS[kind].dimensions == 2:
        low = 2 ** (chips.bit_length() // 2 - (chips.bit_length() % 2 == 0))
        return (low, chips // low)
    small = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
    return small.get(chips) or tuple(4 * n for n in _balanced(chips // 64))


def _balanced(n: int) -> tuple[int, int, int]:
    """Three factors of n in rising order, as equal as they can be."""
    found = [
        (a, b, n // (a * b))
        for a in range(1, n + 1)
        if a**3 <= n and n % a == 0
        for b in range(a, n // a + 1)
        if a * b * b <= n and n % (a * b) == 0
    ]
    return min(found, key=sum)


def _checked(name: str, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    chip = CHIPS[kind]
    if len(shape) != chip.dimensions:
        wanted = "x".join("8" * chip.dimensions)
        raise ValueError(
            f"no topology {name!r}: a {kind} pod has {chip.dimensions} dimensions, as in "
            f"{kind}:{wanted}"
        )
    chips = math.prod(shape)
    if not 1 <= chips <= chip.largest:
        raise ValueError(
            f"no topology {name!r}: {chips} chips, a {kind} pod has 1 to {chip.largest}"
        )
    if chips > 1 and any(n % 2 for n in shape[:2]):
        raise ValueError(f"no topology {name!r}: a host holds 2x2 chips; make the first two even")
    return shape
