# SPDX-License-Identifier: Apache-2.0
"""Paged latent attention in plain jnp: for CPU and for XLA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Backend

LOWEST = float(jnp.finfo(jnp.float32).min)  # finite: the difference of two such is not NaN


class PagedLatents(NamedTuple):
    """What MLA caches, in pages that any row may point to: C + R = 576 values a token in V3.

    Attributes:
        latent_NSC: [N pages, S tokens a page, C] compressed key-value latents; bfloat16, float32 or
            float8_e4m3fn.
        rope_NSR: [N, S, R] rotated decoupled keys, bfloat16 or float32. On TPU fill R (here and in
            queries) up to 128 with zeros: of fewer columns XLA lays pages along the lanes, and
            copies them all for the kernel in each call of a program that takes them as arguments.
        scale_NS: [N, S] float32, each token's latent is `latent · scale`; for float8 latents alone.
    """

    latent_NSC: jax.Array
    rope_NSR: jax.Array
    scale_NS: jax.Array | None = None


class Query(NamedTuple):
    """Checked arguments: queries, the table and lengths in int32 and within bounds."""

    latent_BTHC: jax.Array
    rope_BTHR: jax.Array
    table_BP: jax.Array
    lengths_B: jax.Array


def decode(
    query: Query,
    cache: PagedLatents,
    *,
    scale: float,
    splits: int | None,
    keys: int | None,
    backend: Backend,
) -> tuple[jax.Array, jax.Array]:
    """(out [K, B, T, H, C], lse [K, B, T, H] float32) of the keys in K = `splits` stretches."""
    del keys, backend  # all keys of a stretch are one block
    splits = splits or 1  # one stretch is as fast where nothing runs beside
    b, t, h, _ = query.latent_BTHC.shape
    dtype = query.latent_BTHC.dtype
    flat = lambda x: x[query.table_BP].reshape(b, -1, *x.shape[2:])  # noqa: E731
    latent_BSC, rope_BSR = flat(cache.latent_NSC), flat(cache.rope_NSR).astype(dtype)
    if cache.scale_NS is not None:
        latent_BSC = latent_BSC.astype(jnp.float32) * flat(cache.scale_NS)[..., None]
    key_S = jnp.arange(latent_BSC.shape[1])
    # What lies behind a row's end may be anything, NaN too.
    held_BS1 = (key_S < query.lengths_B[:, None])[..., None]
    latent_BSC = jnp.where(held_BS1, latent_BSC, 0).astype(dtype)
    allowed_BTS = key_S < limits(query.lengths_B, t)[..., None]
    logits = jnp.einsum(
        "bthc,bsc->bths", query.latent_BTHC, latent_BSC, preferred_element_type=jnp.float32
    ) + jnp.einsum("bthr,bsr->bths", query.rope_BTHR, rope_BSR, preferred_element_type=jnp.float32)
    logits = jnp.where(allowed_BTS[:, :, None], logits * scale, -jnp.inf)
    size = -(-len(key_S) // splits)
    parts = [
        _attend(logits[..., i * size : (i + 1) * size], latent_BSC[:, i * size : (i + 1) * size])
        for i in range(splits)
    ]
    out, lse = zip(*parts, strict=True)
    return jnp.stack(out), jnp.stack(lse)


def limits(lengths_B: jax.Array, t: int) -> jax.Array:
    """[B, T]: query t may attend to the keys before this one; the last query to all of them."""
    return lengths_B[:, None] - t + 1 + jnp.arange(t)


def merge(out_KBTHC: jax.Array, lse_KBTH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over K sets of keys from the attention over each (FlashAttention, 2205.14135).

    lse = log Σ_k exp(lse_k), out = Σ_k exp(lse_k − lse) out_k; a set without a key has lse −inf.

    Args:
        out_KBTHC: [K, ...B, T, H, C] outputs.
        lse_KBTH: [K, ...B, T, H] float32 log-sum-exps of the scaled logits.

    Returns:
        (out, lse) without K; out in its dtype, zero where no set had a key.
    """
    peak = jnp.maximum(lse_KBTH.max(0), LOWEST)
    weight_KBTH = jnp.exp(lse_KBTH - peak)
    total = weight_KBTH.sum(0)
    share_KBTH = weight_KBTH / jnp.where(total > 0, total, 1.0)
    out = (share_KBTH[..., None] * out_KBTHC.astype(jnp.float32)).sum(0)
    return out.astype(out_KBTHC.dtype), peak + jnp.log(total)


def _attend(logits_BTHS: jax.Array, latent_BSC: jax.Array) -> tuple[jax.Array, jax.Array]:
    peak = jnp.maximum(logits_BTHS.max(-1, initial=-jnp.inf), LOWEST)
    weight = jnp.exp(logits_BTHS - peak[..., None])
    total = weight.sum(-1)
    mean = jnp.einsum(
        "bths,bsc->bthc",
        weight.astype(latent_BSC.dtype),
        latent_BSC,
        preferred_element_type=jnp.float32,
    )
    mean = mean / jnp.where(total > 0, total, 1.0)[..., None]
    return mean.astype(latent_BSC.dtype), peak + jnp.log(total)
