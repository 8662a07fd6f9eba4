# SPDX-License-Identifier: Apache-2.0
"""Absorbed multi-head latent attention over a paged cache."""

import math
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, run
from pallas_kernels.mla_decode import gpu, ref, tpu
from pallas_kernels.mla_decode.ref import PagedLatents

BACKENDS: dict[str, ModuleType] = {"xla": ref, "tpu": tpu, "gpu": gpu}
MOST_QUERIES = 8
FLOATS = ("float32", "bfloat16")


def mla_decode(
    q_latent_BTHC: jax.Array,
    q_rope_BTHR: jax.Array,
    cache: PagedLatents,
    page_table_BP: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
    splits: int | None = None,
    keys: int | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax((q_latent · c + q_rope · k_rope) scale) c, c the cached latents, in latent space.

    The absorbed form of MLA (DeepSeek-V2, arXiv 2405.04434, §2.1.3): queries have been carried to
    the latent space by W^UK, results are carried out of it by W^UV. The T queries of a row are its
    newest T tokens, already in the cache: query t sees the keys before lengths − T + 1 + t. So one
    query decodes, several verify a speculated continuation. Keys may be gone through in `splits`
    stretches that are merged by their log-sum-exps (Flash-Decoding).

    Slots behind a row's length may hold anything, and table entries that reach no such slot may be
    any number. A query that sees no key gives 0 and lse −inf. Logits, softmax and sums are float32.

    Args:
        q_latent_BTHC: [B, T, H, C] queries in latent space, bfloat16 or float32; T from 1 to 8.
        q_rope_BTHR: [B, T, H, R] rotated queries, the same dtype.
        cache: pages; float8_e4m3fn latents come with a scale a token.
        page_table_BP: [B, P] integer: row b's token s is in page table[b, s // S].
        lengths_B: [B] integer tokens of each row with the T new ones; at most P · S count.
        scale: softmax scale, (qk_nope + qk_rope)^-0.5 times YaRN's m².
        splits: stretches of keys; None chooses.
        keys: keys of a block of a kernel, in whole pages; None chooses.
        implementation: as in `pallas_kernels.dispatch`. Only "xla" has a gradient.

    Returns:
        (out_BTHC, lse_BTH): [B, T, H, C] in q's dtype and [B, T, H] float32, the log-sum-exp of the
        scaled logits, by which `merge` joins results over other keys.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        Unsupported: an implementation that was asked for and cannot.
    """
    _check(q_latent_BTHC, q_rope_BTHR, cache, page_table_BP, lengths_B)
    _check_numbers(scale, splits, keys)
    pages, size = cache.latent_NSC.shape[:2]
    query = ref.Query(
        q_latent_BTHC,
        q_rope_BTHR,
        jnp.clip(page_table_BP.astype(jnp.int32), 0, pages - 1),
        jnp.clip(lengths_B.astype(jnp.int32), 0, page_table_BP.shape[1] * size),
    )

    wanted = dict(scale=scale, splits=splits, keys=keys)
    with jax.named_scope("mla_decode"):
        call = lambda backend: BACKENDS[backend.name].decode(  # noqa: E731
            query, cache, **wanted, backend=backend
        )
        out, lse = run(implementation, call)
        return ref.merge(out, lse) if len(out) > 1 else (out[0], lse[0])


def _check_numbers(scale, splits, keys) -> None:
    if not math.isfinite(scale) or any(x is not None and x < 1 for x in (splits, keys)):
        raise ValueError(f"{scale=} must be finite, {splits=} and {keys=} positive or None")


def _check(q_latent, q_rope, cache, table, lengths) -> None:
    ranks = tuple(x.ndim for x in (q_latent, q_rope, *cache[:2], table, lengths))
    if ranks != (4, 4, 3, 3, 2, 1):
        wrong = (
            "q [B, T, H, C], q [B, T, H, R], pages [N, S, C] and [N, S, R], [B, P], [B] expected"
        )
    elif q_latent.shape[:3] != q_rope.shape[:3]:
        wrong = "both queries must share [B, T, H]"
    elif not 1 <= q_latent.shape[1] <= MOST_QUERIES:
        wrong = f"1 to {MOST_QUERIES} query tokens expected"
    elif cache.latent_NSC.shape[:2] != cache.rope_NSR.shape[:2]:
        wrong = "both pages must share [N, S]"
    elif (q_latent.shape[3], q_rope.shape[3]) != (cache[0].shape[2], cache[1].shape[2]):
        wrong = "queries and pages must share C and R"
    elif not len(q_latent) == len(table) == len(lengths):
        wrong = "queries, table and lengths must share B"
    elif 0 in (*q_latent.shape[2:], *cache[0].shape, *cache[1].shape, *table.shape[1:]):
        wrong = "only B may be 0"
    elif q_latent.dtype != q_rope.dtype or q_latent.dtype.name not in FLOATS:
        wrong = f"both queries must be one of {FLOATS}"
    elif cache.rope_NSR.dtype.name not in FLOATS:
        wrong = f"rope pages must be one of {FLOATS}"
    elif cache.latent_NSC.dtype.name not in (*FLOATS, "float8_e4m3fn"):
        wrong = f"latent pages must be float8_e4m3fn or one of {FLOATS}"
    elif (cache.scale_NS is None) != (cache.latent_NSC.dtype.name != "float8_e4m3fn"):
        wrong = "scales belong to float8_e4m3fn latents, and must be given with them"
    elif cache.scale_NS is not None and cache.scale_NS.shape != cache.latent_NSC.shape[:2]:
        wrong = "scales must be [N, S]"
    elif not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (table, lengths)):
        wrong = "table and lengths must be integer"
    else:
        return
    names = ("q_latent", "q_rope", *(f"cache.{name}" for name in cache._fields), "table", "lengths")
    told = ", ".join(
        f"{name} {x.dtype}{list(x.shape)}"
        for name, x in zip(names, (q_latent, q_rope, *cache, table, lengths), strict=True)
        if x is not None
    )
    raise ValueError(f"{wrong}; got {told}")
