# SPDX-License-Identifier: Apache-2.0
"""What the bench measures: an op at a named shape, the same work left to XLA, the true values."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import candidates, chips, shapes
from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_fprop
from pallas_kernels.fp8_matmul import fp8_dgrad, fp8_fprop, fp8_wgrad
from pallas_kernels.fp8_quantize import quantize_blocks, quantize_tiles
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.mla_decode import PagedLatents, mla_decode
from pallas_kernels.scaled import Scaled
from pallas_kernels.softmax_xent import softmax_xent
from pallas_kernels.tuning import Tiles

BLOCK = 128
PAGE = 64  # tokens
CORNER = 64  # rows and columns compared with float64: enough to see, quick at any shape


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        arrays: its arguments.
        call: (implementation) → function of the arrays.
        xla: the same result in high precision, of arguments `xla_arrays`, by XLA's own op.
        truth: [rows, columns] float64 of a corner of the result.
        flops: of the matmul, 0 where memory is the only bound.
        traffic: bytes that must be read and written.
        bits: of the operands of the matmul.
        tiles: (op, dims, candidates) for the tuner of a TPU.
        gpu_tiles: the same for a GPU; None: nothing to choose.
    """

    arrays: tuple
    call: Callable[[Implementation], Callable]
    xla: Callable
    xla_arrays: tuple
    truth: np.ndarray
    flops: float
    traffic: float
    bits: int
    tiles: tuple[str, dict[str, int], tuple[Tiles, ...]]
    gpu_tiles: tuple[str, dict[str, int], tuple[Tiles, ...]] | None = None


def fp8_quantize(shape: shapes.Matmul) -> Case:
    """Activations in tiles: memory bound."""
    m, k, _ = shape
    x = _normal(0, m, k).astype(jnp.bfloat16)
    corner = np.float64(x[:CORNER, :BLOCK])
    return Case(
        arrays=(x,),
        call=lambda i: lambda x: quantize_tiles(x, implementation=i),
        xla=lambda x: quantize_tiles(x, implementation="xla"),
        xla_arrays=(x,),
        truth=corner[:, :CORNER],
        flops=0,
        traffic=m * k * 3 + m * k // BLOCK * 4,
        bits=16,
        tiles=("fp8_quantize", dict(m=m, k=k, b=BLOCK), tuple(candidates.quantize(m, k, BLOCK))),
    )


def fp8_matmul(shape: shapes.Matmul) -> Case:
    """The forward product of quantised operands, beside XLA's bfloat16 matmul."""
    m, k, n = _whole(shape)
    x, w = _normal(0, m, k).astype(jnp.bfloat16), _normal(1, k, n).astype(jnp.bfloat16)
    qx, qw = quantize_tiles(x), quantize_blocks(w)
    return _product(
        (m, k, n),
        (qx, qw),
        lambda i: lambda x, w: fp8_fprop(x, w, implementation=i),
        (x, w),
        _of_tiles(qx, CORNER) @ _of_blocks(qw.values, qw.scale),
        kind=0,
    )


def fp8_input_gradient(shape: shapes.Matmul) -> Case:
    """[M, N] of weights that lie [N, K]: `fp8_dgrad`, and what checkpoints' weights take."""
    m, k, n = _whole(shape)
    dy, w = _normal(0, m, k).astype(jnp.bfloat16), _normal(1, n, k).astype(jnp.bfloat16)
    qdy, qw = quantize_tiles(dy), quantize_blocks(w)
    rows = np.float64(qw.values[:CORNER]) * np.repeat(np.float64(qw.scale[:1]), BLOCK, 1)
    return _product(
        (m, k, n),
        (qdy, qw),
        lambda i: lambda dy, w: fp8_dgrad(dy, w, implementation=i),
        (dy, w.T),
        _of_tiles(qdy, CORNER) @ rows.T,
        kind=1,
    )


