# SPDX-License-Identifier: Apache-2.0
"""Paged latent attention on Hopper: `wgmma` on pages that a third warpgroup fetches by number.

A block works on 64 query rows (heads of a row's tokens) and one stretch of its keys, 64 a step. Two
warpgroups share a step: each scores half of the keys, both tell each other the largest score, write
their weights to shared memory, and each sums its half of C over all keys; 64 × 512 sums in float32
are too many registers for one. So no product is computed twice, and a page is fetched once for
scores and sums alike. A last page that is not full comes from a copy with zeros behind the end.

Lowered for CUDA and simulated on CPU in the tests; not yet run on a GPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.dispatch import Backend, Unsupported
from pallas_kernels.mla_decode.ref import LOWEST, PagedLatents, Query

ROWS, KEYS, STAGES = 64, 64, 2
HALF = KEYS // 2
WIDEST = 256  # columns of float32 sums that a warpgroup's registers hold
MULTIPROCESSORS = 132


class Plan(NamedTuple):
    """What is static in a call.

    Attributes:
        steps_a_page: steps of KEYS in a page.
        splits: stretches of a row's keys.
        heads: rows of a query token.
        queries: T.
        scale: of the softmax.
        simulated: on CPU.
    """

    steps_a_page: int
    splits: int
    heads: int
    queries: int
    scale: float
    simulated: bool


def decode(
    query: Query,
    cache: PagedLatents,
    *,
    scale: float,
    splits: int | None,
    keys: int | None,
    backend: Backend,
) -> tuple[jax.Array, jax.Array]:
    """As `ref.decode`; as many stretches as give every multiprocessor two blocks."""
    del keys  # a step has KEYS
    _check(query, cache)
    b, t, h, c = query.latent_BTHC.shape
    page, rope = cache.rope_NSR.shape[1:]
    rows = t * h
    tiles = pl.cdiv(rows, ROWS)
    most = max(query.table_BP.shape[1] * page // KEYS // 4, 1)
    splits = splits or min(most, max(1, 2 * MULTIPROCESSORS // (b * tiles)))
    plan = Plan(page // KEYS, splits, h, t, scale, backend.interpret)
    filled = lambda x: jnp.pad(  # noqa: E731
        x.reshape(b, rows, -1), ((0, 0), (0, tiles * ROWS - rows), (0, 0))
    )
    dtype = query.latent_BTHC.dtype
    # 64 bytes, for weights are HALF wide and both sides of a product must be swizzled alike.
    tiled = plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(2 * HALF)
    smem = lambda *shape: plgpu.SMEM(shape, dtype, transforms=tiled)  # noqa: E731
    out, lse = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(
            jax.ShapeDtypeStruct((splits, b, tiles * ROWS, c), dtype),
            jax.ShapeDtypeStruct((splits, b, tiles * ROWS), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=smem(2, ROWS, c // 2),
            q_rope_smem=smem(ROWS, rope),
            latent_smem=smem(STAGES, 2, 2, HALF, c // 2),
            rope_smem=smem(STAGES, 2, HALF, rope),
            weight_smem=smem(2, ROWS, HALF),
            told_smem=plgpu.SMEM((2, ROWS), jnp.float32),
            q_come=plgpu.Barrier(num_arrivals=3),  # as many as copies
            come=plgpu.Barrier(num_arrivals=6, num_barriers=STAGES),
            used=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            told=plgpu.Barrier(num_arrivals=2),
            weighed=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(b, splits, tiles),
        grid_names=("row", "split", "tile"),
        num_threads=3,
        thread_name="wg",
        # Rows of `wgmma` results are reduced in registers: the default would not leave room.
        compiler_params=_compat.gpu_compiler_params(reduction_scratch_bytes=512),
        **({"interpret": _compat.gpu_interpret_params()} if backend.interpret else {}),
    )(
        query.lengths_B,
        query.table_BP,
        filled(query.latent_BTHC),
        filled(query.rope_BTHR),
        *cache[:2],
        *_last_keys(query, cache),
    )
    joined = lambda x: x[:, :, :rows].reshape(splits, b, t, h, *x.shape[3:])  # noqa: E731
    return joined(out), joined(lse)


def _check(query: Query, cache: PagedLatents) -> None:
    c, r = (x.shape[-1] for x in cache[:2])
    page = cache.latent_NSC.shape[1]
    dtypes = {x.dtype.name for x in (query.latent_BTHC, *cache[:2])}
    if dtypes != {"bfloat16"}:
        raise Unsupported(
            f"mla_decode on GPU multiplies bfloat16 queries and pages, got {sorted(dtypes)}; "
            "`wgmma` reads E4M3 on both sides or on neither; use 'xla'"
        )
    if c % 128 or c > 2 * WIDEST or r not in (64, 128) or page % KEYS:
        raise Unsupported(
            f"mla_decode on GPU needs C a multiple of 128 up to {2 * WIDEST}, R 64 or 128, pages "
            f"of a multiple of {KEYS} tokens; got pages {list(cache.latent_NSC.shape)} and "
            f"{list(cache.rope_NSR.shape)}; use 'xla'"
        )


def _last_keys(query: Query, cache: PagedLatents) -> tuple[jax.Array, jax.Array]:
    """[B, KEYS, C] and [B, KEYS, R]: the step of each row's last key, zeros behind its end."""
    first_B = jnp.maximum(query.lengths_B - 1, 0) // KEYS * KEYS
    at_BS = first_B[:, None] + jnp.arange(KEYS)
    page = cache.latent_NSC.shape[1]
    pages_BS = jnp.take_along_axis(query.table_BP, at_BS // page, axis=1)
    held_BS1 = (at_BS < query.lengths_B[:, None])[..., None]
    return tuple(jnp.where(held_BS1, x[pages_BS, at_BS % page], 0) for x in cache[:2])


def _kernel(lengths_gmem, table_gmem, *refs, plan: Plan, come, used, **scratch):
    *inputs, out_gmem, lse_gmem = refs
    row, split, tile = (jax.lax.axis_index(x) for x in ("row", "split", "tile"))
    warpgroup = jax.lax.axis_index("wg")
    length = lengths_gmem[row]
    steps = jax.lax.div(length + (KEYS - 1), jnp.int32(KEYS))
    each = jax.lax.div(steps + (plan.splits - 1), jnp.int32(plan.splits))
    first = split * each
    count = jnp.maximum(jnp.minimum(steps - first, each), 0)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _fetch(inputs, table_gmem, (row, tile), (first, count, steps), plan, come, used, **scratch)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")
        mean, peak, total = _attend(
            warpgroup, (first, count), (tile, length), plan, come, used, **scratch
        )
        here = (split, row, pl.ds(tile * ROWS, ROWS))
        _store(warpgroup, (mean, peak, total), out_gmem, lse_gmem, here, **scratch)


def _fetch(inputs, table_gmem, where, steps, plan, come, used, *, q_come, **scratch):
    """Queries once, then a step's keys into the buffer that both warpgroups are done with."""
    q_gmem, q_rope_gmem, latent_gmem, rope_gmem, last_gmem, last_rope_gmem = inputs
    latent_smem, rope_smem = scratch["latent_smem"], scratch["rope_smem"]
    (row, tile), (first, count, all_steps) = where, steps
    width = latent_smem.shape[-1]
    rows = pl.ds(tile * ROWS, ROWS)

    def copy(source, target, barrier):
        plgpu.copy_gmem_to_smem(source, target, barrier)

    for i in range(2):
        copy(q_gmem.at[row, rows, pl.ds(i * width, width)], scratch["q_smem"].at[i], q_come)
    copy(q_rope_gmem.at[row, rows], scratch["q_rope_smem"], q_come)

    @pl.loop(0, count)
    def _(i):
        slot = jax.lax.rem(i, jnp.int32(STAGES))

        @pl.when(i >= STAGES)
        def _():
            plgpu.barrier_wait(used.at[slot])

        def load(latent_SC, rope_SR, begin):
            for half in range(2):
                keys = pl.ds(begin + half * HALF, HALF)
                for part in range(2):
                    columns = pl.ds(part * width, width)
                    copy(
                        latent_SC.at[keys, columns],
                        latent_smem.at[slot, half, part],
                        come.at[slot],
                    )
                copy(rope_SR.at[keys], rope_smem.at[slot, half], come.at[slot])

        last = first + i == all_steps - 1

        @pl.when(last)
        def _():
            load(last_gmem.at[row], last_rope_gmem.at[row], 0)

        @pl.when(jnp.logical_not(last))
        def _():
            page = table_gmem[row, jax.lax.div(first + i, jnp.int32(plan.steps_a_page))]
            step = jax.lax.rem(first + i, jnp.int32(plan.steps_a_page))
            load(latent_gmem.at[page], rope_gmem.at[page], step * KEYS)


def _attend(warpgroup, steps, limits, plan, come, used, **scratch):
    """(mean [ROWS, C / 2], peak [ROWS], this warpgroup's total [ROWS]), float32 in registers."""
    (first, count), (tile, length) = steps, limits
    latent_smem, rope_smem = scratch["latent_smem"], scratch["rope_smem"]
    q_smem, q_rope_smem = scratch["q_smem"], scratch["q_rope_smem"]
    weight_smem, told_smem = scratch["weight_smem"], scratch["told_smem"]
    per_row = plgpu.Layout.WGMMA.reduce(1)
    spread = lambda x, width: jax.lax.broadcast_in_dim(x, (ROWS, width), (0,))  # noqa: E731
    blank = lambda shape, value, layout: plgpu.layout_cast(  # noqa: E731
        jnp.full(shape, value, jnp.float32), layout
    )
    width = latent_smem.shape[-1]

    def meet(barrier):
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def step(i, carry):
        mean, peak, total = carry
        slot = jax.lax.rem(i, jnp.int32(STAGES))
        plgpu.barrier_wait(come.at[slot])

        def scores(acc_ref):
            for part in range(2):
                keys = latent_smem.at[slot, warpgroup, part]
                plgpu.wgmma(acc_ref, q_smem.at[part], _compat.transposed(keys))
            plgpu.wgmma(acc_ref, q_rope_smem, _compat.transposed(rope_smem.at[slot, warpgroup]))
            return acc_ref[...]

        logits = pl.run_scoped(scores, plgpu.ACC((ROWS, HALF), jnp.float32)) * plan.scale
        iota = functools.partial(
            plgpu.broadcasted_iota, jnp.int32, (ROWS, HALF), layout=plgpu.Layout.WGMMA
        )
        key = (first + i) * KEYS + warpgroup * HALF + iota(1)
        token = jax.lax.div(tile * ROWS + iota(0), jnp.int32(plan.heads))
        logits = jnp.where(key < length - plan.queries + 1 + token, logits, -jnp.inf)
        told_smem[warpgroup] = logits.max(axis=1)
        plgpu.commit_smem()
        meet(scratch["told"])
        both = [_compat.load(told_smem.at[j], per_row) for j in range(2)]
        higher = jnp.maximum(peak, jnp.maximum(*both))
        weight = jnp.exp(logits - spread(higher, HALF))
        shrink = jnp.exp(peak - higher)
        weight_smem[warpgroup] = weight.astype(weight_smem.dtype)
        plgpu.commit_smem()
        meet(scratch["weighed"])

        def sums(acc_ref):
            for half in range(2):
                plgpu.wgmma(acc_ref, weight_smem.at[half], latent_smem.at[slot, half, warpgroup])

        mean = _summed(mean * spread(shrink, width), sums, simulated=plan.simulated)
        plgpu.barrier_arrive(used.at[slot])
        return mean, higher, total * shrink + weight.sum(axis=1)

    plgpu.barrier_wait(scratch["q_come"])
    start = (
        blank((ROWS, width), 0.0, plgpu.Layout.WGMMA),
        blank((ROWS,), LOWEST, per_row),
        blank((ROWS,), 0.0, per_row),
    )
    return jax.lax.fori_loop(0, count, step, start)


def _summed(start, sums, *, simulated: bool) -> jax.Array:
    """`start` plus products, added where it lies; the simulation on CPU adds apart."""
    if not simulated:
        return pl.run_state(sums)(plgpu.ACC.init(start))

    def alone(acc_ref):
        sums(acc_ref)
        return acc_ref[...]

    return start + pl.run_scoped(alone, plgpu.ACC(start.shape, jnp.float32))


def _store(warpgroup, found, out_gmem, lse_gmem, here, **scratch):
    """Both totals added; this warpgroup's half of C through the queries' memory."""
    mean, peak, total = found
    q_smem, told_smem = scratch["q_smem"], scratch["told_smem"]
    split, row, rows = here
    per_row = plgpu.Layout.WGMMA.reduce(1)
    width = q_smem.shape[-1]
    told_smem[warpgroup] = total
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch["told"])  # and both are done with the queries
    plgpu.barrier_wait(scratch["told"])
    total = _compat.load(told_smem.at[0], per_row) + _compat.load(told_smem.at[1], per_row)
    plgpu.barrier_arrive(scratch["weighed"])  # both have read before one writes again
    plgpu.barrier_wait(scratch["weighed"])
    divisor = jax.lax.broadcast_in_dim(jnp.where(total > 0, total, 1.0), mean.shape, (0,))
    q_smem[warpgroup] = (mean / divisor).astype(q_smem.dtype)

    @pl.when(warpgroup == 0)
    def _():
        told_smem[0] = peak + jnp.log(total)

    plgpu.commit_smem()
    columns = pl.ds(warpgroup * width, width)
    plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], out_gmem.at[split, row, rows, columns])

    @pl.when(warpgroup == 0)
    def _():
        plgpu.copy_smem_to_gmem(told_smem.at[0], lse_gmem.at[split, row, rows])

    plgpu.wait_smem_to_gmem(0)
