# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of paged latent attention: lowered and simulated, for want of the chip."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels import Backend, Unsupported, _compat, shapes
from pallas_kernels.mla_decode import PagedLatents, mla_decode
from tests.kernels.paged import PAGES, ROWS, SCALE, cache_of, check, queries_of, table_of

HOPPER = Backend("gpu", chip="h100")


def hopper(size, h, r=64, c=512, *, dtype="bfloat16", rows=2):
    """The call's abstract arguments."""
    of = jax.ShapeDtypeStruct
    cache = PagedLatents(of((6, size, c), dtype), of((6, size, r), "bfloat16"))
    queries = (of((rows, 2, h, width), "bfloat16") for width in (c, r))
    return *queries, cache, of((rows, 3), "int32"), of((rows,), "int32")


@pytest.mark.parametrize(("size", "heads"), [(128, 128)])
def test_the_hopper_kernel_lowers_for_cuda(size, heads):
    call = jax.jit(functools.partial(mla_decode, scale=SCALE, implementation=HOPPER))
    lowered = call.trace(*hopper(size, heads)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (hopper(48, 4), r"a multiple of 64 tokens.*\[6, 48, 512\]"),
        (hopper(64, 4, c=576), r"C a multiple of 128.*\[6, 64, 576\]"),
        (hopper(64, 4, r=48), r"R = 64.*\[6, 64, 48\]"),
        (hopper(64, 4, dtype="float32"), "bfloat16 queries and pages.*float32"),
        (hopper(64, 4, rows=0), "needs a row"),
    ],
)
def test_what_the_hopper_kernel_cannot_is_unsupported(arguments, message):
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(
            functools.partial(mla_decode, scale=SCALE, implementation=HOPPER), *arguments
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "lengths", "size", "splits"),
    [
        (2, [1, 75], 64, 1),
        (1, [0, 192, 130], 128, 2),
        (8, [64, 256], 128, 3),
        (2, [300, 1, 384], 128, 1),  # up to three pairs of steps: memory is fetched anew
    ],
)
def test_the_hopper_kernel_simulated(queries, lengths, size, splits):
    """Barriers, copies and products on CPU; with 8 queries more heads than one block takes."""
    if _compat.gpu_interpret_params() is None:
        pytest.skip("this JAX simulates no GPU")
    heads = 12 if queries == 8 else 4
    pages = -(-256 // size) if queries == 8 else 3
    table = table_of()[: len(lengths), :pages]
    check(
        queries_of(len(lengths), queries, heads, 128, 64, dtype="bfloat16"),
        cache_of(ROWS * PAGES, size, 128, 64, dtype="bfloat16"),
        table,
        lengths,
        splits=splits,
        backend=Backend("gpu", chip="h100", interpret=True),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["v3-4k", "v3-4k-verify"])
def test_the_hopper_kernel_on_a_gpu(name):
    """V3's heads and widths on eight rows."""
    _, t, h, length, c, r = shapes.MLA_DECODE[name]
    table = np.arange(8 * length // 64).reshape(8, -1)
    lengths = np.linspace(1, length, 8).astype(int)
    made = cache_of(table.size, 64, c, r, dtype="bfloat16")
    queries = queries_of(8, t, h, c, r, dtype="bfloat16")
    check(queries, made, table, lengths, backend=HOPPER)
