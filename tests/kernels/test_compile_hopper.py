# SPDX-License-Identifier: Apache-2.0
"""Every Hopper kernel through the real compiler, XLA's and `ptxas`, at DeepSeek-V3's shapes.

Needs no GPU: JAX's CUDA plugin of its own version and CUDA's compiler, `pip install
jax-cuda13-pjrt==V jax-cuda13-plugin==V nvidia-cuda-nvcc nvidia-nvvm`. `-s` shows registers and
spills of each kernel: what is spilled to main memory costs more than it saves.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from pallas_kernels import Backend, shapes
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_dgrad, fp8_grouped_wgrad
from pallas_kernels.fp8_matmul import fp8_dgrad, fp8_wgrad
from pallas_kernels.fp8_quantize import quantize_blocks, quantize_tiles
from pallas_kernels.mla_decode import PagedLatents, mla_decode
from pallas_kernels.scaled import E4M3, Scaled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "nvidia"))),
        reason="JAX's CUDA plugin and CUDA's compiler are not installed",
    ),
]
HOPPER = Backend("gpu", "h100")
BF16, F32 = jnp.bfloat16, jnp.float32
# An H100 SXM as XLA describes it.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84978434048  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def lies():
    """On the chip that is not here."""
    jax.devices()  # finds the plugin
    how = dict(topology="1x1x1", target_config=TARGET)
    try:
        found = topologies.get_topology_desc(platform="cuda", topology_name="", **how)
    except (NotImplementedError, RuntimeError) as reason:  # of another version, or half of it
        pytest.skip(f"JAX's CUDA plugin does not start: {reason}")
    return jax.sharding.SingleDeviceSharding(found.devices[0])


def of(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=lies())


def tiles(*shape):
    return Scaled(of(shape, E4M3), of((*shape[:-1], shape[-1] // 128), F32))


def blocks(*shape):
    *lead, k, n = shape
    return Scaled(of(shape, E4M3), of((*lead, k // 128, n // 128), F32))


def check(call, arguments, capfd, *, kernels=1):
    """As many kernels are compiled, and none spills."""
    lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))
    capfd.readouterr()
    lowered.compile()
    told = "".join(capfd.readouterr())
    found = re.findall(
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\s.*?Used (\d+) reg", told, re.S
    )
    with capfd.disabled():
        print(f"\n{[f'{r} registers, {s} + {l} bytes spilled' for s, l, r in found]}")  # noqa: T201
    assert len(found) == kernels, told
    assert all(stores == loads == "0" for stores, loads, _ in found)


@pytest.fixture(autouse=True)
def reported(monkeypatch):
    """What was compiled before is not read: that would tell nothing."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", kept)


@pytest.mark.parametrize("name", ["v3-4k", "v3-4k-verify"])
def test_mla_decode(name, capfd):
    b, t, h, length, c, r = shapes.MLA_DECODE[name]
    pages = b * length // 64
    cache = PagedLatents(of((pages, 64, c), BF16), of((pages, 64, r), BF16))
    queries = of((b, t, h, c), BF16), of((b, t, h, r), BF16)
    table = of((b, length // 64), jnp.int32), of((b,), jnp.int32)
    call = functools.partial(mla_decode, scale=0.07, implementation=HOPPER)
    check(call, (*queries, cache, *table), capfd)


@pytest.mark.parametrize("name", ["v3-dense-up", "v3-q-up", "square-8192"])
def test_products(name, capfd):
    m, k, n = shapes.MATMUL[name]
    dgrad = functools.partial(fp8_dgrad, implementation=HOPPER)
    check(dgrad, (tiles(m, k), blocks(n, k)), capfd)
    wgrad = functools.partial(fp8_wgrad, implementation=HOPPER)
    check(wgrad, (tiles(m, k), tiles(n, k)), capfd)


def test_products_of_groups(capfd):
    m, k, n, e = shapes.GROUPED["v3-up-of-32"]
    sizes = of((e,), jnp.int32)
    dgrad = functools.partial(fp8_grouped_dgrad, tail=True, implementation=HOPPER)
    check(dgrad, (tiles(m, n), blocks(e, k, n), sizes), capfd)
    wgrad = functools.partial(fp8_grouped_wgrad, implementation=HOPPER)
    check(wgrad, (tiles(k, m), tiles(n, m), sizes), capfd)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_quantisation(dtype, capfd):
    both = lambda x: [f(x, implementation=HOPPER) for f in (quantize_tiles, quantize_blocks)]  # noqa: E731
    check(both, (of((4096, 7168), dtype),), capfd, kernels=2)
