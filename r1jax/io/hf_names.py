# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a Hugging Face checkpoint is which part of our parameter tree: a table.

A row reads: our path, their name, how their matrix lies in our array (`ops.quant.Layout`). Rows of
a layer are repeated for every layer of a stack, rows of an expert for every expert.
"""

from collections.abc import Iterator
from typing import NamedTuple

from r1jax.config import DenseConfig, MLAConfig, ModelConfig, MoEConfig
from r1jax.ops.quant import Layout


class Row(NamedTuple):
    """`ours` under a block (or the model) is made from `theirs` under a layer (or the model)."""

    ours: str
    theirs: str
    layout: Layout


class Place(NamedTuple):
    """Where one tensor of the checkpoint goes.

    Attributes:
        path: of the stacked array in our tree, as `moe_layers.attention.w_uk`.
        index: layer and expert in its leading axes.
        name: of the tensor.
        layout: how it lies in the array at `index`.
    """

    path: str
    index: tuple[int, ...]
    name: str
    layout: Layout


def linear(out: int, into: int, *split: int, part: tuple[int, int] | None = None) -> Layout:
    """A projection [out, in]: ours is [in, out], its axes split into `split`."""
    return Layout((out, into), split or None, part)


def vector(n: int, *split: int) -> Layout:
    """A gain or bias [n], split into `split`."""
    return Layout((n,), split or None)


def table(rows: int, dim: int) -> Layout:
    """An embedding [rows, dim], the same on both sides."""
    return Layout((rows, dim), transposed=False)


def mla_rows(d: int, c: MLAConfig) -> list[Row]:
    """Latent attention of one layer."""
    h, r, v = c.num_heads, c.qk_rope_head_dim, c.v_head_dim
    k, q, lat = c.qk_nope_head_dim, c.q_lora_rank, c.kv_lora_rank
    down, up = (lat + r, d), (h * (k + v), lat, lat, h, k + v)
    if q is None:
        query = [Row("w_q", "q_proj.weight", linear(h * (k + r), d, d, h, k + r))]
    else:
        query = [
            Row("w_dq", "q_a_proj.weight", linear(q, d)),
            Row("q_norm.weight", "q_a_layernorm.weight", vector(q)),
            Row("w_uq", "q_b_proj.weight", linear(h * (k + r), q, q, h, k + r)),
        ]
    return [
        *query,
        Row("w_dkv", "kv_a_proj_with_mqa.weight", linear(*down, part=(0, lat))),
        Row("w_kr", "kv_a_proj_with_mqa.weight", linear(*down, part=(lat, lat + r))),
        Row("kv_norm.weight", "kv_a_layernorm.weight", vector(lat)),
        Row("w_uk", "kv_b_proj.weight", linear(*up, part=(0, k))),
        Row("w_uv", "kv_b_proj.weight", linear(*up, part=(k, k + v))),
        Row("w_o", "o_proj.weight", linear(d, h * v, h, v, d)),
    ]


def gqa_rows(c: DenseConfig) -> list[Row]:
    """Grouped-query attention of one layer."""
    d, h, j, k = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    rows = [
        Row("w_q", "q_proj.weight", linear(h * k, d, d, h, k)),
        Row("w_k", "k_proj.weight", linear(j * k, d, d, j, k)),
        Row("w_v", "v_proj.weight", linear(j * k, d, d, j, k)),
        Row("w_o", "o_proj.weight", linear(d, h * k, h, k, d)),
    ]
    if c.qkv_bias:
        rows += [
            Row("b_q", "q_proj.bias", vector(h * k, h, k)),
            Row("b_k", "k_proj.bias", vector(j * k, j, k)),
            Row("b_v", "v_proj.bias", vector(j * k, j, k)),
        ]
    if c.qk_norm:
        rows += [Row(f"{n}.weight", f"{n}.weight", vector(k)) for n in ("q_norm", "k_norm")]
    return rows


def swiglu_rows(d: int, f: int) -> list[Row]:
    """A gated feed-forward network."""
    return [
        Row("w_gate", "gate_proj.weight", linear(f, d)),
        Row("w_up", "up_proj.weight", linear(f, d)),
        Row("w_down", "down_proj.weight", linear(d, f)),
    ]


def moe_rows(d: int, c: MoEConfig) -> list[Row]:
    """Router and shared experts of one layer; the routed ones are `swiglu_rows`, each."""
    e, f = c.n_routed_experts, c.moe_intermediate_size * c.n_shared_experts
    rows = [
        Row("router.weight", "gate.weight", linear(e, d)),
        Row("router.bias", "gate.e_score_correction_bias", vector(e)),
    ]
    if c.n_shared_experts:
        rows += under("shared.", "shared_experts.", swiglu_rows(d, f))
    return rows


def under(ours: str, theirs: str, rows: list[Row]) -> list[Row]:
    """The rows with a prefix on both sides."""
    return [Row(ours + row.ours, theirs + row.theirs, row.layout) for row in rows]


def places(cfg: ModelConfig | DenseConfig) -> list[Place]:
    """Every tensor of a checkpoint of this architecture, in the order of its layers.

    The multi-token-prediction module is the layer after the last (61 in DeepSeek-V3).
    """
    d, n = cfg.hidden_size, cfg.num_layers
    top = [
        Row("embed", "model.embed_tokens.weight", table(cfg.vocab_size, d)),
        Row("norm.weight", "model.norm.weight", vector(d)),
    ]
    if isinstance(cfg, ModelConfig) or not cfg.tie_embeddings:
        top.append(Row("head", "lm_head.weight", linear(cfg.vocab_size, d)))
    found = [Place(row.ours, (), row.theirs, row.layout) for row in top]
    if isinstance(cfg, DenseConfig):
        for i in range(n):
            found += _layer(cfg, "layers", (i,), i)
        return found
    for i in range(n):
        dense = i < cfg.first_k_dense
        stack, at = ("dense_layers", i) if dense else ("moe_layers", i - cfg.first_k_dense)
        found += _layer(cfg, stack, (at,), i)
    if cfg.mtp_depth:
        found += _mtp(cfg)
    return found


def shared_by_mtp(cfg: ModelConfig | DenseConfig) -> dict[str, str]:
    """{name under the MTP layer: the main model's tensor that it repeats}."""
    if isinstance(cfg, DenseConfig) or not cfg.mtp_depth:
        return {}
    layer = f"model.layers.{cfg.num_layers}."
    return {
        f"{layer}embed_tokens.weight": "model.embed_tokens.weight",
        f"{layer}shared_head.head.weight": "lm_head.weight",
    }


def _mtp(cfg: ModelConfig) -> Iterator[Place]:
    d, layer = cfg.hidden_size, f"model.layers.{cfg.num_layers}."
    rows = [
        Row("mtp.embed_norm.weight", "enorm.weight", vector(d)),
        Row("mtp.hidden_norm.weight", "hnorm.weight", vector(d)),
        # Theirs takes [embedding; hidden], ours [hidden; embedding] as in eq. 21.
        Row("mtp.proj", "eh_proj.weight", Layout((d, 2 * d), swapped=True)),
        Row("mtp.norm.weight", "shared_head.norm.weight", vector(d)),
    ]
    for row in rows:
        yield Place(row.ours, (), layer + row.theirs, row.layout)
    yield from _layer(cfg, "mtp.block", (), cfg.num_layers)


def _layer(cfg: ModelConfig | DenseConfig, stack: str, index: tuple[int, ...], number: int):
    """The places of one decoder layer."""
    d, layer = cfg.hidden_size, f"model.layers.{number}."
    rows = [
        Row("attention_norm.weight", "input_layernorm.weight", vector(d)),
        Row("feed_forward_norm.weight", "post_attention_layernorm.weight", vector(d)),
    ]
    dense = isinstance(cfg, DenseConfig) or number < cfg.first_k_dense
    attention = gqa_rows(cfg) if isinstance(cfg, DenseConfig) else mla_rows(d, cfg.mla)
    rows += under("attention.", "self_attn.", attention)
    mixing = swiglu_rows(d, cfg.intermediate_size) if dense else moe_rows(d, cfg.moe)
    rows += under("feed_forward.", "mlp.", mixing)
    for row in rows:
        yield Place(f"{stack}.{row.ours}", index, layer + row.theirs, row.layout)
    if dense:
        return
    expert = swiglu_rows(d, cfg.moe.moe_intermediate_size)
    for e in range(cfg.moe.n_routed_experts):
        for row in under("feed_forward.", f"mlp.experts.{e}.", expert):
            yield Place(f"{stack}.{row.ours}", (*index, e), layer + row.theirs, row.layout)
