# SPDX-License-Identifier: Apache-2.0
"""Every TPU kernel, forward and backward, through the real TPU compiler at DeepSeek-V3's shapes.

Needs `libtpu` (any machine), no TPU. `-s` shows what the compiler reports for each program.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Backend, scaled, shapes
from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.fp8_grouped_matmul import (
    fp8_grouped_dgrad,
    fp8_grouped_fprop,
    fp8_grouped_linear,
    fp8_grouped_wgrad,
)
from pallas_kernels.fp8_matmul import fp8_linear
from pallas_kernels.fp8_quantize import (
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
)
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.scaled import Scaled
from tests.kernels.chip_compiler import TOPOLOGIES, compiled

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("chip", TOPOLOGIES)]
BF16, F32 = jnp.bfloat16, jnp.float32
GROUPED = ["v3-up", "v3-down", "v3-decode-up"]


def report(name, chip, call, arguments, *, kernels):
    got = compiled(call, arguments, chip)
    print(  # noqa: T201  (the report, with -s)
        f"\n{chip} {name}: {got.flops:.3g} FLOP, {got.bytes_accessed:.3g} bytes, "
        f"{got.temporaries / 2**20:.0f} MiB of temporaries, {got.kernels} kernels with VMEM limits "
        f"{sorted(got.vmem_limits)} MiB"
    )
    assert got.kernels == kernels
    assert max(got.vmem_limits, default=0.0) <= Backend("tpu", chip).device.on_chip / 2**20


def sizes(experts):
    return ((experts,), jnp.int32)


def both_ways(layer):
    """(y, dx, dw) of one layer: nothing for the compiler to leave out."""

    def call(x, w, dy, *sizes_E):
        y, pull = jax.vjp(lambda x, w: layer(x, w, *sizes_E), x, w)
        return y, pull(dy)

    return call


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("size", [(4096, 7168), (4096, 18432), (1000, 1536), (8, 7168)])
def test_quantize(chip, size, block):
    backend = Backend("tpu", chip)
    options = dict(block=block, power_of_two=True, implementation=backend)

    def call(x):
        made = [f(x, **options) for f in (quantize_tiles, quantize_transposed, quantize_both)]
        return made if len(x) % block else (*made, quantize_blocks(x, **options))

    kernels = 3 if size[0] % block else 4
    for dtype in (BF16, F32):
        report(f"quantize {size} {block}", chip, call, ((size, dtype),), kernels=kernels)


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("name", ["v3-dense-up", "v3-dense-down", "v3-kv-down", "square-8192"])
def test_linear(chip, name, block):
    m, k, n = shapes.MATMUL[name]
    layer = lambda x, w: fp8_linear(x, w, block=block, implementation=Backend("tpu", chip))  # noqa: E731
    arguments = (((m, k), BF16), ((k, n), F32), ((m, n), BF16))
    report(f"fp8_linear {name} {block}", chip, both_ways(layer), arguments, kernels=6)


@pytest.mark.parametrize(("dtype", "experts"), [(BF16, 256), (F32, 32)])
@pytest.mark.parametrize("name", GROUPED)
def test_grouped(chip, name, dtype, experts):
    m, k, n, _ = shapes.GROUPED[name]

    def layer(x, w, sizes):
        return grouped_matmul(x, w, sizes, tail=True, implementation=Backend("tpu", chip))

    arguments = (((m, k), dtype), ((experts, k, n), dtype), ((m, n), dtype), sizes(experts))
    name = f"grouped_matmul {name} of {experts} {dtype.__name__}"
    report(name, chip, both_ways(layer), arguments, kernels=3)


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("name", GROUPED)
def test_fp8_grouped_products(chip, name, block):
    """All 256 experts on one chip: what fits v5e's 16 GB are the quantised operands."""
    m, k, n, e = shapes.GROUPED[name]
    options = dict(block=block, implementation=Backend("tpu", chip))

    def call(x, dy, w, turned, sizes):
        y = fp8_grouped_fprop(x, w, sizes, tail=True, **options)
        dx = fp8_grouped_dgrad(dy, w, sizes, tail=True, **options)
        return y, dx, fp8_grouped_wgrad(*turned, sizes, dtype=BF16, **options)

    tiles = lambda r, c: Scaled(((r, c), scaled.E4M3), ((r, c // block), F32))  # noqa: E731
    w = Scaled(((e, k, n), scaled.E4M3), ((e, k // block, n // block), F32))
    rows = -(-m // block) * block
    turned = tiles(k, rows), tiles(n, rows)
    arguments = (tiles(m, k), tiles(m, n), w, turned, sizes(e))
    report(f"fp8_grouped {name} of {e} {block}", chip, call, arguments, kernels=3)


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("name", GROUPED)
def test_fp8_grouped_layer(chip, name, block):
    m, k, n, _ = shapes.GROUPED[name]
    experts = 32

    def layer(x, w, sizes):
        backend = Backend("tpu", chip)
        return fp8_grouped_linear(x, w, sizes, block=block, tail=True, implementation=backend)

    arguments = (((m, k), BF16), ((experts, k, n), F32), ((m, n), BF16), sizes(experts))
    name = f"fp8_grouped_linear {name} of {experts} {block}"
    report(name, chip, both_ways(layer), arguments, kernels=6)


@pytest.mark.parametrize(
    ("name", "pieces"), [("v3-4k", 1), ("v3-32k", 1), ("v3-32k", 8), ("qwen-1.5b-4k", 1)]
)
def test_causal_attention(chip, name, pieces):
    b, h, g, s, k, v = shapes.ATTENTION[name]
    j, t = h // g, s // pieces

    def call(qkv, segments, piece, given):
        how = dict(piece=piece[0], scale=k**-0.5, implementation=Backend("tpu", chip))
        out, pull = jax.vjp(lambda *x: causal_attention(*x, *segments, **how), *qkv)
        return out, pull(given)

    qkv = ((b, j, g, t, k), BF16), ((b, j, s, k), BF16), ((b, j, s, v), BF16)
    segments = ((b, t), jnp.int32), ((b, s), jnp.int32)
    arguments = (qkv, segments, ((1,), jnp.int32), ((b, j, g, t, v), BF16))
    report(f"causal_attention {name} / {pieces}", chip, call, arguments, kernels=3)
