# SPDX-License-Identifier: Apache-2.0
"""Paged caches of latents, attention over them in numpy float64, and the comparison with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mla_decode import PagedLatents, mla_decode
from tests.kernels.conformance import BFLOAT16_ERROR, FLOAT32_ERROR, error

# Rows, pages of a row, tokens of a page; then lengths: none, one, not a whole page, full.
ROWS, PAGES, SIZE = 5, 6, 32
LENGTHS = [0, 1, 75, 64, 192]
SCALE = 0.2


def cache_of(pages, size, c, r, *, dtype="float32", seed=0):
    """(cache, the same latents in float64), what an inference program would hold."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(pages, size, c)).astype(np.float32)
    rope = jnp.asarray(
        rng.normal(size=(pages, size, r)), "bfloat16" if dtype == "bfloat16" else "float32"
    )
    if dtype != "float8_e4m3fn":
        latent = jnp.asarray(latent, dtype)
        return PagedLatents(latent, rope), np.asarray(latent, np.float64)
    scale = (np.abs(latent).max(-1) / 448).astype(np.float32)
    latent = jnp.asarray(latent / scale[..., None], dtype)
    exact = np.asarray(latent, np.float64) * scale[..., None]
    return PagedLatents(latent, rope, jnp.asarray(scale)), exact


def queries_of(b, t, h, c, r, *, dtype="float32", seed=1):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(b, t, h, width)), dtype) for width in (c, r)]


def true(queries, latents, rope, table, lengths):
    """(out, lse) of every row and query token by itself, in float64."""
    q_latent, q_rope, rope = (np.asarray(x, np.float64) for x in (*queries, rope))
    out, lse = np.zeros(q_latent.shape), np.full(q_latent.shape[:3], -np.inf)
    for b, t in np.ndindex(q_latent.shape[:2]):
        n = lengths[b] - q_latent.shape[1] + 1 + t
        if n > 0:
            c, k = (x[table[b]].reshape(-1, x.shape[-1])[:n] for x in (latents, rope))
            s = (q_latent[b, t] @ c.T + q_rope[b, t] @ k.T) * SCALE
            peak = s.max(-1)
            e = np.exp(s - peak[:, None])
            out[b, t], lse[b, t] = e @ c / e.sum(-1, keepdims=True), peak + np.log(e.sum(-1))
    return out, lse


@functools.partial(jax.jit, static_argnums=(3, 4))
def found(queries, cache, rows, wanted, backend):
    """What `mla_decode` gives; `rows`: (table, lengths), `wanted`: (splits, keys)."""
    splits, keys = wanted
    kernel = functools.partial(mla_decode, splits=splits, keys=keys, implementation=backend)
    return kernel(*queries, cache, *rows, scale=SCALE)


def check(queries, made, table, lengths, *, splits=None, keys=None, backend):
    """Output and log-sum-exp against `true`; `made`: of `cache_of`."""
    cache, latents = made
    table, lengths = (np.asarray(x, np.int32) for x in (table, lengths))
    out, lse = found(queries, cache, (table, lengths), (splits, keys), backend)
    want_out, want_lse = true(queries, latents, cache.rope_NSR, table, lengths)
    seen = np.isfinite(want_lse)
    assert out.dtype == queries[0].dtype
    assert lse.dtype == jnp.float32
    assert (np.isneginf(lse) == ~seen).all()
    # In bfloat16 the weights are rounded before their product with the latents, then the result.
    most = FLOAT32_ERROR if out.dtype == jnp.float32 else 2 * BFLOAT16_ERROR
    assert error(out, want_out) < most
    assert error(np.where(seen, lse, 0), np.where(seen, want_lse, 0)) < FLOAT32_ERROR
    assert not np.asarray(out, np.float32)[~seen].any()


def table_of(seed=0, distinct=True):
    rng = np.random.default_rng(seed)
    pages = ROWS * PAGES
    return (rng.permutation(pages) if distinct else rng.integers(0, pages, pages)).reshape(
        ROWS, PAGES
    )
