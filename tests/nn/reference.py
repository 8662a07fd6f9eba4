# SPDX-License-Identifier: Apache-2.0
"""The decoders written a second time, plainly: numpy, float64, one document, one token at a time.

Only parameters are taken from the module under test; the rest is DeepSeek-V3, sections 2.1 and 2.2.
"""

import jax
import numpy as np

from r1jax.ops.rope import inverse_frequencies, yarn_frequencies


def array(variable) -> np.ndarray:
    """A parameter in float64."""
    return np.asarray(variable[...], np.float64)


def layers_of(model):
    """The layers of all stacks, one module each."""
    for stack in model.stacks():
        n = stack.attention_norm.weight[...].shape[0]
        for i in range(n):
            yield jax.tree.map(lambda x, i=i: x[i], stack)


def rms(x, norm):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps) * array(norm.weight)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def silu(x):
    return x / (1 + np.exp(-x))


def turns(rope, dim, positions):
    """[T, dim / 2] unit complex numbers times YaRN's scale, which is 1 when both mscales agree."""
    if rope.factor == 1.0:
        inv = inverse_frequencies(dim, rope.theta)
    else:
        inv = yarn_frequencies(
            dim,
            rope.theta,
            factor=rope.factor,
            original_max_position=rope.original_max_position,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
        )
    return np.exp(1j * np.asarray(positions)[:, None] * inv)


def turn_pairs(x, turn):
    """Multiplies (x0 + i·x1), (x2 + i·x3), … by `turn`."""
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def turn_halves(x, turn):
    """Multiplies (x_i + i·x_{i + R/2}) by `turn`."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


def mla(a, x, positions, cfg):
    """Equations 1-11 with every key and value expanded."""
    m, rope = cfg.mla, cfg.rope
    turn = turns(rope, m.qk_rope_head_dim, positions)
    if m.q_lora_rank is None:
        q = np.einsum("td,dhk->thk", x, array(a.w_q))
    else:
        q = np.einsum("tq,qhk->thk", rms(x @ array(a.w_dq), a.q_norm), array(a.w_uq))
    c = rms(x @ array(a.w_dkv), a.kv_norm)
    k_rope = turn_pairs(x @ array(a.w_kr), turn)
    extended = 0.1 * rope.mscale_all_dim * np.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    scale = extended**2 / np.sqrt(m.qk_nope_head_dim + m.qk_rope_head_dim)
    y = np.zeros_like(x)
    for h in range(m.num_heads):
        keys = np.concatenate([c @ array(a.w_uk)[:, h], k_rope], 1)
        values = c @ array(a.w_uv)[:, h]
        q_rope = turn_pairs(q[:, h, m.qk_nope_head_dim :], turn)
        queries = np.concatenate([q[:, h, : m.qk_nope_head_dim], q_rope], 1)
        for t in range(len(x)):
            weights = softmax(keys[: t + 1] @ queries[t] * scale)
            y[t] += weights @ values[: t + 1] @ array(a.w_o)[h]
    return y


def gqa(a, x, positions, cfg):
    """Grouped-query attention, one head at a time."""
    turn = turns(cfg.rope, cfg.head_dim, positions)
    y = np.zeros_like(x)
    for h in range(cfg.num_heads):
        j = h // (cfg.num_heads // cfg.num_kv_heads)
        q, k, v = x @ array(a.w_q)[:, h], x @ array(a.w_k)[:, j], x @ array(a.w_v)[:, j]
        if cfg.qkv_bias:
            q, k, v = q + array(a.b_q)[h], k + array(a.b_k)[j], v + array(a.b_v)[j]
        q, k = turn_halves(q, turn), turn_halves(k, turn)
        for t in range(len(x)):
            weights = softmax(k[: t + 1] @ q[t] / np.sqrt(cfg.head_dim))
            y[t] += weights @ v[: t + 1] @ array(a.w_o)[h]
    return y


def swiglu(f, x):
    return (silu(x @ array(f.w_gate)) * (x @ array(f.w_up))) @ array(f.w_down)


def choose(affinity, bias, cfg):
    """The experts of one token: groups by the sum of their two best s + b, then experts."""
    choice = (affinity + bias).reshape(cfg.n_group, -1)
    kept = np.argsort(-np.sort(choice, 1)[:, -2:].sum(1), kind="stable")[: cfg.topk_group]
    allowed = [e for e in range(affinity.size) if e // choice.shape[1] in kept]
    return sorted(allowed, key=lambda e: -choice.reshape(-1)[e])[: cfg.num_experts_per_tok]


def moe(f, x, cfg):
    """Equations 12-16."""
    y = swiglu(f.shared, x) if cfg.n_shared_experts else np.zeros_like(x)
    gate, up, down = array(f.w_gate), array(f.w_up), array(f.w_down)
    for t in range(len(x)):
        affinity = 1 / (1 + np.exp(-(x[t] @ array(f.router.weight))))
        chosen = choose(affinity, array(f.router.bias), cfg)
        weights = affinity[chosen] / affinity[chosen].sum() * cfg.routed_scaling_factor
        for e, w in zip(chosen, weights, strict=True):
            y[t] += w * ((silu(x[t] @ gate[e]) * (x[t] @ up[e])) @ down[e])
    return y


def block(layer, x, positions, cfg, *, attention=mla):
    x = x + attention(layer.attention, rms(x, layer.attention_norm), positions, cfg)
    h = rms(x, layer.feed_forward_norm)
    routed = "router" in vars(layer.feed_forward)
    return x + (moe(layer.feed_forward, h, cfg.moe) if routed else swiglu(layer.feed_forward, h))


def hidden(model, tokens, positions=None, *, attention=mla):
    """[T, D] after the final norm, for one document."""
    positions = np.arange(len(tokens)) if positions is None else positions
    x = array(model.embed)[tokens]
    for layer in layers_of(model):
        x = block(layer, x, positions, model.cfg, attention=attention)
    return rms(x, model.norm)


def second_hidden(model, hidden_TD, next_tokens):
    """Equations 21-23: the MTP module, for one document."""
    mtp = model.mtp
    both = [rms(hidden_TD, mtp.hidden_norm), rms(array(model.embed)[next_tokens], mtp.embed_norm)]
    x = np.concatenate(both, 1) @ array(mtp.proj)
    return rms(block(mtp.block, x, np.arange(len(next_tokens)), model.cfg), mtp.norm)
