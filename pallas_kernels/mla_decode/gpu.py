# SPDX-License-Identifier: Apache-2.0
"""Paged latent attention on Hopper: `wgmma` on pages that a third warpgroup fetches by number.

A block works on 64 query rows (heads of a row's tokens) and one stretch of its keys, two steps of
64 keys at a time. Two warpgroups share a pair of steps: each scores the keys of one, and sums its
half of C over the keys of both; 64 × 512 sums in float32 are too many registers for one. So no
product is computed twice. They take turns rather than meet: the first tells its weights and the
largest score so far, the second puts the sums over the first's keys on the tensor cores before it
takes its own exponentials, and so one multiplies while the other weighs.

Memory holds one pair, in four parts (step × half of C) that are fetched anew as soon as the last
product with them is done; a step's weights lie where its rotated keys were. Two blocks of one row's
heads share what they fetch. A last page that is not full comes from a copy with zeros behind the
end.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, hopper
from pallas_kernels.dispatch import Backend, Unsupported
from pallas_kernels.mla_decode.ref import LOWEST, PagedLatents, Query

ROWS, KEYS, PAIR = 64, 64, 2
ROPE = KEYS  # columns of rotated keys: weights lie in their place
WIDEST = 256  # columns of float32 sums that a warpgroup's registers hold


class Plan(NamedTuple):
    """What is static in a call.

    Attributes:
        steps_a_page: steps of KEYS in a page.
        splits: stretches of a row's keys.
        heads: rows of a query token.
        queries: T.
        scale: of the softmax, whose base is 2.
        cluster: blocks that share pages.
        simulated: on CPU.
    """

    steps_a_page: int
    splits: int
    heads: int
    queries: int
    scale: float
    cluster: int
    simulated: bool


class Scratch(NamedTuple):
    """Shared memory and barriers of a block; warpgroup w scores step w of a pair.

    Attributes:
        q_smem: [2 halves of C, ROWS, C / 2]; results leave through it.
        q_rope_smem: [1, ROWS, ROPE].
        latent_smem: [PAIR, 2 halves of C, KEYS, C / 2].
        rope_smem: [PAIR, KEYS, ROPE]; then the step's weights [ROWS, KEYS].
        peak_smem: [PAIR, ROWS] float32: the largest scores with those of the step.
        total_smem: [2 warpgroups, ROWS] float32.
        q_come: queries are there.
        left_come, right_come: a step's half of C is there, with the second its rotated keys.
        used: [step, half of C] is done with.
        weighed: a step's weights and peak are there.
        met: both warpgroups have come to the end.
    """

    q_smem: Any
    q_rope_smem: Any
    latent_smem: Any
    rope_smem: Any
    peak_smem: Any
    total_smem: Any
    q_come: Any
    left_come: Any
    right_come: Any
    used: Any
    weighed: Any
    met: Any


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
    page = cache.latent_NSC.shape[1]
    rows = t * h
    tiles = pl.cdiv(rows, ROWS)
    most = max(query.table_BP.shape[1] * page // (4 * KEYS), 1)
    splits = splits or min(most, max(1, 2 * hopper.MULTIPROCESSORS // (b * tiles)))
    cluster = 1 if tiles % 2 or backend.interpret else 2
    base_2 = scale / math.log(2)
    plan = Plan(page // KEYS, splits, h, t, base_2, cluster, backend.interpret)
    filled = lambda x: jnp.pad(  # noqa: E731
        x.reshape(b, rows, -1), ((0, 0), (0, tiles * ROWS - rows), (0, 0))
    )
    out, lse = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(
            jax.ShapeDtypeStruct((splits, b, tiles * ROWS, c), query.latent_BTHC.dtype),
            jax.ShapeDtypeStruct((splits, b, tiles * ROWS), jnp.float32),
        ),
        scratch_types=_scratch(c // 2, cluster)._asdict(),
        grid=(b, splits, tiles // cluster),
        grid_names=("row", "split", "tile"),
        **(dict(cluster=(cluster,), cluster_names=("cluster",)) if cluster > 1 else {}),
        num_threads=3,
        thread_name="wg",
        # Rows of `wgmma` results are reduced in registers: the default would not leave room.
        compiler_params=_compat.gpu_compiler_params(reduction_scratch_bytes=512, approx_math=True),
        **hopper.simulation(backend),
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


def _scratch(width: int, cluster: int) -> Scratch:
    """For C = 2 · width."""
    tiled = hopper.swizzled(jnp.bfloat16)
    smem = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled)  # noqa: E731
    used = dict(num_arrivals=1, num_barriers=2 * PAIR)
    return Scratch(
        q_smem=smem(2, ROWS, width),
        q_rope_smem=smem(1, ROWS, ROPE),
        latent_smem=smem(PAIR, 2, KEYS, width),
        rope_smem=smem(PAIR, KEYS, ROPE),
        peak_smem=plgpu.SMEM((PAIR, ROWS), jnp.float32),
        total_smem=plgpu.SMEM((2, ROWS), jnp.float32),
        q_come=plgpu.Barrier(num_arrivals=3),  # as many as copies
        left_come=plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
        right_come=plgpu.Barrier(num_arrivals=2, num_barriers=PAIR),
        used=plgpu.ClusterBarrier(collective_axes=("cluster",), **used)
        if cluster > 1
        else plgpu.Barrier(**used),
        weighed=plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
        met=plgpu.Barrier(num_arrivals=2),
    )


def _check(query: Query, cache: PagedLatents) -> None:
    if not len(query.lengths_B):
        raise Unsupported("mla_decode on GPU needs a row; use 'xla'")
    c, r = (x.shape[-1] for x in cache[:2])
    page = cache.latent_NSC.shape[1]
    dtypes = {x.dtype.name for x in (query.latent_BTHC, *cache[:2])}
    if dtypes != {"bfloat16"}:
        raise Unsupported(
            f"mla_decode on GPU multiplies bfloat16 queries and pages, got {sorted(dtypes)}; "
            "`wgmma` reads E4M3 on both sides or on neither; use 'xla'"
        )
    if c % 128 or c > 2 * WIDEST or r != ROPE or page % KEYS:
        raise Unsupported(
            f"mla_decode on GPU needs C a multiple of 128 up to {2 * WIDEST}, R = {ROPE}, pages "
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


def _kernel(lengths_gmem, table_gmem, *refs, plan: Plan, **scratch):
    *inputs, out_gmem, lse_gmem = refs
    scratch = Scratch(**scratch)
    row, split, tile = (jax.lax.axis_index(x) for x in ("row", "split", "tile"))
    if plan.cluster > 1:
        tile = tile * plan.cluster + jax.lax.axis_index("cluster")
    warpgroup = jax.lax.axis_index("wg")
    length = lengths_gmem[row]
    pairs = jax.lax.div(length + (PAIR * KEYS - 1), jnp.int32(PAIR * KEYS))
    most = jax.lax.div(pairs + (plan.splits - 1), jnp.int32(plan.splits))
    first = split * most
    count = jnp.maximum(jnp.minimum(pairs - first, most), 0)

    limit = length - plan.queries + 1  # of the first query token
    place = (split, row, pl.ds(tile * ROWS, ROWS))

    def fetching():
        plgpu.set_max_registers(40, action="decrease")
        last = jax.lax.div(length + (KEYS - 1), jnp.int32(KEYS)) - 1
        _fetch((table_gmem, *inputs), (row, tile), (first, count, last), plan, scratch)

    def computing(each, attend):
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(scratch.q_come)
        found = _attend(attend, (first, count), (tile, limit), plan, scratch)
        _store(each, found, (out_gmem, lse_gmem), place, scratch)

    jax.lax.switch(
        warpgroup,
        [
            functools.partial(computing, 0, _first),
            functools.partial(computing, 1, _second),
            fetching,
        ],
    )


def _fetch(gmem, where, pairs, plan: Plan, scratch: Scratch) -> None:
    """Queries once, then each part of a pair's keys when the last product with it is done."""
    table_gmem, q_gmem, q_rope_gmem, latent_gmem, rope_gmem, *last_gmem = gmem
    (row, tile), (first, count, last) = where, pairs
    width = scratch.q_smem.shape[-1]
    rows = pl.ds(tile * ROWS, ROWS)
    shared = dict(collective_axes="cluster") if plan.cluster > 1 else {}
    copy = plgpu.copy_gmem_to_smem
    for half in range(2):
        half_C = q_gmem.at[row, rows, pl.ds(half * width, width)]
        copy(half_C, scratch.q_smem.at[half], scratch.q_come)
    copy(q_rope_gmem.at[row, rows], scratch.q_rope_smem.at[0], scratch.q_come)

    def load(source, step, half):
        latent_SC, rope_SR = source
        come = (scratch.left_come, scratch.right_come)[half].at[step]
        part = latent_SC.at[:, pl.ds(half * width, width)]
        copy(part, scratch.latent_smem.at[step, half], come, **shared)
        if half == 1:  # both warpgroups are done with the weights that lie there
            copy(rope_SR, scratch.rope_smem.at[step], come, **shared)

    def numbers(i):
        """Of the pages of a pair: asked for a pair ahead, for they come from main memory."""
        steps = [(first + i) * PAIR + step for step in range(PAIR)]
        pages = [jax.lax.div(at, jnp.int32(plan.steps_a_page)) for at in steps]
        return [table_gmem[row, jnp.minimum(page, table_gmem.shape[1] - 1)] for page in pages]

    def pair(i, current):
        ahead = numbers(i + 1)
        for step in range(PAIR):
            at, number = (first + i) * PAIR + step, current[step]
            begin = jax.lax.rem(at, jnp.int32(plan.steps_a_page)) * KEYS
            for half in range(2):

                @pl.when(i > 0)
                def _(step=step, half=half):
                    plgpu.barrier_wait(scratch.used.at[2 * step + half])

                @pl.when(at >= last)  # a step behind it counts nothing but must be finite
                def _(step=step, half=half):
                    load([x.at[row] for x in last_gmem], step, half)

                @pl.when(at < last)
                def _(step=step, half=half, number=number, begin=begin):
                    keys = pl.ds(begin, KEYS)
                    load([x.at[number, keys] for x in (latent_gmem, rope_gmem)], step, half)

        return ahead

    jax.lax.fori_loop(0, count, pair, numbers(0))

    @pl.when(count > 0)
    def _():
        for part in range(2 * PAIR):  # another block of the cluster may still say so
            plgpu.barrier_wait(scratch.used.at[part])


