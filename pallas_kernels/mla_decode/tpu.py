# SPDX-License-Identifier: Apache-2.0
"""Paged latent attention on TPU: pages are fetched by number while the block before is attended to.

A program is one row and one stretch of its keys; programs run one after another on a core. Keys
come in blocks of several pages, each page its own copy from HBM into one of two buffers. While a
block is attended to, the next one is under way, also across the border of programs: the last block
of a program starts the first one of the next. Pages behind a row's end are not fetched.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic, tuning
from pallas_kernels.dispatch import Backend, Unsupported
from pallas_kernels.mla_decode.ref import LOWEST, PagedLatents, Query

LANES = 128
KEYS = 512  # of a block
MOST_TABLE = 2**19  # bytes; scalar memory has 2^20


class Plan(NamedTuple):
    """What is static in a call.

    Attributes:
        page: tokens of a page.
        pages: pages of a block.
        splits: stretches of a row's keys.
        heads: rows of a query token.
        queries: T.
        scale: of the softmax.
    """

    page: int
    pages: int
    splits: int
    heads: int
    queries: int
    scale: float

    @property
    def block(self) -> int:
        """Keys of a block."""
        return self.page * self.pages


def stretch(length, split, *, block: int, splits: int):
    """(first block, number of blocks ≥ 1) of one stretch of a row; whole blocks, evenly dealt out.

    A stretch behind the end has a block too, of which nothing is seen: then every program has one.
    """
    blocks = _ceil(length, block)
    each = _ceil(blocks, splits)
    first = split * each
    return first, jnp.clip(blocks - first, 1, jnp.maximum(each, 1))


def _ceil(a, b: int):
    """⌈a / b⌉ of what is not negative; `//` looks at signs, for which Mosaic asks the device."""
    return jax.lax.div(a + (b - 1), jnp.int32(b))


def decode(
    query: Query,
    cache: PagedLatents,
    *,
    scale: float,
    splits: int | None,
    keys: int | None,
    backend: Backend,
) -> tuple[jax.Array, jax.Array]:
    """As `ref.decode`; one stretch unless more are asked for: a core gains nothing by them."""
    b, t, h, c = query.latent_BTHC.shape
    n, page = cache.latent_NSC.shape[:2]
    r = cache.rope_NSR.shape[2]
    plan = _plan(query, cache, (scale, splits or 1, keys), backend)
    rows = t * h
    row = lambda width: pl.BlockSpec((1, rows, width), lambda i, k, *_: (i, 0, 0))  # noqa: E731
    part = lambda width: pl.BlockSpec(  # noqa: E731
        (1, 1, rows, width), lambda i, k, *_: (k, i, 0, 0)
    )
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    scales, scale_specs = _scales(query, cache, plan)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=(
            jax.ShapeDtypeStruct((plan.splits, b, rows, c), query.latent_BTHC.dtype),
            jax.ShapeDtypeStruct((plan.splits, b, rows, 1), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, plan.splits),
            in_specs=[row(c), row(r), hbm, hbm, *scale_specs],
            out_specs=(part(c), part(1)),
            scratch_shapes=[
                pltpu.VMEM((2, plan.pages, page, c), cache.latent_NSC.dtype),
                pltpu.VMEM((2, plan.pages, page, r), cache.rope_NSR.dtype),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, c), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        compiler_params=mosaic.params(
            ("arbitrary", "arbitrary"), vmem_bytes(plan, query, cache), backend
        ),
        interpret=backend.interpret,
    )(
        query.lengths_B,
        query.table_BP,
        query.latent_BTHC.reshape(b, rows, c),
        query.rope_BTHR.reshape(b, rows, r),
        cache.latent_NSC,
        cache.rope_NSR,
        *scales,
    )
    return out.reshape(plan.splits, b, t, h, c), lse.reshape(plan.splits, b, t, h)


def _plan(query, cache, wanted, backend) -> Plan:
    scale, splits, keys = wanted
    b, t, h, _ = query.latent_BTHC.shape
    page = cache.latent_NSC.shape[1]
    rows = {"float32": 8, "bfloat16": 16, "float8_e4m3fn": 32}
    least = max(rows[cache.latent_NSC.dtype.name], rows[cache.rope_NSR.dtype.name])
    if page % least:
        raise Unsupported(
            f"mla_decode on TPU needs pages of a multiple of {least} tokens, got latents "
            f"{list(cache.latent_NSC.shape)} {cache.latent_NSC.dtype}; use 'xla'"
        )
    dims = {"heads": h, "queries": t, "page": page, "batch": b}
    keys = keys or tuning.choose("mla_decode", dims, backend, lambda: (KEYS,))[0]
    if (table := 4 * query.table_BP.size) > MOST_TABLE:
        raise Unsupported(
            f"mla_decode on TPU keeps the page table in scalar memory, at most {MOST_TABLE} bytes; "
            f"{list(query.table_BP.shape)} takes {table}; use larger pages, fewer rows, or 'xla'"
        )
    pages = min(max(keys // page, 1), query.table_BP.shape[1])
    return Plan(page, pages, splits, h, t, scale)


def vmem_bytes(plan: Plan, query: Query, cache: PagedLatents) -> int:
    """Two buffers of keys, queries and results; sums; logits and what is made of them."""
    rows, block = plan.heads * plan.queries, plan.block
    wide = lambda n: n + -n % LANES  # noqa: E731
    c, r = (wide(x.shape[-1]) for x in cache[:2])
    keys = 2 * block * (c * cache.latent_NSC.dtype.itemsize + r * cache.rope_NSR.dtype.itemsize)
    ends = 2 * rows * ((2 * c + r) * query.latent_BTHC.dtype.itemsize + 4 * LANES)
    return keys + ends + rows * (4 * c + 8 * LANES) + 4 * 4 * rows * wide(block) + 4 * block * c


def _scales(query: Query, cache: PagedLatents, plan: Plan):
    """Each row's scales in the order of its keys, in whole blocks: a float for every C bytes."""
    if cache.scale_NS is None:
        return (), ()
    b, pages = query.table_BP.shape
    behind = -pages % plan.pages
    scale_BS = jnp.pad(cache.scale_NS[query.table_BP], ((0, 0), (0, behind), (0, 0)))
    blocks = scale_BS.reshape(b, -1, 1, plan.block)
    spec = pl.BlockSpec((1, *blocks.shape[1:]), lambda i, k, *_: (i, 0, 0, 0))
    return (blocks,), (spec,)


