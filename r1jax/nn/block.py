# SPDX-License-Identifier: Apache-2.0
"""One decoder layer, and stacks of them under `jax.lax.scan`: in full, and a cached step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from r1jax.config import DenseConfig, ModelConfig
from r1jax.nn.layers import RMSNorm
from r1jax.nn.stats import RouterStats
from r1jax.ops.alike import pieces
from r1jax.ops.attention import Causal
from r1jax.parallel.folding import all_positions
from r1jax.sharding import constrain, platform

Entry = tuple[jax.Array, jax.Array]  # what an attention caches: (latent, key) or (key, value)


class Step(NamedTuple):
    """Where a cached step stands: masks over the prompt and the own cache, and the write index.

    Attributes:
        prompt_mask_BTS: [B, T, S] keys of the shared prompt cache that may be attended to; None if
            there is no such cache.
        own_mask_BTS: [B, T, S'] keys of each row's own cache, this step's included.
        index: int32, first slot of the own cache that this step writes: a scalar, or [B].
        layer: scalar int32, the layer of the stack that is running.
    """

    prompt_mask_BTS: jax.Array | None
    own_mask_BTS: jax.Array
    index: jax.Array
    layer: jax.Array | int = 0


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, dim: int, *, eps: float, attention: nnx.Module, feed_forward: nnx.Module):
        self.attention_norm = RMSNorm(dim, eps=eps)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(dim, eps=eps)
        self.feed_forward = feed_forward

    def __call__(
        self, x_BTD: jax.Array, rotation, sight: jax.Array | Causal, valid_BT: jax.Array
    ) -> tuple[jax.Array, tuple[Entry, RouterStats]]:
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        with jax.named_scope("attention"):
            h_BTD = self.attention_norm(x_BTD)
            entry = checkpoint_name(self.attention.entry(h_BTD, rotation), "entry")
            part = self.attention.Part(*map(all_positions, entry), sight)
            added_BTD = self.attention(h_BTD, rotation, part)
            x_BTD = x_BTD + checkpoint_name(added_BTD, "attention_out")
        x_BTD, stats = self._feed_forward(x_BTD, valid_BT)
        return x_BTD, (entry, stats)

    def cached(self, x_BTD: jax.Array, rotation, prompt: Entry | None, own: Entry, step: Step):
        """One step over the shared prompt cache and the rows' own, which it extends in place.

        Args:
            x_BTD: [B, T, D], T new tokens a row.
            prompt: [P, S, ...] arrays, P dividing B, or None.
            own: [L, B, S', ...] arrays of the whole stack, of which this is layer `step.layer`.

        Returns:
            (x_BTD, own with the new entries at step.index).
        """
        with jax.named_scope("attention"):
            h_BTD = self.attention_norm(x_BTD)
            entry = self.attention.entry(h_BTD, rotation)
            own = tuple(
                _written(old, new, step.layer, step.index)
                for old, new in zip(own, entry, strict=True)
            )
            mine = (jax.lax.dynamic_index_in_dim(x, step.layer, keepdims=False) for x in own)
            parts = (self.attention.Part(*mine, step.own_mask_BTS),)
            if prompt is not None:
                parts = (self.attention.Part(*prompt, step.prompt_mask_BTS), *parts)
            x_BTD = x_BTD + self.attention.cached(h_BTD, rotation, parts)
        every_BT = jnp.ones(x_BTD.shape[:2], bool)
        return self._feed_forward(x_BTD, every_BT)[0], own

    def _feed_forward(self, x_BTD: jax.Array, valid_BT: jax.Array):
        with jax.named_scope("feed_forward"):
            y_BTD, stats = self.feed_forward(self.feed_forward_norm(x_BTD), valid_BT)
        return constrain(x_BTD + y_BTD, "batch", "length", "embed"), stats


def run(layers: Block, x_BTD, rotation, sight, valid_BT, *, cfg: ModelConfig | DenseConfig):
    """A stack of layers in full: (x_BTD, (entries [L, B, T, ...], RouterStats [L, ...])).

    Rows that are cut over devices lie folded.
    """

    def body(x, layer):
        return layer(x, rotation, sight, valid_BT)

    few = jax.tree.leaves(layers)[0].shape[0] <= cfg.scan_unroll
    # Outside of a loop bfloat16 is rounded elsewhere with a gradient than without one.
    if cfg.remat or not few or cfg.dtype != "float32" or platform() != "cpu":
        return jax.lax.scan(remade(body, cfg), x_BTD, layers, unroll=cfg.scan_unroll)
    made, body = [], jax.jit(body)  # traced once
    for layer in pieces(layers):
        # The first layer's input is no embedding to XLA, but an array as any layer's.
        x_BTD, out = body(jax.lax.optimization_barrier(x_BTD), layer)
        made.append(out)
    return x_BTD, jax.tree.map(lambda *xs: jnp.stack(xs), *made)


def remade(layer: Callable, cfg: ModelConfig | DenseConfig) -> Callable:
    """`layer`, computed again for its gradient if the config says so. For bodies of scans."""
    return jax.checkpoint(layer, prevent_cse=False, policy=_kept(cfg)) if cfg.remat else layer


def _kept(cfg: ModelConfig | DenseConfig):
    """The policy of what is not computed again."""
    if not cfg.remat_offloaded:
        return jax.checkpoint_policies.save_only_these_names(*cfg.remat_saved)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(cfg.remat_saved),
        names_which_can_be_offloaded=list(cfg.remat_offloaded),
        offload_src="device",
        offload_dst="pinned_host",
    )


def run_cached(
    layers: Block | tuple[Block, ...],
    x_BTD,
    rotation,
    *,
    prompt: Entry | tuple[Entry, ...] | None,
    own: Entry | tuple[Entry, ...],
    step: Step,
):
    """A stack of layers for one step; caches have a leading layer axis: (x_BTD, own).

    The own cache is carried, not stacked anew: a step writes its entries and copies nothing else.
    Layers that lie each by itself run one after another, without a scan; their caches lie so too,
    as stacks of one layer each.
    """
    if isinstance(layers, tuple):
        made = []
        for i, (layer, mine) in enumerate(zip(layers, own, strict=True)):
            shared = None if prompt is None else tuple(x[0] for x in prompt[i])
            x_BTD, mine = layer.cached(x_BTD, rotation, shared, mine, step)
            made.append(mine)
        return x_BTD, tuple(made)

    def body(carry, xs):
        layer, prompt_layer, index = xs
        x, own = carry
        return layer.cached(x, rotation, prompt_layer, own, step._replace(layer=index)), None

    index_L = jnp.arange(own[0].shape[0])
    return jax.lax.scan(body, (x_BTD, own), (layers, prompt, index_L))[0]


def _written(cache_LBS: jax.Array, new_BT: jax.Array, layer, index) -> jax.Array:
    """The cache [L, B, S, ...] with the entries [B, T, ...] of a layer from slot `index` on.

    Rows that stand at the same slot are one slice; rows at slots of their own are scattered: row by
    row, but on GPUs, where each row would be a kernel of its own, at once.
    """
    new_BT = new_BT.astype(cache_LBS.dtype)
    layer, none = jnp.asarray(layer, jnp.int32), np.int32(0)  # one dtype, whatever JAX's default
    rest = (none,) * (cache_LBS.ndim - 3)
    if jnp.ndim(index) == 0:
        return jax.lax.dynamic_update_slice(cache_LBS, new_BT[None], (layer, none, index, *rest))
    if platform() == "gpu":
        rows, new = new_BT.shape[:2]
        first_B = jnp.clip(index, 0, cache_LBS.shape[2] - new)  # as slices are clipped
        slot_BT = first_B[:, None] + jnp.arange(new)
        at = (layer, jnp.arange(rows)[:, None], slot_BT)
        return cache_LBS.at[at].set(new_BT, unique_indices=True, mode="promise_in_bounds")

    def row(b, cache):
        one = jax.lax.dynamic_index_in_dim(new_BT, b, keepdims=True)
        at = (layer, jnp.asarray(b, jnp.int32), index[b], *rest)
        return jax.lax.dynamic_update_slice(cache, one[None], at)

    return jax.lax.fori_loop(0, index.shape[0], row, cache_LBS)
