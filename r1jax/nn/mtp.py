# SPDX-License-Identifier: Apache-2.0
"""The multi-token-prediction module (DeepSeek-V3 section 2.2, eq. 21–25)."""

import jax.numpy as jnp
from flax import nnx

from r1jax.nn import param
from r1jax.nn.block import Block, Entry, Step
from r1jax.nn.layers import RMSNorm, project
from r1jax.ops.linear import FP8


class MTP(nnx.Module):
    """h'_i = W [RMSNorm(h_i) ; RMSNorm(Emb(t_{i+1}))], one block, its own norm; embedding and head
    are the main model's. It predicts t_{i+2}. h_i is the main model's output after its final norm.
    """

    def __init__(self, dim: int, *, eps: float, std: float, block: Block, fp8: FP8 | None = None):
        self.fp8 = fp8
        self.hidden_norm = RMSNorm(dim, eps=eps)
        self.embed_norm = RMSNorm(dim, eps=eps)
        self.proj = param.linear((2 * dim, dim), (None, "embed"), std)
        self.block = block
        self.norm = RMSNorm(dim, eps=eps)

    def cached(
        self,
        hidden_BTD,
        next_embed_BTD,
        rotation,
        own: Entry,
        step: Step,
        *,
        prompt: Entry | None = None,
    ):
        """The same for new positions over the module's own cache, and one shared by several rows
        where there is one: (hidden_BTD, own)."""
        x_BTD = self.joined(hidden_BTD, next_embed_BTD)
        x_BTD, own = self.block.cached(x_BTD, rotation, prompt, own, step)
        return self.norm(x_BTD), own

    def joined(self, hidden_BTD, next_embed_BTD):
        """What the block is given; `norm` of what it returns is what the shared head turns into
        P(t_{i+2})."""
        both = jnp.concatenate([self.hidden_norm(hidden_BTD), self.embed_norm(next_embed_BTD)], -1)
        return project("bte,ed->btd", both, self.proj, self.fp8)