def _kernel(lengths_smem, table_smem, *refs, plan: Plan):
    q_ref, q_rope_ref, latent_hbm, rope_hbm, *scale_refs = refs[:-9]
    out_ref, lse_ref, latent_vmem, rope_vmem, peak_vmem, total_vmem, mean_vmem = refs[-9:-2]
    slot_smem, sems = refs[-2:]
    row, split = pl.program_id(0), pl.program_id(1)
    length = lengths_smem[row]
    here = functools.partial(stretch, block=plan.block, splits=plan.splits)
    first, count = here(length, split)
    wraps = split == plan.splits - 1
    next_row, next_split = jnp.where(wraps, row + 1, row), jnp.where(wraps, 0, split + 1)
    there = next_row < pl.num_programs(0)
    next_row = jnp.where(there, next_row, row)
    pairs = (latent_hbm, latent_vmem), (rope_hbm, rope_vmem)
    fetch = functools.partial(_copy, (lengths_smem, table_smem, sems, *pairs), plan)

    @pl.when((row == 0) & (split == 0))
    def _():
        slot_smem[0] = 0
        fetch((row, first), 0, start=True)

    peak_vmem[...] = jnp.full_like(peak_vmem, LOWEST)
    total_vmem[...] = jnp.zeros_like(total_vmem)
    mean_vmem[...] = jnp.zeros_like(mean_vmem)

    def body(i, slot):
        @pl.when(i + 1 < count)
        def _():
            fetch((row, first + i + 1), 1 - slot, start=True)

        @pl.when((i + 1 == count) & there)
        def _():
            next_first, _ = here(lengths_smem[next_row], next_split)
            fetch((next_row, next_first), 1 - slot, start=True)

        fetch((row, first + i), slot, start=False)
        scale_1S = _row_of(scale_refs[0], first + i) if scale_refs else None
        _absorb(
            (q_ref[0], q_rope_ref[0]),
            (latent_vmem[slot], rope_vmem[slot], scale_1S),
            (first + i) * plan.block,
            (peak_vmem, total_vmem, mean_vmem),
            length=length,
            plan=plan,
        )
        return 1 - slot

    slot_smem[0] = jax.lax.fori_loop(0, count, body, slot_smem[0])
    total = total_vmem[...]
    out_ref[0, 0] = (mean_vmem[...] / jnp.where(total > 0, total, 1.0)).astype(out_ref.dtype)
    lse_ref[0, 0] = peak_vmem[...] + jnp.log(total)