def fp8_weight_gradient(shape: shapes.Matmul) -> Case:
    """[M, N] float32 over K tokens, both operands in tiles along them: `fp8_wgrad`."""
    m, k, n = _whole(shape)
    xt, dyt = (_normal(i, size, k).astype(jnp.bfloat16) for i, size in enumerate((m, n)))
    qx, qdy = quantize_tiles(xt), quantize_tiles(dyt)
    return _product(
        (m, k, n),
        (qx, qdy),
        lambda i: lambda x, dy: fp8_wgrad(x, dy, implementation=i),
        (xt, dyt.T),
        _of_tiles(qx, CORNER) @ _of_tiles(qdy, CORNER).T,
        kind=2,
    )


def _whole(shape: shapes.Matmul) -> tuple[int, int, int]:
    m, k, n = shape
    return m, k, n // BLOCK * BLOCK


def _product(sizes, arrays, call, plain, truth, *, kind: int) -> Case:
    """fprop, dgrad or wgrad (kind 0, 1, 2) beside XLA's bfloat16 matmul."""
    (m, k, n), wide = sizes, 4 if kind == 2 else 2
    dims = dict(m=m, n=n, k=k, b=BLOCK)
    return Case(
        arrays=arrays,
        call=call,
        xla=jnp.dot,
        xla_arrays=plain,
        truth=truth,
        flops=2 * m * k * n,
        traffic=m * k + k * n + wide * m * n,
        bits=8,
        # A TPU's kernel has one key for both that have the contraction last in b, Hopper's for both
        # whose b has a scale a block.
        tiles=(
            "fp8_matmul",
            dict(dims, t=min(kind, 1)),
            tuple(candidates.matmul((m, n, k), BLOCK, 1)),
        ),
        gpu_tiles=("fp8_matmul", dict(dims, t=max(kind, 1)), tuple(candidates.hopper())),
    )


def grouped(shape: shapes.Grouped) -> Case:
    """Sorted rows times their experts' bfloat16 weights, beside XLA's `ragged_dot`."""
    m, k, n, e = shape
    sizes = _sizes(m, e)
    x, w = _normal(0, m, k).astype(jnp.bfloat16), _normal(1, e, k, n).astype(jnp.bfloat16)
    return Case(
        arrays=(x, w, sizes),
        call=lambda i: lambda x, w, s: grouped_matmul(x, w, s, tail=True, implementation=i),
        xla=jax.lax.ragged_dot,
        xla_arrays=(x, w, sizes),
        truth=_by_group(np.float64(x[:CORNER]), lambda g: np.float64(w[g, :, :CORNER]), sizes),
        flops=2 * m * k * n,
        traffic=2 * (m * (k + n) + _active(sizes) * k * n),
        bits=16,
        tiles=(
            "grouped_matmul",
            dict(m=m, n=n, k=k, e=e, t=0, bits=16),
            tuple(candidates.matmul((m, n, k), BLOCK, 2)),
        ),
    )


def fp8_grouped(shape: shapes.Grouped) -> Case:
    """The same with quantised operands, beside XLA's bfloat16 `ragged_dot`."""
    m, k, n, e = shape
    sizes = _sizes(m, e)
    x, w = _normal(0, m, k).astype(jnp.bfloat16), _normal(1, e, k, n).astype(jnp.bfloat16)
    qx, qw = quantize_tiles(x), quantize_blocks(w)
    return Case(
        arrays=(qx, qw, sizes),
        call=lambda i: lambda x, w, s: fp8_grouped_fprop(x, w, s, tail=True, implementation=i),
        xla=jax.lax.ragged_dot,
        xla_arrays=(x, w, sizes),
        truth=_by_group(
            _of_tiles(qx, CORNER), lambda g: _of_blocks(qw.values[g], qw.scale[g]), sizes
        ),
        flops=2 * m * k * n,
        traffic=m * k + _active(sizes) * k * n + 2 * m * n,
        bits=8,
        tiles=(
            "fp8_grouped_matmul",
            dict(m=m, n=n, k=k, e=e, b=BLOCK, t=0),
            tuple(candidates.matmul((m, n, k), BLOCK, 1)),
        ),
    )


