# SPDX-License-Identifier: Apache-2.0
"""Log-probability of the target and entropy of softmax(hidden · head / temperature)."""

import functools
import math
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Backend, Implementation, run
from pallas_kernels.softmax_xent import gpu, ref

Tile = tuple[int, int]


def softmax_xent(
    hidden_BTD: jax.Array,
    head_DN: jax.Array,
    targets_BT: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    tile: Tile | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """log P(target) and entropy of a linear head's softmax; no [T, N] array in value or gradient.

    s = hidden · head / τ; log P = s_target − log Σ exp(s); H = −Σ p log p, p = softmax(s). The
    vocabulary is gone through in tiles with a running log-sum-exp (Milakov and Gimelshein 2018,
    arXiv 1805.02867); the gradient makes each tile's logits again, and is
    g (δ − p) − h p (log p + H) for them, with g and h the gradients of log P and H. Products have
    float32 sums; the head is read, and slopes enter the two products of the gradient, in the
    hidden states' dtype.

    A logit of −inf has probability zero. A row with a logit of +inf or NaN, or with none that is
    finite, is NaN; so is log P of a target outside 0 … N − 1.

    Args:
        hidden_BTD: [..., T, D] bfloat16 or float32 final hidden states; T may be 0.
        head_DN: [D, N] output head, any float dtype.
        targets_BT: [..., T] integer token ids.
        temperature: scalar τ > 0, may be traced; it has a gradient.
        tile: tokens (over all leading axes) and columns of the vocabulary in memory at once; None
            chooses. "xla" cuts the axis T alone.
        implementation: as in `pallas_kernels.dispatch`.

    Returns:
        (logp_BT, entropy_BT): [..., T] float32, in nats; both have gradients, in reverse mode only.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        Unsupported: an implementation that was asked for and cannot.
    """
    _check(hidden_BTD, head_DN, targets_BT, tile)
    temperature = jnp.asarray(temperature, jnp.float32)
    if temperature.ndim:
        raise ValueError(f"temperature must be a scalar; got shape {temperature.shape}")
    if not targets_BT.size:
        return (jnp.zeros(targets_BT.shape, jnp.float32),) * 2
    arrays = hidden_BTD, head_DN, targets_BT.astype(jnp.int32), temperature
    return run(implementation, lambda backend: _xent(backend, tile, *arrays))


def _backend(name: str) -> ModuleType:
    """Pallas takes half a second to import, which runs on CPU need not wait for."""
    if name == "tpu":
        from pallas_kernels.softmax_xent import tpu

        return tpu
    return gpu if name == "gpu" else ref


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _xent(backend: Backend, tile: Tile | None, *arrays) -> tuple[jax.Array, jax.Array]:
    return _forward(backend, tile, *arrays)[0]


def _forward(backend, tile, *arrays):
    _, head_DN, targets_BT, _ = arrays
    with jax.named_scope("softmax_xent"):
        sums = _backend(backend.name).forward(*arrays, backend=backend, tile=tile)
    known_BT = (targets_BT >= 0) & (targets_BT < head_DN.shape[1])
    return (jnp.where(known_BT, sums.logp, math.nan), sums.entropy), (arrays, sums)


def _backward(backend, tile, kept, given):
    arrays, sums = kept
    hidden_BTD, _, _, temperature = arrays
    columns = ref.Given(*(x[..., None] for x in (sums.norm, sums.entropy, *given)))
    with jax.named_scope("softmax_xent_gradient"):
        d_hidden, d_head = _backend(backend.name).backward(
            *arrays, columns, backend=backend, tile=tile
        )
    # Logits are linear in the hidden states: Σ ∂s · s over the vocabulary is ∂hidden · hidden.
    d_temperature = -(d_hidden * hidden_BTD.astype(jnp.float32)).sum() / temperature
    return d_hidden.astype(hidden_BTD.dtype), d_head, None, d_temperature


_xent.defvjp(_forward, _backward)


def _check(hidden_BTD, head_DN, targets_BT, tile) -> None:
    if hidden_BTD.ndim < 2 or head_DN.ndim != 2:
        wrong = "hidden [..., T, D] and head [D, N] expected"
    elif hidden_BTD.shape[-1] != head_DN.shape[0]:
        wrong = "hidden [..., T, D] and head [D, N] must share D"
    elif hidden_BTD.shape[:-1] != targets_BT.shape:
        wrong = "hidden [..., T, D] and targets [..., T] must share T and what is before it"
    elif 0 in head_DN.shape:
        wrong = "head [D, N] must not be empty"
    elif not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (hidden_BTD, head_DN)):
        wrong = "hidden and head must be floating"
    elif not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        wrong = "targets must be integer"
    elif tile is not None and min(tile) < 1:
        wrong = f"{tile=} must be positive"
    else:
        return
    of = lambda x: f"{x.dtype}{list(x.shape)}"  # noqa: E731
    raise ValueError(
        f"{wrong}; got hidden {of(hidden_BTD)}, head {of(head_DN)}, targets {of(targets_BT)}"
    )