def _attend(attend, pairs, where, plan: Plan, scratch: Scratch):
    """(sums [ROWS, C / 2], peak [ROWS], this warpgroup's total [ROWS]), float32 in registers."""
    first, count = pairs
    per_row = plgpu.Layout.WGMMA.reduce(1)
    width = scratch.q_smem.shape[-1]
    blank = lambda shape, value, layout: plgpu.layout_cast(  # noqa: E731
        jnp.full(shape, value, jnp.float32), layout
    )
    start = (
        blank((ROWS, width), 0.0, plgpu.Layout.WGMMA),
        blank((ROWS,), LOWEST, per_row),
        blank((ROWS,), 0.0, per_row),
    )
    step = lambda i, carry: attend(first + i, carry, where, plan, scratch)  # noqa: E731
    return jax.lax.fori_loop(0, count, step, start)


def _first(pair, carry, where, plan: Plan, scratch: Scratch):
    """The warpgroup of a pair's first step: the left half of C."""
    zero, one = _both(pair)
    sums, peak, total = carry
    logits = _logits(zero, pair, where, plan, scratch)
    higher = jnp.maximum(peak, logits.max(axis=1))
    weight = jnp.exp2(logits - _spread(higher, KEYS))
    shrink = jnp.exp2(peak - higher)
    _tell(zero, higher, weight, scratch)
    sums = _added(sums, shrink, (zero, zero), plan, scratch)
    total = total * shrink + weight.sum(axis=1)
    plgpu.barrier_wait(scratch.weighed.at[one])
    peak, higher = higher, _peak(one, scratch)
    shrink = jnp.exp2(peak - higher)
    return _added(sums, shrink, (one, zero), plan, scratch), higher, total * shrink


