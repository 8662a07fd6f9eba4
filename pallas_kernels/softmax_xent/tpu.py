# SPDX-License-Identifier: Apache-2.0
"""The loss head on TPU: logits of a tile stay in VMEM, only sums or the tile's slope leave it.

Forward is one kernel over (tokens, vocabulary, D): a tile of logits is summed over D in VMEM and
absorbed into running sums. The gradient goes through the vocabulary in slices of `SLICE` columns:
a kernel makes a slice's logits again and writes their slope in the hidden states' dtype; the two
products with it fuse with nothing and are XLA's. So each logit is computed twice in all, and the
largest temporary is [T, SLICE].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.dispatch import Backend, Unsupported
from pallas_kernels.softmax_xent import ref

LANES = 128
SLICE = 4096  # columns of a step of the gradient


class Tiles(NamedTuple):
    """Tokens, columns and depth of a tile of the product."""

    t: int
    n: int
    d: int


def forward(
    hidden_BTD, head_DN, targets_BT, temperature, *, backend: Backend, tile=None
) -> ref.Sums:
    """As `ref.forward`, logits in VMEM alone."""
    hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    (t, d), n = hidden_TD.shape, head_DN.shape[1]
    tiles = tiles_of(backend, hidden_TD, head_DN, tile)
    packed_TL = pl.pallas_call(
        functools.partial(_forward_kernel, n=n, steps=_steps(d, tiles.d)),
        out_shape=jax.ShapeDtypeStruct((t, LANES), jnp.float32),
        grid_spec=pl.GridSpec(
            grid=(pl.cdiv(t, tiles.t), pl.cdiv(n, tiles.n), _steps(d, tiles.d)),
            in_specs=[*_product_specs(tiles), _per_token(tiles, 1), _SCALAR],
            out_specs=_per_token(tiles, LANES),
            scratch_shapes=[
                pltpu.VMEM((tiles.t, tiles.n), jnp.float32),
                *[pltpu.VMEM((tiles.t, 1), jnp.float32)] * len(ref.Running._fields),
            ],
        ),
        **_settings(backend, tiles, hidden_TD, head_DN, columns=True),
    )(hidden_TD, head_DN, targets_BT.reshape(-1, 1), temperature.reshape(1))
    fields = range(len(ref.Sums._fields))
    return ref.Sums(*(packed_TL[:, i].reshape(targets_BT.shape) for i in fields))


def backward(hidden_BTD, head_DN, targets_BT, temperature, given, *, backend: Backend, tile=None):
    """As `ref.backward`, with a [T, SLICE] slope as the largest temporary."""
    hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    n = head_DN.shape[1]
    tiles = tiles_of(backend, hidden_TD, head_DN, tile)
    count, size = ref.tile_of(n, max(SLICE - SLICE % tiles.n, tiles.n))
    targets_T1 = targets_BT.reshape(-1, 1)
    packed_T4 = jnp.concatenate([x.reshape(-1, 1) for x in given], axis=-1)

    def one_slice(carry, i):
        d_hidden, d_head = carry
        begin, stale = ref.columns(i, n, size)
        w_Dn = jax.lax.dynamic_slice_in_dim(head_DN, begin, size, 1)
        where = jnp.stack([begin, stale]).astype(jnp.int32)
        slope_Tn = _slope(
            (hidden_TD, w_Dn, targets_T1, packed_T4, temperature.reshape(1), where),
            backend=backend,
            tiles=tiles._replace(n=min(tiles.n, size)),
        )
        d_hidden_more, d_w = ref.products(slope_Tn, hidden_TD, w_Dn)
        return (d_hidden + d_hidden_more, ref.added(d_head, d_w, begin)), None

    zeros = jnp.zeros(hidden_TD.shape, jnp.float32), jnp.zeros_like(head_DN)
    (d_hidden, d_head), _ = jax.lax.scan(one_slice, zeros, jnp.arange(count))
    return d_hidden.reshape(hidden_BTD.shape), d_head


def tiles_of(backend: Backend, hidden_TD, head_DN, tile: tuple[int, int] | None) -> Tiles:
    """Tokens and columns as asked for or tuned, cut to the arrays; the depth that divides D.

    Raises:
        Unsupported: a D that only fits VMEM in whole and does not.
    """
    (t, d), n = hidden_TD.shape, head_DN.shape[1]
    dims = {"m": t, "k": d, "vocabulary": n}
    most_t, most_n = tile or tuning.choose("softmax_xent", dims, backend, lambda: (1024, 1024))
    depth = depth_of(d)
    tiles = Tiles(_cut(t, most_t, 16), _cut(n, most_n, LANES), depth)
    needed = vmem_bytes(tiles, hidden_TD.dtype.itemsize, head_DN.dtype.itemsize)
    if needed > backend.device.on_chip:
        raise Unsupported(
            f"softmax_xent on {backend.chip} needs {needed} bytes of VMEM for {tiles} of hidden "
            f"{list(hidden_TD.shape)} and head {list(head_DN.shape)}, and has "
            f"{backend.device.on_chip}; use a smaller tile, a D that is a multiple of 128, or 'xla'"
        )
    return tiles


def depth_of(d: int, most: int = 1024) -> int:
    """The largest divisor of D that is a multiple of 128 and at most `most`; D where none is."""
    fits = (x for x in range(most - most % LANES, 0, -LANES) if d % x == 0)
    return next(fits, d)


def vmem_bytes(tiles: Tiles, hidden_size: int, head_size: int) -> int:
    """Two buffers of each operand, the tile of logits and six of its size beside it, tokens' sums.

    Six: what the compiler keeps of a tile's logits, exponentials, masks and column numbers.
    """
    operands = 2 * tiles.d * (tiles.t * hidden_size + tiles.n * head_size)
    return operands + 7 * 4 * tiles.t * tiles.n + 12 * 4 * tiles.t * LANES


def _cut(n: int, most: int, multiple: int) -> int:
    """A tile of n: all of it, or at most `most` and a multiple of the layout's."""
    most = max(most - most % multiple, multiple)
    return min(n, most)


