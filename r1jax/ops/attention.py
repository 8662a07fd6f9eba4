# SPDX-License-Identifier: Apache-2.0
"""Attention cores as pure functions: multi-head latent (naive and absorbed) and grouped-query.

Every function takes its keys as *parts*: arrays whose batch either equals the queries' batch B or
divides it, in which case a part's row p serves the queries of rows p·G … p·G + G − 1. So the G
samples of one prompt attend to one copy of the prompt's cache.

From `LONG` query-key pairs on one part is attended to block by block, on TPUs by a kernel
(`pallas_kernels.causal_attention`): the same in exact arithmetic, but for queries that may attend
to no key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.causal_attention import causal_attention, causal_mask
from pallas_kernels.causal_attention.ref import attend
from pallas_kernels.chips import present
from r1jax.ops.linear import FP8, linear
from r1jax.ops.rowwise import Operands, attend_rows

FEW_KEYS = 128  # of a row, that queries are multiplied by from the left
LONG = 2**18  # T · S of a head: below, whole logits are as fast (experiments/log/006_…)
MANY = 2**18  # logits of a row, all heads: from here on a CPU is faster a row at a time
NEG = -1e30  # finite: a query without any key gets uniform weights, not NaN


class Causal(NamedTuple):
    """Attention to one's own document, as far as one has come, in place of a mask: kernels go by
    the segments.

    Attributes:
        mask_BTS: [B, T, S] the same as a mask.
        segments_BT: [B, T] segments of the queries, 0 is padding.
        keys_BS: [B, S] those of the keys; None: the queries' own.
        pieces: P numbers: the queries are so many stretches of T / P keys, one behind the other,
            and these.
    """

    mask_BTS: jax.Array
    segments_BT: jax.Array
    keys_BS: jax.Array | None
    pieces: tuple[jax.Array | int, ...]

    @classmethod
    def of(
        cls, segments_BT, keys_BS=None, *, pieces: tuple[jax.Array | int, ...] = (0,)
    ) -> "Causal":
        """With the mask of `causal_mask`, which nothing computes unless it is asked for."""
        parts = zip(jnp.split(segments_BT, len(pieces), axis=1), pieces, strict=True)
        masks = [causal_mask(own, keys_BS, piece=piece) for own, piece in parts]
        return cls(jnp.concatenate(masks, 1), segments_BT, keys_BS, pieces)


class LatentPart(NamedTuple):
    """Latents of one stretch of keys: what MLA caches, C + R = 576 values a token in V3.

    Attributes:
        c_PSC: [P, S, C] normalised compressed key-value latents.
        k_rope_PSR: [P, S, R] rotated decoupled keys, shared by all heads.
        sight: [B, T, S] mask, True where query t of row b may attend to key s; or `Causal`.
    """

    c_PSC: jax.Array
    k_rope_PSR: jax.Array
    sight: jax.Array | Causal

    @property
    def mask_BTS(self) -> jax.Array:
        """The mask."""
        return _mask(self.sight)


class KVPart(NamedTuple):
    """Keys and values of one stretch, k_PSJK, v_PSJK [P, S, J kv heads, K]; `sight` as above."""

    k_PSJK: jax.Array
    v_PSJK: jax.Array
    sight: jax.Array | Causal

    @property
    def mask_BTS(self) -> jax.Array:
        """The mask."""
        return _mask(self.sight)


def _mask(sight: jax.Array | Causal) -> jax.Array:
    return sight.mask_BTS if isinstance(sight, Causal) else sight


def mla_naive(
    q_nope_BTHK: jax.Array,
    q_rope_BTHR: jax.Array,
    part: LatentPart,
    w_uk_CHK: jax.Array,
    w_uv_CHV: jax.Array,
    *,
    scale: float,
    fp8: FP8 | None = None,
    backend: str | None = None,
) -> jax.Array:
    """MLA with keys and values expanded to all heads (DeepSeek-V3 eq. 1–11): for training.

    k = [W^UK c ; k^R], v = W^UV c, o = softmax(q·k · scale) v. The part's batch must be B.

    Args:
        q_nope_BTHK: [B, T, H, K] queries without position.
        q_rope_BTHR: [B, T, H, R] rotated queries.
        part: latents of the keys.
        w_uk_CHK: [C, H, K] key up-projection.
        w_uv_CHV: [C, H, V] value up-projection.
        scale: softmax scale, (K + R)^-0.5 times YaRN's m².
        fp8: of the two up-projections, as in `linear`; attention itself is not quantised.
        backend: that it is compiled for; None: of the mesh in force or the default.

    Returns:
        [B, T, H, V] in q's dtype; logits and softmax are float32.
    """
    dtype = q_nope_BTHK.dtype
    k_BSHK = linear("bsc,chk->bshk", part.c_PSC, w_uk_CHK, fp8)
    v_BSHV = linear("bsc,chv->bshv", part.c_PSC, w_uv_CHV, fp8)
    if _by_rows(q_nope_BTHK, k_BSHK, backend or present()[0]):
        x = Operands(q_nope_BTHK, q_rope_BTHR, k_BSHK, part.k_rope_PSR, v_BSHV)
        causal = isinstance(part.sight, Causal) and part.sight.keys_BS is None
        return attend_rows(x, part.mask_BTS, scale, causal)
    shared_BSHR = jnp.broadcast_to(
        part.k_rope_PSR[:, :, None], (*k_BSHK.shape[:3], part.k_rope_PSR.shape[-1])
    )
    q_BTHK = jnp.concatenate([q_nope_BTHK, q_rope_BTHR], -1)
    k_BSHK = jnp.concatenate([k_BSHK, shared_BSHR], -1)
    if _long((part,), q_BTHK):
        heads = lambda x: jnp.moveaxis(x, 1, 2)  # noqa: E731
        q_BH1TK = heads(q_BTHK)[:, :, None]
        out = _by_block(q_BH1TK, heads(k_BSHK), heads(v_BSHV), part.sight, scale)
        return jnp.moveaxis(out[:, :, 0], 2, 1)
    logits = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    weights = _softmax(logits * scale, part.mask_BTS[:, None]).astype(dtype)
    return jnp.einsum("bhts,bshv->bthv", weights, v_BSHV)


def mla_absorbed(
    q_nope_BTHK: jax.Array,
    q_rope_BTHR: jax.Array,
    parts: tuple[LatentPart, ...],
    w_uk_CHK: jax.Array,
    w_uv_CHV: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """MLA inside the latent space: for decoding. Equal to `mla_naive` in exact arithmetic.

    q·W^UK c = (W^UKᵀ q)·c, so the query is carried to the latent space once, attends to the latents
    themselves, and the mean latent is carried out by W^UV: no key or value is ever expanded.

    Args and Returns: as `mla_naive`, with one or more parts whose batch divides B.
    """
    dtype = q_nope_BTHK.dtype
    q_BTHC = jnp.einsum("bthk,chk->bthc", q_nope_BTHK, w_uk_CHK.astype(dtype))
    if _long(parts, q_BTHC):
        (part,) = parts
        q_BHTE = jnp.moveaxis(jnp.concatenate([q_BTHC, q_rope_BTHR], -1), 1, 2)
        k_BSE = jnp.concatenate([part.c_PSC, part.k_rope_PSR], -1)
        operands = q_BHTE[:, None], k_BSE[:, None], part.c_PSC[:, None]
        mean_BHTC = _by_block(*operands, part.sight, scale)[:, 0]
        return jnp.einsum("bhtc,chv->bthv", mean_BHTC, w_uv_CHV.astype(dtype))
    b, t, h, _ = q_BTHC.shape
    logits, masks = [], []
    for part in parts:  # rows of queries are (sample, time, head), as they lie: nothing is moved
        n = part.c_PSC.shape[0]
        one = _scores(q_BTHC.reshape(n, -1, q_BTHC.shape[-1]), part.c_PSC)
        one += _scores(q_rope_BTHR.reshape(n, -1, q_rope_BTHR.shape[-1]), part.k_rope_PSR)
        logits.append(one.reshape(b, t, h, -1))
        masks.append(part.mask_BTS[:, :, None])
    weights = _softmax(jnp.concatenate(logits, -1) * scale, jnp.concatenate(masks, -1))
    mean_BTHC, start = jnp.zeros_like(q_BTHC), 0
    for part in parts:
        n, s = part.c_PSC.shape[:2]
        w = weights[..., start : start + s].astype(dtype).reshape(n, -1, s)
        mean_BTHC += jnp.einsum("pqs,psc->pqc", w, part.c_PSC).reshape(q_BTHC.shape)
        start += s
    return jnp.einsum("bthc,chv->bthv", mean_BTHC, w_uv_CHV.astype(dtype))


def _scores(q_PQC: jax.Array, k_PSC: jax.Array) -> jax.Array:
    """[P, Q, S] float32."""
    return jnp.einsum("pqc,psc->pqs", q_PQC, k_PSC, preferred_element_type=jnp.float32)


def _grouped_scores(q_PGTJIK: jax.Array, k_PSJK: jax.Array) -> jax.Array:
    """[P, G, J, I, T, S] float32.

    XLA:CPU multiplies few keys faster as queries times keys, many as `einsum` has them, keys times
    queries: 0.5 and 1.3 times the time at 32 and 1,024 keys a row.
    """
    how = dict(preferred_element_type=jnp.float32)
    if k_PSJK.shape[1] > FEW_KEYS:
        return jnp.einsum("pgtjik,psjk->pgjits", q_PGTJIK, k_PSJK, **how)
    q_PJGITK = q_PGTJIK.transpose(0, 3, 1, 4, 2, 5)
    return jnp.einsum("pjgitk,psjk->pjgits", q_PJGITK, k_PSJK, **how).swapaxes(1, 2)


def gqa(q_BTHK: jax.Array, parts: tuple[KVPart, ...], *, scale: float) -> jax.Array:
    """Grouped-query attention (Ainslie et al. 2023): H query heads share J key-value heads.

    Args:
        q_BTHK: [B, T, H, K] rotated queries; head h uses key-value head h // (H / J).
        parts: keys and values, batch dividing B.
        scale: softmax scale, K^-0.5.

    Returns:
        [B, T, H, K] in q's dtype; logits and softmax are float32.
    """
    dtype = q_BTHK.dtype
    b, t, h, k = q_BTHK.shape
    heads = parts[0].k_PSJK.shape[2]
    q = q_BTHK.reshape(b, t, heads, h // heads, k)
    if _long(parts, q_BTHK):
        (part,) = parts
        keys, values = jnp.moveaxis(part.k_PSJK, 1, 2), jnp.moveaxis(part.v_PSJK, 1, 2)
        out = _by_block(jnp.moveaxis(q, 1, 3), keys, values, part.sight, scale)
        return jnp.moveaxis(out, 3, 1).reshape(q_BTHK.shape)
    logits, masks = [], []
    for part in parts:
        one = _grouped_scores(_group(q, part.k_PSJK.shape[0]), part.k_PSJK)
        logits.append(one.reshape(b, *one.shape[2:]))
        masks.append(part.mask_BTS[:, None, None])
    weights = _softmax(jnp.concatenate(logits, -1) * scale, jnp.concatenate(masks, -1))
    out, start = jnp.zeros_like(q), 0
    for part in parts:  # weights times values in the order in which they come out, for XLA:CPU
        n, s = part.k_PSJK.shape[:2]
        w_PJGITS = _group(weights[..., start : start + s].astype(dtype), n).swapaxes(1, 2)
        one = jnp.einsum("pjgits,psjk->pjgitk", w_PJGITS, part.v_PSJK)
        out += one.transpose(0, 2, 4, 1, 3, 5).reshape(q.shape)
        start += s
    return out.reshape(q_BTHK.shape)


def _long(parts: tuple[LatentPart | KVPart, ...], q_BTHK: jax.Array) -> bool:
    """Whether the keys are one part of the queries' batch, and many."""
    mask_BTS = parts[0].mask_BTS
    one = len(parts) == 1 and parts[0][0].shape[0] == q_BTHK.shape[0]
    return one and mask_BTS.shape[1] * mask_BTS.shape[2] >= LONG and mask_BTS.shape[1] > 16