def head(shape: shapes.Head) -> Case:
    """Log-probabilities and entropies [M, 2] of tokens, beside the whole log-softmax by XLA."""
    m, k, n = shape
    hidden = _normal(0, m, k).astype(jnp.bfloat16)
    w = (_normal(1, k, n) / k**0.5).astype(jnp.bfloat16)
    targets = jnp.arange(m) % n

    def whole(hidden, w, targets):
        logp = jax.nn.log_softmax(jnp.dot(hidden, w, preferred_element_type=jnp.float32))
        chosen = jnp.take_along_axis(logp, targets[:, None], 1)
        return jnp.concatenate([chosen, -(jnp.exp(logp) * logp).sum(1, keepdims=True)], 1)

    s = np.float64(hidden[:CORNER]) @ np.float64(w)
    s -= s.max(1, keepdims=True)
    logp = s - np.log(np.exp(s).sum(1, keepdims=True))
    few = np.arange(len(s))
    return Case(
        arrays=(hidden, w, targets),
        call=lambda i: lambda *x: jnp.stack(softmax_xent(*x, implementation=i), 1),
        xla=whole,
        xla_arrays=(hidden, w, targets),
        truth=np.stack([logp[few, few % n], -(np.exp(logp) * logp).sum(1)], 1),
        flops=2 * m * k * n,
        traffic=2 * (m * k + k * n),
        bits=16,
        tiles=("softmax_xent", dict(m=m, k=k, vocabulary=n), tuple(candidates.head(m, n))),
    )


def attention(shape: shapes.Attention) -> Case:
    """Values [B · H · T, V] of rows of one document, beside whole logits by XLA."""
    b, h, g, t, k, v = shape
    j = h // g
    widths = (b, j, g, t, k), (b, j, t, k), (b, j, t, v)
    q, keys, values = (_normal(i, *size).astype(jnp.bfloat16) for i, size in enumerate(widths))
    ones, scale = jnp.ones((b, t), jnp.int32), k**-0.5

    def call(i):
        how = dict(scale=scale, implementation=i)
        return lambda *x: causal_attention(*x, **how).reshape(-1, v)

    def whole(q, k, v, _):
        s = jnp.einsum("bjgtk,bjsk->bjgts", q, k, preferred_element_type=jnp.float32) * scale
        p = jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), s, -jnp.inf), axis=-1)
        return jnp.einsum("bjgts,bjsv->bjgtv", p.astype(v.dtype), v).reshape(-1, v.shape[-1])

    few = min(t, CORNER)
    one = [np.float64(x[0, 0]) for x in (keys, values)]
    s = np.float64(q[0, 0, 0, :few]) @ one[0].T * scale
    e = np.where(np.tri(few, t), np.exp(s - s.max(1, keepdims=True)), 0.0)
    pairs = b * h * t * (t + 1) // 2
    return Case(
        arrays=(q, keys, values, ones),
        call=call,
        xla=whole,
        xla_arrays=(q, keys, values, ones),
        truth=(e / e.sum(1, keepdims=True) @ one[1])[:, :CORNER],
        flops=2 * pairs * (k + v),
        traffic=2 * b * t * (h * (k + v) + j * (k + v)),
        bits=16,
        tiles=(
            "causal_attention",
            dict(t=t, k=k, v=v, heads=h, shared=g),
            tuple(candidates.attention(t)),
        ),
    )