def _second(pair, carry, where, plan: Plan, scratch: Scratch):
    """The warpgroup of a pair's second step: the right half of C."""
    zero, one = _both(pair)
    sums, peak, total = carry
    logits = _logits(one, pair, where, plan, scratch)
    plgpu.barrier_wait(scratch.weighed.at[zero])
    told = _peak(zero, scratch)

    def weigh():
        higher = jnp.maximum(told, logits.max(axis=1))
        weight = jnp.exp2(logits - _spread(higher, KEYS))
        scratch.total_smem[1] = weight.sum(axis=1)
        _tell(one, higher, weight, scratch)

    before = jnp.exp2(peak - told)
    sums = _added(sums, before, (zero, one), plan, scratch, meanwhile=weigh)
    higher, weighed = _peak(one, scratch), _of_row(scratch.total_smem.at[1])
    shrink = jnp.exp2(told - higher)
    sums = _added(sums, shrink, (one, one), plan, scratch)
    return sums, higher, total * (before * shrink) + weighed


def _both(pair) -> tuple[jax.Array, jax.Array]:
    """(0, 1), which a compiler does not know: places in memory counted from them are worked out in
    the loop. Known ones, of 52 products, are kept over all of it and leave no registers."""
    zero = jax.lax.shift_right_logical(pair, jnp.int32(30))
    return zero, zero + 1