def _steps(d: int, depth: int) -> int:
    return d // depth


_SCALAR = pl.BlockSpec(memory_space=pltpu.SMEM)


def _product_specs(tiles: Tiles) -> list[pl.BlockSpec]:
    """Blocks of hidden and head."""
    return [
        pl.BlockSpec((tiles.t, tiles.d), lambda t, n, d: (t, d)),
        pl.BlockSpec((tiles.d, tiles.n), lambda t, n, d: (d, n)),
    ]


def _per_token(tiles: Tiles, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((tiles.t, width), lambda t, n, d: (t, 0))


def _settings(backend: Backend, tiles: Tiles, hidden_TD, head_DN, *, columns: bool) -> dict:
    """The keywords that both calls share; `columns`: whether the columns are gone through in order.

    The limit leaves the compiler a quarter more than was counted.
    """
    needed = vmem_bytes(tiles, hidden_TD.dtype.itemsize, head_DN.dtype.itemsize)
    (t, d), n = hidden_TD.shape, head_DN.shape[1]
    return dict(
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if columns else "parallel", "arbitrary"),
            vmem_limit_bytes=min(max(needed * 5 // 4, 16 * 2**20), backend.device.on_chip),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * t * d * n,
            bytes_accessed=head_DN.size * head_DN.dtype.itemsize * pl.cdiv(t, tiles.t)
            + hidden_TD.size * hidden_TD.dtype.itemsize * pl.cdiv(n, tiles.n),
            transcendentals=t * n,
        ),
        interpret=backend.interpret,
    )


def _add_product(hidden_ref, head_ref, logits_vmem) -> None:
    """One step of depth more in the tile's logits."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        logits_vmem[...] = jnp.zeros_like(logits_vmem)

    exact = hidden_ref.dtype == jnp.float32  # the matrix unit's own float32 is one bfloat16 pass
    logits_vmem[...] += jnp.dot(
        hidden_ref[...],
        head_ref[...].astype(hidden_ref.dtype),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )


def _forward_kernel(*refs, n, steps):
    hidden_ref, head_ref, target_ref, temperature_ref, packed_ref, logits_vmem = refs[:6]
    running_vmem = refs[6:]
    column, depth = pl.program_id(1), pl.program_id(2)
    last = depth == steps - 1

    @pl.when((column == 0) & (depth == 0))
    def _():
        for ref_, value in zip(running_vmem, ref.start(running_vmem[0].shape), strict=True):
            ref_[...] = value

    _add_product(hidden_ref, head_ref, logits_vmem)

    @pl.when(last)
    def _():
        logits = logits_vmem[...] / temperature_ref[0]
        at = column * logits.shape[1] + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        logits = jnp.where(at < n, logits, -jnp.inf)  # behind the last column lies anything
        running = ref.Running(*(x[...] for x in running_vmem))
        running = ref.absorb(running, logits, at == target_ref[...])
        for ref_, value in zip(running_vmem, running, strict=True):
            ref_[...] = value

    @pl.when(last & (column == pl.num_programs(1) - 1))
    def _():
        sums = ref.finish(ref.Running(*(x[...] for x in running_vmem)))
        lane = jax.lax.broadcasted_iota(jnp.int32, packed_ref.shape, 1)
        packed_ref[...] = jnp.where(lane == 0, sums[0], jnp.where(lane == 1, sums[1], sums[2]))


def _slope(arrays, *, backend: Backend, tiles: Tiles) -> jax.Array:
    """[T, n] slope of the logits of one slice of the head, in the hidden states' dtype."""
    hidden_TD, w_Dn = arrays[:2]
    (t, d), n = hidden_TD.shape, w_Dn.shape[1]
    return pl.pallas_call(
        functools.partial(_slope_kernel, steps=_steps(d, tiles.d)),
        out_shape=jax.ShapeDtypeStruct((t, n), hidden_TD.dtype),
        grid_spec=pl.GridSpec(
            grid=(pl.cdiv(t, tiles.t), pl.cdiv(n, tiles.n), _steps(d, tiles.d)),
            in_specs=[
                *_product_specs(tiles),
                _per_token(tiles, 1),
                _per_token(tiles, len(ref.Given._fields)),
                _SCALAR,
                _SCALAR,
            ],
            out_specs=pl.BlockSpec((tiles.t, tiles.n), lambda t, n, d: (t, n)),
            scratch_shapes=[pltpu.VMEM((tiles.t, tiles.n), jnp.float32)],
        ),
        **_settings(backend, tiles, hidden_TD, w_Dn, columns=False),
    )(*arrays)


def _slope_kernel(*refs, steps):
    hidden_ref, head_ref, target_ref, given_ref, temperature_ref = refs[:5]
    where_ref, slope_ref, logits_vmem = refs[5:]
    first = pl.program_id(1) * slope_ref.shape[1]
    _add_product(hidden_ref, head_ref, logits_vmem)

    @pl.when(pl.program_id(2) == steps - 1)
    def _():
        temperature = temperature_ref[0]
        logits = logits_vmem[...] / temperature
        at = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        fresh = at >= where_ref[1]
        logits = jnp.where(fresh, logits, -jnp.inf)
        hit = fresh & (at + where_ref[0] == target_ref[...])
        given = ref.Given(*(given_ref[:, i : i + 1] for i in range(len(ref.Given._fields))))
        slope_ref[...] = (ref.slope(logits, hit, given) / temperature).astype(slope_ref.dtype)