def _by_block(q_BJGTK, k_BJSK, v_BJSV, sight: jax.Array | Causal, scale: float) -> jax.Array:
    """[B, J, G, T, V] attention that never holds whole logits."""
    if not isinstance(sight, Causal):
        return attend(q_BJGTK, k_BJSK, v_BJSV, sight, scale)
    cut = lambda x, axis: jnp.split(x, len(sight.pieces), axis=axis)  # noqa: E731
    parts = zip(cut(q_BJGTK, 3), cut(sight.segments_BT, 1), sight.pieces, strict=True)
    out = [
        causal_attention(q, k_BJSK, v_BJSV, own, sight.keys_BS, piece=piece, scale=scale)
        for q, own, piece in parts
    ]
    return jnp.concatenate(out, 3)


def _by_rows(q_BTHK: jax.Array, k_BSHK: jax.Array, backend: str) -> bool:
    """Whether a CPU attends a row at a time: rows of many logits, but not yet `LONG`.

    Rows that an Explicit mesh may have cut are not gone through one by one.
    """
    if jax.sharding.get_abstract_mesh().are_all_axes_explicit:
        return False
    t, s = q_BTHK.shape[1], k_BSHK.shape[1]
    return backend == "cpu" and t * s < LONG and t * s * q_BTHK.shape[2] >= MANY


def _group(x: jax.Array, n: int) -> jax.Array:
    """[B, ...] → [n, B / n, ...]: the queries of each row of a part."""
    return x.reshape(n, x.shape[0] // n, *x.shape[1:])


def _softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask, logits, NEG), axis=-1)