def _logits(step, pair, where, plan: Plan, scratch: Scratch) -> jax.Array:
    """[ROWS, KEYS] scaled products of the queries with a step's keys; −inf where none is seen."""
    tile, limit = where
    zero, _ = _both(pair)

    def products(acc_ref):
        for half, come in enumerate((scratch.left_come, scratch.right_come)):
            plgpu.barrier_wait(come.at[step])
            keys = scratch.latent_smem.at[step, half]
            plgpu.wgmma(acc_ref, scratch.q_smem.at[half + zero], _compat.transposed(keys))
        keys = scratch.rope_smem.at[step]
        plgpu.wgmma(acc_ref, scratch.q_rope_smem.at[zero], _compat.transposed(keys))
        return acc_ref[...]

    logits = pl.run_scoped(products, plgpu.ACC((ROWS, KEYS), jnp.float32)) * plan.scale
    iota = functools.partial(
        plgpu.broadcasted_iota, jnp.int32, (ROWS, KEYS), layout=plgpu.Layout.WGMMA
    )
    key = (pair * PAIR + step) * KEYS + iota(1)
    token = jax.lax.div(tile * ROWS + iota(0), jnp.int32(plan.heads))
    return jnp.where(key < limit + token, logits, -jnp.inf)


def _added(sums, shrink, part, plan: Plan, scratch: Scratch, *, meanwhile=lambda: None):
    """sums · shrink + a step's weights times its half of C; then that part is done with."""
    step, half = part

    def products(acc_ref):
        plgpu.wgmma(acc_ref, scratch.rope_smem.at[step], scratch.latent_smem.at[step, half])
        meanwhile()

    def alone(acc_ref):
        products(acc_ref)
        return acc_ref[...]

    sums = sums * _spread(shrink, sums.shape[1])
    if plan.simulated:  # it adds apart
        sums += pl.run_scoped(alone, plgpu.ACC(sums.shape, jnp.float32))
    else:
        sums = pl.run_state(products)(plgpu.ACC.init(sums))
    plgpu.barrier_arrive(scratch.used.at[2 * step + half])
    return sums


def _tell(step, peak, weight, scratch: Scratch) -> None:
    """A step's weights and peak to both warpgroups."""
    scratch.rope_smem[step] = weight.astype(jnp.bfloat16)
    scratch.peak_smem[step] = peak
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.weighed.at[step])


def _peak(step, scratch: Scratch) -> jax.Array:
    return _of_row(scratch.peak_smem.at[step])


def _of_row(ref) -> jax.Array:
    return _compat.load(ref, plgpu.Layout.WGMMA.reduce(1))


def _spread(x: jax.Array, width: int) -> jax.Array:
    """[ROWS] → [ROWS, width]."""
    return jax.lax.broadcast_in_dim(x, (ROWS, width), (0,))


def _store(warpgroup, found, gmem, where, scratch: Scratch) -> None:
    """Both totals added; this warpgroup's half of C through the queries' memory."""
    (sums, peak, total), (out_gmem, lse_gmem), (split, row, rows) = found, gmem, where
    width = sums.shape[1]
    scratch.total_smem[warpgroup] = total
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.met)
    plgpu.barrier_wait(scratch.met)  # and both are done with the queries
    total = jnp.add(*(_of_row(scratch.total_smem.at[i]) for i in range(2)))
    divisor = _spread(jnp.where(total > 0, total, 1.0), width)
    scratch.q_smem[warpgroup] = (sums / divisor).astype(jnp.bfloat16)
    if warpgroup == 0:
        scratch.peak_smem[0] = (peak + jnp.log2(total)) * math.log(2)
    plgpu.commit_smem()
    columns = pl.ds(warpgroup * width, width)
    plgpu.copy_smem_to_gmem(scratch.q_smem.at[warpgroup], out_gmem.at[split, row, rows, columns])
    if warpgroup == 0:
        plgpu.copy_smem_to_gmem(scratch.peak_smem.at[0], lse_gmem.at[split, row, rows])
    plgpu.wait_smem_to_gmem(0)
