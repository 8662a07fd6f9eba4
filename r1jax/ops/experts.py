# SPDX-License-Identifier: Apache-2.0
"""The routed experts' feed-forward network, dropless, in four equal implementations.

`ragged`: tokens sorted by expert, `jax.lax.ragged_dot`. What TPUs run.
`tiled`:  tokens sorted by expert, each expert's rows padded to whole tiles, one batched matmul over
          (tile, its expert's weights). For CPUs and GPUs, where XLA's `ragged_dot` multiplies every
          row by every expert.
`looped`: short tiles, up to eight of an expert at once, its weights read where they lie. For CPUs
          when an expert is large.
`dense`:  every expert on every token as two wide matmuls, unchosen ones weighed by zero. For both
          when an expert gets few rows: E/K times the arithmetic, but neither sort nor gather.
None drops a token at any load. `experiments/bench_experts.py` measures them.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_linear
from r1jax.ops.blocks import Blocks
from r1jax.ops.deal import laid_out, slots, summed, weight_of
from r1jax.ops.linear import FP8
from r1jax.ops.mlp import gated
from r1jax.ops.tiles import swiglu_tiles, tile_experts, tiled_slots

TILES = (32, 128)  # fewest and most rows of a tile
# `dense` reads the weights of experts where they lie, not as one matrix, from LARGE values an
# expert on (from which `looped` is faster than `tiled` too), on CPUs up to FEW tokens. Alone, 8
# tokens: 0.8 against 1.5 ms at D 256 and F 128, but 0.19 against 0.10 ms at 64 and 64.
FEW, LARGE = 16, 2**14


def tile(rows_per_expert: float, d: int, f: int) -> int:
    """Rows of a tile: a power of two within `TILES`.

    A tile copies its expert's weights, D·F values, and works on rows of D and F values: from
    D·F / (D + F) rows on the copy is the smaller part. Padding is half a tile an expert, so a tile
    has at most an eighth of an expert's rows. At D 256, F 128 and 512 rows an expert, gradient
    included: 179, 98 and 99 ms with tiles of 32, 64 and 128.
    """
    rows = min(d * f / (d + f), rows_per_expert / 8)
    return next((n for n in (TILES[0], 64) if n >= rows), TILES[1])


def choose(n_tokens: int, k: int, n_experts: int, backend: str, *, values: int = 0) -> str:
    """The implementation to run: by measurement, `experiments/log/002_experts_on_cpu.md` and
    `006_models_beside_transformers.md`; on GPUs by what is compiled, `019_hopper.md`.

    Args:
        backend: the platform compiled for, "cpu", "gpu" or "tpu".
        values: of one of an expert's matrices, where all T·K pairs are here; else 0.
    """
    if backend == "tpu":
        return "ragged"
    if n_tokens * k / n_experts < 2 * TILES[0]:
        return "dense"
    return "looped" if backend == "cpu" and values >= LARGE else "tiled"


def experts(
    x_TD: jax.Array,
    index_TK: jax.Array,
    weight_TK: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    *,
    implementation: str | None = None,
    rows: int | None = None,
) -> jax.Array:
    """y_t = Σ_k weight_tk · SwiGLU_{index_tk}(x_t) (DeepSeek-V3 eq. 12).

    Args:
        x_TD: [T, D] tokens.
        index_TK: [T, K] int32 chosen experts; E for one that is not here and adds nothing.
        weight_TK: [T, K] float32 mixing weights.
        weights: (w_gate_EDF, w_up_EDF, w_down_EFD).
        implementation: "ragged", "tiled", "looped", "dense" or None to choose by backend and shape.
        rows: at most so many (token, expert) pairs are here; None if all T·K are.

    Returns:
        [T, D] in x's dtype.

    Raises:
        ValueError: unknown implementation.
    """
    n_experts, d, f = weights[0].shape
    if implementation is None:
        values = d * f if rows is None else 0
        platform = chips.present()[0]
        implementation = choose(*index_TK.shape, n_experts, platform, values=values)
    weights = tuple(w.astype(x_TD.dtype) for w in weights)
    if implementation == "dense":
        return _dense(x_TD, index_TK, weight_TK, weights)
    if implementation == "ragged":
        return _ragged(x_TD, index_TK, weight_TK, weights, rows)
    if implementation == "tiled":
        return _tiled(x_TD, index_TK, weight_TK, weights, rows)
    if implementation == "looped" and rows is None:
        return _looped(x_TD, index_TK, weight_TK, weights)
    raise ValueError(
        f"{implementation=} must be 'ragged', 'tiled', 'looped' (with rows=None), 'dense' or None"
    )


def fp8_experts(
    x_TD: jax.Array,
    index_TK: jax.Array,
    weight_TK: jax.Array,
    weights: tuple[jax.Array | Blocks, jax.Array | Blocks, jax.Array | Blocks],
    *,
    fp8: FP8,
    rows: int | None = None,
) -> jax.Array:
    """The same in E4M3 (DeepSeek-V3 section 3.3): `ragged`, its products `fp8_grouped_linear`.

    The tiles of the weights' gradients go over the rows as they are sorted, from one expert's into
    the next one's.

    Args and Returns: as `experts`; the weights are quantised as they are, or in blocks already.
    """

    def product(rows_MK, w_EKN, sizes_E, real):
        del real  # the rows behind the last expert's are zeros already
        how = dict(block=fp8.block, power_of_two=fp8.power_of_two)
        if isinstance(w_EKN, Blocks):
            w_EKN, how["blocks"] = w_EKN.like_master, w_EKN.matrix
        return fp8_grouped_linear(rows_MK, w_EKN, sizes_E, tail=True, **how)

    return _by_rows(x_TD, index_TK, weight_TK, weights, bound=rows, product=product)


def _dense(x_TD, index_TK, weight_TK, weights):
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    e, d, f = w_gate_EDF.shape
    gate_TE = (jax.nn.one_hot(index_TK, e, dtype=jnp.float32) * weight_TK[..., None]).sum(1)
    wide = lambda w: w.transpose(1, 0, 2).reshape(d, e * f)  # noqa: E731
    if (len(x_TD) <= FEW or chips.present()[0] != "cpu") and d * f >= LARGE:
        x_ETD = jnp.broadcast_to(x_TD, (e, *x_TD.shape))
        up = lambda w: jnp.einsum("etd,edf->etf", x_ETD, w).swapaxes(0, 1)  # noqa: E731
    else:
        up = lambda w: (x_TD @ wide(w)).reshape(-1, e, f)  # noqa: E731
    h = gated(up(w_gate_EDF), up(w_up_EDF))
    h = h * gate_TE[:, :, None].astype(x_TD.dtype)
    return h.reshape(-1, e * f) @ w_down_EFD.reshape(e * f, d)


def _ragged(x_TD, index_TK, weight_TK, weights, bound):
    def product(rows_MK, w_EKN, sizes_E, real):
        return real(jax.lax.ragged_dot(rows_MK, w_EKN, sizes_E))

    return _by_rows(x_TD, index_TK, weight_TK, weights, bound=bound, product=product)


def _by_rows(x_TD, index_TK, weight_TK, weights, *, bound, product):
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    (t, k), e = index_TK.shape, w_gate_EDF.shape[0]
    if e < k:  # a column for each expert, of which a token has at most one each
        hit_TKE = index_TK[:, :, None] == jnp.arange(e)
        weight_TK = jnp.where(hit_TKE, weight_TK[:, :, None], 0.0).sum(1)
        index_TK = jnp.where(hit_TKE.any(1), jnp.arange(e), e)
    where = slots(index_TK, e, t * k if bound is None else bound)
    rows, sizes = laid_out(x_TD, where), where.count_n
    # Rows behind the last expert's are whatever the backend left there.
    real_M1 = (where.token_S < t)[:, None]
    real = lambda x: x if bound is None else jnp.where(real_M1, x, 0)  # noqa: E731
    gate = product(rows, w_gate_EDF, sizes, real)
    up = product(rows, w_up_EDF, sizes, real)
    # Weighed before the last product: a gradient needs F values of each row then, not D.
    h = gated(gate, up) * weight_of(weight_TK, where)[:, None].astype(x_TD.dtype)
    return summed(product(h, w_down_EFD, sizes, real), where)


def _tiled(x_TD, index_TK, weight_TK, weights, bound):
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    e = w_gate_EDF.shape[0]
    (t, k), d = index_TK.shape, x_TD.shape[1]
    order, token, sizes = _sort(index_TK, e)
    tile_rows = tile(t * k / e, d, w_gate_EDF.shape[2])
    order, token = order[:bound], token[:bound]
    expert_M, weight_M = index_TK.reshape(-1)[order], weight_TK.reshape(-1)[order]
    slot_M, expert_I = tile_slots(expert_M, sizes, tile_rows)
    n_tiles = expert_I.shape[0]
    # Those that are not here are written nowhere and weigh nothing.
    slot_M = jnp.where(expert_M < e, slot_M, n_tiles * tile_rows + jnp.arange(len(order)))
    weight_M = jnp.where(expert_M < e, weight_M, 0.0)
    rows = (
        jnp.zeros((n_tiles * tile_rows, d), x_TD.dtype)
        .at[slot_M]
        .set(x_TD[token], unique_indices=True)
    )
    rows = rows.reshape(n_tiles, tile_rows, d)
    up = lambda w: jnp.einsum("ird,idf->irf", rows, w[expert_I])  # noqa: E731
    h = gated(up(w_gate_EDF), up(w_up_EDF))
    out = jnp.einsum("irf,ifd->ird", h, w_down_EFD[expert_I]).reshape(-1, d)
    out = out.at[slot_M].get(mode="clip")
    out = out * weight_M[:, None].astype(x_TD.dtype)
    if bound is not None:
        return jnp.zeros_like(x_TD).at[token].add(out)
    back = jnp.argsort(order)
    return out[back].reshape(t, k, d).sum(1)


def _looped(x_TD, index_TK, weight_TK, weights):
    (t, k), (e, d, f) = index_TK.shape, weights[0].shape
    # Short: no weights are copied for a tile here, and several are multiplied at once.
    tile_rows = min(tile(t * k / e, d, f), 64)
    where, span_E2 = tiled_slots(index_TK, e, tile_rows)
    rows_MD, weight_M = laid_out(x_TD, where), weight_of(weight_TK, where)
    return summed(swiglu_tiles(rows_MD, weight_M, span_E2, weights, tile_rows), where)


def _sort(index_TK: jax.Array, n_experts: int):
    """(order, token of each sorted row, rows of each expert) of the T·K assignments."""
    flat = index_TK.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=n_experts).astype(jnp.int32)
    return order, order // index_TK.shape[1], sizes


def tile_slots(
    expert_M: jax.Array, sizes_E: jax.Array, tile_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Where each row sorted by expert goes when every expert's rows are padded to whole tiles.

    Args:
        expert_M: [M] int32 expert of each row, ascending.
        sizes_E: [E] rows of each expert.
        tile_rows: of a tile.

    Returns:
        slot_M: [M] row of the padded buffer; expert_I: [I] expert of each of its tiles, where
        I = ⌈M / tile_rows⌉ + E bounds the tiles at any load. Unused tiles name the last expert.
    """
    m = expert_M.shape[0]
    first_tile_E, expert_I = tile_experts(sizes_E, m, tile_rows)
    first_row_E = jnp.cumsum(sizes_E) - sizes_E
    return first_tile_E[expert_M] * tile_rows + jnp.arange(m) - first_row_E[expert_M], expert_I