def _row_of(scale_ref, block):
    """[1, S] scales of a block; a stretch behind the end may name one that is not there."""
    return scale_ref[0, jnp.minimum(block, scale_ref.shape[1] - 1)]


def _copy(refs, plan: Plan, which, slot, *, start: bool) -> None:
    """Starts, or waits for, the copies of the pages of a row's block that the row reaches."""
    lengths_smem, table_smem, sems, *pairs = refs
    row, block = which
    length = lengths_smem[row]
    for i in range(plan.pages):
        at = block * plan.pages + i

        @pl.when(at * plan.page < length)
        def _(at=at, i=i):
            page = table_smem[row, at]
            for j, (hbm, vmem) in enumerate(pairs):
                copy = pltpu.make_async_copy(hbm.at[page], vmem.at[slot, i], sems.at[slot, j])
                copy.start() if start else copy.wait()


def _absorb(q, keys, begin, running, *, length, plan: Plan) -> None:
    """One block of keys into the running softmax."""
    (q_MC, q_MR), (latent_PSC, rope_PSR, scale_1S) = q, keys
    peak_vmem, total_vmem, mean_vmem = running
    flat = lambda x: x.reshape(plan.block, x.shape[-1])  # noqa: E731
    latent_SC = flat(latent_PSC.astype(q_MC.dtype))
    # Behind the end lies what the buffer held before, or NaN.
    at_S1 = begin + jax.lax.broadcasted_iota(jnp.int32, latent_SC.shape, 0)
    latent_SC = jnp.where(at_S1 < length, latent_SC, jnp.zeros_like(latent_SC))
    logits = _dot(q_MC, latent_SC, 1)
    logits = logits if scale_1S is None else logits * scale_1S
    logits = (logits + _dot(q_MR, flat(rope_PSR.astype(q_MR.dtype)), 1)) * plan.scale
    row_M1 = jax.lax.broadcasted_iota(jnp.int32, (len(logits), 1), 0)
    query = jax.lax.div(row_M1, jnp.int32(plan.heads))
    at = begin + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(at < length - plan.queries + 1 + query, logits, -jnp.inf)
    peak = jnp.maximum(peak_vmem[...], logits.max(-1, keepdims=True))
    weight = jnp.exp(logits - peak)
    shrink = jnp.exp(peak_vmem[...] - peak)
    peak_vmem[...] = peak
    total_vmem[...] = total_vmem[...] * shrink + weight.sum(-1, keepdims=True)
    if scale_1S is not None:  # a scale behind the end may be anything, too
        weight = jnp.where(weight > 0, weight * scale_1S, 0.0)
    mean_vmem[...] = mean_vmem[...] * shrink + _dot(weight.astype(latent_SC.dtype), latent_SC, 0)


def _dot(a, b, axis: int) -> jax.Array:
    """a [M, K] times b, whose `axis` is K; float32 operands are not rounded to bfloat16."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    )
