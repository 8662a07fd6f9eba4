# SPDX-License-Identifier: Apache-2.0
"""Causal attention of documents packed into rows, each key-value head shared by G query heads."""

from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.causal_attention import ref
from pallas_kernels.dispatch import Implementation, Unsupported, run


def causal_attention(
    q_BJGTK: jax.Array,
    k_BJSK: jax.Array,
    v_BJSV: jax.Array,
    segments_BT: jax.Array,
    keys_BS: jax.Array | None = None,
    *,
    piece: jax.Array | int = 0,
    scale: float,
    implementation: Implementation = None,
) -> jax.Array:
    """softmax(q·k · scale) v over the keys of a query's document that are not behind it.

    No logits [T, S] are ever whole: the softmax runs along the keys (Milakov and Gimelshein 2018,
    arXiv 1805.02867), the gradient makes each block again (FlashAttention-2, arXiv 2307.08691).
    "tpu" is JAX's splash attention, which skips blocks that lie behind the queries and multiplies
    bfloat16; "xla" is the same in plain JAX, skips every block that no query of a block sees, and
    has any length and dtype. Logits, softmax and sums are float32.

    Args:
        q_BJGTK: [B, J, G, T, K] queries, G heads for each of J key-value heads.
        k_BJSK: [B, J, S, K] keys.
        v_BJSV: [B, J, S, V] values; V need not be K.
        segments_BT: [B, T] int32, the document of each query; 0 is padding, which gives 0.
        keys_BS: [B, S] documents of the keys, S a multiple of T; None: the queries' own, S = T.
        piece: which of the S / T pieces of the rows the queries are, as on meshes that cut rows;
            may be traced.
        scale: softmax scale.
        implementation: as in `pallas_kernels.dispatch`.

    Returns:
        [B, J, G, T, V] in q's dtype. It has a gradient in reverse mode, and no second one.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        Unsupported: an implementation that was asked for and cannot.
    """
    keys_BS = segments_BT if keys_BS is None else keys_BS
    _check(q_BJGTK, k_BJSK, v_BJSV, segments_BT, keys_BS)

    def call(backend):
        if backend.name == "xla":
            mask_BTS = ref.causal_mask(segments_BT, keys_BS, piece=piece)
            return ref.attend(q_BJGTK, k_BJSK, v_BJSV, mask_BTS, scale)
        if backend.name == "gpu":
            raise Unsupported("causal_attention has no kernel for GPUs; 'xla' runs there")
        segments = ref.Segments(segments_BT, keys_BS, piece)
        how = dict(scale=scale, backend=backend)
        return _tpu().attend(q_BJGTK, k_BJSK, v_BJSV, segments, **how)

    with jax.named_scope("causal_attention"):
        return run(implementation, call)


def _tpu() -> ModuleType:
    """Pallas takes half a second to import, which runs on CPU need not wait for."""
    from pallas_kernels.causal_attention import tpu

    return tpu


def _check(q, k, v, segments_BT, keys_BS) -> None:
    if q.ndim != 5 or k.ndim != 4 or v.ndim != 4:
        wrong = "q [B, J, G, T, K], k [B, J, S, K] and v [B, J, S, V] expected"
    elif q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        wrong = "q [B, J, G, T, K] and k [B, J, S, K] must share B, J and K"
    elif k.shape[:3] != v.shape[:3]:
        wrong = "k [B, J, S, K] and v [B, J, S, V] must share B, J and S"
    elif segments_BT.shape != (q.shape[0], q.shape[3]):
        wrong = f"segments {list(segments_BT.shape)} must be [B, T]"
    elif keys_BS.shape != (k.shape[0], k.shape[2]):
        wrong = f"segments of the keys {list(keys_BS.shape)} must be [B, S]"
    elif q.shape[3] == 0 or k.shape[2] % q.shape[3]:
        wrong = "the keys' S must be a multiple of the queries' T > 0"
    elif not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        wrong = "q, k and v must have one floating dtype"
    elif not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (segments_BT, keys_BS)):
        wrong = "segments must be integer"
    else:
        return
    of = lambda x: f"{x.dtype}{list(x.shape)}"  # noqa: E731
    raise ValueError(f"{wrong}; got q {of(q)}, k {of(k)}, v {of(v)}")