def decode(shape: shapes.Decode) -> Case:
    """Attention [B · T · H, C] over pages in random order, beside the plain form by XLA."""
    b, t, h, length, c, r = shape
    # Fewer columns than a register has XLA lay out across pages, and copy for the kernel.
    r = max(r, 128) if chips.present()[0] == "tpu" else r
    count = b * length // PAGE
    table = jax.random.permutation(jax.random.key(4), count).reshape(b, -1)
    widths = (b, t, h, c), (b, t, h, r), (count, PAGE, c), (count, PAGE, r)
    made = [_normal(i, *size).astype(jnp.bfloat16) for i, size in enumerate(widths)]
    arrays = (*made[:2], PagedLatents(*made[2:]), table, jnp.full((b,), length))
    scale = (128 + shape.rope) ** -0.5

    def call(i):
        return lambda *x: mla_decode(*x, scale=scale, implementation=i)[0].reshape(-1, c)

    # Rows of the result are heads of a token of a row, from the first on.
    seen = length - t + 1
    truth = [
        _attention([x[i, j] for x in made[:2]], [x[table[i]] for x in made[2:]], seen + j, scale)
        for i, j in np.ndindex(b, t)
        if (i * t + j) * h < CORNER
    ]
    return Case(
        arrays=arrays,
        call=call,
        xla=call("xla"),
        xla_arrays=arrays,
        truth=np.concatenate(truth),
        flops=2 * b * t * h * length * (2 * c + shape.rope),
        traffic=2 * b * (length * (c + shape.rope) + t * h * (2 * c + shape.rope)),
        bits=16,
        tiles=(
            "mla_decode",
            dict(batch=b, queries=t, heads=h, page=PAGE),
            tuple((n,) for n in (128, 256, 512, 1024)),
        ),
    )


OPS: dict[str, tuple[dict[str, Any], Callable[[Any], Case]]] = {
    "fp8_quantize": (shapes.MATMUL, fp8_quantize),
    "fp8_matmul": (shapes.MATMUL, fp8_matmul),
    "fp8_dgrad": (shapes.MATMUL, fp8_input_gradient),
    "fp8_wgrad": (shapes.MATMUL, fp8_weight_gradient),
    "grouped_matmul": (shapes.GROUPED, grouped),
    "fp8_grouped_matmul": (shapes.GROUPED, fp8_grouped),
    "softmax_xent": (shapes.HEAD, head),
    "causal_attention": (shapes.ATTENTION, attention),
    "mla_decode": (shapes.MLA_DECODE, decode),
}


def corner(result: Any) -> np.ndarray:
    """The part of a result that `truth` has."""
    if isinstance(result, Scaled):
        return _of_tiles(result, CORNER)[:, :CORNER]
    return np.float64(result[:CORNER, :CORNER])


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def _sizes(m, e):
    """Rows of each group as a router that is not quite balanced gives them."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.multinomial(m, rng.dirichlet(np.full(e, 4.0))), jnp.int32)


def _active(sizes):
    return int((np.asarray(sizes) > 0).sum())


def _of_tiles(x: Scaled, rows: int) -> np.ndarray:
    return np.float64(x.values[:rows]) * np.repeat(np.float64(x.scale[:rows]), BLOCK, 1)


def _of_blocks(values, scale) -> np.ndarray:
    """The first CORNER columns (of the first block) in float64."""
    return np.float64(values[:, :CORNER]) * np.repeat(np.float64(scale[:, 0]), BLOCK)[:, None]


def _attention(queries, pages, seen: int, scale: float) -> np.ndarray:
    """[H, CORNER of C] float64: one token's heads over the first `seen` keys of its pages."""
    keys = [np.float64(x).reshape(-1, x.shape[-1])[:seen] for x in pages]
    s = sum(np.float64(q) @ k.T for q, k in zip(queries, keys, strict=True)) * scale
    e = np.exp(s - s.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True) @ keys[0][:, :CORNER]


def _by_group(x: np.ndarray, w_of: Callable, sizes: jax.Array) -> np.ndarray:
    group = np.repeat(np.arange(len(sizes)), np.asarray(sizes))[: len(x)]
    rows: Iterator = (x[i : i + 1] @ w_of(g) for i, g in enumerate(group))
    return np.concatenate(list(rows))
