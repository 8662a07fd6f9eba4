# SPDX-License-Identifier: Apache-2.0
"""One decoder layer, and stacks of them under `jax.lax.scan`: in full, and a cached step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.nn.layers import RMSNorm
from r1jax.nn.stats import RouterStats
from r1jax.sharding import constrain

Entry = tuple[jax.Array, jax.Array]  # what an attention caches: (latent, key) or (key, value)


class Step(NamedTuple):
    """Where a cached step stands: masks over the prompt and the own cache, and the write index.

    Attributes:
        prompt_mask_BTS: [B, T, S] keys of the shared prompt cache that may be attended to.
        own_mask_BTS: [B, T, S'] keys of each row's own cache, this step's included.
        index: scalar int32, first slot of the own cache that this step writes.
    """

    prompt_mask_BTS: jax.Array
    own_mask_BTS: jax.Array
    index: jax.Array


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, dim: int, *, eps: float, attention: nnx.Module, feed_forward: nnx.Module):
        self.attention_norm = RMSNorm(dim, eps=eps)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(dim, eps=eps)
        self.feed_forward = feed_forward

    def __call__(
        self, x_BTD: jax.Array, rotation, mask_BTS: jax.Array, valid_BT: jax.Array
    ) -> tuple[jax.Array, tuple[Entry, RouterStats]]:
        with jax.named_scope("attention"):
            h_BTD = self.attention_norm(x_BTD)
            entry = self.attention.entry(h_BTD, rotation)
            part = self.attention.Part(*entry, mask_BTS)
            x_BTD = x_BTD + self.attention(h_BTD, rotation, part)
        x_BTD, stats = self._feed_forward(x_BTD, valid_BT)
        return x_BTD, (entry, stats)

    def cached(self, x_BTD: jax.Array, rotation, prompt: Entry, own: Entry, step: Step):
        """One step over the shared prompt cache and the row's own, which it extends.

        Args:
            x_BTD: [B, T, D], T new tokens a row.
            prompt: [P, S, ...] arrays, P dividing B.
            own: [B, S', ...] arrays.

        Returns:
            (x_BTD, own with the new entries at step.index).
        """
        with jax.named_scope("attention"):
            h_BTD = self.attention_norm(x_BTD)
            entry = self.attention.entry(h_BTD, rotation)
            own = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), step.index, axis=1)
                for old, new in zip(own, entry, strict=True)
            )
            parts = (
                self.attention.Part(*prompt, step.prompt_mask_BTS),
                self.attention.Part(*own, step.own_mask_BTS),
            )
            x_BTD = x_BTD + self.attention.cached(h_BTD, rotation, parts)
        every_BT = jnp.ones(x_BTD.shape[:2], bool)
        return self._feed_forward(x_BTD, every_BT)[0], own

    def _feed_forward(self, x_BTD: jax.Array, valid_BT: jax.Array):
        with jax.named_scope("feed_forward"):
            y_BTD, stats = self.feed_forward(self.feed_forward_norm(x_BTD), valid_BT)
        return constrain(x_BTD + y_BTD, "batch", "length", "embed"), stats


def run(layers: Block, x_BTD, rotation, mask_BTS, valid_BT, *, remat: bool):
    """A stack of layers in full: (x_BTD, (entries [L, B, T, ...], RouterStats [L, ...]))."""

    def body(x, layer):
        return layer(x, rotation, mask_BTS, valid_BT)

    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False) if remat else body, x_BTD, layers)


def run_cached(layers: Block, x_BTD, rotation, *, prompt: Entry, own: Entry, step: Step):
    """A stack of layers for one step; caches have a leading layer axis: (x_BTD, own)."""

    def body(x, xs):
        layer, prompt_layer, own_layer = xs
        return layer.cached(x, rotation, prompt_layer, own_layer, step)

    return jax.lax.scan(body, x_BTD, (layers, prompt, own))
