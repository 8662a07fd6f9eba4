# SPDX-License-Identifier: Apache-2.0
"""A scalar head on a decoder: the critic of PPO, or a reward model."""

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.nn import param
from r1jax.nn.param import RouterBias
from r1jax.nn.transformer import Output


class Valued(nnx.Module):
    """A decoder and a linear head on its last hidden states, [D] → 1.

    The decoder may be a whole policy, whose trunk is then shared, or the `trunk_of` one.
    """

    def __init__(self, decoder: nnx.Module, *, std: float):
        """Args: the decoder; the deviation that the head is drawn with, 0 for values of 0."""
        self.decoder = decoder
        dim = decoder.cfg.hidden_size
        self.value_head = param.normal((dim,), (None,), std)
        self.value_bias = param.constant(0.0, (), ())

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
    ) -> Output:
        """The decoder's pass."""
        return self.decoder(tokens_BT, positions_BT, segments_BT)

    def values(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, D] → [B, T] float32."""
        value_BT = jnp.einsum(
            "btd,d->bt",
            hidden_BTD.astype(jnp.float32),
            self.value_head[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        return value_BT + self.value_bias[...]


def valued(decoder: nnx.Module, key: jax.Array, *, std: float) -> Valued:
    """The decoder, as it is, with a head that is drawn."""
    graphdef, params, rest = nnx.split(Valued(decoder, std=std), nnx.Param, ...)
    drawn = std * jax.random.normal(key, params["value_head"][...].shape, jnp.float32)
    params["value_head"] = params["value_head"].replace(drawn)
    return nnx.merge(graphdef, params, rest)


def trunk_of(decoder: nnx.Module) -> nnx.Module:
    """The decoder without its vocabulary head and its MTP module: what a critic of its own needs.

    Tied embeddings stay, being the input's.
    """
    graphdef, params, router = nnx.split(decoder, nnx.Param, RouterBias)
    trunk = nnx.merge(graphdef, params, router)
    for name in ("head", "mtp"):
        if name in vars(trunk):
            delattr(trunk, name)
    return trunk
